"""The Hydra application behind scripts/run.py: single runs and sweeps, one comparison table at the end."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import hydra
import msgspec
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lambdascale.cli.guard import user_message
from lambdascale.experiments.compose import conf_dir
from lambdascale.experiments.folder import SUMMARY, read_json
from lambdascale.experiments.runner import run
from lambdascale.experiments.schema import register_schema
from lambdascale.metrics import comparison, print_comparison

# Where the jobs of a sweep, which may be other processes, leave word of how they ended.
_SWEEP_DIR = "LAMBDASCALE_SWEEP_DIR"


class _Outcome(msgspec.Struct):
    """How one job ended: a folder, or the error and the status it stands for."""

    job: int
    label: str
    folder: str = ""
    reused: bool = False
    error: str = ""
    status: int = 0


def main(argv: list[str]) -> int:
    """Run Hydra on ``argv`` (overrides and Hydra's flags); the exit status is the worst of the jobs'."""
    register_schema()
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with tempfile.TemporaryDirectory(prefix="lambdascale-sweep-") as sweep_dir:
        os.environ[_SWEEP_DIR] = sweep_dir
        # argparse takes overrides in one piece only; -m may stand anywhere.
        flags = [argument for argument in argv if argument in ("-m", "--multirun")]
        sys.argv = [sys.argv[0], *(argument for argument in argv if argument not in flags), *flags]
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="run")(_job)()
        outcomes = [msgspec.json.decode(path.read_bytes(), type=_Outcome) for path in sorted(Path(sweep_dir).glob("job-*.json"))]
    _report(outcomes)
    return max((outcome.status for outcome in outcomes), default=0)


def _job(config: DictConfig) -> None:
    """One job. Its failure is noted, not raised, so that the rest of the sweep still runs."""
    register_schema()
    job = HydraConfig.get().job
    number = 0 if OmegaConf.is_missing(job, "num") else int(job.num)
    outcome = _Outcome(number, ",".join(job.override_dirname.split(",")))
    try:
        result = run(config, group=Path(os.environ[_SWEEP_DIR]).name)
        outcome.folder, outcome.reused = str(result.folder), result.reused
    except Exception as error:
        message = user_message(error)
        if message is None and os.environ.get("LAMBDASCALE_DEBUG"):
            raise
        outcome.error = message or f"internal error: {type(error).__name__}: {error}"
        outcome.status = 2 if message else 1
    Path(os.environ[_SWEEP_DIR], f"job-{number:05d}.json").write_bytes(msgspec.json.encode(outcome))


def _report(outcomes: list[_Outcome]) -> None:
    console = Console(width=max(140, Console().width) if not sys.stdout.isatty() else None)
    finished = [outcome for outcome in outcomes if outcome.folder]
    if finished:
        common = _common_overrides(finished)
        rows = [read_json(Path(o.folder) / SUMMARY) | {"label": _label(o.label, common)} for o in finished]
        print_comparison(console, comparison(rows), "runs")
        for outcome in finished:
            console.print(f"{'reused' if outcome.reused else 'wrote'} {outcome.folder}", highlight=False, soft_wrap=True)
    for outcome in outcomes:
        if outcome.error:
            where = f" ({outcome.label})" if len(outcomes) > 1 else ""
            print(f"error: {' '.join(outcome.error.split())}{where}", file=sys.stderr)


def _common_overrides(outcomes: list[_Outcome]) -> set[str]:
    """Overrides that all jobs have: no need to repeat them on every row."""
    return set.intersection(*(set(outcome.label.split(",")) for outcome in outcomes))


def _label(overrides: str, common: set[str]) -> str:
    """What distinguishes a job, the system aside (it has a column of its own)."""
    return " ".join(part for part in overrides.split(",") if part not in common and not part.startswith("system="))
