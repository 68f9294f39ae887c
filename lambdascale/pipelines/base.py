"""Protocol of pipeline builders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lambdascale.core import MulticastPlan, PipelinePlan


class PipelineBuilder(Protocol):
    """Part of a system that decides which destinations of a multicast serve together, and from which round on. Pure."""

    def pipelines(self, plan: MulticastPlan) -> Sequence[PipelinePlan]:
        """Return disjoint pipelines over ``plan.destinations``, ordered by ready_round; empty for load-then-execute systems."""
        ...
