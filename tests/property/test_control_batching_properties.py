"""The batch scheduler against a model that touches every sequence at every step."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lambdascale.control import BatchedRequest, BatchLimits, BatchScheduler

REQUEST = st.tuples(st.integers(1, 40), st.integers(1, 12))
KV = 60


@st.composite
def scripts(draw: st.DrawFn) -> tuple[BatchLimits, list[tuple[int, tuple[int, int]]]]:
    max_batch = draw(st.integers(1, 4))
    limits = BatchLimits(
        mode=draw(st.sampled_from(["continuous", "static"])), max_batch=max_batch, max_tokens=draw(st.integers(max_batch, 50))
    )
    arrivals = draw(st.lists(st.tuples(st.integers(0, 20), REQUEST), max_size=12))
    return limits, sorted(arrivals, key=lambda entry: entry[0])


@settings(max_examples=150, deadline=None)
@given(scripts(), st.booleans(), st.randoms())
def test_every_sequence_gets_exactly_its_tokens_within_the_limits(
    script: tuple[BatchLimits, list[tuple[int, tuple[int, int]]]], merge: bool, random: object
) -> None:
    limits, arrivals = script
    scheduler = BatchScheduler(limits, KV)
    wanted = {i: output for i, (_, (_, output)) in enumerate(arrivals)}
    first, done, admitted_order = [], {}, []
    clock = 0
    pending = list(enumerate(arrivals))
    while pending or len(scheduler):
        while pending and pending[0][1][0] <= clock:
            index, (_, (prompt, output)) = pending.pop(0)
            scheduler.add(BatchedRequest(index, prompt, output))
        iteration = scheduler.schedule()
        if iteration is None:
            assert pending, "idle with work inside"
            clock += 1
            continue
        before = {i: s.context_tokens - 1 + scheduler._step - s._joined for i, s in scheduler.decoding.items()}
        assert iteration.context_tokens == sum(before.values())
        assert iteration.decodes == len(before)
        assert scheduler.running <= limits.max_batch
        assert sum(s.kv_tokens for s in [*scheduler.decoding.values(), *scheduler._prefilling]) == scheduler._reserved <= KV
        if limits.mode == "continuous":
            assert iteration.decodes + iteration.prefill_tokens <= limits.max_tokens
        assert iteration.prefills == [] or iteration.max_steps == 1
        steps = iteration.max_steps if merge else 1
        new, finished = scheduler.complete(iteration, steps)
        first += [s.request_id for s in new]
        admitted_order += [s.request_id for s in new]
        for sequence in finished:
            assert sequence.request_id not in done
            done[sequence.request_id] = sequence.produced
        clock += steps
    assert done == wanted
    assert sorted(first) == sorted(wanted)
    assert admitted_order == sorted(admitted_order), "first come, first served"
    assert scheduler._context == 0
    assert scheduler._reserved == 0


@settings(max_examples=80, deadline=None)
@given(st.lists(REQUEST, min_size=1, max_size=8), st.integers(0, 30), st.booleans())
def test_a_drained_sequence_goes_on_where_it_was(requests: list[tuple[int, int]], steps: int, cached: bool) -> None:
    limits = BatchLimits(max_batch=3, max_tokens=16)
    here, there = BatchScheduler(limits, KV), BatchScheduler(limits, KV)
    for index, (prompt, output) in enumerate(requests):
        here.add(BatchedRequest(index, prompt, output))
    finished = []
    for _ in range(steps):
        iteration = here.schedule()
        if iteration is None:
            break
        finished += here.complete(iteration)[1]
    produced_before = {s.request_id: s.produced for s in finished}
    moved = here.drain()
    assert len(here) == 0
    assert here.schedule() is None
    for s in moved:
        there.add(BatchedRequest(s.request_id, s.prompt_tokens, s.output_tokens, s.produced, cached and s.produced > 0))
    firsts = {s.request_id for s in moved if s.produced == 0}
    seen_first: set[int] = set()
    while (iteration := there.schedule()) is not None:
        new, done = there.complete(iteration, iteration.max_steps)
        seen_first |= {s.request_id for s in new}
        produced_before |= {s.request_id: s.produced for s in done}
    assert seen_first == firsts, "a request that had tokens gets no second first token"
    assert produced_before == {i: output for i, (_, output) in enumerate(requests)}
