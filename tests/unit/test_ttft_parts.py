"""Each part of a TTFT, one record at a time."""

from __future__ import annotations

from typing import Any

import pytest

from lambdascale.core import MulticastPlan, Request, Send
from lambdascale.core.commands import AllocateNode, CancelTransfer, Dispatch, LoadBlocks, ReleaseNode, Serve, StartMulticast
from lambdascale.core.events import BlockArrived, CommandFailed, NodeLost, RequestArrived, SetUpDone, TokensProduced
from lambdascale.core.plan import Stage
from lambdascale.metrics import Recorder, requests_table
from lambdascale.metrics.ttft_parts import PARTS, between

BYTES = (8, 8)


def request(number: int, arrival_s: float) -> Request:
    return Request(number, arrival_s, "m", 10, 10)


def multicast(number: int, source: int, destination: int) -> StartMulticast:
    plan = MulticastPlan((source, destination), (source,), 2, tuple((Send(source, destination, block),) for block in (0, 1)))
    return StartMulticast(number, "m", plan, BYTES, ("gpu",), "one_sided")


def load(number: int, node: int) -> LoadBlocks:
    return LoadBlocks(number, "m", node, (0, 1), BYTES, "ssd", "pipelined")


def served(at_s: float, number: int, *nodes: int) -> tuple[float, Any]:
    stages = tuple(Stage(node, i, i) for i, node in enumerate(nodes)) if len(nodes) > 1 else (Stage(nodes[0], 0, 1),)
    return at_s, Serve(number, "m", stages, BYTES, 100)


def blocks(number: int, node: int, first_s: float, last_s: float) -> list[Any]:
    return [BlockArrived(first_s, number, node, "m", 0), BlockArrived(last_s, number, node, "m", 1)]


def answer(at_s: float, asked: Request, instance: int, first_s: float) -> list[Any]:
    return [(at_s, Dispatch(instance, (asked,))), TokensProduced(first_s, instance, asked.request_id, 1, "local")]


def parts(*entries: Any, of: int = 0) -> dict[str, float]:
    """Parts of a request that are not zero."""
    recorder = Recorder()
    for entry in entries:
        if isinstance(entry, tuple):
            recorder.on_command(*entry)
        else:
            recorder.on_event(entry)
    rows = {row["request_id"]: row for row in requests_table(recorder, "s").to_pylist()}
    return {part: pytest.approx(seconds) for part in PARTS if (seconds := rows[of][f"{part}_s"])}


def test_without_a_scale_out() -> None:
    asked = request(0, 1.0)
    assert parts(served(0.0, 1, 0), RequestArrived(1.0, asked), *answer(1.5, asked, 1, 1.7)) == {
        "queue": 0.5,
        "first_iteration": 0.2,
    }


def test_a_scale_out_that_began_before_the_request() -> None:
    """The part that was left of the transfer counts, and none of it after the last block."""
    asked = request(0, 3.0)
    begun = [(1.0, AllocateNode(1, "m", 1)), (1.0, load(7, 1)), RequestArrived(3.0, asked), *blocks(7, 1, 2.0, 4.0)]
    assert parts(*begun, served(4.0, 1, 1), *answer(4.5, asked, 1, 5.0)) == {
        "transfer": 1.0,
        "queue": 0.5,
        "first_iteration": 0.5,
    }


def test_a_set_up() -> None:
    asked = request(0, 0.0)
    begun = [RequestArrived(0.0, asked), (0.5, AllocateNode(1, "m", 1)), (0.5, multicast(7, 0, 1)), SetUpDone(1.7, 7, 1)]
    assert parts(*begun, *blocks(7, 1, 2.0, 2.5), served(2.5, 1, 1), *answer(2.5, asked, 1, 2.6)) == {
        "queue": 0.5,
        "setup": 1.2,
        "transfer": 0.8,
        "first_iteration": 0.1,
    }


def test_a_source_that_was_busy() -> None:
    """Node 0 sends to node 1 until 2 s, and the next look is at 2.2 s."""
    first, asked = request(1, 0.0), request(0, 1.2)
    before = [RequestArrived(0.0, first), (1.0, AllocateNode(1, "m", 1)), (1.0, multicast(7, 0, 1)), RequestArrived(1.2, asked)]
    before += [*blocks(7, 1, 1.5, 2.0), served(2.0, 1, 1), *answer(2.0, first, 1, 2.1)]
    after = [(2.2, AllocateNode(2, "m", 1)), (2.2, multicast(8, 0, 2)), *blocks(8, 2, 2.7, 3.0), served(3.0, 2, 2)]
    assert parts(*before, *after, *answer(3.0, asked, 2, 3.1)) == {
        "source_wait": 0.8,
        "queue": 0.2,
        "transfer": 0.8,
        "first_iteration": 0.1,
    }


