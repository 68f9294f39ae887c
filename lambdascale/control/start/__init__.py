"""Start policies: how new replicas get their weights, from where, with whom, and who serves meanwhile."""

from lambdascale.control.start.base import (
    Change,
    GradualStart,
    LoadMore,
    LoadOrder,
    MulticastOrder,
    Reshape,
    StartDecision,
    StartPolicy,
)
from lambdascale.control.start.instant import InstantStart
from lambdascale.control.start.local import LocalStart
from lambdascale.control.start.multicast import MulticastStart

__all__ = [
    "Change",
    "GradualStart",
    "InstantStart",
    "LoadMore",
    "LoadOrder",
    "LocalStart",
    "MulticastOrder",
    "MulticastStart",
    "Reshape",
    "StartDecision",
    "StartPolicy",
]
