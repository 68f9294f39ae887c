"""The observer of a run: it keeps what happened, in order, and works nothing out."""

from __future__ import annotations

from lambdascale.core.commands import Command
from lambdascale.core.events import Event


class Recorder:
    """Events and commands of a run as (time, event or command), in the order they happened."""

    def __init__(self) -> None:
        self.entries: list[tuple[float, Event | Command]] = []
        self._append = self.entries.append

    def on_event(self, event: Event) -> None:
        """Keep an event."""
        self._append((event.at, event))

    def on_command(self, at: float, command: Command) -> None:
        """Keep a command."""
        self._append((at, command))

    @property
    def end_s(self) -> float:
        """Time of the last entry, 0 if there is none."""
        return self.entries[-1][0] if self.entries else 0.0
