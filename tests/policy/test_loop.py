"""The run loop, and turns at a node's compute."""

from __future__ import annotations

from lambdascale.control import drive
from lambdascale.control.turns import ComputeTurns
from lambdascale.core.commands import Command, PlaceCopy
from lambdascale.core.events import Event, NodeJoined


class Script:
    """System, backend and observer in one, that writes down who is called when."""

    def __init__(self, *events: Event) -> None:
        self.events = list(events)
        self.calls: list[str] = []

    def next_event(self) -> Event | None:
        return self.events.pop(0) if self.events else None

    def submit(self, command: Command) -> None:
        self.calls.append("backend")

    def on_command(self, at: float, command: Command) -> None:
        self.calls.append(f"observer {at}")


class Observed(Script):
    def on_event(self, event: Event) -> None:
        self.calls.append("observer")


class System:
    def __init__(self, script: Script) -> None:
        self.script = script

    def on_event(self, event: Event) -> list[Command]:
        self.script.calls.append("system")
        return [PlaceCopy(0, "a")]


def test_observers_see_events_before_the_system_and_commands_before_the_backend() -> None:
    script = Observed(NodeJoined(1.5, 0))
    assert drive(System(script), script, [script]) == 1.5
    assert script.calls == ["observer", "system", "observer 1.5", "backend"]


def test_a_run_without_events_ends_at_zero() -> None:
    script = Observed()
    assert drive(System(script), script) == 0.0
    assert script.calls == []


def test_turns_of_an_instance_that_is_removed() -> None:
    turns: ComputeTurns[str, int] = ComputeTurns()
    turns.add_pass("a", 1)
    turns.add_head("a")
    turns.remove("a")
    assert not turns
    assert turns.next() is None
    turns.add_pass("a", 1)
    turns.add_pass("b", 2)
    turns.add_pass("a", 3)
    turns.add_head("c")
    turns.remove("a")
    assert [(t.instance, t.work) for t in iter(turns.next, None)] == [("b", 2), ("c", None)]
