"""Sinks to which a finished run is reported, beyond its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run whose folder is complete, with the contents of its config.yaml, summary.json and manifest.json.

    ``group`` names the sweep it belongs to. ``draw`` draws the run's figures into a folder and returns their paths.
    """

    folder: Path
    group: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    manifest: Mapping[str, Any]
    draw: Callable[[Path], Sequence[Path]]


class RunLogger(Protocol):
    """A sink for finished runs."""

    def log_run(self, run: FinishedRun) -> bool:
        """Report a run unless it was reported before; return True if this call reported it."""
        ...


@dataclass(frozen=True, kw_only=True)
class FilesLogger:
    """The default logger: nothing is reported beyond the run's folder."""

    def log_run(self, run: FinishedRun) -> bool:
        """Do nothing and return False: the run itself wrote its folder."""
        return False
