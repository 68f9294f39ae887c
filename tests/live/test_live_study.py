"""The tables of live runs, at a small scale."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from lambdascale.checkpoints.synthetic import smollm2_file
from lambdascale.core import UserError
from lambdascale.experiments.live_study import MEASURES, Case, execute_while_load, scale_out_durations, sim_vs_live


def test_durations_of_scale_outs() -> None:
    """From the command to the last block; what a run starts with does not count, nor what never arrived."""
    rows = [
        ("LoadBlocks", 0.0, 1, '{"tier":"instant"}'),
        ("BlockArrived", 0.0, 1, None),
        ("StartMulticast", 2.0, 2, '{"sources":[0]}'),
        ("LoadBlocks", 2.5, 3, '{"tier":"host"}'),
        ("BlockArrived", 3.0, 2, None),
        ("BlockArrived", 5.0, 2, None),
        ("LoadBlocks", 5.5, 4, '{"tier":"ssd"}'),
        ("BlockArrived", 6.0, 3, None),
    ]
    events = pd.DataFrame(rows, columns=["kind", "at_s", "transfer_id", "detail"])
    assert scale_out_durations(events) == [3.0, 3.5]


def test_execute_while_load_of_the_simulator(tmp_path: Path) -> None:
    """More sources, earlier pipelines; without pipelines nothing is served by one."""
    table = execute_while_load(str(tmp_path), seeds=(1,), backend="sim").set_index(["sources", "executes"])
    assert (table.first_tokens_of_pipelines.xs("after loading", level="executes") == 0).all()
    early, late = (table.all_served_s.xs(kind, level="executes") for kind in ("while loading", "after loading"))
    assert (early < late).all()


@pytest.mark.live
def test_a_simulation_beside_its_live_run(tmp_path: Path) -> None:
    try:
        smollm2_file()
    except UserError as error:
        pytest.skip(str(error))
    trace = ["workload=burst", "workload.count=6", "workload.prompt_tokens=8", "workload.output_tokens=4"]
    cases = (Case("2 nodes, timed", 2, "timed"),)
    table = sim_vs_live("desk", str(tmp_path), seeds=(1,), cases=cases, systems=("lambdascale",), trace=trace)
    assert list(table.measure) == list(MEASURES)
    assert set(table.backend) == {"sim and live-timed"}
    assert (table.live > 0).all()
    errors = 100 * (table.simulated / table.live - 1)
    pd.testing.assert_series_equal(table.error_percent, errors, check_names=False)
