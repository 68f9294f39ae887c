"""Batches that move between partitions, with messages in every order that connections allow: token for token."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdascale.control import BatchLimits
from lambdascale.core.commands import KvPolicy
from lambdascale.core.plan import Stage
from lambdascale.inference.batch import Batch, Ticket
from lambdascale.live import wire
from lambdascale.live.node.instance import Head
from tests.node.fakes import BLOCKS, FakeCluster, expected_answer, stages

ALONE = stages((0, 0, 3))
SOURCE_FIRST = stages((0, 0, 1), (1, 2, 3))
DESTINATION_FIRST = stages((1, 0, 1), (0, 2, 3))
FOUR = stages((0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3))


@dataclass
class Story:
    """An instance with its partitions, as a controller keeps track of them."""

    cluster: FakeCluster
    first: tuple[Stage, ...]
    version: int = 0
    nodes: list[int] = field(default_factory=list)
    batches: int = 0
    instance: int = 1

    def __post_init__(self) -> None:
        self._note(self.first)
        self.cluster.serve(self.instance, *self.first)

    def _note(self, new: tuple[Stage, ...]) -> None:
        nodes = dict.fromkeys(stage.node for stage in new)
        self.nodes = list(dict.fromkeys((*self.nodes, *nodes)))
        self.batches = max(self.batches, len(nodes))

    @property
    def head(self) -> int:
        return self.first[0].node

    def assign(self, *requests: int) -> None:
        self.cluster.assign(self.instance, self.head, *requests)

    def repartition(self, new: tuple[Stage, ...], kv: KvPolicy) -> None:
        self.version += 1
        self._note(new)
        self.cluster.repartition(self.instance, self.version, self.head, self.nodes, self.batches, kv, *new)


def layer_ranges(cluster: FakeCluster, node: int) -> list[range]:
    return [runner.layers for runner in cluster.executors[node].open]


@pytest.mark.parametrize("kv", ["copy", "recompute"])
@pytest.mark.parametrize(
    ("before", "after"),
    [(ALONE, SOURCE_FIRST), (ALONE, DESTINATION_FIRST), (ALONE, stages((1, 0, 3))), (FOUR, ALONE), (FOUR, stages((2, 0, 3)))],
)
def test_a_boundary_moves_while_requests_run(before: tuple[Stage, ...], after: tuple[Stage, ...], kv: KvPolicy) -> None:
    """The tokens are the model's after every possible number of steps, and old runners end."""
    for moment in range(0, 60, 3):
        cluster = FakeCluster(4)
        story = Story(cluster, before)
        story.assign(1, 2, 3, 4, 5)
        cluster.run(steps=moment)
        story.repartition(after, kv)
        cluster.run()
        cluster.check()
        for node in range(4):
            here = [range(2 * s.first_block, 2 * s.last_block + 2) for s in after if s.node == node]
            assert layer_ranges(cluster, node) == here


def test_kv_travels_and_nothing_is_prefilled_again() -> None:
    """A running request goes on decoding on its new stages with "copy"."""
    cluster = FakeCluster(2)
    story = Story(cluster, ALONE)
    story.assign(1)
    while len(cluster.tokens()) < 2:
        cluster.run(steps=1)
    story.repartition(SOURCE_FIRST, "copy")
    sent = cluster.run_noting()
    cluster.check()
    parts = [message for message in sent if isinstance(message, wire.SlotKv)]
    assert [layer for part in parts for layer in range(part.first_layer, part.first_layer + part.layers)] == [4, 5, 6, 7]
    assert all(isinstance(part.data, wire.Landed) for part in parts)
    assert sum(isinstance(message, wire.Grant) for message in sent) == len(parts)
    at_rest(cluster)
    forwards = [message for message in sent if isinstance(message, wire.Forward)]
    assert forwards
    assert all(forward.work.prefill_tokens == 0 for forward in forwards)


def at_rest(cluster: FakeCluster) -> None:
    """No KV waits for anything, and nobody has a place."""
    for node in cluster.nodes:
        assert len(node._switching.sender) == 0
        assert node._switching._kv.landing.free == cluster.kv_places
        assert not node._switching._kv.landing._asked


def test_with_recompute_no_kv_travels() -> None:
    """Running requests are prefilled again, from their prompt and their tokens so far."""
    cluster = FakeCluster(2)
    story = Story(cluster, ALONE)
    story.assign(1)
    while len(cluster.tokens()) < 2:
        cluster.run(steps=1)
    story.repartition(SOURCE_FIRST, "recompute")
    sent = cluster.run_noting()
    cluster.check()
    assert not any(isinstance(message, wire.SlotKv) for message in sent)
    assert cluster.executors[1].made[0].prefilled >= cluster.tickets[1].prompt_tokens + 2


