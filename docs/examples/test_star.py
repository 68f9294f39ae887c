"""The tutorial's planner and system, through the conformance suites that the package ships."""

from __future__ import annotations

from dataclasses import replace

from star import Star

from lambdascale.control import SystemConfig
from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose
from lambdascale.multicast import MulticastPlanner, completion_rounds
from lambdascale.testing.planners import PlannerConformance
from lambdascale.testing.systems import SystemConformance

LAMBDASCALE = build(compose(["system=lambdascale"])).system


class TestStar(PlannerConformance):
    def make_planner(self) -> MulticastPlanner:
        return Star()

    def test_two_sources_take_half_the_time_of_one(self) -> None:
        one, two = (Star().plan(sources=sources, destinations=6, blocks=4) for sources in (1, 2))
        assert max(completion_rounds(one).values()) == 2 * max(completion_rounds(two).values()) == 24


class TestStarSystem(SystemConformance):
    def make_system(self) -> SystemConfig:
        return replace(LAMBDASCALE, start=replace(LAMBDASCALE.start, planner=Star()))
