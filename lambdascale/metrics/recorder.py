"""The observer that records a run's events and commands in order and derives nothing from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from lambdascale.core.commands import Command
from lambdascale.core.events import Event


class Recorder:
    """Events and commands of a run as (time, event or command), in the order they happened.

    ``on_event`` records an event. ``log`` has events, which know their time, and commands, each behind its time: most entries are
    read only after the run, and pairs of all would occupy the garbage collector. ``entries`` and iteration make pairs of it.
    """

    def __init__(self) -> None:
        self.log: list[Event | float | Command] = []
        self._entries: list[tuple[float, Event | Command]] = []
        self._read = 0  # entries of the log that are in ``_entries``
        self._extend = self.log.extend
        self.on_event: Callable[[Event], None] = self.log.append

    def on_command(self, at: float, command: Command) -> None:
        """Record a command issued at ``at`` (seconds of the run)."""
        self._extend((at, command))

    def __iter__(self) -> Iterator[tuple[float, Event | Command]]:
        """Yield the entries without keeping them all in memory a second time."""
        return _pairs(self.log)

    @property
    def entries(self) -> list[tuple[float, Event | Command]]:
        """Return what was recorded so far."""
        log = self.log
        self._entries += _pairs(islice(log, self._read, None))
        self._read = len(log)
        return self._entries

    @property
    def end_s(self) -> float:
        """Time of the last entry in seconds of the run; 0 without entries."""
        entries = self.entries
        return entries[-1][0] if entries else 0.0


def _pairs(log: Iterable[Event | float | Command]) -> Iterator[tuple[float, Event | Command]]:
    """Yield entries of a log with their times."""
    at = 0.0
    for entry in log:
        if isinstance(entry, Event):
            yield entry.at, entry
        elif isinstance(entry, Command):
            yield at, entry
        else:
            at = entry
