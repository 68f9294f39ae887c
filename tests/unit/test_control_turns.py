"""Turns at a node's compute: one row for each sentence of the rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lambdascale.control.turns import ComputeTurns, Turn

PASS, HEAD, REMOVE = "pass", "head", "remove"
TABLE: dict[str, tuple[list[tuple[str, ...]], list[tuple[str, str | None]]]] = {
    "nothing waits": ([], []),
    "passes run in the order they came, across instances": (
        [(PASS, "a", "1"), (PASS, "b", "2"), (PASS, "a", "3")],
        [("a", "1"), ("b", "2"), ("a", "3")],
    ),
    "passes run before heads that came earlier": ([(HEAD, "a"), (PASS, "b", "1")], [("b", "1"), ("a", None)]),
    "a pass of an instance runs before its own head": ([(HEAD, "a"), (PASS, "a", "1")], [("a", "1"), ("a", None)]),
    "heads run in the order they came": ([(HEAD, "b"), (HEAD, "a")], [("b", None), ("a", None)]),
    "a head that waits already keeps its place": ([(HEAD, "a"), (HEAD, "b"), (HEAD, "a")], [("a", None), ("b", None)]),
    "a removed instance leaves nothing": (
        [(PASS, "a", "1"), (HEAD, "a"), (PASS, "b", "2"), (HEAD, "b"), (PASS, "a", "3"), (REMOVE, "a")],
        [("b", "2"), ("b", None)],
    ),
    "an unknown instance may be removed": ([(HEAD, "b"), (REMOVE, "a")], [("b", None)]),
}


def turns(steps: list[tuple[str, ...]]) -> ComputeTurns[str, str]:
    queue = ComputeTurns[str, str]()
    calls: dict[str, Callable[..., None]] = {PASS: queue.add_pass, HEAD: queue.add_head, REMOVE: queue.remove}
    for kind, *arguments in steps:
        calls[kind](*arguments)
    return queue


@pytest.mark.parametrize("case", TABLE)
def test_the_order_of_turns(case: str) -> None:
    steps, wanted = TABLE[case]
    queue = turns(steps)
    assert bool(queue) == bool(wanted)
    for instance, work in wanted:
        assert queue.next() == Turn(instance, work)
    assert not queue
    assert queue.next() is None


def test_instances_take_turns() -> None:
    """An instance that is added again after its turn comes after those that wait: nobody is passed over."""
    queue = turns([(HEAD, "a"), (HEAD, "b"), (HEAD, "c")])
    order = []
    for _ in range(6):
        turn = queue.next()
        assert turn is not None
        order.append(turn.instance)
        queue.add_head(turn.instance)
    assert order == ["a", "b", "c", "a", "b", "c"]
