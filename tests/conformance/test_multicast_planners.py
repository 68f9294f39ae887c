from __future__ import annotations

import pytest

from baselines.faasnet import BalancedTree, PrototypeTree
from baselines.nccl_broadcast import Chain
from lambdascale.core import PlanError
from lambdascale.multicast import BinomialPipeline, MulticastPlanner
from lambdascale.testing.planners import PlannerConformance


class TestBinomialShift(PlannerConformance):
    def make_planner(self) -> MulticastPlanner:
        return BinomialPipeline()


class TestBinomialHalfRoundRobin(PlannerConformance):
    def make_planner(self) -> MulticastPlanner:
        return BinomialPipeline(order="half", chunks="round_robin")


class TestBinomialShiftRoundRobin(PlannerConformance):
    def make_planner(self) -> MulticastPlanner:
        return BinomialPipeline(chunks="round_robin")


class TestBinomialHalf(PlannerConformance):
    def make_planner(self) -> MulticastPlanner:
        return BinomialPipeline(order="half")


class TestBinomialUnshifted(PlannerConformance):
    def make_planner(self) -> MulticastPlanner:
        return BinomialPipeline(order="none")


class TestBalancedTree(PlannerConformance):
    def make_planner(self) -> MulticastPlanner:
        return BalancedTree()


class TestPrototypeTree(PlannerConformance):
    max_nodes = 12

    def make_planner(self) -> MulticastPlanner:
        return PrototypeTree()

    @pytest.mark.parametrize(("nodes", "rounds"), [(2, 16), (3, 32), (4, 32), (5, 33), (7, 33), (8, 34), (12, 34)])
    def test_round_counts_of_the_prototype(self, nodes: int, rounds: int) -> None:
        assert len(self.make_planner().plan(sources=1, destinations=nodes - 1, blocks=16).rounds) == rounds

    def test_thirteen_nodes_are_too_many(self) -> None:
        with pytest.raises(PlanError, match="12 nodes, not 13"):
            self.make_planner().plan(sources=1, destinations=12, blocks=16)


class TestChain(PlannerConformance):
    def make_planner(self) -> MulticastPlanner:
        return Chain()

    @pytest.mark.parametrize(("nodes", "blocks"), [(2, 1), (5, 7), (40, 16)])
    def test_rounds_of_a_chain(self, nodes: int, blocks: int) -> None:
        plan = self.make_planner().plan(sources=1, destinations=nodes - 1, blocks=blocks)
        assert len(plan.rounds) == blocks + nodes - 2
        assert plan.streaming
