"""Where a finished run is reported to, beyond its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run whose folder is complete, with what config.yaml, summary.json and manifest.json in it say.

    ``group`` is the sweep it belongs to. ``draw`` draws the run's figures into a folder and names their files.
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
        """Report a run, once; whether that was done now."""
        ...


@dataclass(frozen=True, kw_only=True)
class FilesLogger:
    """The default: the run's folder is all there is."""

    def log_run(self, run: FinishedRun) -> bool:
        """Nothing to do: the folder was written by the run."""
        return False