def test_a_stage_whose_slots_are_too_few_gets_a_new_runner() -> None:
    """The first stage stays as it was while the instance grows from two nodes to three, and so to a third batch."""
    cluster = FakeCluster(3, max_batch=1)
    story = Story(cluster, SOURCE_FIRST)
    story.assign(1, 2)
    cluster.run(steps=20)
    story.repartition(stages((0, 0, 1), (1, 2, 2), (2, 3, 3)), "copy")
    story.assign(3)
    cluster.run()
    cluster.check()
    assert [runner.slots for runner in cluster.executors[0].made] == [2, 3]


def test_a_stage_that_stays_keeps_its_runner() -> None:
    cluster = FakeCluster(3)
    story = Story(cluster, stages((0, 0, 1), (1, 2, 2), (2, 3, 3)))
    story.assign(1, 2)
    cluster.run(steps=20)
    story.repartition(stages((0, 0, 1), (2, 2, 2), (1, 3, 3)), "copy")
    cluster.run()
    cluster.check()
    assert len(cluster.executors[0].made) == 1
    assert len(cluster.executors[1].made) == len(cluster.executors[2].made) == 2


def test_an_iteration_under_way_ends_on_its_old_stages() -> None:
    """The old second stage computes for a pass that began before the new stages were known, and its runner ends after it."""
    cluster = FakeCluster(3)
    story = Story(cluster, SOURCE_FIRST)
    story.assign(1)
    while not cluster.wires.get((0, 1)):
        cluster.run(steps=1)
    story.repartition(stages((0, 0, 1), (2, 2, 3)), "copy")
    for node in range(3):
        while cluster.orders[node]:
            cluster.obey(node)
    assert layer_ranges(cluster, 1) == [range(4, 8)]
    assert cluster.executors[1].log == []
    cluster.run()
    assert cluster.executors[1].log == ["run 4-8"]
    assert layer_ranges(cluster, 1) == []
    cluster.check()


def test_a_pass_waits_for_its_kv() -> None:
    """A pass that reaches a node before the KV of its layers does not run there."""
    cluster = FakeCluster(3)
    story = Story(cluster, SOURCE_FIRST)
    story.assign(1)
    while len(cluster.tokens()) < 1:
        cluster.run(steps=1)
    cluster.run(steps=1)
    story.repartition(stages((0, 0, 1), (2, 2, 3)), "copy")
    slow = ("deliver", 1, 2)
    while fast := [choice for choice in cluster.choices() if choice != slow]:
        cluster.happen(fast[0])
    assert cluster.executors[2].log == []
    cluster.run()
    cluster.check()


def test_moves_of_a_batch_keep_their_order() -> None:
    """A node whose KV is late has no stage in the next partition but one in the one after: it moves through all three."""
    cluster = FakeCluster(3)
    first, second = stages((0, 0, 1), (2, 2, 3)), stages((0, 0, 1), (1, 2, 3))
    story = Story(cluster, first)
    story.assign(1)
    while len(cluster.tokens()) < 2 or not isinstance(cluster.wires[2, 0][0] if cluster.wires[2, 0] else None, wire.Chosen):
        cluster.run(steps=1)
    for change in (second, first, second):
        story.repartition(change, "copy")
    # All in one step, so that the batch is between two iterations at each of the changes.
    head = cluster.nodes[0]
    head.take(cluster.wires[2, 0].popleft())
    while cluster.orders[0]:
        head.repartition(cluster.orders[0].popleft()[1])
    head.step()
    slow = ("deliver", 2, 1)
    while fast := [choice for choice in cluster.choices() if choice != slow]:
        cluster.happen(fast[0])
    cluster.run()
    cluster.check()


def test_batches_take_turns() -> None:
    """Batches run in a circle: one whose iterations end at once is not served alone."""
    head = Head(lambda index: Batch(BatchLimits(max_batch=1), range(index, index + 1), 20, 50))
    head.resize(3, 20)
    for request_id in range(3):
        head.add(Ticket(request_id, [1], 1, 9))
    assert [head.next_batch() for _ in range(4)] == [0, 1, 2, 0]
    head.batches[1].take(1)
    assert [head.next_batch() for _ in range(3)] == [2, 0, 2]


def test_kv_memory_changes_with_the_stages() -> None:
    """Batches that exist and new ones have the new memory."""
    cluster = FakeCluster(2, kv_tokens=30)
    story = Story(cluster, ALONE)
    cluster.run()
    cluster.kv_tokens = 25
    story.repartition(SOURCE_FIRST, "copy")
    cluster.run()
    head = cluster.nodes[0]._instances[1].head
    assert head is not None
    assert [batch._scheduler.kv_tokens for batch in head.batches] == [25, 25]


