"""The batch scheduler in small steps: who joins, what an iteration runs, who leaves, and whose memory is free then."""

from __future__ import annotations

import pytest

from lambdascale.control import BatchedRequest, BatchLimits, BatchScheduler
from lambdascale.core import UserError


def scheduler(kv: int = 100, requests: tuple[tuple[int, int], ...] = (), **limits: object) -> BatchScheduler:
    """A scheduler with waiting requests 0, 1, ... of (prompt, output) tokens."""
    made = BatchScheduler(BatchLimits(**limits), kv)
    for number, (prompt, output) in enumerate(requests):
        made.add(BatchedRequest(number, prompt, output))
    return made


def run(batch: BatchScheduler, steps: int = 1, stopped: tuple[int, ...] = ()) -> tuple[list[int], list[int]]:
    """One iteration, repeated; ids of (first tokens, finished)."""
    iteration = batch.schedule()
    assert iteration is not None
    first, finished = batch.complete(iteration, steps, stopped)
    return [s.request_id for s in first], [s.request_id for s in finished]


def prefills(batch: BatchScheduler) -> list[tuple[int, int]]:
    iteration = batch.schedule()
    assert iteration is not None
    return [(sequence.request_id, count) for sequence, count in iteration.prefills]


def test_a_request_from_prefill_to_its_end() -> None:
    batch = scheduler(requests=((10, 4),))
    iteration = batch.schedule()
    assert iteration is not None
    assert (iteration.decodes, iteration.prefill_tokens, iteration.attended_tokens, iteration.max_steps) == (0, 10, 55, 1)
    assert isinstance(iteration.attended_tokens, int)
    assert (len(batch), batch.running) == (1, 1)
    first, finished = batch.complete(iteration)
    assert ([s.produced for s in first], finished) == ([1], [])
    iteration = batch.schedule()
    assert iteration is not None
    assert (iteration.decodes, iteration.context_tokens, iteration.max_steps) == (1, 10, 3)
    assert batch.complete(iteration, 2) == ([], [])
    iteration = batch.schedule()
    assert iteration is not None
    assert (iteration.context_tokens, iteration.max_steps) == (12, 1)
    first, finished = batch.complete(iteration)
    assert [(s.request_id, s.produced) for s in finished] == [(0, 4)]
    assert batch.schedule() is None
    assert (len(batch), batch.running) == (0, 0)


def test_a_request_with_its_cache_needs_no_prefill() -> None:
    batch = scheduler()
    batch.add(BatchedRequest(7, 5, 10, produced=2, cached=True))
    iteration = batch.schedule()
    assert iteration is not None
    assert (iteration.prefills, iteration.decodes, iteration.context_tokens, iteration.max_steps) == ([], 1, 6, 8)
    assert run(batch, 8) == ([], [7]), "no second first token"


def test_a_request_without_its_cache_prefills_what_it_has_produced_too() -> None:
    batch = scheduler()
    batch.add(BatchedRequest(7, 5, 10, produced=2))
    assert prefills(batch) == [(7, 7)]
    assert run(batch) == ([], [])
    assert run(batch, 7) == ([], [7])


def test_everything_inside_counts() -> None:
    batch = scheduler(requests=((5, 9), (5, 9)), max_batch=2)
    run(batch)
    batch.add(BatchedRequest(2, 5, 9))
    assert (len(batch), batch.running) == (3, 2)
    assert not batch.admits
    batch = scheduler(requests=((5, 9), (9, 9), (5, 9)), max_batch=2, max_tokens=8)
    run(batch)
    assert (len(batch), batch.running, len(batch.decoding)) == (3, 2, 1)


def test_no_more_join_than_the_batch_has_places() -> None:
    batch = scheduler(requests=((5, 9), (5, 9)), max_batch=3)
    run(batch)
    for number in (2, 3, 4):
        batch.add(BatchedRequest(number, 1, 9))
    assert batch.admits
    assert prefills(batch) == [(2, 1)]
    assert batch.running == 3


