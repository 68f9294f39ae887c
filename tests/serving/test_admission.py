"""Requests that wait, their order, and those refused: decisions without a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdascale.live.serving.admission import Admission, Bounds, Place, Refused


class Desk:
    """An admission whose clock stands still, and what it has started."""

    def __init__(self, window: int = 2, requests: int = 8, tokens: int = 1000, share: float = 0.5) -> None:
        self.now_s = 0.0
        bounds = Bounds(window=window, requests=requests, tokens=tokens, share=share)
        self.admission = Admission(bounds, lambda: self.now_s)
        self.started: list[str] = []
        self.places: dict[str, Place] = {}

    def enter(self, client: str, *names: str, tokens: int = 10) -> None:
        wanted: Sequence[tuple[int, Callable[[], None]]] = [(tokens, partial(self.started.append, name)) for name in names]
        self.places |= dict(zip(names, self.admission.enter(client, wanted), strict=True))

    def leave(self, name: str) -> None:
        self.admission.leave(self.places[name])

    def refuses(self, client: str, *names: str, **options: Any) -> Refused:
        with pytest.raises(Refused) as caught:
            self.enter(client, *names, **options)
        return caught.value


def test_the_window_is_filled_and_then_they_wait() -> None:
    desk = Desk()
    desk.enter("a", "a1", "a2", "a3")
    assert desk.started == ["a1", "a2"]
    assert (desk.admission.waiting, desk.admission.waiting_tokens) == (1, 10)
    desk.leave("a1")
    assert desk.started == ["a1", "a2", "a3"]
    assert (desk.admission.waiting, desk.admission.waiting_tokens) == (0, 0)


def test_clients_take_turns() -> None:
    """One that came first with many does not keep the others waiting."""
    desk = Desk(window=1, requests=20, share=1.0)
    desk.enter("a", *(f"a{i}" for i in range(5)))
    desk.enter("b", "b0", "b1")
    desk.enter("c", "c0")
    for _ in range(7):
        desk.leave(desk.started[-1])
    assert desk.started == ["a0", "a1", "b0", "c0", "a2", "b1", "a3", "a4"]


def test_a_client_that_leaves_gives_its_turn_up() -> None:
    desk = Desk(window=1, requests=20, share=1.0)
    desk.enter("a", "a0", "a1")
    desk.enter("b", "b0")
    desk.enter("c", "c0")
    desk.leave("a1")
    desk.leave("b0")
    desk.leave("a0")
    assert desk.started == ["a0", "c0"]


def test_leaving_twice_frees_one_place() -> None:
    desk = Desk(window=1, requests=20, share=1.0)
    desk.enter("a", "a0", "a1", "a2")
    desk.leave("a0")
    desk.leave("a0")
    assert desk.started == ["a0", "a1"]
    desk.leave("a2")
    desk.leave("a2")
    assert desk.admission.waiting == 0


@pytest.mark.parametrize(
    ("waiting", "client", "wanted", "tokens", "reason"),
    [
        ({"a": 4, "b": 4}, "c", 1, 10, "queue_requests"),
        ({"a": 4, "b": 3}, "c", 1, 10, None),
        ({"a": 4, "b": 3}, "c", 2, 10, "queue_requests"),
        ({"a": 4}, "a", 1, 10, "client_share"),
        ({"a": 3}, "a", 1, 10, None),
        ({"a": 4}, "b", 1, 961, "queue_tokens"),
        ({"a": 4}, "b", 1, 960, None),
        ({"a": 1}, "a", 1, 491, "client_share"),
        ({"a": 1}, "a", 1, 490, None),
        ({"a": 1}, "b", 1, 900, None),
        ({}, "a", 9, 10, None),
        ({}, "a", 1, 2000, None),
        ({"b": 1}, "a", 5, 10, None),
    ],
)
def test_bounds(waiting: dict[str, int], client: str, wanted: int, tokens: int, reason: str | None) -> None:
    """Eight requests and 1000 tokens, half of them for a client; what comes first is not refused for its size alone."""
    desk = Desk(window=1)
    desk.enter("z", "busy")
    for other, count in waiting.items():
        desk.enter(other, *(f"{other}{i}" for i in range(count)))
    names = [f"new{i}" for i in range(wanted)]
    if reason is None:
        desk.enter(client, *names, tokens=tokens)
        assert desk.admission.waiting == sum(waiting.values()) + wanted
    else:
        assert desk.refuses(client, *names, tokens=tokens).reason == reason
        assert desk.admission.waiting == sum(waiting.values())


def test_what_the_window_has_room_for_does_not_wait() -> None:
    desk = Desk(window=20, requests=1, tokens=1)
    desk.enter("a", *(f"a{i}" for i in range(20)))
    assert len(desk.started) == 20


@pytest.mark.parametrize(
    ("waiting", "ends_every_s", "estimate"),
    [(8, 1.0, 4), (8, 0.1, 1), (8, 10.0, 40), (8, 1e9, 10), (2, 1.0, 1)],
)
def test_retry_after(waiting: int, ends_every_s: float, estimate: int) -> None:
    """Seconds until half of those who wait have started, at the pace of the last minute; 10 without one."""
    desk = Desk(window=1, requests=waiting, share=1.0)
    ended = 20
    desk.enter("a", "a")
    for i in range(ended):
        desk.now_s += ends_every_s
        desk.leave("a" if i == 0 else f"x{i - 1}")
        desk.enter("a", f"x{i}")
    desk.now_s += ends_every_s
    desk.enter("b", *(f"b{i}" for i in range(waiting)))
    assert desk.refuses("b", "more").retry_after_s == estimate


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.sampled_from("abc"), st.integers(1, 4)),
        st.tuples(st.just("leave"), st.just(""), st.integers(0, 30)),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(STEPS, st.integers(1, 4))
def test_no_place_is_lost_and_none_waits_beside_a_free_one(steps: list[tuple[str, str, int]], window: int) -> None:
    desk = Desk(window=window, requests=10, share=0.6)
    refused_beside_nothing = False
    for number, (kind, client, count) in enumerate(steps):
        names = list(desk.places)
        if kind == "enter":
            waited = desk.admission.waiting
            try:
                desk.enter(client, *(f"{client}{number}.{i}" for i in range(count)))
            except Refused:
                refused_beside_nothing |= waited == 0
        elif names:
            desk.leave(names[count % len(names)])
        open_ = [place for place in desk.places.values() if place.state != "left"]
        waiting = [place for place in open_ if place.state == "waiting"]
        assert desk.admission.started == len(open_) - len(waiting) <= window
        assert (desk.admission.waiting, desk.admission.waiting_tokens) == (len(waiting), 10 * len(waiting))
        assert not waiting or desk.admission.started == window
        assert len(desk.started) == len(set(desk.started))
    assert not refused_beside_nothing
