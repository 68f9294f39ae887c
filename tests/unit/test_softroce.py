"""Errors of scripts/softroce on machines where the virtual machine does not start."""

from __future__ import annotations

from pathlib import Path

import pytest

from lambdascale.core import UserError
from lambdascale.testing.softroce import __main__ as command
from lambdascale.testing.softroce import packages
from lambdascale.testing.softroce.kernel import cache_folder


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "missing", lambda: ["qemu-system-x86", "perftest"])
    monkeypatch.setattr(packages.os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match=r"lacks qemu-system-x86, perftest: .*apt-get install") as error:
        packages.ensure_packages()
    assert "\n" not in str(error.value)


def test_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.platform, "machine", lambda: "aarch64")
    with pytest.raises(UserError, match="aarch64"):
        packages.ensure_packages()


def test_another_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The distribution's pyverbs is compiled for the distribution's Python."""
    monkeypatch.setattr(packages, "missing", list)
    monkeypatch.setattr(packages, "PYVERBS", tmp_path)
    with pytest.raises(UserError, match="cpython-3"):
        packages.ensure_packages()


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert capsys.readouterr().err == "error: no command given: scripts/softroce COMMAND ...\n"


def test_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lambdascale" / "softroce"