# -- KV memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv", "requests", "admitted"),
    [
        (40, ((20, 20), (20, 20)), [0, 1]),  # the prompts fit; where the answers end is no matter
        (39, ((20, 19), (20, 19)), [0]),
        (99, ((50, 1), (30, 1), (20, 1), (19, 1)), [0, 1]),  # 3 would fit, but it came after 2
        (400, ((200, 9), (197, 9)), [0]),  # a hundredth stays free
        (400, ((200, 9), (196, 9)), [0, 1]),
        (200, ((199, 1),), [0]),  # nothing needs to stay free for a request that is alone
    ],
)
def test_what_exists_of_a_request_is_admitted(kv: int, requests: tuple[tuple[int, int], ...], admitted: list[int]) -> None:
    batch = scheduler(kv, requests)
    assert batch.admits
    assert [number for number, _ in prefills(batch)] == admitted
    assert batch.kv_held == sum(requests[number][0] for number in admitted)


def test_what_a_request_has_produced_elsewhere_exists_too() -> None:
    for produced, cached, admitted in ((10, False, True), (11, False, False), (10, True, True), (11, True, False)):
        batch = scheduler(40, ((10, 2),))
        batch.add(BatchedRequest(1, 20, 20, produced, cached))
        batch.schedule()
        assert batch.running == 1 + admitted, (produced, cached)


def test_the_next_tokens_of_the_others_come_before_a_newcomer() -> None:
    batch = scheduler(40, ((9, 20), (9, 20)))
    run(batch)
    batch.add(BatchedRequest(2, 20, 5))
    assert prefills(batch) == [(2, 20)], "9 and 9, a token each, and 20"
    batch = scheduler(40, ((9, 20), (9, 20)))
    run(batch)
    batch.add(BatchedRequest(2, 21, 5))
    assert not batch.admits
    iteration = batch.schedule()
    assert iteration is not None
    assert iteration.prefills == []


def full() -> BatchScheduler:
    """40 tokens of KV, full: requests 0, 1 and 2 of (10, 30) tokens decode, with 13 tokens each and 1 free."""
    batch = scheduler(40, ((10, 30), (10, 30), (10, 30)), max_batch=4)
    run(batch)
    assert run(batch, 3) == ([], [])
    assert batch.kv_held == 39
    return batch


def test_steps_are_merged_until_the_memory_runs_out() -> None:
    batch = scheduler(40, ((10, 30), (10, 30), (10, 30)), max_batch=4)
    run(batch)
    iteration = batch.schedule()
    assert iteration is not None
    assert (iteration.decodes, iteration.max_steps) == (3, 3), "30 tokens, 3 more each step"
    batch = scheduler(40, ((10, 4), (10, 30), (10, 30)), max_batch=4)
    run(batch)
    iteration = batch.schedule()
    assert iteration is not None
    assert iteration.max_steps == 3, "the first ends then"
    batch = scheduler(40, ((10, 3), (10, 30), (10, 30)), max_batch=4)
    run(batch)
    iteration = batch.schedule()
    assert iteration is not None
    assert iteration.max_steps == 2


def test_the_request_admitted_last_is_preempted_and_computed_anew() -> None:
    batch = full()
    batch.add(BatchedRequest(3, 1, 1))
    iteration = batch.schedule()
    assert iteration is not None
    assert [(s.request_id, s.produced, s.prefilled, s.cached) for s in iteration.preempted] == [(2, 4, 0, False)]
    assert (iteration.decodes, iteration.context_tokens, iteration.max_steps) == (2, 26, 7)
    assert (batch.running, len(batch), batch.preemptions) == (2, 4, 1)
    assert [s.request_id for s in batch.waiting] == [2, 3], "before those that came later, which may not overtake it"
    assert iteration.prefills == [], "nobody joins an iteration that somebody had to make room for"
    assert batch.complete(iteration, 7) == ([], [])
    iteration = batch.schedule()
    assert iteration is not None
    assert [s.request_id for s in iteration.preempted] == [1]
    assert batch.preemptions == 2, "all so far are counted"
    assert [s.request_id for s in batch.waiting] == [1, 2, 3]
    assert (iteration.decodes, iteration.context_tokens, iteration.max_steps) == (1, 20, 19)
    assert run(batch, 19) == ([], [0])
    assert prefills(batch) == [(1, 21), (2, 14), (3, 1)]
    assert run(batch) == ([3], [3]), "no second first token"


