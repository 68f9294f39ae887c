"""A batch's KV slots when requests move: between partitions, and from one batch into another."""

from __future__ import annotations

import pytest

from lambdascale.control import BatchLimits
from lambdascale.core import CapacityError
from lambdascale.inference.batch import Batch, Ticket


def batch(first_slot: int = 0, slots: int = 2, max_tokens: int = 8, kv_tokens: int | None = None) -> Batch:
    limits = BatchLimits(max_batch=slots, max_tokens=max_tokens)
    return Batch(limits, range(first_slot, first_slot + slots), 30, 50, kv_tokens)


def step(each: Batch) -> list[int]:
    """Run an iteration; the slots it used."""
    plan = each.next()
    assert plan is not None
    each.complete(plan, [1] * len(plan.getting))
    return [segment.slot for segment in plan.batch.segments]


def ticket(number: int, prompt: int = 4, output: int = 5) -> Ticket:
    return Ticket(number, [2] * prompt, prompt, output)


def test_kv_of_running_requests() -> None:
    """All tokens but the newest of those that decode, the prefilled part of the others, nothing of those that wait."""
    each = batch(slots=3, max_tokens=6)
    for number, prompt in ((1, 3), (2, 9), (3, 5)):
        each.add(ticket(number, prompt))
    step(each)
    assert each.kv_slots() == [(0, 3), (1, 3)]
    step(each)
    assert each.kv_slots() == [(0, 4), (1, 8)]


def test_recomputing_frees_the_slots_and_keeps_the_tokens() -> None:
    each = batch()
    each.add(ticket(1))
    step(each)
    step(each)
    each.recompute()
    assert each.kv_slots() == []
    plan = each.next()
    assert plan is not None
    assert plan.iteration.prefill_tokens == 6
    assert plan.tokens == [2, 2, 2, 2, 1, 1]


def test_a_preempted_request_gives_its_slot_back_and_begins_anew() -> None:
    each = batch(kv_tokens=12)
    each.add(ticket(1, prompt=4, output=8))
    each.add(ticket(2, prompt=4, output=8))
    for _ in range(3):
        assert step(each) == [0, 1]
    plan = each.next()
    assert plan is not None
    assert [segment.slot for segment in plan.batch.segments] == [0]
    assert each.kv_slots() == [(0, 6)]
    assert (each.preemptions, each.cached_slot(2), len(each)) == (1, None, 2)
    each.complete(plan, [1])
    while 1 in each:
        step(each)
    plan = each.next()
    assert plan is not None
    assert (plan.tokens, plan.positions) == ([2, 2, 2, 2, 1, 1, 1], [3])


def test_a_preempted_request_gives_a_borrowed_slot_up() -> None:
    here, other = batch(kv_tokens=14), batch(first_slot=2)
    here.add(ticket(1, output=8))
    other.add(ticket(11, output=8))
    step(here)
    step(other)
    here.absorb(other)
    while here.borrowed or step(here) == [0]:
        if here.preemptions:
            break
        step(here)
    assert (here.preemptions, here.borrowed) == (1, [])
    while 1 in here:
        step(here)
    assert step(here) == [0]


def test_less_memory_counts_from_the_next_iteration() -> None:
    each = batch()
    each.add(ticket(1, output=8))
    each.add(ticket(2, output=8))
    step(each)
    each.limit(12)
    assert step(each) == [0, 1]
    each.limit(1000)
    assert each.next() is not None
    with pytest.raises(CapacityError, match="needs 40 tokens of KV memory, a slot has 30"):
        each.check(ticket(3, prompt=35))
    each.limit(12)
    with pytest.raises(CapacityError, match="needs 14 tokens of KV memory, the instance has 12"):
        each.check(ticket(3, prompt=9))


def merged() -> tuple[Batch, Batch]:
    """Requests 1 and 2 run in a batch with slots 0 and 1, requests 11 and 12 come from one with slots 2 and 3."""
    here, other = batch(), batch(first_slot=2)
    for number in (1, 2):
        here.add(ticket(number, output=2))
        other.add(ticket(10 + number))
    step(here)
    step(other)
    here.absorb(other)
    return here, other


def test_absorbed_requests_keep_their_slots_and_wait_without_losing_kv() -> None:
    here, other = merged()
    assert len(other) == 0
    assert sorted(here.kv_slots()) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert sorted(here.borrowed) == [2, 3]
    assert [here.cached_slot(number) for number in (11, 12)] == [2, 3]
    assert here.uncache() == [], "KV in slots moves with the batch"
    assert step(here) == [0, 1]
    plan = here.next()
    assert plan is not None
    assert (plan.iteration.prefill_tokens, plan.settling) == (0, [])
    assert [segment.slot for segment in plan.batch.segments] == [2, 3]


def test_borrowed_slots_are_not_given_to_others() -> None:
    """Slots 0 and 1 were the other batch's, and are again when the absorbed request has ended."""
    here, other = batch(first_slot=2), batch()
    other.add(ticket(11))
    step(other)
    here.absorb(other)
    here.take(11)
    assert here.borrowed == []
    here.add(ticket(21))
    other.add(ticket(22))
    assert step(here) == [2]
    assert step(other) == [0]


def test_a_prefill_under_way_begins_anew_in_the_other_batch() -> None:
    here, other = batch(), batch(first_slot=2)
    other.add(ticket(11, prompt=12))
    step(other)
    here.absorb(other)
    assert here.kv_slots() == []
    assert step(here) == [0]
    assert here.kv_slots() == [(0, 8)]
