"""Simulated nodes that share a machine's cores: who computes at once is slower for it, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest

from lambdascale.core import ComputeSpec, UserError
from lambdascale.experiments.compose import compose
from lambdascale.experiments.runner import run
from lambdascale.sim.sharing import SharedCores


def quiet() -> None:
    """Ignore the call."""


def test_the_pace_follows_how_many_compute() -> None:
    cores = SharedCores((1.0, 1.5, 2.0))
    (one, alone), (two, both), (three, all_three) = (cores.enter(quiet) for _ in range(3))
    assert (alone, both, all_three) == (1.0, 1.5, 2.0)
    assert cores.enter(quiet)[1] == pytest.approx(2.0 * 4 / 3)  # beyond what was measured: in proportion
    for ticket in (one, two, three, three):
        cores.leave(ticket)
    assert cores.enter(quiet)[1] == 1.5


def test_those_who_compute_hear_of_others() -> None:
    heard: list[str] = []
    cores = SharedCores((1.0, 2.0))
    first, _ = cores.enter(lambda: heard.append("first"))
    second, _ = cores.enter(lambda: heard.append("second"))
    assert heard == ["first"]
    cores.leave(first)
    assert heard == ["first", "second"]
    cores.leave(second)
    assert heard == ["first", "second"]


@pytest.mark.parametrize("slowdown", [(0.5,), (1.0, 2.0, 1.5)])
def test_slowdowns_that_cannot_be(slowdown: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="shared_slowdown"):
        ComputeSpec(flops_efficiency=1.0, bandwidth_efficiency=1.0, shared_slowdown=slowdown)


@pytest.mark.parametrize("system", ["lambdascale", "serverlessllm", "nccl_broadcast"])
def test_a_run_on_shared_cores(system: str, tmp_path: Path) -> None:
    """One replica alone is as fast as ever; a burst over several is slower, and a factor of one changes nothing."""

    def finished_s(slowdown: str, *more: str) -> float:
        overrides = [
            f"system={system}",
            "workload=burst",
            "cluster=desk",
            "model=smollm2",
            f"++cluster.compute.shared_slowdown={slowdown}",
        ]
        result = run(compose([*overrides, f"results={tmp_path}", f"name=shared{slowdown.count(',')}{len(more)}", *more]))
        assert result.summary["requests"]["completed"] == result.summary["requests"]["submitted"]
        return float(result.summary["ttft_s"]["mean"] + result.summary["tpot_s"]["mean"])

    assert finished_s(f"[{','.join(['1.0'] * 16)}]") == pytest.approx(finished_s("[]"), rel=1e-6)
    assert finished_s("[1.0,2.0,3.0,4.0]") > 1.05 * finished_s("[]")
    alone = "cluster.nodes=1"
    assert finished_s("[1.0,2.0]", alone) == pytest.approx(finished_s("[]", alone), rel=1e-6)
