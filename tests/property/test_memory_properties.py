"""Host copies against a slow reference model of an LRU with budget, keep-alive and pins."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lambdascale.core import UserError
from lambdascale.memory import HostCacheConfig, HostCaches

BUDGET, KEEP_S = 100, 10.0
NAMES = st.sampled_from(["a", "b", "c", "d"])
NODES = st.integers(0, 1)


class Caches(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.caches = HostCaches(HostCacheConfig(budget=BUDGET, keep_alive_s=KEEP_S), dict.fromkeys(range(8), 1000))
        self.copies: dict[int, list[tuple[str, int, float]]] = {0: [], 1: []}  # least recently used first
        self.pins: dict[tuple[int, str], int] = {}

    def alive(self, node: int) -> list[tuple[str, int, float]]:
        return [c for c in self.copies[node] if self.now - c[2] <= KEEP_S or self.pins.get((node, c[0]))]

    @rule(step=st.sampled_from([0.0, 1.0, 5.0, 10.0, 10.5]))
    def time_passes(self, step: float) -> None:
        self.now += step

    @rule(node=NODES, name=NAMES, size=st.integers(1, 120))
    def put(self, node: int, name: str, size: int) -> None:
        if self.pins.get((node, name)):
            return
        before = {c[0] for c in self.copies[node]}
        kept = [c for c in self.alive(node) if c[0] != name]
        while sum(c[1] for c in kept) + size > BUDGET:
            victim = next((c for c in kept if not self.pins.get((node, c[0]))), None)
            if victim is None:
                break
            kept.remove(victim)
        if sum(c[1] for c in kept) + size <= BUDGET:
            kept.append((name, size, self.now))
        self.copies[node] = kept
        evicted = self.caches.put(node, name, size, self.now)
        assert set(evicted) - {name} == before - {c[0] for c in kept} - {name}

    @rule(node=NODES, name=NAMES)
    def touch(self, node: int, name: str) -> None:
        if self.caches.has(node, name, self.now):
            self.caches.touch(node, name, self.now)
            size = next(c[1] for c in self.copies[node] if c[0] == name)
            self.copies[node] = [c for c in self.copies[node] if c[0] != name] + [(name, size, self.now)]

    @rule(node=NODES, name=NAMES)
    def pin(self, node: int, name: str) -> None:
        if self.caches.has(node, name, self.now):
            self.caches.pin(node, name)
            self.pins[node, name] = self.pins.get((node, name), 0) + 1

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        node, name = data.draw(st.sampled_from(sorted(key for key, count in self.pins.items() if count)))
        self.pins[node, name] -= 1
        self.caches.unpin(node, name, self.now)
        size = next(c[1] for c in self.copies[node] if c[0] == name)
        self.copies[node] = [c for c in self.copies[node] if c[0] != name] + [(name, size, self.now)]

    @rule(node=NODES)
    def forget(self, node: int) -> None:
        self.caches.forget(node)
        self.copies[node] = []
        self.pins = {key: count for key, count in self.pins.items() if key[0] != node}

    @invariant()
    def the_same_copies_are_usable(self) -> None:
        for node in (0, 1):
            alive = {c[0] for c in self.alive(node)}
            assert {name for name in "abcd" if self.caches.has(node, name, self.now)} == alive
            assert self.caches.used_bytes(node) <= BUDGET


TestCaches = Caches.TestCase
TestCaches.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_budget_beyond_the_host_is_refused() -> None:
    with pytest.raises(UserError, match="exceeds"):
        HostCaches(HostCacheConfig(budget="2GB"), {0: 10**9})


def test_disabled_keeps_nothing() -> None:
    caches = HostCaches(HostCacheConfig(enabled=False), {0: 1000})
    caches.put(0, "a", 1, 0.0)
    assert not caches.has(0, "a", 0.0)


def test_copies_on_lasting_nodes_never_expire() -> None:
    """Mutations: no node, or one too many, is spared."""
    caches = HostCaches(HostCacheConfig(keep_alive_s=KEEP_S, lasting_nodes=2), dict.fromkeys(range(4), 1000))
    for node in range(4):
        caches.put(node, "a", 1, 0.0)
    late = 10 * KEEP_S
    assert [caches.has(node, "a", late) for node in range(4)] == [True, True, False, False]
    assert [caches.expire(node, late) for node in range(4)] == [[], [], ["a"], ["a"]]
    with pytest.raises(UserError, match=r"memory\.lasting_nodes must not be negative, not -1"):
        HostCacheConfig(lasting_nodes=-1)
