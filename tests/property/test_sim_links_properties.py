"""Recorded grants of random flows: no port over capacity, every byte accounted for, max-min fair at every moment."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from itertools import pairwise
from math import inf, isclose

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lambdascale.sim.kernel import Kernel
from lambdascale.sim.links import Flow as Present
from lambdascale.sim.links import Grant, LinkNetwork, Port

RATES = [1.0, 2.0, 3.5, 10.0]
FLOW = st.tuples(
    st.sampled_from([0.0, 0.5, 1.0, 2.25]),  # start
    st.dictionaries(st.integers(0, 3), st.sampled_from([1.0, 1.0, 0.5, 2.0]), min_size=1, max_size=3),  # ports and weights
    st.sampled_from([0.0, 1.0, 3.0, 7.5]),  # bytes
    st.sampled_from([inf, 0.4, 2.0]),
    st.sampled_from([None, None, None, 1.0, 3.0]),  # cancelled at
)


Flow = tuple[float, dict[int, float], float, float, float | None]


def run(script: list[Flow]) -> tuple[list[Grant], dict[int, float], set[int]]:
    kernel = Kernel()
    links = LinkNetwork(kernel, record_grants=True)
    ports = [Port(f"p{i}", rate) for i, rate in enumerate(RATES)]
    done: dict[int, float] = {}
    cancelled: set[int] = set()

    def start(index: int) -> None:
        _, used, size, cap, cancel_at = script[index]

        def finished() -> None:
            assert index not in done
            assert index not in cancelled
            done[index] = kernel.now

        weights = tuple(used.values())
        flow = links.start(tuple(ports[p] for p in used), size, finished, cap, weights=None if set(weights) == {1.0} else weights)
        ids[flow.flow_id] = index
        if cancel_at is not None:
            kernel.at(max(cancel_at, kernel.now), lambda _: index in done or (cancelled.add(index), links.cancel(flow)))

    ids: dict[int, int] = {}
    for index, (at, *_) in enumerate(script):
        kernel.at(at, start, index)
    while kernel.step():
        pass
    grants = [Grant(ids[g.flow_id], g.ports, g.begin_s, g.end_s, g.rate, g.cap, g.weights) for g in links.grants or []]
    return grants, done, cancelled


@settings(max_examples=200, deadline=None)
@given(st.lists(FLOW, max_size=9))
def test_shares_are_feasible_complete_and_max_min_fair(
    script: list[Flow],
) -> None:
    grants, done, cancelled = run(script)
    capacity = {f"p{i}": rate for i, rate in enumerate(RATES)}
    moved: dict[int, float] = defaultdict(float)
    for grant in grants:
        moved[grant.flow_id] += grant.rate * (grant.end_s - grant.begin_s)
    for index, (_, _, size, _, _) in enumerate(script):
        assert (index in done) != (index in cancelled)
        if index in done:
            assert isclose(moved[index], size, rel_tol=1e-9, abs_tol=1e-9)
    times = sorted({g.begin_s for g in grants} | {g.end_s for g in grants})
    for begin, end in pairwise(times):
        if end - begin < 1e-9:
            continue
        middle = (begin + end) / 2
        active = [g for g in grants if g.begin_s <= middle < g.end_s]
        taken = [(name, g.rate * weight) for g in active for name, weight in zip(g.ports, g.weights, strict=True)]
        load = {name: sum(rate for used, rate in taken if used == name) for name in capacity}
        assert all(load[name] <= capacity[name] * (1 + 1e-9) for name in capacity)
        for g in active:
            at_cap = isclose(g.rate, g.cap, rel_tol=1e-9)
            bottleneck = any(
                isclose(load[name], capacity[name], rel_tol=1e-9)
                and all(other.rate <= g.rate * (1 + 1e-9) for other in active if name in other.ports)
                for name in g.ports
            )
            assert at_cap or bottleneck, f"flow {g.flow_id} could be faster"


def exact_rates(used: dict[int, dict[int, float]], caps: dict[int, float]) -> dict[int, Fraction]:
    """Raise all rates together; a flow stops at its cap or when one of its ports is full. In rationals."""
    rates = {flow: Fraction(0) for flow in used}
    rising = set(used)
    while rising:
        weights = {f: {p: Fraction(weight) for p, weight in of.items()} for f, of in used.items()}
        room = {p: Fraction(rate) - sum(rates[f] * weights[f].get(p, 0) for f in used) for p, rate in enumerate(RATES)}
        users = {p: sum(weights[f].get(p, 0) for f in rising) for p in room}
        steps = [room[p] / users[p] for p in room if users[p]] + [Fraction(caps[f]) - rates[f] for f in rising if caps[f] < inf]
        step = min(steps)
        for flow in rising:
            rates[flow] += step
        full = {p for p in room if users[p] and room[p] == step * users[p]}
        rising = {f for f in rising if rates[f] != caps[f] and full.isdisjoint(used[f])}
    return rates


def exact_completions(script: list[Flow]) -> dict[int, Fraction]:
    """Return the end of each flow if all rates are computed anew whenever anything changes. Nothing is cancelled."""
    now, left, done = Fraction(0), dict[int, Fraction](), dict[int, Fraction]()
    waiting = sorted(range(len(script)), key=lambda index: script[index][0])
    while waiting or left:
        rates = exact_rates({f: script[f][1] for f in left}, {f: script[f][3] for f in left})
        ends = [now + left[f] / rates[f] for f in left] + [Fraction(script[f][0]) for f in waiting[:1]]
        then = min(ends)
        left = {f: left[f] - rates[f] * (then - now) for f in left}
        now = then
        done |= {f: now for f in left if left[f] == 0}
        left = {f: rest for f, rest in left.items() if rest}
        while waiting and script[waiting[0]][0] <= now:
            flow = waiting.pop(0)
            left[flow] = Fraction(script[flow][2])
    return done


@settings(max_examples=100, deadline=None)
@given(st.lists(FLOW, max_size=8))
def test_completions_are_those_of_an_exact_simulation_without_shortcuts(
    script: list[Flow],
) -> None:
    script = [(*flow[:4], None) for flow in script]
    _, done, _ = run(script)
    exact = exact_completions(script)
    assert set(done) == set(exact)
    assert all(isclose(done[flow], exact[flow], rel_tol=1e-9, abs_tol=1e-12) for flow in exact)


@given(st.lists(FLOW, max_size=6))
@settings(max_examples=30, deadline=None)
def test_runs_are_deterministic(script: list[Flow]) -> None:
    assert run(script) == run(script)


CHAIN = st.tuples(
    st.sampled_from([0.0, 0.5, 1.0]),  # start
    st.dictionaries(st.integers(0, 3), st.sampled_from([1.0, 0.5]), min_size=1, max_size=3),  # ports and weights
    st.lists(st.sampled_from([0.0, 1.0, 3.0]), min_size=1, max_size=4),  # bytes of flows, each begun when the last one is done
    st.sampled_from([inf, 0.4]),
    st.sampled_from([None, None, 1.0, 2.5]),  # cancelled at
)
Chain = tuple[float, dict[int, float], list[float], float, float | None]
CHANGE = st.tuples(st.sampled_from([0.5, 0.75, 2.0]), st.integers(0, 3), st.sampled_from(RATES))  # at, port, new rate
Change = tuple[float, int, float]


def chains(script: list[Chain], changes: list[Change], *, in_parts: bool) -> list[tuple[int, float]]:
    """Ends of the flows of each chain; ``in_parts``: one flow takes the place of the one before."""
    kernel = Kernel()
    links = LinkNetwork(kernel)
    ports = [Port(f"p{i}", rate) for i, rate in enumerate(RATES)]
    ends: list[tuple[int, float]] = []
    present: dict[int, Present] = {}

    def start(index: int) -> None:
        _, used, sizes, cap, _ = script[index]
        left = list(sizes[1:])

        def begin(size: float) -> None:
            crossed, weights = tuple(ports[p] for p in used), tuple(used.values())
            present[index] = links.start(crossed, size, done, cap, weights=weights, in_parts=in_parts)

        def done() -> float | None:
            ends.append((index, kernel.now))
            if left and in_parts:
                return left.pop(0)
            if left:
                begin(left.pop(0))
            return None

        begin(sizes[0])

    for index, (at, *_, cancel_at) in enumerate(script):
        kernel.at(at, start, index)
        if cancel_at is not None:
            kernel.at(cancel_at, lambda number: links.cancel(present[number]), index)
    for at, port, rate in changes:
        kernel.at(at, lambda change: links.set_rate(ports[change[0]], change[1]), (port, rate))
    while kernel.step():
        pass
    return ends


@settings(max_examples=300, deadline=None)
@given(st.lists(CHAIN, max_size=6), st.lists(CHANGE, max_size=2))
# The third flow lets the other two end together, in the order in which they are numbered: the first one's second part comes last.
@example([(0.0, {0: 1.0}, [1, 2], inf, None), (0.5, {1: 2.0}, [2.5], inf, None), (2.0, {0: 1.0, 1: 2.0}, [3], inf, None)], [])
def test_a_flow_in_the_place_of_another_is_like_a_new_one(script: list[Chain], changes: list[Change]) -> None:
    """Mutations: a part keeps the number, the time or the end of the one before; it goes on after a cancel or at an old rate."""
    assert chains(script, changes, in_parts=True) == chains(script, changes, in_parts=False)
