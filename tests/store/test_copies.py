"""Copies that leave room for others: few are under way at a time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from lambdascale.inference import devices
from lambdascale.inference.copies import BoundedCopies


class Event:
    """An event of a pretended GPU, which logs what is done with it."""

    made = 0

    def __init__(self, log: list[str]) -> None:
        self._log, self._name = log, f"event {Event.made}"
        Event.made += 1

    def synchronize(self) -> None:
        self._log.append(f"wait for {self._name}")

    def record(self, stream: Any) -> None:
        self._log.append(f"copy, {self._name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    log: list[str] = []
    Event.made = 0
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: Event(log))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(devices, "use", lambda device: None)
    return log


def test_a_copy_begins_once_fewer_than_the_most_are_under_way(log: list[str]) -> None:
    """Mutation: all copies of a model queued at once, before the token ids of an iteration."""
    down = BoundedCopies(torch.device("cuda", 0), object(), most=2)
    for number in range(3):
        down.start(torch.zeros(1), torch.full((1,), float(number)))
    # Events that nothing was recorded behind are complete.
    assert log == [
        *["wait for event 0", "copy, event 0", "wait for event 1", "copy, event 1", "wait for event 0", "copy, event 0"],
    ]


def test_a_copy_that_fails_leaves_its_turn_to_others(log: list[str]) -> None:
    down = BoundedCopies(torch.device("cuda", 0), object(), most=1)
    with pytest.raises(RuntimeError):
        down.start(torch.zeros(2), torch.zeros(3))
    down.start(torch.zeros(2), torch.ones(2))
    assert log == ["wait for event 0", "wait for event 0", "copy, event 0"]


def test_on_a_cpu_a_copy_is_complete_at_once() -> None:
    target = torch.zeros(3)
    copy = BoundedCopies(torch.device("cpu"), None)
    copy.start(target, torch.ones(3))
    assert target.tolist() == [1.0, 1.0, 1.0]
    copy.wait()
