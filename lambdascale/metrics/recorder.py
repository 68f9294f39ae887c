"""The observer that records a run's events and commands in order and derives nothing from them."""

from __future__ import annotations

from lambdascale.core.commands import Command
from lambdascale.core.events import Event


class Recorder:
    """Events and commands of a run as (time, event or command), in the order they happened."""

    def __init__(self) -> None:
        self.entries: list[tuple[float, Event | Command]] = []
        self._append = self.entries.append

    def on_event(self, event: Event) -> None:
        """Record an event."""
        self._append((event.at, event))

    def on_command(self, at: float, command: Command) -> None:
        """Record a command issued at ``at`` (seconds of the run)."""
        self._append((at, command))

    @property
    def end_s(self) -> float:
        """Time of the last entry in seconds of the run; 0 without entries."""
        return self.entries[-1][0] if self.entries else 0.0
