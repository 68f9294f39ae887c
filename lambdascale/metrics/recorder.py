"""The observer that records a run's events and commands in order and derives nothing from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lambdascale.core.commands import Command
from lambdascale.core.events import Event


class Recorder:
    """Events and commands of a run as (time, event or command), in the order they happened.

    ``on_event`` records an event. Events know their time and stay as they are in ``log``, which is quicker to read than what
    ``entries`` and iteration make of it: most entries are read only after the run.
    """

    def __init__(self) -> None:
        self.log: list[Event | tuple[float, Command]] = []
        self._entries: list[tuple[float, Event | Command]] = []
        self.on_event: Callable[[Event], None] = self.log.append

    def on_command(self, at: float, command: Command) -> None:
        """Record a command issued at ``at`` (seconds of the run)."""
        self.log.append((at, command))

    def __iter__(self) -> Iterator[tuple[float, Event | Command]]:
        """Yield the entries without keeping them all in memory a second time."""
        return ((entry.at, entry) if isinstance(entry, Event) else entry for entry in self.log)

    @property
    def entries(self) -> list[tuple[float, Event | Command]]:
        """Return what was recorded so far."""
        known, log = self._entries, self.log
        known += [(entry.at, entry) if isinstance(entry, Event) else entry for entry in log[len(known) :]]
        return known

    @property
    def end_s(self) -> float:
        """Time of the last entry in seconds of the run; 0 without entries."""
        entries = self.entries
        return entries[-1][0] if entries else 0.0
