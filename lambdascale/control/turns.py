"""Turns at a node's compute, pure: the live node and the simulator's compute port call this class.

A node runs one stage at a time. Two kinds of work wait for it:

- *passes*: later stages of iterations that are under way. Other nodes wait for their results, so they come first, in the order
  in which they were added, whichever instance they belong to.
- *heads*: instances that could start an iteration on this node. They take turns: an instance that has had its turn is out of
  the queue until it is added again, and then comes after all that wait already.

A pass never interrupts a running stage: the owner asks for the next turn when the node is free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

InstanceKey = TypeVar("InstanceKey", bound=Hashable)
PassItem = TypeVar("PassItem")


class Turn(NamedTuple, Generic[InstanceKey, PassItem]):
    """The next thing to run: a pass of ``instance`` or, with ``work`` None, the start of an iteration of it."""

    instance: InstanceKey
    work: PassItem | None


class ComputeTurns(Generic[InstanceKey, PassItem]):
    """Queue of a node's compute. Instances are opaque keys, passes opaque values other than None. ``waiting``: its length."""

    __slots__ = ("_heads", "_passes", "waiting")

    def __init__(self) -> None:
        self._passes: deque[Turn[InstanceKey, PassItem]] = deque()
        self._heads: dict[InstanceKey, None] = {}  # in order of addition
        self.waiting = 0

    def __bool__(self) -> bool:
        """True if something waits."""
        return self.waiting > 0

    def add_pass(self, instance: InstanceKey, work: PassItem) -> None:
        """Queue a later stage's part of an iteration under way."""
        self._passes.append(Turn(instance, work))
        self.waiting += 1

    def add_head(self, instance: InstanceKey) -> None:
        """Queue the start of an iteration of ``instance``. One that waits already keeps its place."""
        if instance not in self._heads:
            self._heads[instance] = None
            self.waiting += 1

    def remove(self, instance: InstanceKey) -> None:
        """Drop everything that waits for ``instance``; nothing happens if nothing does."""
        self._heads.pop(instance, None)
        if any(turn.instance == instance for turn in self._passes):
            self._passes = deque(turn for turn in self._passes if turn.instance != instance)
        self.waiting = len(self._passes) + len(self._heads)

    def next(self) -> Turn[InstanceKey, PassItem] | None:
        """Take the next turn out of the queue; None if nothing waits."""
        if not self.waiting:
            return None
        self.waiting -= 1
        if self._passes:
            return self._passes.popleft()
        instance = next(iter(self._heads))
        del self._heads[instance]
        return Turn(instance, None)
