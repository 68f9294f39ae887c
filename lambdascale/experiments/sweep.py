"""The Hydra application behind scripts/run.py: single runs, sweeps and studies, and the table at their end."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import hydra
import msgspec
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lambdascale.cli.guard import user_message
from lambdascale.core import UserError
from lambdascale.experiments.collect import study_table, write_study
from lambdascale.experiments.compose import conf_dir
from lambdascale.experiments.folder import SUMMARY, read_json
from lambdascale.experiments.runner import run
from lambdascale.experiments.schema import register_schema
from lambdascale.experiments.study import Study, as_published, chosen, command_lines, load_study
from lambdascale.metrics import comparison, print_comparison


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
    # argparse takes overrides in one piece only; -m may stand anywhere.
    flags = [argument for argument in argv if argument in ("-m", "--multirun")]
    overrides = [argument for argument in argv if argument not in flags]
    asks = any(argument.startswith("-") for argument in overrides)
    study = None if asks else load_study(overrides)
    if study is not None and flags:
        return _run_study(study, overrides)
    if study is not None and study.experiments:
        raise UserError(f"experiment={chosen(overrides, 'experiment')} stands for several: run it with -m")
    outcomes = _hydra([*overrides, *flags])
    _report(outcomes)
    return _worst(outcomes)


def _hydra(argv: Sequence[str], group: str = "") -> list[_Outcome]:
    """One Hydra run or multirun; how its jobs ended. ``group``: the study it is part of."""
    with tempfile.TemporaryDirectory(prefix=f"lambdascale-{group or 'sweep'}-") as sweep_dir:
        # The jobs of a sweep, which may be other processes, leave word there of how they ended.
        flags = [argument for argument in argv if argument.startswith("-")]
        settings = [argument for argument in argv if argument not in flags]
        sys.argv = [sys.argv[0], *settings, f"hydra.sweep.dir={sweep_dir}", *flags]
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="run")(_job)()
        return [msgspec.json.decode(path.read_bytes(), type=_Outcome) for path in sorted(Path(sweep_dir).glob("job-*.json"))]


def _job(config: DictConfig) -> None:
    """One job. Its failure is noted, not raised, so that the rest of the sweep still runs."""
    register_schema()
    hydra_config = HydraConfig.get()
    job, sweep_dir = hydra_config.job, Path(hydra_config.sweep.dir)
    number = 0 if OmegaConf.is_missing(job, "num") else int(job.num)
    outcome = _Outcome(number, ",".join(job.override_dirname.split(",")))
    try:
        result = run(config, group=sweep_dir.name)
        outcome.folder, outcome.reused = str(result.folder), result.reused
    except Exception as error:
        message = user_message(error)
        if message is None and os.environ.get("LAMBDASCALE_DEBUG"):
            raise
        outcome.error = message or f"internal error: {type(error).__name__}: {error}"
        outcome.status = 2 if message else 1
    (sweep_dir / f"job-{number:05d}.json").write_bytes(msgspec.json.encode(outcome))


def _worst(outcomes: Sequence[_Outcome]) -> int:
    return max((outcome.status for outcome in outcomes), default=0)


# -- studies -------------------------------------------------------------------------------------------------------------


def _run_study(study: Study, overrides: list[str]) -> int:
    """All runs of a study, then its table and figure; a study of studies goes on where one of them fails."""
    if study.experiments:
        others = [override for override in overrides if not override.startswith("experiment=")]
        return max(_run_member([f"experiment={name}", *others]) for name in study.experiments)
    experiment = str(chosen(overrides, "experiment"))
    outcomes = [o for line in command_lines(study, overrides) for o in _hydra([*line, "-m"], group=experiment)]
    _report_errors(outcomes)
    reused = sum(outcome.reused for outcome in outcomes)
    print(f"{experiment}: {len(outcomes)} runs, {reused} of them reused", flush=True)
    if not _worst(outcomes):
        # Grids may meet in a run where the user's overrides took their differences away.
        table = study_table(study, [Path(folder) for folder in dict.fromkeys(outcome.folder for outcome in outcomes)])
        results = Path(chosen(overrides, "results") or "results")
        for path in write_study(experiment, table, results, published=as_published(overrides)):
            print(f"  {path}", flush=True)
    return _worst(outcomes)


def _run_member(overrides: list[str]) -> int:
    study = load_study(overrides)
    if study is None:
        raise UserError(f"{overrides[0]} is no study")
    return _run_study(study, overrides)


# -- reports -------------------------------------------------------------------------------------------------------------


def _report(outcomes: list[_Outcome]) -> None:
    console = Console(width=max(140, Console().width) if not sys.stdout.isatty() else None)
    finished = [outcome for outcome in outcomes if outcome.folder]
    if finished:
        common = _common_overrides(finished)
        rows = [read_json(Path(o.folder) / SUMMARY) | {"label": _label(o.label, common)} for o in finished]
        print_comparison(console, comparison(rows), "runs")
        for outcome in finished:
            console.print(f"{'reused' if outcome.reused else 'wrote'} {outcome.folder}", highlight=False, soft_wrap=True)
    _report_errors(outcomes)


def _report_errors(outcomes: list[_Outcome]) -> None:
    """A line for every different error."""
    lines: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.error:
            where = f" ({outcome.label})" if len(outcomes) > 1 else ""
            lines.setdefault(outcome.error, f"error: {' '.join(outcome.error.split())}{where}")
    for line in lines.values():
        print(line, file=sys.stderr)


def _common_overrides(outcomes: list[_Outcome]) -> set[str]:
    """Overrides that all jobs have: no need to repeat them on every row."""
    return set.intersection(*(set(outcome.label.split(",")) for outcome in outcomes))


def _label(overrides: str, common: set[str]) -> str:
    """What distinguishes a job, the system aside (it has a column of its own)."""
    return " ".join(part for part in overrides.split(",") if part not in common and not part.startswith("system="))
