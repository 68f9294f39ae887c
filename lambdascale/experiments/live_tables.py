"""Tables that compare live runs, derived from the tables of their studies. Frames in, frames out; times in seconds."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from lambdascale.core import UserError


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
    """Medians over seeds by number of sources, with pipelines and without, from rows of experiment live_while_load."""
    executes = rows.pipelines.map(lambda target: "after loading" if target.endswith("NoPipelines") else "while loading")
    names = {"ttft_max_s": "all_served_s", "pipeline_first_tokens": "first_tokens_of_pipelines"}
    keys = ["backend", "sources", "executes"]
    groups = rows.assign(executes=executes).rename(columns=names).groupby(keys, sort=False)
    measures = groups[["ttft_p50_s", "ttft_p90_s", "all_served_s", "first_tokens_of_pipelines"]].median()
    table = measures.assign(runs=groups.size()).reset_index()
    ordered = table.sort_values(["backend", "sources", "executes"], ascending=[True, True, False], ignore_index=True)
    return ordered[[column for column in ordered if column != "backend"] + ["backend"]]


# A table, the study it is derived from, and the derivation.
LIVE_TABLES: dict[str, tuple[str, Callable[[pd.DataFrame], pd.DataFrame]]] = {
    "sim_vs_live": ("live_fidelity", sim_vs_live),
    "execute_while_load": ("live_while_load", execute_while_load),
}