def test_destinations_that_bring_each_other_the_rest() -> None:
    """The source has died: nodes 1 and 2 hold a block each."""
    asked = request(0, 1.0)
    repair = MulticastPlan((1, 2), (), 2, ((Send(1, 2, 0), Send(2, 1, 1)),))
    begun = [RequestArrived(1.0, asked), *((1.0, AllocateNode(node, "m", 1)) for node in (1, 2))]
    again = (2.0, StartMulticast(8, "m", repair, BYTES, (), "one_sided"))
    ends = [again, BlockArrived(3.0, 8, 1, "m", 1), served(3.0, 1, 1), *answer(3.0, asked, 1, 3.5)]
    assert parts(*begun, *ends) == {"source_wait": 1.0, "transfer": 1.0, "first_iteration": 0.5}


def test_an_idle_source_is_not_waited_for() -> None:
    """One of the two was idle all the time."""
    asked = request(0, 1.2)
    before = [(1.0, AllocateNode(1, "m", 1)), (1.0, multicast(7, 0, 1)), RequestArrived(1.2, asked), *blocks(7, 1, 1.5, 2.0)]
    plan = MulticastPlan((0, 5, 2), (0, 5), 2, ((Send(0, 2, 0),), (Send(5, 2, 1),)))
    both = StartMulticast(8, "m", plan, BYTES, ("gpu", "gpu"), "one_sided")
    after = [(2.2, AllocateNode(2, "m", 1)), (2.2, both), *blocks(8, 2, 2.7, 3.0), served(3.0, 2, 2)]
    assert parts(*before, *after, *answer(3.0, asked, 2, 3.1)) == {"queue": 1.0, "transfer": 0.8, "first_iteration": 0.1}


@pytest.mark.parametrize("end", [(1.5, CancelTransfer(7)), CommandFailed(1.5, "StartMulticast", "damaged", transfer_id=7)])
def test_a_transfer_that_failed(end: Any) -> None:
    """Time of the failed transfer counts as transfer, and the gap until the next one as a wait for a source."""
    asked = request(0, 1.0)
    begun = [RequestArrived(1.0, asked), (1.0, AllocateNode(1, "m", 1)), (1.0, multicast(7, 0, 1)), end]
    again = [(1.8, multicast(8, 0, 1)), *blocks(8, 1, 2.0, 2.3), served(2.3, 1, 1), *answer(2.3, asked, 1, 2.4)]
    assert parts(*begun, *again) == {"transfer": 1.0, "source_wait": 0.3, "first_iteration": 0.1}


def test_a_pipeline_waits_for_the_node_that_is_last() -> None:
    """Node 1 loads at once, node 2 after a set-up; a block that a cancelled transfer had to bring counts for the other too."""
    asked = request(0, 0.0)
    begun = [RequestArrived(0.0, asked), *((0.2, AllocateNode(node, "m", 1)) for node in (1, 2))]
    begun += [(0.2, load(6, 1)), (0.2, multicast(7, 0, 2)), SetUpDone(0.9, 7, 2)]
    begun += [*blocks(6, 1, 0.4, 0.5), BlockArrived(1.4, 7, 2, "m", 1), served(1.4, 1, 1, 2)]
    assert parts(*begun, *answer(1.4, asked, 1, 1.5)) == {"queue": 0.2, "setup": 0.7, "transfer": 0.5, "first_iteration": 0.1}


def test_a_lost_instance_counts_as_queue() -> None:
    """Time up to the second dispatch is queue; a scale-out that had begun before the first one is not waited for meanwhile."""
    asked = request(0, 0.0)
    begun = [served(0.0, 1, 0), RequestArrived(0.0, asked), (0.1, AllocateNode(1, "m", 1)), (0.1, load(7, 1))]
    begun += [(0.4, Dispatch(1, (asked,))), NodeLost(0.6, 0), *blocks(7, 1, 0.7, 1.0), served(1.0, 2, 1)]
    assert parts(*begun, *answer(1.0, asked, 2, 1.2)) == {"queue": 0.4, "transfer": 0.6, "first_iteration": 0.2}


def test_a_node_that_was_released_begins_anew() -> None:
    asked = request(0, 5.0)
    before = [(0.0, AllocateNode(1, "m", 1)), (0.0, load(6, 1)), *blocks(6, 1, 1.0, 2.0), (4.0, ReleaseNode(1, "m", 1))]
    after = [RequestArrived(5.0, asked), (5.5, AllocateNode(1, "m", 1)), (5.5, load(7, 1)), *blocks(7, 1, 6.0, 6.5)]
    assert parts(*before, *after, served(6.5, 1, 1), *answer(6.5, asked, 1, 6.6)) == {
        "queue": 0.5,
        "transfer": 1.0,
        "first_iteration": 0.1,
    }


def test_without_a_first_token() -> None:
    asked = request(0, 0.0)
    recorder = Recorder()
    recorder.on_event(RequestArrived(0.0, asked))
    recorder.on_command(0.5, Dispatch(1, (asked,)))
    (row,) = requests_table(recorder, "s").to_pylist()
    assert [row[f"{part}_s"] for part in PARTS] == [None] * len(PARTS)


def test_stretches() -> None:
    marks = [(1.0, "setup"), (2.0, "transfer"), (2.0, "setup"), (4.0, "queue")]
    assert list(between(marks, 0.5, 3.0)) == [("queue", 0.5), ("setup", 1.0), ("setup", 1.0)]
    assert list(between((), 1.0, 1.0)) == []
