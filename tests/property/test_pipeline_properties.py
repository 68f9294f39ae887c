"""Pipelines are found without trying all ways: what is skipped could not have been chosen."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from lambdascale.core import Stage
from lambdascale.pipelines import Costs, divide

SECONDS = st.floats(0.0, 10.0)


@st.composite
def _costs(draw: st.DrawFn) -> Costs:
    sizes = draw(st.integers(1, 4))
    passes = st.lists(SECONDS, min_size=sizes, max_size=sizes).map(tuple)
    return Costs(batch_s=draw(passes), hop_s=draw(passes), overhead_s=draw(SECONDS), round_s=1.0)


@st.composite
def _stages(draw: st.DrawFn) -> tuple[Stage, ...]:
    lengths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=6))
    ends = [sum(lengths[: index + 1]) for index in range(len(lengths))]
    nodes = draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    return tuple(Stage(node, end - length, end - 1) for node, length, end in zip(nodes, lengths, ends, strict=True))


@given(_costs(), _stages(), SECONDS, SECONDS, st.lists(SECONDS, min_size=6, max_size=6), st.data())
def test_no_pipeline_saves_more_than_the_bound_of_an_earlier_round(
    costs: Costs, stages: tuple[Stage, ...], ready_s: float, later_s: float, alone_from_s: list[float], data: st.DataObject
) -> None:
    """The search ends once the bound is no more than what is saved already; rounding included."""
    batch = data.draw(st.integers(1, len(costs.batch_s)))
    nodes = len({stage.node for stage in stages})
    some = data.draw(st.permutations(alone_from_s))[:nodes]
    bound = costs.most_saved_s(sorted(alone_from_s), ready_s, batch)
    assert costs.saved_s(stages, ready_s + later_s, sorted(some), batch) <= bound


@given(
    st.integers(1, 7).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.sets(st.integers(0, b - 1)), min_size=1, max_size=4)))
)
def test_nodes_get_one_range_each_exactly_if_some_cut_allows_it(case: tuple[int, list[set[int]]]) -> None:
    """Compared with a trial of all cuts, in the order of the blocks that the nodes hold."""
    blocks, sets = case
    held = dict(enumerate(sets))
    order = sorted(held, key=lambda node: (sum(held[node]) / max(1, len(held[node])), node))
    ways = [(0, *inner, blocks) for inner in combinations(range(1, blocks), len(order) - 1)]
    fitting = [way for way in ways if all({*range(*part)} <= held[node] for node, part in zip(order, pairwise(way), strict=True))]
    found = divide(held, blocks)
    one_each = found is not None and [stage.node for stage in found] == order
    alone = any(len(of_node) == blocks for of_node in sets)
    assert one_each == (bool(fitting) and not alone)
    if found is not None:
        assert [block for stage in found for block in range(stage.first_block, stage.last_block + 1)] == [*range(blocks)]
        assert all({*range(stage.first_block, stage.last_block + 1)} <= held[stage.node] for stage in found)
