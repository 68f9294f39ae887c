"""Start policies: how new replicas get their weights, from where, with whom, and who serves meanwhile."""

from lambdascale.control.placement import ByLocality, ByStartupTime, Placement, SparingCopies
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
from lambdascale.control.start.local import FreeMigration, LocalStart
from lambdascale.control.start.multicast import MulticastStart
from lambdascale.control.start.sources import GpuAndHostSources, GpuSources, JoiningSources, SourceRule, StandingTree
from lambdascale.control.start.warm import FasterWay, NoOwnCopies, OwnCopies, WarmRule

__all__ = [
    "ByLocality",
    "ByStartupTime",
    "Change",
    "FasterWay",
    "FreeMigration",
    "GpuAndHostSources",
    "GpuSources",
    "GradualStart",
    "InstantStart",
    "JoiningSources",
    "LoadMore",
    "LoadOrder",
    "LocalStart",
    "MulticastOrder",
    "MulticastStart",
    "NoOwnCopies",
    "OwnCopies",
    "Placement",
    "Reshape",
    "SourceRule",
    "SparingCopies",
    "StandingTree",
    "StartDecision",
    "StartPolicy",
    "WarmRule",
]
