"""Finished runs read back from their folders, for reports made at once or later."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lambdascale.core import UserError
from lambdascale.experiments.compose import compose
from lambdascale.experiments.folder import MANIFEST, SUMMARY, check_whole, read_json
from lambdascale.metrics import FinishedRun, RunLogger


def finished_run(folder: Path, group: str = "") -> FinishedRun:
    """Read the run in ``folder``; without ``group`` it belongs to the group named after its experiment."""
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert isinstance(config, dict), "a run's configuration is a mapping"
    settings = {str(key): value for key, value in config.items()}
    return FinishedRun(
        folder=folder,
        group=group or settings["name"],
        config=settings,
        summary=read_json(folder / SUMMARY),
        manifest=read_json(folder / MANIFEST),
        draw=partial(_draw, folder),
    )


def _draw(folder: Path, out: Path) -> Sequence[Path]:
    # Imported only when figures are drawn: matplotlib takes a second to import.
    from lambdascale.figures.run_overview import render_overview

    summary = read_json(folder / SUMMARY)
    requests = pd.read_parquet(folder / "requests.parquet").assign(backend=summary["backend"])
    if requests.empty:
        return []
    end_s = summary["simulated_s"] if summary["simulated_s"] is not None else summary["wall_s"]
    return render_overview(requests, pd.read_parquet(folder / "gpus.parquet"), end_s, out)


def find_runs(places: Iterable[Path]) -> list[Path]:
    """Folders of the finished runs at or below ``places``, in order, without duplicates; UserError for a place without any."""
    found: list[Path] = []
    for place in places:
        runs = sorted(path.parent for path in place.rglob(SUMMARY) if (path.parent / MANIFEST).is_file())
        runs = [run for run in runs if not run.name.startswith(".")]
        if not runs:
            raise UserError(f"no finished run in {place}")
        found += runs
    return list(dict.fromkeys(found))


def log_to_wandb(arguments: Sequence[str]) -> int:
    """Report finished runs to W&B and print each folder; return exit status 0.

    Arguments: folders (of runs, or above them) and overrides of logger.*. UserError for any other argument.
    """
    folders = [Path(argument) for argument in arguments if "=" not in argument or Path(argument).is_dir()]
    overrides = [argument for argument in arguments if Path(argument) not in folders]
    strange = [override for override in overrides if not override.startswith("logger.")]
    if strange or not folders:
        raise UserError(f"usage: log_wandb.py FOLDER ... [logger.KEY=VALUE ...]{'; not ' + strange[0] if strange else ''}")
    logger: RunLogger = instantiate(compose(["logger=wandb", *overrides]).logger, _convert_="all")
    for folder in find_runs(folders):
        check_whole(folder)
        print(f"{'logged' if logger.log_run(finished_run(folder)) else 'logged before'} {folder}")
    return 0