def test_a_request_in_its_prefill_is_preempted_before_those_that_decode() -> None:
    batch = scheduler(40, ((4, 30), (4, 30)), max_batch=3, max_tokens=8)
    run(batch)
    batch.add(BatchedRequest(2, 27, 5))
    assert prefills(batch) == [(2, 6)]
    run(batch)
    assert (batch.kv_held, batch.kv_in_use) == (37, 16)
    run(batch)
    assert batch.kv_held == 39
    iteration = batch.schedule()
    assert iteration is not None
    assert [(s.request_id, s.prefilled) for s in iteration.preempted] == [(2, 0)]
    assert (batch.kv_held, iteration.prefills, iteration.max_steps) == (12, [], 14)


def test_several_are_preempted_when_memory_is_taken_away() -> None:
    batch = full()
    batch.kv_tokens = 20
    iteration = batch.schedule()
    assert iteration is not None
    assert [s.request_id for s in iteration.preempted] == [2, 1]
    assert [s.request_id for s in batch.waiting] == [1, 2]
    assert batch.preemptions == 2
    batch.kv_tokens = 5
    iteration = batch.schedule()
    assert iteration is not None
    assert (iteration.decodes, iteration.max_steps, iteration.preempted) == (1, 1, []), "the one that is left goes on"


def test_the_last_one_is_never_preempted() -> None:
    batch = scheduler(20, ((5, 15),))
    run(batch)
    iteration = batch.schedule()
    assert iteration is not None
    assert (iteration.max_steps, iteration.preempted) == (14, ())
    assert run(batch, 14) == ([], [0])


def test_a_request_that_came_with_its_cache_is_preempted_as_any_other() -> None:
    batch = scheduler(30, ((10, 15),))
    run(batch)
    batch.add(BatchedRequest(1, 10, 15, produced=5, cached=True))
    assert run(batch, 3) == ([], [])
    iteration = batch.schedule()
    assert iteration is not None
    assert [(s.request_id, s.produced, s.cached) for s in iteration.preempted] == [(1, 8, False)]


def test_a_static_batch_goes_on_without_those_that_were_preempted() -> None:
    batch = scheduler(42, ((10, 12), (10, 30), (10, 30)), mode="static", max_batch=3)
    run(batch)
    run(batch, 4)
    assert run(batch, 7) == ([], [0])
    assert [s.request_id for s in batch.waiting] == [2]
    assert not batch.admits, "one of the batch still runs"


def test_a_batch_prefills_within_its_token_budget() -> None:
    assert prefills(scheduler(requests=((6, 2), (4, 2), (1, 2)), max_tokens=10, max_batch=3)) == [(0, 6), (1, 4)], "spent"
    assert prefills(scheduler(requests=((6, 2), (3, 2), (5, 2)), max_tokens=10, max_batch=3)) == [(0, 6), (1, 3), (2, 1)]
    batch = scheduler(requests=((6, 5), (20, 5)), max_tokens=10, max_batch=2)
    assert prefills(batch) == [(0, 6), (1, 4)]
    assert run(batch) == ([0], [])
    assert prefills(batch) == [(1, 9)], "a decode takes one of the ten"
    run(batch)
    assert prefills(batch) == [(1, 7)]
    assert run(batch) == ([1], [])


