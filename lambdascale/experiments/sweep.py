"""Hydra application behind scripts/run.py: runs, sweeps and studies under any launcher, with one table and exit status."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lambdascale.core import UserError
from lambdascale.experiments.compose import conf_dir
from lambdascale.experiments.jobs import attempt
from lambdascale.experiments.mistakes import user_message
from lambdascale.experiments.outcomes import Outcome, note, read_outcomes, report, worst
from lambdascale.experiments.schema import register_schema
from lambdascale.experiments.search import report_search
from lambdascale.experiments.study import chosen, load_study
from lambdascale.experiments.study_runs import run_study


class _SearchEnded(BaseException):
    """Ends a search after a failed job, which has written its outcome and has no value to return.

    Not an Exception, since Hydra and its sweepers would catch that, print a message of their own and continue.
    """


def main(argv: list[str]) -> int:
    """Run Hydra on ``argv`` (overrides and Hydra's flags); return the highest exit status of its jobs.

    Failures of a launcher itself (a lost worker, a job over its time limit) are raised after the report on the finished jobs.
    UserError for a user's mistake.
    """
    register_schema()
    os.environ["HYDRA_FULL_ERROR"] = "1"
    _hush()
    overrides, flags = _split(argv)
    sweeps = [flag for flag in flags if flag in ("-m", "--multirun")]
    try:
        study = None if flags != sweeps else load_study(overrides)
    except UserError as error:
        raise _with_hint(error) from error.__cause__
    with _sweep_folder() as folder:
        if study is not None and sweeps:
            return run_study(study, overrides, lambda line, part: _part(line, Path(folder, part)), _stamp(folder))
        if study is not None and study.experiments:
            raise UserError(f"experiment={chosen(overrides, 'experiment')} consists of several studies: run it with -m")
        outcomes, failure = _hydra(overrides, flags, folder)
        report(outcomes)
        report_search(folder, outcomes)
    if failure is not None:
        raise failure
    return worst(outcomes)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the overrides of a command line, and Hydra's options; UserError for an unknown option.

    argparse accepts overrides only as one contiguous group, while users write options anywhere.
    """
    known, rest = get_args_parser().parse_known_args(argv)
    if strange := [argument for argument in rest if argument.startswith("-")]:
        raise UserError(f"unknown option {strange[0]} (run.py --hydra-help shows all)")
    overrides = [*known.overrides, *rest]
    return overrides, [argument for argument in argv if argument not in overrides]


@contextmanager
def _sweep_folder() -> Iterator[Path]:
    """Yield a path for files that jobs and launchers exchange; it is deleted at the end.

    It is in the current folder, as the results are: jobs may run on other machines, which share that folder but not /tmp.
    """
    folder = Path.cwd() / f".sweep-{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _part(overrides: Sequence[str], sweep: Path) -> list[Outcome]:
    """Run one sweep of a study and return its outcomes; a launcher's failure is raised."""
    outcomes, failure = _hydra(overrides, ["-m"], sweep)
    if failure is not None:
        raise failure
    return outcomes


def _hydra(overrides: Sequence[str], flags: Sequence[str], sweep: Path) -> tuple[list[Outcome], BaseException | None]:
    """Run Hydra once; return the outcomes that its jobs wrote into the folder ``sweep``, and Hydra's own failure, if any."""
    sys.argv = [sys.argv[0], *overrides, f"hydra.sweep.dir={_quoted(str(sweep))}", *flags]
    failure: BaseException | None = None
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="run")(_job)()
    except _SearchEnded:
        pass
    except Exception as error:
        failure = _with_hint(error)
    return read_outcomes(sweep), failure


def _hush() -> None:
    """Keep messages of Hydra and its plugins off stderr, since the report contains every error."""
    for name in ("hydra", "hydra_plugins"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    for name in ("optuna.study", "optuna.storages"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # A folder that does not exist is a mistake; Hydra only warns, and fails later for want of what is in it.
    warnings.filterwarnings("error", message="provider=hydra.searchpath")
    # Hydra's sweeper needs Optuna 2, which was written for SQLAlchemy 1.
    warnings.filterwarnings("ignore", message="Deprecated API features detected")


def _with_hint(failure: Exception) -> Exception:
    """The failure, with a hint on installation if it is about a missing Hydra plugin."""
    message = user_message(failure)
    if message is None or not any(group in message for group in ("hydra/launcher", "hydra/sweeper")):
        return failure
    return UserError(f"{message} (launchers and sweepers are extras: pip install '.[slurm,tune]'; docs/experiments.md)")


def _quoted(text: str) -> str:
    """Quote a value for Hydra's grammar, so that it may contain any character."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _job(config: DictConfig) -> float | None:
    """Run one job; return its objective to a search. A failure is written down, not raised, so that the sweep continues."""
    register_schema()
    settings = HydraConfig.get()
    sweep = Path(settings.sweep.dir)
    number = 0 if OmegaConf.is_missing(settings.job, "num") else int(settings.job.num)
    group = "" if settings.mode == RunMode.RUN else f"{config.name}-{_stamp(sweep)}"
    outcome = attempt(config, Outcome(number, settings.job.override_dirname), group)
    note(sweep, outcome)
    if outcome.error and config.objective is not None:
        raise _SearchEnded(outcome.error)
    return outcome.value


def _stamp(sweep: Path) -> str:
    """Time stamp of the command, the same for all sweeps of a study."""
    (name,) = (part for part in sweep.parts if part.startswith(".sweep-"))
    return name.removeprefix(".sweep-")
