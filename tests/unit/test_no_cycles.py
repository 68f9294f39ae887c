"""Objects that a simulation drops: freed at once, and not left to the garbage collector."""

from __future__ import annotations

import gc

import pytest

from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.experiments.runner import drive_experiment
from lambdascale.metrics import Recorder


def left_in_cycles(system: str, duration_s: int) -> int:
    """Objects in cycles after a run of replicas that come and go for so long."""
    workload = ["workload=bursty", f"workload.duration_s={duration_s}"]
    experiment = build(compose(["model=llama2_7b", f"system={system}", *workload]))
    requests = experiment.workload.load(models=[model.name for model in experiment.models], seed=1).requests
    gc.collect()
    gc.disable()
    try:
        drive_experiment(experiment, requests, 1, Recorder())
        return gc.collect()
    finally:
        gc.enable()


@pytest.mark.parametrize("system", ["lambdascale", "faasnet", "nccl_broadcast", "serverlessllm", "ideal"])
def test_a_longer_run_leaves_no_more_in_cycles(system: str) -> None:
    """The cluster itself is left, at the end, and nothing that happened in the run."""
    left_in_cycles(system, 10)
    assert left_in_cycles(system, 600) < left_in_cycles(system, 60) + 120


def test_a_run_leaves_the_collector_as_it_was() -> None:
    before = gc.get_threshold()
    left_in_cycles("ideal", 10)
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)
