"""Lines on stderr: the first at once, equal ones counted."""

from __future__ import annotations

import pytest

from lambdascale.live.controller import log
from lambdascale.live.controller.log import Log


class Said:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.lines: list[str] = []
        self.log = Log(write=self.lines.append, clock=lambda: self.now_s)


def test_equal_lines_are_counted() -> None:
    said = Said()
    for _ in range(38):
        said.log.say("a")
    said.log.say("b")
    assert said.lines == ["a", "b"]
    said.now_s = 9.9
    said.log.flush()
    assert said.lines == ["a", "b"]
    said.now_s = 10.0
    said.log.flush()
    assert said.lines == ["a", "b", "a (37 times more)"]


def test_a_line_that_goes_on_is_told_of_now_and_then() -> None:
    said = Said()
    for _ in range(1000):
        said.now_s += 0.05
        said.log.say("a")
    assert said.lines[0] == "a"
    assert 3 <= len(said.lines) <= 6


def test_a_line_that_pauses_is_new_again() -> None:
    said = Said()
    for _ in range(3):
        said.log.say("a")
        said.now_s += 100
        said.log.flush()
    assert said.lines == ["a"] * 3


def test_nothing_is_lost_at_the_end() -> None:
    said = Said()
    for _ in range(2):
        said.log.say("a")
    said.log.flush(all_of_them=True)
    said.log.flush(all_of_them=True)
    assert said.lines == ["a", "a (1 time more)"]


def test_different_lines_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound on what is kept; the oldest is counted before it goes."""
    monkeypatch.setattr(log, "_MOST_LINES", 2)
    said = Said()
    for line in ("a", "a", "b", "c"):
        said.log.say(line)
    assert said.lines == ["a", "b", "c", "a (1 time more)"]
    assert len(said.log._said) == 2
