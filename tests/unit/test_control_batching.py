from __future__ import annotations

import pytest

from lambdascale.control import BatchedRequest, BatchLimits, BatchScheduler
from lambdascale.core import UserError


def test_a_prompt_longer_than_the_budget_is_prefilled_in_chunks_beside_decodes() -> None:
    scheduler = BatchScheduler(BatchLimits(max_batch=2, max_tokens=10), kv_tokens=1000)
    scheduler.add(BatchedRequest(1, prompt_tokens=4, output_tokens=9))
    scheduler.complete(scheduler.schedule())
    scheduler.add(BatchedRequest(2, prompt_tokens=25, output_tokens=1))
    counts = []
    for _ in range(3):
        iteration = scheduler.schedule()
        counts.append((iteration.decodes, iteration.prefill_tokens, iteration.attended_tokens))
        first, finished = scheduler.complete(iteration)
    # Chunks attend to everything before them: 25 * 26 / 2 pairs in all, the last chunk 7 queries over 18 cached tokens.
    assert counts == [(1, 9, 45), (1, 9, 9 * 9 + 45), (1, 7, 7 * 18 + 28)]
    assert [s.request_id for s in first] == [s.request_id for s in finished] == [2]


def test_static_batches_are_not_joined_and_ignore_the_token_budget() -> None:
    scheduler = BatchScheduler(BatchLimits(mode="static", max_batch=2, max_tokens=4), kv_tokens=1000)
    for index, output in enumerate([2, 5, 3]):
        scheduler.add(BatchedRequest(index, prompt_tokens=10, output_tokens=output))
    assert scheduler.schedule().prefill_tokens == 20
    finished = []
    while not finished or finished[-1] != 1:
        finished += [s.request_id for s in scheduler.complete(scheduler.schedule())[1]]
        assert scheduler.running <= 2
    assert finished == [0, 1], "request 2 waits for the whole first batch"
    assert scheduler.schedule().prefill_tokens == 10


def test_admission_waits_for_kv_memory_and_keeps_the_order() -> None:
    scheduler = BatchScheduler(BatchLimits(max_batch=8), kv_tokens=100)
    for index, prompt in enumerate([60, 40, 10]):
        scheduler.add(BatchedRequest(index, prompt, output_tokens=10))
    assert [s.request_id for s, _ in scheduler.schedule().prefills] == [0], "2 would fit but came after 1"


def test_a_stopped_sequence_frees_its_slot_at_once() -> None:
    scheduler = BatchScheduler(BatchLimits(max_batch=1), kv_tokens=100)
    scheduler.add(BatchedRequest(1, 5, 50))
    scheduler.add(BatchedRequest(2, 5, 1))
    scheduler.complete(scheduler.schedule())
    _, finished = scheduler.complete(scheduler.schedule(), 1, stopped={1})
    assert [(s.request_id, s.produced) for s in finished] == [(1, 2)]
    assert [s.request_id for s, _ in scheduler.schedule().prefills] == [2]


def test_end_of_sequence_as_the_very_first_token() -> None:
    scheduler = BatchScheduler(BatchLimits(), kv_tokens=100)
    scheduler.add(BatchedRequest(1, 5, 50))
    first, finished = scheduler.complete(scheduler.schedule(), 1, stopped={1})
    assert first == finished
    assert scheduler.schedule() is None


@pytest.mark.parametrize("stage", ["waiting", "prefilling", "decoding"])
def test_remove_from_any_stage_returns_its_memory(stage: str) -> None:
    scheduler = BatchScheduler(BatchLimits(max_batch=2, max_tokens=4), kv_tokens=40)
    scheduler.add(BatchedRequest(1, 10, 10))
    if stage != "waiting":
        scheduler.complete(scheduler.schedule())
    if stage == "decoding":
        for _ in range(3):
            scheduler.complete(scheduler.schedule())
    assert scheduler.remove(1).request_id == 1
    assert scheduler.remove(1) is None
    assert len(scheduler) == scheduler.kv_held == 0
    assert scheduler.schedule() is None


def test_limits_are_checked() -> None:
    with pytest.raises(UserError, match="max_batch must be at least 1, not 0"):
        BatchLimits(max_batch=0)
    with pytest.raises(UserError, match=r"max_batch must be int, not 2\.5"):
        BatchLimits(max_batch=2.5)