@pytest.mark.parametrize("end", ["one token", "stopped", "last token", "stopped later", "removed", "drained"])
def test_whoever_leaves_frees_exactly_its_memory(end: str) -> None:
    """20 of 59 tokens each: once one of two has ended, one more fits and not two."""
    batch = scheduler(59, ((29 if end == "one token" else 20, 1 if end == "one token" else 10), (20, 10)), max_batch=4)
    if end == "stopped":
        assert run(batch, 1, (0,)) == ([0, 1], [0])
    else:
        run(batch)
    if end == "last token":
        batch = scheduler(59, ((20, 10), (10, 20)), max_batch=4)
        run(batch)
        assert run(batch, 9) == ([], [0])
    if end == "stopped later":
        assert run(batch, 2, (0,)) == ([], [0])
    if end == "removed":
        batch.remove(0)
    if end == "drained":
        assert [s.request_id for s in batch.drain()] == [0, 1]
        batch.add(BatchedRequest(8, 20, 10))
    for number in (5, 6):
        batch.add(BatchedRequest(number, 20, 10))
    assert [number for number, _ in prefills(batch)] == ([8, 5] if end == "drained" else [5])


def test_stopping_one_leaves_the_others_their_ends() -> None:
    batch = scheduler(requests=((5, 20), (5, 6), (5, 9)))
    run(batch)
    assert run(batch, 2, (1,)) == ([], [1])
    iteration = batch.schedule()
    assert iteration is not None
    assert (iteration.decodes, iteration.context_tokens, iteration.max_steps) == (2, 14, 6)
    assert run(batch, 6) == ([], [2])
    assert run(batch, 11) == ([], [0])


def test_sequences_that_end_together_leave_together() -> None:
    batch = scheduler(requests=((5, 4), (7, 4), (9, 5)))
    run(batch)
    assert run(batch, 3) == ([], [0, 1])
    assert run(batch, 1) == ([], [2])


def test_a_stopped_name_that_is_not_decoding_is_ignored() -> None:
    batch = scheduler(requests=((5, 4),))
    run(batch)
    assert run(batch, 1, (3,)) == ([], [])


def test_static_batches_take_no_newcomers_and_ignore_the_budget() -> None:
    batch = scheduler(requests=((30, 2), (30, 3)), mode="static", max_batch=2, max_tokens=10)
    assert prefills(batch) == [(0, 30), (1, 30)]
    run(batch)
    batch.add(BatchedRequest(2, 5, 2))
    assert not batch.admits
    assert run(batch) == ([], [0])
    assert not batch.admits, "one of the batch still runs"
    run(batch)
    assert batch.admits
    assert prefills(batch) == [(2, 5)]


def test_a_drained_scheduler_gives_its_requests_in_order_with_what_they_produced() -> None:
    batch = scheduler(kv=1000, requests=((5, 9), (5, 9), (50, 9), (5, 9)), max_batch=3, max_tokens=20)
    run(batch)
    run(batch)
    assert [(s.request_id, s.produced, s.prefilled) for s in batch.drain()] == [(0, 2, 5), (1, 2, 5), (2, 0, 28), (3, 0, 0)]
    assert (len(batch), batch.schedule()) == (0, None)


def test_a_removed_request_is_returned_from_wherever_it_is() -> None:
    batch = scheduler(requests=((5, 9), (30, 9), (5, 9)), max_batch=2, max_tokens=10)
    run(batch)
    removed = [batch.remove(number) for number in (0, 1, 2, 3)]
    assert [None if s is None else s.request_id for s in removed] == [0, 1, 2, None]
    assert (len(batch), batch.schedule()) == (0, None)


def test_limits_are_checked() -> None:
    assert BatchLimits(max_batch=5, max_tokens=5).max_tokens == 5
    with pytest.raises(UserError, match=r"BatchLimits\.max_tokens \(4\) must not be below max_batch \(5\)"):
        BatchLimits(max_batch=5, max_tokens=4)
    with pytest.raises(UserError, match=r"BatchLimits\.max_batch must be at least 1, not 0"):
        BatchLimits(max_batch=0)
    with pytest.raises(UserError, match="mode"):
        BatchLimits(mode="dynamic")
