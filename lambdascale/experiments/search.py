"""Search for the best settings (Hydra's Optuna sweeper): the objective of each job, and a report kept with the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lambdascale.core import UserError
from lambdascale.experiments.folder import SUMMARY, read_json
from lambdascale.experiments.outcomes import Outcome
from lambdascale.metrics import write_json

# File that the sweeper writes into the sweep's folder.
_FOUND = "optimization_results.yaml"


def objective_value(name: str, summary: Mapping[str, Any]) -> float:
    """Number called ``name`` in a run's summary, levels separated by dots (ttft_s.p90); UserError if it is not a number."""
    value: Any = summary
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if not isinstance(value, int | float):
        raise UserError(f"objective={name} is not a number of this run's {SUMMARY} (ttft_s.p90, gpu_seconds, ... are)")
    return float(value)


def report_search(sweep: Path, outcomes: Sequence[Outcome]) -> None:
    """Print a search's result and write it beside its runs as optimization-<sweep>.json; do nothing for any other sweep."""
    if not (sweep / _FOUND).is_file():
        return
    found = yaml.safe_load((sweep / _FOUND).read_text())
    trials = [outcome for outcome in outcomes if outcome.folder]
    backend = read_json(Path(trials[0].folder) / SUMMARY)["backend"]
    document = {
        "objective": trials[0].objective,
        "backend": backend,
        "best": {"value": found["best_value"], "settings": found["best_params"]},
        "trials": [{"overrides": t.label, "value": t.value, "folder": Path(t.folder).name} for t in trials],
    }
    path = Path(trials[0].folder).parent / f"optimization-{sweep.name.removeprefix('.sweep-')}.json"
    write_json(path, document)
    settings = " ".join(f"{name}={value}" for name, value in found["best_params"].items())
    kind = "simulated" if backend == "sim" else backend
    print(
        f"best {trials[0].objective} ({kind}): {found['best_value']:.6g} with {settings}, of {len(trials)} trials\nwrote {path}"
    )
