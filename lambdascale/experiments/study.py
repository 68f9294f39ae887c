"""Studies: experiments whose file lists the runs of a figure (grids of overrides) and the table to make from them.

``conf/experiment/NAME.yaml`` may have a key ``study``. ``scripts/run.py experiment=NAME -m`` then makes every run of its
grids, in processes of this machine, or in one multirun per grid where a launcher of Hydra's is chosen. When all have finished
it writes ``results/tables/NAME.csv`` (or .parquet) and draws the figure of that name, if one exists. Without ``-m`` the
experiment is an ordinary run of its settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from lambdascale.core import UserError
from lambdascale.experiments.compose import compose
from lambdascale.experiments.mistakes import user_message

Grid = Mapping[str, Any]
# Kinds of rows that compare runs with each other: pairs of runs, and single runs with the intervals of their pairs beside them.
PAIRS = "pairs"
WITH_INTERVALS = ("outcome", "parts")
# Overrides that do not change a study's results; any other override makes its table unfit to replace the committed one.
_HARMLESS = ("results", "traces", "force", "logger", "hydra")
_PLACES = "hydra.searchpath"


@dataclass(frozen=True, kw_only=True)
class Study:
    """Runs behind a table: grids of settings, and the kind of rows that each run adds.

    ``grids``: each maps configuration keys to values as on Hydra's command line (``a,b`` sweeps); all combinations are run.

    ``live``: the grids for backend=live, at a scale for one machine. A grid that sets ``backend`` itself is run unless another
    backend is chosen: such studies have simulated and live runs in one table. ``rows``: kind of rows a run adds to the table (see
    collect.py); ``fields``: their columns (all, if empty); ``columns``: more columns, name -> key of the run's configuration.
    ``reference``: the system that every other is compared with, run by run, for rows of the kinds "pairs", "outcome" and "parts"
    (see pairs.py).
    ``references``: systems that are compared with another reference, by name.
    ``experiments``: other studies to run one after the other, instead of all of these.
    """

    grids: tuple[Grid, ...] = ()
    live: tuple[Grid, ...] = ()
    rows: str = ""
    fields: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    reference: str = ""
    references: Mapping[str, str] = field(default_factory=dict)
    experiments: tuple[str, ...] = ()


def study_of(config: DictConfig, experiment: str) -> Study | None:
    """Study of a configuration, None for an ordinary run; UserError for unknown keys or a contradictory study."""
    if config.study is None:
        return None
    settings: Any = OmegaConf.to_container(config.study)
    try:
        study = Study(**settings)
    except TypeError as error:
        raise UserError(f"experiment {experiment}: study: {error}") from None
    if bool(study.experiments) == bool(study.grids and study.rows):
        raise UserError(f"experiment {experiment}: a study has either experiments or grids and rows")
    if (study.rows in (PAIRS, *WITH_INTERVALS)) != bool(study.reference):
        kinds = ", ".join((PAIRS, *WITH_INTERVALS))
        raise UserError(f"experiment {experiment}: a study of rows that compare ({kinds}) needs a reference, no other has one")
    return study


def chosen(overrides: Sequence[str], key: str) -> str | None:
    """Value of the last override of ``key``; None without one."""
    values = [override.partition("=")[2] for override in overrides if override.partition("=")[0] == key]
    return values[-1] if values else None


def load_study(overrides: Sequence[str]) -> Study | None:
    """Study named by ``experiment=`` on a command line; None for ordinary runs and sweeps over experiments."""
    experiment = chosen(overrides, "experiment")
    if experiment is None or "," in experiment:
        return None
    # The folder of an experiment of the user's own is named by the same command line.
    places = [override for override in overrides if override.startswith(f"{_PLACES}=")]
    return study_of(compose([f"experiment={experiment}", *places]), experiment)


def command_lines(study: Study, overrides: Sequence[str]) -> list[list[str]]:
    """Overrides of each grid, sweeps included; the user's overrides replace the grid's values of the same keys.

    UserError if the study has no grids for the chosen backend.
    """
    backend = chosen(overrides, "backend")
    own = [grid for grid in study.grids if "backend" in grid and backend in (None, grid["backend"])]
    grids = own + list(study.live if backend == "live" else [grid for grid in study.grids if "backend" not in grid])
    if not grids:
        raise UserError(f"experiment {chosen(overrides, 'experiment')} has no runs for backend={backend or 'sim'}")
    taken = {override.partition("=")[0].lstrip("+~") for override in overrides}
    lines: dict[tuple[str, ...], None] = {}
    for grid in grids:
        settings = [f"{key}={_value(value)}" for key, value in grid.items() if key.lstrip("+~") not in taken]
        lines[(*overrides, *settings)] = None
    return [list(line) for line in lines]


def in_pool(line: Sequence[str]) -> bool:
    """True for a command line whose runs this package's processes make, false for one that is left to Hydra.

    A live cluster needs the machine to itself; whoever sets something of Hydra's has chosen its launchers, unless it is a folder
    of configurations.
    """
    of_hydra = [key for override in line if (key := override.lstrip("+~").partition("=")[0]).startswith("hydra")]
    return chosen(line, "backend") != "live" and not set(of_hydra) - {_PLACES}


def expand(line: Sequence[str]) -> list[tuple[str, ...]]:
    """Overrides of every run of a command line with sweeps (``a,b``), as Hydra reads them; UserError if it cannot."""
    (runs,) = BasicSweeper.split_arguments([_parsed(override) for override in line], max_batch_size=None)
    return [tuple(run) for run in runs]


def _parsed(override: str) -> Override:
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise UserError(f"{override}: {user_message(error) or error}") from error


def _value(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else str(value)


def as_published(overrides: Sequence[str]) -> bool:
    """True if no override changes the study's results, so that its table may replace the committed one."""
    keys = [override.partition("=")[0] for override in overrides]
    return all(key == "experiment" or key.replace("/", ".").split(".")[0] in _HARMLESS for key in keys)
