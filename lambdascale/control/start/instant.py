"""Ideal scaling: a new replica has its weights at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lambdascale.control.placement import by_locality
from lambdascale.control.start.base import LoadOrder, StartDecision
from lambdascale.control.state import Fleet, ModelState
from lambdascale.core import NodeId
from lambdascale.core.commands import Loader, Storage


@dataclass(frozen=True, kw_only=True)
class InstantStart:
    """Loads that take no time: the lower bound under the same autoscaling policy."""

    loader: ClassVar[Loader] = "pipelined"
    storage: ClassVar[Storage] = "ssd"
    multicast: ClassVar[None] = None
    instant: ClassVar[bool] = True

    def check(self, *, replicas: int, copies: int) -> None:
        """See StartPolicy; every run can use it."""

    def rank(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId]) -> list[NodeId]:
        """See StartPolicy."""
        return by_locality(fleet, state, nodes)

    def start(self, fleet: Fleet, state: ModelState, nodes: Sequence[NodeId], replicas: int) -> StartDecision:
        """See StartPolicy."""
        taken = tuple(nodes[:replicas])
        blocks = tuple(range(state.blocks))
        return StartDecision(nodes=taken, loads=tuple(LoadOrder(node=node, tier="instant", blocks=blocks) for node in taken))
