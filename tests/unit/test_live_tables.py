"""Tables derived from the studies of live runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pandas as pd
import pytest

from lambdascale.core import UserError
from lambdascale.experiments.live_tables import execute_while_load, sim_vs_live


def measured(backend: str, seed: int, value: float, *, nodes: int = 12, executor: str | None = None) -> dict[str, object]:
    measures = dict.fromkeys(("ttft_p50_s", "ttft_p90_s", "scale_out_s", "gpu_seconds"), value)
    return {"nodes": nodes, "executor": executor, "model": "m", "system": "s", "backend": backend, "seed": seed, **measures}


def test_errors_are_computed_per_seed() -> None:
    """The median of the errors, not the error of the medians."""
    rows = [measured("sim", seed, value) for seed, value in ((1, 1.0), (2, 2.0), (3, 9.0))]
    rows += [measured("live-timed", seed, value, executor="timed") for seed, value in ((3, 10.0), (2, 1.0), (1, 4.0))]
    rows += [measured("sim", 1, 3.0, nodes=4), measured("live", 1, 4.0, nodes=4, executor="torch")]
    table = sim_vs_live(pd.DataFrame(rows))
    assert list(table.case.unique()) == ["12 nodes, timed", "4 nodes, real"]
    assert set(table.backend) == {"sim and live-timed", "sim and live"}
    timed, real = (table[(table.case == case) & (table.measure == "ttft_p50_s")].iloc[0] for case in table.case.unique())
    assert (timed.simulated, timed.live, timed.error_percent) == (2.0, 4.0, pytest.approx(-10.0))
    assert (real.simulated, real.live, real.error_percent) == (3.0, 4.0, pytest.approx(-25.0))


def test_a_live_run_without_a_simulated_one_is_an_error() -> None:
    rows = [measured("sim", 1, 1.0), measured("live-timed", 2, 1.0, executor="timed")]
    with pytest.raises(UserError, match="s on 12 nodes: no simulated run with seed 2"):
        sim_vs_live(pd.DataFrame(rows))


def bursts(seeds: Sequence[int], served_s: dict[str, Callable[[int], float]]) -> pd.DataFrame:
    """Rows of live_while_load with two sources; ``served_s``: by pipelines and switch, the last first token of each seed."""
    return pd.DataFrame(
        {"sources": 2, "pipelines": f"lambdascale.pipelines.{kind.partition(' ')[0]}", "switch": kind.partition(" ")[2] or None}
        | {"backend": backend, "seed": seed, "ttft_p50_s": seed, "ttft_p90_s": seed + 1, "ttft_max_s": last(seed)}
        | {"pipeline_first_tokens": 5 * (kind[0] == "C")}
        for backend in ("sim", "live-paced")
        for kind, last in served_s.items()
        for seed in seeds
    )


def test_bursts_with_pipelines_stand_beside_those_without() -> None:
    kinds = ("NoPipelines", "ComplementaryPipelines", "ComplementaryPipelines all")
    table = execute_while_load(bursts((1, 2, 30), dict.fromkeys(kinds, lambda seed: seed + 2)))
    assert list(table.columns) == list(pd.read_csv("results/tables/execute_while_load.csv", nrows=0).columns)
    ways = ("while loading", "while loading, nodes leave together", "after loading")
    assert list(zip(table.backend, table.executes, strict=True)) == [(b, way) for b in ("live-paced", "sim") for way in ways]
    expected = {
        **{"sources": 2, "executes": "while loading", "ttft_p50_s": 2.0, "ttft_p90_s": 3.0, "all_served_s": 4.0},
        **{"first_tokens_of_pipelines": 5.0, "ratio": 1.0, "low": 1.0, "high": 1.0, "runs": 3, "backend": "live-paced"},
    }
    assert table.iloc[0].to_dict() == expected
    assert table.iloc[2][["ratio", "low", "high"]].isna().all()


def test_ratios_are_of_pairs_with_the_same_seed() -> None:
    """The median of the ratios, with an interval from five pairs on; seeds without a partner do not count."""
    rows = bursts(range(1, 6), {"NoPipelines": lambda seed: 3.0 * seed, "ComplementaryPipelines": lambda seed: 1.0 * seed})
    alone = rows.iloc[-1:].assign(seed=99, ttft_max_s=1000.0)
    first = execute_while_load(pd.concat([rows, alone], ignore_index=True)).iloc[0]
    assert (first.ratio, first.low, first.high, first.runs) == (pytest.approx(3.0), pytest.approx(3.0), pytest.approx(3.0), 6)
    few = bursts((1, 2), {"NoPipelines": lambda seed: 2.0 + seed, "ComplementaryPipelines": lambda seed: 1.0})
    times = execute_while_load(few).iloc[0]
    assert times.ratio == pytest.approx(3.5)
    assert math.isnan(times.low)
    assert math.isnan(times.high)
