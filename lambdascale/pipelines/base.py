"""What a pipeline builder is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lambdascale.core import MulticastPlan, PipelinePlan


class PipelineBuilder(Protocol):
    """Decides which destinations of a multicast serve together, and from which round on. Pure."""

    def pipelines(self, plan: MulticastPlan) -> Sequence[PipelinePlan]:
        """Disjoint pipelines over ``plan.destinations``, ordered by ready_round; empty for load-then-execute systems."""
        ...
