"""scripts/gpu_host.py: what it packs and sends on machines of four and of eight GPUs, and its rows."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from lambdascale.calibration.multicast_runs import Timed
from lambdascale.checkpoints import PackedModel
from lambdascale.cli.multicast import Setting
from tests.unit.scripts_loaded import loaded


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return loaded("gpu_host")


def test_only_eight_gpus_are_two_nodes_of_four(script: ModuleType) -> None:
    assert [str(job) for job in script.jobs(["7B", "70B"], [8, 16], 8)] == [
        "7B in 16 blocks",
        "7B in 16 blocks, not verified",
        "70B in 16 blocks",
        "70B in 16 blocks, in quarters",
        "7B in 8 blocks",
    ]
    assert not any(job.quarters for job in script.jobs(["7B", "70B"], [8, 16], 4))


def test_groups_fit_and_each_source_has_a_destination(script: ModuleType) -> None:
    assert script.sizes([2, 4, 8], [1, 2, 4], 8) == [(1, 7), (2, 6), (4, 4), (1, 3), (2, 2), (1, 1)]
    assert script.sizes([2, 4, 8], [1, 2, 4], 4) == [(1, 3), (2, 2), (1, 1)]


def test_quarters_go_from_node_to_node(script: ModuleType) -> None:
    job = script.Job("70B", 4, (("lambdascale",),), quarters=True)
    ((_, trial),) = script.trials(job, ("lambdascale",), list("abcd"), Setting("lambdascale", 8, "shm", "cpu"), [], 2)
    assert trial.sources == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
    assert trial.destinations == [(4, "a"), (5, "b"), (6, "c"), (7, "d")]


def test_own_copies_need_no_sources(script: ModuleType) -> None:
    job = script.Job("7B", 4, (("own copies",),))
    found = script.trials(job, ("own copies",), ["m"], Setting("lambdascale", 4, "shm", "cpu"), [(1, 3), (2, 2), (1, 1)], 2)
    assert [len(trial.destinations) for _, trial in found] == [3, 1]
    assert all(trial.own_copies for _, trial in found)


def test_a_row_leaves_the_first_multicast_and_the_set_up_out(script: ModuleType) -> None:
    job = script.Job("7B", 2, (("nccl_broadcast",),))
    setting = Setting("nccl_broadcast", 4, "shm", "cpu")
    ((name, trial),) = script.trials(job, ("nccl_broadcast",), ["m"], setting, [(1, 3)], 3)
    model: Any = SimpleNamespace(block_bytes=(10, 20))
    found = script.row(job, name, trial, Timed([9.0, 3.0, 5.0], [8.0, 1.0, 1.0]), cast("PackedModel", model), 10.0)
    assert (found["first_s"], found["later_s"], found["set_up_s"], found["without_set_up_s"]) == (9.0, 4.0, 1.0, 3.0)
    assert (found["plan_s"], found["of_plan"]) == (3.0, pytest.approx(4 / 3))
    assert found["gb_per_s"] == pytest.approx(3 * 30 / 4e9)
