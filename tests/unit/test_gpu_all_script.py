"""scripts/gpu_all.py: the time that parts get, and what becomes of parts without time or with a failure."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from lambdascale.core import UserError
from tests.unit.scripts_loaded import SCRIPTS, loaded


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return loaded("gpu_all")


def test_parts_share_the_time_but_for_the_comparisons(script: ModuleType) -> None:
    a, b, errors = script.Part("a", 3, ()), script.Part("b", 1, ()), script.Part("errors", None, ())
    assert script.allowed_s(460.0, a, [b, errors]) == 300.0
    assert script.allowed_s(460.0, a, [b]) == 345.0
    assert script.allowed_s(200.0, b, [errors]) == 140.0, "what others have left goes to the last"
    assert script.allowed_s(20.0, b, [errors]) == 0.0
    assert script.allowed_s(20.0, errors, []) == 20.0


class Clock:
    """Time in which each command takes as long as it may."""

    def __init__(self, fails: str = "") -> None:
        self.at, self.began, self._fails = 0.0, list[str](), fails

    def monotonic(self) -> float:
        return self.at

    def run(self, command: list[str], *, check: bool) -> SimpleNamespace:
        assert not check
        self.began.append(" ".join(command[2:]))
        self.at += float(command[-1]) if "--limit-s" in command else 5.0
        return SimpleNamespace(returncode=int(command[2] == self._fails))


def carried_out(script: ModuleType, monkeypatch: pytest.MonkeyPatch, clock: Clock, limit_s: float) -> Any:
    monkeypatch.setattr(script.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(script.subprocess, "run", clock.run)
    parts = [
        script.Part("a", 1, (("x.py", "a"),)),
        script.Part("b", 1, (("x.py", "b1"), ("x.py", "b2"))),
        script.Part("errors", None, (("x.py", "e"),)),
    ]
    return script.carry_out(parts, limit_s)


def test_commands_of_a_part_share_its_time(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    assert carried_out(script, monkeypatch, clock, 260.0) == ([], [])
    assert clock.began == ["a --limit-s 100", "b1 --limit-s 50", "b2 --limit-s 50", "e"]


def test_what_has_no_time_is_named_and_comparisons_are_made(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    left_out, failed = carried_out(script, monkeypatch, clock, 150.0)
    assert (left_out, failed) == (["b: x.py b1"], [])
    assert clock.began == ["a --limit-s 45", "b2 --limit-s 45", "e"], "its time is the next one's"


def test_a_failure_ends_nothing_else(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(fails="b1")
    assert carried_out(script, monkeypatch, clock, 260.0) == ([], ["b: x.py b1"])
    assert clock.began[-2:] == ["b2 --limit-s 50", "e"]


def test_every_option_is_known_to_its_script(script: ModuleType, tmp_path: Path) -> None:
    places: Any = {"out": tmp_path / "tables", "memory": tmp_path, "traces": tmp_path}
    arguments = argparse.Namespace(models="7B,small", profile="h200", device="cuda", transport="cuda_ipc", **places)
    every = script.parts(arguments, 8)
    assert [part.name for part in every] == ["multicasts", "bursts", "traces", "blocks", "large", "errors"]
    for command in (command for part in every for command in part.commands):
        source = (SCRIPTS / command[0]).read_text()
        limit = [] if command in every[-1].commands else ["--limit-s"]
        for option in [*(word for word in command[1:] if word.startswith("--")), *limit]:
            assert f'"{option}"' in source, (command[0], option)
    assert [command[-1] for command in every[1].commands] == [str(tmp_path / "7B"), "small"]


def test_packed_models_are_named_by_their_shapes(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "7B-16").mkdir()
    monkeypatch.setattr(
        script, "packed", lambda models, memory, blocks: {model: memory / f"{model}-{blocks}" for model in models}
    )
    for _ in range(2):  # a second call finds the first one's
        script.name_models(["7B", "small"], tmp_path)
    assert (tmp_path / "7B").resolve() == tmp_path / "7B-16"
    (tmp_path / "7B").unlink()
    (tmp_path / "7B").mkdir()
    with pytest.raises(UserError, match="7B exists: choose another folder"):
        script.name_models(["7B"], tmp_path)


def test_multicasts_of_a_host_beside_the_profile(tmp_path: Path) -> None:
    """One round for each block of the plan, at the profile's rates; set-up of a communicator is not a part of it.

    A broadcast in which NCCL makes its connections is not compared.
    """
    errors = loaded("gpu_sim_errors")
    cluster, spec = errors.specs("h200", "7B")
    nic, pcie = (float(rate) for rate in (cluster.nic_bytes_per_s, cluster.pcie_bytes_per_s))
    rows = [
        ("7B", "lambdascale", 1, 7, 2, 1.0, None),
        ("7B", "nccl_broadcast", 1, 7, 16, 2.0, 0.5),
        ("7B", "own copies", 1, 1, 16, 1.0, None),
        ("70B", "lambdascale", 1, 1, 16, 1.0, None),
    ]
    columns = ["model", "system", "sources", "destinations", "blocks", "later_s", "without_set_up_s"]
    rows.append(("7B", "nccl_broadcast", 1, 7, 16, 2.0, 1.5))
    table = pd.DataFrame(rows, columns=columns).assign(measured_on="8 x NVIDIA H200", verify="full")
    table.loc[1, "measured_on"] = "8 x NVIDIA H200; NCCL_RUNTIME_CONNECT=0"
    table.to_csv(tmp_path / "gpu_host.csv")
    binomial, nccl, own = errors.host_multicasts("h200", tmp_path, "H200")
    largest = max(block.size_bytes for block in spec.partition(2))
    rounds_s = 4 * (largest / nic + cluster.link_latency_s)
    assert binomial["simulated_s"] == pytest.approx(rounds_s), "two blocks to seven nodes: 2 + log2(8) - 1 rounds"
    assert nccl["simulated_s"] == pytest.approx(spec.size_bytes / nic / cluster.collective_efficiency, rel=0.1)
    assert nccl["measured_s"] == 0.5
    assert own["simulated_s"] == pytest.approx(spec.size_bytes / pcie)
    assert binomial["what"] == "lambdascale, 1 to 7, 2 blocks"
