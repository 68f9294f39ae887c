"""Location and composition of conf/; a user's mistake becomes a one-line UserError."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import lambdascale
from lambdascale.core import UserError
from lambdascale.experiments.mistakes import user_message
from lambdascale.experiments.schema import register_schema

_GIVEN = "given"  # the name of a user's file; none of conf/ has it


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
    except YAMLError as error:
        raise UserError(f"this is not YAML: {' '.join(str(error).split())}") from error


def names(group: str) -> list[str]:
    """Return the names of a configuration group."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


@contextmanager
def choosing(group: str, choice: str) -> Iterator[list[str]]:
    """Yield the overrides that choose from a group: by a name of conf/, or the path of a YAML file composed as one of them.

    UserError if ``choice`` is neither.
    """
    if choice in names(group):
        yield [f"{group}={choice}"]
        return
    if not Path(choice).is_file():
        known = ", ".join(names(group))
        raise UserError(f"{group} must be one of {known}, or the path of a YAML file, not {choice}")
    with TemporaryDirectory(prefix="lambdascale-conf-") as folder:
        (Path(folder) / group).mkdir()
        shutil.copy(choice, Path(folder) / group / f"{_GIVEN}.yaml")
        yield [f"{group}={_GIVEN}", f"hydra.searchpath=[file://{folder}]"]
