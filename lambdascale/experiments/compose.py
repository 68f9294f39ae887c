"""Location and composition of conf/; a user's mistake becomes a one-line UserError."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import lambdascale
from lambdascale.core import UserError
from lambdascale.experiments.mistakes import user_message
from lambdascale.experiments.schema import register_schema


def conf_dir() -> Path:
    """Path of the configuration tree: conf/ of a checkout, or the copy inside an installed wheel.

    FileNotFoundError if neither exists.
    """
    package = Path(lambdascale.__file__).resolve().parent
    for candidate in (package.parent / "conf", package / "_conf"):
        if (candidate / "run.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"no conf/run.yaml beside or inside {package}")


def compose(overrides: Sequence[str] = (), directory: Path | None = None, config_name: str = "run") -> DictConfig:
    """Compose the configuration for ``overrides``, written as on the command line; UserError if they are wrong."""
    register_schema()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(directory or conf_dir()), version_base="1.3"):
            return hydra_compose(config_name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(user_message(error) or str(error)) from error
