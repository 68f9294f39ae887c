"""Time of planning, with nothing cached."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from lambdascale.multicast import BinomialPipeline, binomial
from lambdascale.pipelines import ComplementaryPipelines


@pytest.mark.parametrize(("nodes", "blocks"), [(8, 16), (128, 64), (1024, 64)])
def test_plan_a_multicast(benchmark: BenchmarkFixture, nodes: int, blocks: int) -> None:
    def clear() -> None:
        binomial._plan.cache_clear()
        binomial._schedule.cache_clear()

    plan = benchmark.pedantic(
        lambda: BinomialPipeline().plan(sources=1, destinations=nodes - 1, blocks=blocks), setup=clear, rounds=10
    )
    assert len(plan.rounds) == blocks + nodes.bit_length() - 2


@pytest.mark.parametrize(("sources", "nodes", "blocks"), [(2, 12, 16), (4, 1024, 64)])
def test_build_pipelines(benchmark: BenchmarkFixture, sources: int, nodes: int, blocks: int) -> None:
    plan = BinomialPipeline().plan(sources=sources, destinations=nodes - sources, blocks=blocks)
    assert benchmark(ComplementaryPipelines().pipelines, plan)
