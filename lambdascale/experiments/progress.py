"""A progress bar of the requests answered in a run, on terminals only."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from lambdascale.core.commands import Command, FailRequest
from lambdascale.core.events import Event, RequestFinished

_EVERY_S = 0.1


class Progress:
    """Observer that counts answered and refused requests and redraws the bar at most ten times a second."""

    def __init__(self, total: int, title: str) -> None:
        console = Console(stderr=True)
        self.visible = console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = RichProgress(*columns, console=console, auto_refresh=False, transient=True)
        self._task = self._bar.add_task(title or "run", total=total)
        self._done = 0
        self._due = 0.0

    def __enter__(self) -> Progress:
        if self.visible:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.visible:
            self._bar.stop()

    def on_event(self, event: Event) -> None:
        """Count an answered request."""
        if type(event) is RequestFinished:
            self._count()

    def on_command(self, at: float, command: Command) -> None:
        """Count a refused request."""
        if type(command) is FailRequest:
            self._count()

    def _count(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now >= self._due:
            self._due = now + _EVERY_S
            self._bar.update(self._task, completed=self._done, refresh=True)
