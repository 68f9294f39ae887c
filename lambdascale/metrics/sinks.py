"""Where a finished run is reported to, beyond its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run whose folder is complete. ``group`` is the sweep it belongs to."""

    folder: Path
    name: str
    group: str
    experiment: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    figures: tuple[Path, ...] = ()


class RunLogger(Protocol):
    """A sink for finished runs."""

    def log_run(self, run: FinishedRun) -> None:
        """Report a run."""
        ...


@dataclass(frozen=True, kw_only=True)
class FilesLogger:
    """The default: the run's folder is all there is."""

    def log_run(self, run: FinishedRun) -> None:
        """Nothing to do: the folder was written by the run."""
