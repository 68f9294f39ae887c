"""The Hydra application behind scripts/run.py: single runs, sweeps and studies, and the table at their end."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lambdascale.cli.guard import user_message
from lambdascale.core import UserError
from lambdascale.experiments.compose import conf_dir
from lambdascale.experiments.outcomes import Outcome, note, read_outcomes, report, worst
from lambdascale.experiments.runner import run
from lambdascale.experiments.schema import register_schema
from lambdascale.experiments.study import chosen, load_study
from lambdascale.experiments.study_runs import run_study


def main(argv: list[str]) -> int:
    """Run Hydra on ``argv`` (overrides and Hydra's flags); the exit status is the worst of the jobs'."""
    register_schema()
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # argparse takes overrides in one piece only; -m may stand anywhere.
    flags = [argument for argument in argv if argument in ("-m", "--multirun")]
    overrides = [argument for argument in argv if argument not in flags]
    asks_only = any(argument.startswith("-") for argument in overrides)
    study = None if asks_only else load_study(overrides)
    with tempfile.TemporaryDirectory(prefix="lambdascale-sweep-") as folder:
        if study is not None and flags:
            return run_study(study, overrides, lambda line, part: _hydra(line, ["-m"], Path(folder, part)))
        if study is not None and study.experiments:
            raise UserError(f"experiment={chosen(overrides, 'experiment')} stands for several: run it with -m")
        outcomes = _hydra(overrides, flags, Path(folder, "sweep"))
    report(outcomes)
    return worst(outcomes)


def _hydra(overrides: Sequence[str], flags: Sequence[str], sweep: Path) -> list[Outcome]:
    """One Hydra run or multirun; how its jobs ended, which they note in the folder ``sweep``."""
    sys.argv = [sys.argv[0], *overrides, f"hydra.sweep.dir={sweep}", *flags]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="run")(_job)()
    return read_outcomes(sweep)


def _job(config: DictConfig) -> None:
    """One job. Its failure is noted, not raised, so that the rest of the sweep still runs."""
    register_schema()
    settings = HydraConfig.get()
    sweep = Path(settings.sweep.dir)
    number = 0 if OmegaConf.is_missing(settings.job, "num") else int(settings.job.num)
    outcome = Outcome(number, settings.job.override_dirname)
    try:
        result = run(config, group=sweep.parent.name)
        outcome.folder, outcome.reused = str(result.folder), result.reused
    except Exception as error:
        message = user_message(error)
        if message is None and os.environ.get("LAMBDASCALE_DEBUG"):
            raise
        outcome.error = message or f"internal error: {type(error).__name__}: {error}"
        outcome.status = 2 if message else 1
    note(sweep, outcome)
