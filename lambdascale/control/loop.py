"""The only run loop, and the three roles it joins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Protocol

from lambdascale.core import UserError
from lambdascale.core.commands import Command
from lambdascale.core.events import Event


class ServingSystem(Protocol):
    """λScale or a baseline: decides what to do about an event."""

    def on_event(self, event: Event) -> Sequence[Command]:
        """Return the commands to carry out now, in order. Pure: time is ``event.at``."""
        ...


class Backend(Protocol):
    """A cluster, simulated or live, or a test double: carries commands out and reports events."""

    def submit(self, command: Command) -> None:
        """Start carrying a command out; failures come back as events."""
        ...

    def next_event(self) -> Event | None:
        """Return the next event, times never decreasing; None when nothing is outstanding."""
        ...


class Observer(Protocol):
    """Watches a run; never influences it."""

    def on_event(self, event: Event) -> None:
        """Take note of an event, before the system sees it."""
        ...

    def on_command(self, at: float, command: Command) -> None:
        """Take note of a command, before the backend gets it."""
        ...


def drive(system: ServingSystem, backend: Backend, observers: Sequence[Observer] = (), *, max_events: int | None = None) -> float:
    """Run until nothing is outstanding; return the time of the last event in seconds. UserError beyond ``max_events`` events."""
    at = 0.0
    see = _each([observer.on_event for observer in observers])
    tell = _each([observer.on_command for observer in observers])
    next_event, on_event, submit = backend.next_event, system.on_event, backend.submit
    for _ in repeat(None) if max_events is None else repeat(None, max_events):
        event = next_event()
        if event is None:
            return at
        at = event.at
        see(event)
        for command in on_event(event):
            tell(at, command)
            submit(command)
    event = next_event()
    if event is None:
        return at
    raise UserError(
        f"the simulation has had max_events={max_events} events at {event.at:g} s and has not ended: "
        "make it smaller, or raise max_events"
    )


def _each(calls: Sequence[Callable[..., None]]) -> Callable[..., None]:
    """Return a function that calls all of them, in order."""
    if len(calls) == 1:
        return calls[0]

    def call(*arguments: object) -> None:
        for each in calls:
            each(*arguments)

    return call
