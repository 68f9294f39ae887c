"""Protocol of pipeline builders."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from lambdascale.core import MulticastPlan, NodeId, PipelinePlan
from lambdascale.pipelines.costs import IN_ROUNDS, Costs


class PipelineBuilder(Protocol):
    """Part of a system that decides which destinations of a multicast serve together, and from which round on. Pure."""

    def pipelines(
        self, plan: MulticastPlan, holders: Collection[NodeId] = (), costs: Costs = IN_ROUNDS
    ) -> Sequence[PipelinePlan]:
        """Return pipelines by ready_round, in which each destination is once at most; none for load-then-execute systems.

        ``holders``: nodes whose GPUs hold the whole model already; they may take stages beside the destinations. ``costs``:
        predicted times by which to choose.
        """
        ...
