"""Mistakes on the command line of ``lambdascale serve``: one line, status 2, and no node process is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lambdascale.cli import serve as command
from lambdascale.cli.main import main
from lambdascale.live.serving import server

COMMAND = str(Path(sys.executable).with_name("lambdascale"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "/nowhere"], "/nowhere"),
        (["--model", "tiny", "--nodes", "0"], "--nodes"),
        (["--model", "tiny", "--min-nodes", "9"], "--min-nodes"),
        (["--model", "tiny", "--link", "fast"], "fast"),
        (["--model", "tiny", "--blocks", "8", "--transport", "rdma"], "rdma"),
        (["--model", "tiny", "--blocks", "8", "--transport", "rdma", "--rdma-mtu", "1500"], "rdma.mtu"),
        (["--model", "tiny", "--blocks", "8", "--transport", "cuda_ipc"], "device cuda, not cpu"),
        pytest.param(
            ["--model", "tiny", "--blocks", "8", "--transport", "cuda_ipc", "--device", "cuda"],
            "finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one"),
        ),
        (["--model", "tiny", "--blocks", "99"], "blocks"),
        (["--model", "tiny", "--blocks", "8", "--rdma-port", "1"], "--rdma-port needs --transport rdma, not shm"),
        (["--model", "tiny", "--port", "99999"], "99999"),
        (["--model", "tiny", "--queue-requests", "0"], "--queue-requests"),
        (["--model", "tiny", "--api-key", "@/nowhere"], "@/nowhere"),
        (["--model", "tiny", "--tls-cert", "/nowhere", "--tls-key", "/nowhere"], "/nowhere"),
        (["--model", "tiny", "--blocks", "8", "--system", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--model", "tiny", "--restarts", "-1"], "--restarts"),
        (["--model", "tiny", "--blocks", "8", "--slot-tokens", "99999"], "99999"),
        (["--model", "tiny", "--blocks", "8", "system.bloks=3"], "bloks"),
    ],
)
def test_mistakes(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMBDASCALE_CACHE", str(tmp_path))
    try:
        status = main(["serve", "--no-view", "--port", "0", *options])
    except SystemExit as error:
        status = int(error.code or 0)
    assert status == 2
    errors = capsys.readouterr().err
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, errors
    assert says in lines[0]
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--api-key", "secret"], False),
        (["--host", "127.0.0.1"], False),
    ],
    ids=["all addresses", "a key", "loopback"],
)
def test_a_server_open_to_strangers_says_so(
    options: list[str], warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMBDASCALE_CACHE", str(tmp_path))
    monkeypatch.setattr(command, "prepare", lambda: None)
    monkeypatch.setattr(server, "Service", lambda **given: None)
    monkeypatch.setattr(server, "serve", lambda *given, **named: 0)
    assert main(["serve", "--no-view", "--port", "0", "--model", "tiny", "--blocks", "8", *options]) == 0
    errors = " ".join(capsys.readouterr().err.split())
    assert ("warning: anybody who can reach 0.0.0.0 may use this server" in errors) == warned


def test_a_mistake_of_the_command_itself() -> None:
    """The command is run as a user runs it, with nothing imported before."""
    done = subprocess.run([COMMAND, "serve", "--model", "/nowhere"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: /nowhere")
