"""Conformance of multicast planners."""

from __future__ import annotations

import pytest

from lambdascale.core import PlanError
from lambdascale.multicast import MulticastPlanner, validate_plan


class PlannerConformance:
    """Subclass with ``make_planner``."""

    max_nodes = 40

    def make_planner(self) -> MulticastPlanner:
        """The planner under test."""
        raise NotImplementedError

    @pytest.mark.parametrize("blocks", [1, 2, 3, 16, 33])
    @pytest.mark.parametrize("sources", [1, 2, 3, 4, 7])
    def test_plans_are_valid(self, sources: int, blocks: int) -> None:
        """Every destination gets every block once, from nodes that hold it, one send a round."""
        for destinations in range(self.max_nodes - sources + 1):
            plan = self.make_planner().plan(sources=sources, destinations=destinations, blocks=blocks)
            validate_plan(plan)
            assert plan.blocks == blocks
            assert plan.destinations == tuple(range(sources, sources + destinations))
            assert plan.sources == plan.members[: len(plan.sources)]
            assert all(plan.rounds), "no round is empty"

    def test_planning_is_deterministic(self) -> None:
        """Two planners give the same plan: runs are reproducible."""
        one, two = (self.make_planner().plan(sources=2, destinations=7, blocks=9) for _ in range(2))
        assert one == two

    def test_groups_partition_the_destinations(self) -> None:
        """Pipelines rely on the sub-groups, each with its source first."""
        plan = self.make_planner().plan(sources=3, destinations=8, blocks=6)
        if plan.groups:
            assert sorted(node for group in plan.groups for node in group[1:]) == list(plan.destinations)
            assert all(group[0] in plan.sources for group in plan.groups)

    @pytest.mark.parametrize(("sources", "destinations", "blocks"), [(0, 3, 4), (1, -1, 4), (1, 3, 0), (-2, 3, 4)])
    def test_nonsense_is_refused(self, sources: int, destinations: int, blocks: int) -> None:
        """A PlanError, not a broken plan."""
        with pytest.raises(PlanError):
            self.make_planner().plan(sources=sources, destinations=destinations, blocks=blocks)

    def test_a_plan_can_be_put_on_real_nodes(self) -> None:
        """Names change, and nothing else."""
        plan = self.make_planner().plan(sources=1, destinations=4, blocks=3)
        names = [30, 11, 5, 99, 7]
        real = plan.on(names)
        validate_plan(real)
        assert real.on(plan.members) == plan
