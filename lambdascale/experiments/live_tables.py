"""Tables that compare live runs, derived from the tables of their studies. Frames in, frames out; times in seconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from lambdascale.core import UserError
from lambdascale.metrics.intervals import over_draws

# Serving in pipelines that each node leaves when it holds the model, or that last until all their nodes do; without pipelines.
_WHILE, _TOGETHER, _AFTER = "while loading", "while loading, nodes leave together", "after loading"
_EXECUTES = (_WHILE, _TOGETHER, _AFTER)


def sim_vs_live(rows: pd.DataFrame) -> pd.DataFrame:
    """Simulated and live measures of each cluster and system, from rows of experiment live_fidelity.

    Medians over seeds; the simulator's error in per cent is computed per seed. Rows name both backends. UserError if a live run
    has no simulated one.
    """
    found = []
    live = rows[rows.backend != "sim"]
    for (nodes, executor, system), runs in live.groupby(["nodes", "executor", "system"], sort=False):
        backend = runs.backend.iloc[0]
        runs = runs.set_index("seed")
        simulated = rows[(rows.backend == "sim") & (rows.nodes == nodes) & (rows.system == system)].set_index("seed")
        if missing := sorted(set(runs.index) - set(simulated.index)):
            raise UserError(f"{system} on {nodes} nodes: no simulated run with seed {missing[0]}")
        for measure in ("ttft_p50_s", "ttft_p90_s", "scale_out_s", "gpu_seconds"):
            error = 100 * (simulated[measure].reindex(runs.index) / runs[measure] - 1)
            found.append(
                {
                    "case": f"{nodes} nodes, {'real' if executor == 'torch' else executor}",
                    "system": system,
                    "measure": measure,
                    "simulated": simulated[measure].median(),
                    "live": runs[measure].median(),
                    "error_percent": error.median(),
                    "backend": f"sim and {backend}",
                }
            )
    return pd.DataFrame(found)


def execute_while_load(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians over seeds by number of sources and by what serves meanwhile, from rows of experiment live_while_load.

    ``ratio``, with its interval of 95 % from ``low`` to ``high`` (none from too few pairs): how many times as long serving after
    loading takes until all are served, seed by seed.
    """
    names = {"ttft_max_s": "all_served_s", "pipeline_first_tokens": "first_tokens_of_pipelines"}
    rows = rows.assign(executes=[_executes(*each) for each in zip(rows.pipelines, rows.switch, strict=True)]).rename(
        columns=names
    )
    found: list[dict[str, Any]] = []
    for (backend, sources), runs in rows.groupby(["backend", "sources"]):
        last = runs.pivot_table(index="seed", columns="executes", values="all_served_s")
        for executes in [each for each in _EXECUTES if each in last]:
            own = runs[runs.executes == executes]
            medians = own[["ttft_p50_s", "ttft_p90_s", "all_served_s", "first_tokens_of_pipelines"]].median()
            interval = {"ratio": math.nan, "low": math.nan, "high": math.nan}
            if executes != _AFTER and _AFTER in last:
                ratios = (last[_AFTER] / last[executes]).dropna()
                times = over_draws(ratios.tolist()) if len(ratios) else None
                interval = interval if times is None else {"ratio": times.value, "low": times.low, "high": times.high}
            found.append({"sources": sources, "executes": executes, **medians, **interval, "runs": len(own), "backend": backend})
    return pd.DataFrame(found)


def _executes(pipelines: str, switch: object) -> str:
    if pipelines.endswith("NoPipelines"):
        return _AFTER
    return _TOGETHER if switch == "all" else _WHILE


# A table, the study it is derived from, and the derivation.
LIVE_TABLES: dict[str, tuple[str, Callable[[pd.DataFrame], pd.DataFrame]]] = {
    "sim_vs_live": ("live_fidelity", sim_vs_live),
    "execute_while_load": ("live_while_load", execute_while_load),
}
