"""The batch scheduler against a model that touches every sequence at every step."""

from __future__ import annotations

import random
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from lambdascale.control import BatchedRequest, BatchLimits, BatchScheduler, Iteration

REQUEST = st.tuples(st.integers(1, 40), st.integers(1, 12))
KV = 60
Arrivals = list[tuple[int, tuple[int, int]]]


@st.composite
def scripts(draw: st.DrawFn) -> tuple[BatchLimits, Arrivals]:
    max_batch = draw(st.integers(1, 6))
    limits = BatchLimits(
        mode=draw(st.sampled_from(["continuous", "static"])), max_batch=max_batch, max_tokens=draw(st.integers(max_batch, 50))
    )
    arrivals = draw(st.lists(st.tuples(st.integers(0, 20), REQUEST), max_size=12))
    return limits, sorted(arrivals, key=lambda entry: entry[0])


class Run:
    """A run of a scheduler to its end, or to the end of the first answer; ``log``: iteration by iteration.

    ``steps_of`` chooses how often an iteration is repeated.
    """

    def __init__(
        self,
        limits: BatchLimits,
        arrivals: Arrivals,
        steps_of: Callable[[Iteration], int],
        *,
        until_first: bool = False,
    ) -> None:
        self.limits = limits
        self.scheduler = BatchScheduler(limits, KV)
        self.first: list[int] = []
        self.done: dict[int, int] = {}
        self.ended_at: dict[int, int] = {}
        self.log: list[tuple[object, ...]] = []
        clock, pending = 0, list(enumerate(arrivals))
        while pending or len(self.scheduler):
            while pending and pending[0][1][0] <= clock:
                index, (_, (prompt, output)) = pending.pop(0)
                self.scheduler.add(BatchedRequest(index, prompt, output))
            iteration = self.scheduler.schedule()
            if iteration is None:
                assert pending, "idle with work inside"
                clock += 1
                continue
            self._check(iteration)
            steps = steps_of(iteration)
            new, finished = self.scheduler.complete(iteration, steps)
            assert self.scheduler.kv_held <= KV
            clock += steps
            self.first += [s.request_id for s in new]
            for sequence in finished:
                assert sequence.request_id not in self.done
                self.done[sequence.request_id], self.ended_at[sequence.request_id] = sequence.produced, clock
            if finished and until_first:
                return
        assert self.scheduler.kv_held == 0

    def _check(self, iteration: Iteration) -> None:
        scheduler = self.scheduler
        tokens = {i: s.context_tokens + scheduler._step - s._joined for i, s in scheduler.decoding.items()}
        assert iteration.context_tokens == sum(tokens.values()) - len(tokens)
        assert iteration.decodes == len(tokens)
        assert scheduler.running <= self.limits.max_batch
        held = sum(tokens.values()) + sum(s.context_tokens for s in scheduler._prefilling)
        assert held <= KV, "the next token of every decoding sequence has its place"
        if self.limits.mode == "continuous":
            assert iteration.decodes + iteration.prefill_tokens <= self.limits.max_tokens
        assert iteration.prefills == [] or iteration.max_steps == 1
        kept = [*scheduler.decoding, *(s.request_id for s in scheduler._prefilling)]
        lost = [s.request_id for s in iteration.preempted]
        assert lost == sorted(lost, reverse=True)
        if lost:
            assert max(kept) < min(lost), "those admitted last lose their memory"
            assert not iteration.prefills or iteration.prefills[-1][0].request_id in kept
        waiting = [s.request_id for s in scheduler.waiting]
        assert waiting == sorted(waiting), "first come, first served"
        assert not waiting or not kept or max(kept) < min(waiting)
        self.log.append((sorted(kept), [(s.request_id, n) for s, n in iteration.prefills], iteration.context_tokens, lost))


def one(iteration: Iteration) -> int:
    return 1


def most(iteration: Iteration) -> int:
    return iteration.max_steps


@settings(max_examples=300, deadline=None)
@given(scripts(), st.sampled_from([one, most]))
def test_every_sequence_gets_exactly_its_tokens_within_the_limits(
    script: tuple[BatchLimits, Arrivals], steps_of: Callable[[Iteration], int]
) -> None:
    limits, arrivals = script
    run = Run(limits, arrivals, steps_of)
    assert run.done == {i: output for i, (_, (_, output)) in enumerate(arrivals)}
    assert sorted(run.first) == sorted(run.done)
    assert run.first == sorted(run.first), "first come, first served"


@settings(max_examples=200, deadline=None)
@given(scripts())
def test_merged_steps_change_nothing(script: tuple[BatchLimits, Arrivals]) -> None:
    """Every request ends at the same step if all are present from the beginning."""
    limits, arrivals = script
    arrivals = [(0, request) for _, request in arrivals]
    apart, merged = Run(limits, arrivals, one), Run(limits, arrivals, most)
    assert merged.ended_at == apart.ended_at
    assert merged.scheduler.preemptions == apart.scheduler.preemptions


@settings(max_examples=200, deadline=None)
@given(scripts(), st.randoms(use_true_random=False))
def test_nothing_depends_on_where_answers_end_before_the_first_does(
    script: tuple[BatchLimits, Arrivals], shuffler: random.Random
) -> None:
    limits, arrivals = script
    outputs = [output for _, (_, output) in arrivals]
    shuffler.shuffle(outputs)
    other = [(at, (prompt, output)) for (at, (prompt, _)), output in zip(arrivals, outputs, strict=True)]
    logs = [Run(limits, each, one, until_first=True).log for each in (arrivals, other)]
    shortest = min(map(len, logs))
    assert logs[0][:shortest] == logs[1][:shortest]


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
