"""Tables that compare runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

_COLUMNS = {
    "p50": "TTFT\nP50 [s]",
    "p90": "TTFT\nP90 [s]",
    "p99": "TTFT\nP99 [s]",
    "tpot": "TPOT\nmean [s]",
    "gpu_seconds": "GPU-\nseconds",
    "cost_usd": "cost\n[USD]",
    "scale_outs": "scale-\nouts",
    "completed": "requests\ncompleted",
}


def comparison(runs: Sequence[Mapping[str, Any]], reference: str = "lambdascale") -> pd.DataFrame:
    """One row per run summary (plus an optional ``label``), with ratios to the reference system's run of the same label.

    ``setup``: ranks of the run's largest communicator, if the set-up for so many is not measured, and what it rests on.
    ``p90_ratio`` and ``gpu_ratio``: this run's P90 TTFT and GPU-seconds over the reference's; NaN without a reference run.
    """
    rows = [_row(run) for run in runs]
    frame = pd.DataFrame(rows, columns=["label", "system", "backend", "setup", *_COLUMNS])
    base = frame[frame.system == reference].drop_duplicates("label").set_index("label")
    for ratio, column in (("p90_ratio", "p90"), ("gpu_ratio", "gpu_seconds")):
        frame[ratio] = frame[column] / frame.label.map(base[column])
    return frame


def _row(run: Mapping[str, Any]) -> dict[str, Any]:
    ttft = run["ttft_s"]
    return {
        "label": run.get("label", ""),
        "system": run["system"],
        "backend": run["backend"],
        "setup": _setup(run.get("communicator_setup")),
        **{name: ttft[name] for name in ("p50", "p90", "p99")},
        "tpot": run["tpot_s"]["mean"],
        **{name: run[name] for name in ("gpu_seconds", "cost_usd", "scale_outs")},
        "completed": f"{run['requests']['completed']}/{run['requests']['submitted']}",
    }


def _setup(found: Mapping[str, Any] | None) -> str:
    return "" if found is None or found["basis"] == "measured" else f"{found['ranks']} ranks: {found['basis']}"


def print_comparison(console: Console, frame: pd.DataFrame, title: str) -> None:
    """Print a comparison as a table whose title names the backends (simulated or live); † marks rows with a ``setup``."""
    backends = {"sim": "simulated", "live": "live"}
    kinds = ", ".join(sorted({backends.get(backend, backend) for backend in frame.backend}))
    setups = "; ".join(sorted(set(frame.setup) - {""}))
    note = f"†: time to set a communicator up not measured ({setups})" if setups else None
    table = Table(title=f"{title} ({kinds})", title_justify="left", caption=note, caption_justify="left")
    labelled = frame.label.astype(bool).any()
    for heading in (["run"] if labelled else []) + ["system"]:
        table.add_column(heading, no_wrap=True)
    for heading in [*_COLUMNS.values(), "P90 TTFT\n/ λScale", "GPU-s\n/ λScale"]:
        table.add_column(heading, justify="right")
    for row in frame.to_dict("records"):
        cells = [str(row["label"])] if labelled else []
        cells += [f"{row['system']}†" if row["setup"] else str(row["system"])] + [
            _format(row[name]) for name in [*_COLUMNS, "p90_ratio", "gpu_ratio"]
        ]
        table.add_row(*cells)
    console.print(table)


def _format(value: Any) -> str:
    if isinstance(value, str | int):
        return str(value)
    if value is None or value != value:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