def consolidated(max_batch: int) -> tuple[FakeCluster, int]:
    """Requests 1 and 2, each in a batch of its own, moved onto one node when each has a token; the tokens so far."""
    cluster = FakeCluster(2, max_batch=max_batch)
    story = Story(cluster, SOURCE_FIRST)
    story.assign(1, 2)
    while {token.request_id for token in cluster.tokens()} != {1, 2}:
        cluster.run(steps=1)
    story.repartition(ALONE, "copy")
    cluster.run()
    cluster.check()
    on_pipeline = sum(len(m.tokens) for m in cluster.said if isinstance(m, wire.Tokens) and m.mode == "pipeline")
    return cluster, on_pipeline


def test_batches_that_are_too_many_are_merged() -> None:
    """Requests of both batches decode in the same iterations where slots allow it."""
    cluster, on_pipeline = consolidated(max_batch=2)
    left = sum(len(expected_answer(ticket)) for ticket in cluster.tickets.values()) - on_pipeline
    assert cluster.executors[0].log.count("run 0-8") < left
    assert any(len(m.tokens) == 2 for m in cluster.said if isinstance(m, wire.Tokens))


def test_merged_requests_wait_with_their_kv() -> None:
    """A request without a slot waits for the other, and decodes then without a prefill."""
    cluster, on_pipeline = consolidated(max_batch=1)
    left = sum(len(expected_answer(ticket)) for ticket in cluster.tickets.values()) - on_pipeline
    assert cluster.executors[0].log.count("run 0-8") == left
    local = [token.request_id for m in cluster.said if isinstance(m, wire.Tokens) and m.mode == "local" for token in m.tokens]
    assert local == sorted(local) or local == sorted(local, reverse=True)


def test_a_growing_instance_keeps_more_batches_in_flight() -> None:
    """Requests that come after the repartition go to the new batch, in slots of its own."""
    cluster = FakeCluster(2, max_batch=1)
    story = Story(cluster, ALONE)
    story.assign(1)
    story.repartition(SOURCE_FIRST, "copy")
    story.assign(2)
    cluster.run()
    cluster.check()
    assert cluster.executors[1].made[0].slots == 2
    assert {slot for slot, _ in cluster.executors[1].made[0].kv} == {0, 1}


def partitions(draw: st.DrawFn, nodes: int) -> tuple[Stage, ...]:
    """Any cover of the blocks by nodes, in which a node may have several stages."""
    cuts = sorted(draw(st.sets(st.integers(1, BLOCKS - 1))))
    bounds = [0, *cuts, BLOCKS]
    owners = draw(st.lists(st.integers(0, nodes - 1), min_size=len(bounds) - 1, max_size=len(bounds) - 1))
    return tuple(Stage(node, low, high - 1) for node, low, high in zip(owners, bounds, bounds[1:], strict=False))


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[tuple[Stage, ...]], list[KvPolicy], list[int]]:
    changes = draw(st.integers(1, 4))
    parts = [partitions(draw, 3) for _ in range(changes + 1)]
    policies: list[KvPolicy] = [draw(st.sampled_from(["copy", "copy", "recompute"])) for _ in range(changes)]
    return parts, policies, [draw(st.integers(0, 40)) for _ in range(changes)]


@settings(max_examples=150, deadline=None)
@given(histories(), st.lists(st.sampled_from([80, 22]), min_size=5, max_size=5), st.randoms(use_true_random=False))
def test_any_history_in_any_order(
    history: tuple[list[tuple[Stage, ...]], list[KvPolicy], list[int]], kv_tokens: list[int], rng: random.Random
) -> None:
    """Several repartitions, close together, requests between them, messages in any order: always the model's tokens.

    KV memory comes and goes with the stages: room for all requests of a batch, or for one at its longest.
    """
    parts, policies, pauses = history
    cluster = FakeCluster(3, kv_tokens=kv_tokens[0], kv_places=rng.choice((0, 1, 2)))
    story = Story(cluster, parts[0])
    story.assign(1, 2, 3)
    for number, (part, kv, pause) in enumerate(zip(parts[1:], policies, pauses, strict=True)):
        cluster.run(rng, steps=pause)
        cluster.kv_tokens = kv_tokens[number + 1]
        story.repartition(part, kv)
        story.assign(10 + number)
    cluster.run(rng)
    cluster.check()
    for node, compute in enumerate(cluster.nodes):
        wanted = sum(stage.node == node for stage in parts[-1])
        assert len(cluster.executors[node].open) == wanted
        instance = compute._instances.get(1)
        assert instance is None or list(instance.partitions) == [len(parts) - 1]
        assert instance is None or not instance._held
        assert instance is None or not instance._came
    at_rest(cluster)
    story.cluster.stop(1, *story.nodes)
    cluster.run(rng)
    assert not any(executor.open for executor in cluster.executors)
