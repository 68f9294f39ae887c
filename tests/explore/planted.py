"""Planted bugs: small faults of the control plane, each of a kind that a change could bring, as monkeypatches.

``python -m tests.explore.planted 1000`` says in which of 1,000 seeds each is found first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from lambdascale.control.allocations import Allocations
from lambdascale.control.plane import ControlPlane
from lambdascale.control.recovery import Recovery
from lambdascale.control.router import Router
from lambdascale.control.scale_in import ScaleIn
from lambdascale.control.serving import Serving
from lambdascale.control.state import Fleet
from lambdascale.control.transfers import Transfers
from lambdascale.core.commands import Dispatch, StopInstance
from lambdascale.explore.run import Outcome, run
from lambdascale.explore.scenario import draw
from lambdascale.memory import HostCaches

Plant = Callable[[pytest.MonkeyPatch], None]
PLANTED: dict[str, Plant] = {}


def planted(plant: Plant) -> Plant:
    """Register a bug under the name of its function."""
    PLANTED[plant.__name__] = plant
    return plant


@planted
def a_lost_nodes_requests_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    def requeue(self: Router, state: Any, instance: Any, *, failed: bool = False) -> None:
        state.running -= len(instance.outstanding)
        instance.outstanding.clear()

    patch.setattr(Router, "requeue", requeue)


@planted
def a_queue_does_not_go_on_when_its_head_is_given_up(patch: pytest.MonkeyPatch) -> None:
    give_up = Router.give_up

    def without_fill(self: Router, state: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self, "fill", lambda state: None)
            give_up(self, state)

    patch.setattr(Router, "give_up", without_fill)


@planted
def late_news_of_an_older_transfer_counts(patch: pytest.MonkeyPatch) -> None:
    allocate = Allocations.allocate

    def without_since(self: Allocations, state: Any, node: int, wanted: Any = None) -> None:
        allocate(self, state, node, wanted)
        state.allocations[node].since = -1

    patch.setattr(Allocations, "allocate", without_since)


@planted
def a_node_is_released_while_it_feeds_a_transfer(patch: pytest.MonkeyPatch) -> None:
    begin = Transfers._begin

    def without_hold(self: Transfers, *args: Any, **kwargs: Any) -> int:
        number = begin(self, *args, **kwargs)
        transfer = self._fleet.transfers[number]
        for allocation in transfer.held:
            allocation.transfers -= 1
        transfer.held = tuple(a for a in transfer.held if a.node in transfer.waiting)
        for allocation in transfer.held:
            allocation.transfers += 1
        return number

    patch.setattr(Transfers, "_begin", without_hold)


@planted
def a_copy_is_not_pinned_while_it_is_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HostCaches, "pin", lambda self, node, model: None)
    patch.setattr(HostCaches, "unpin", lambda self, node, model, now: None)


@planted
def a_broken_multicast_is_not_planned_anew(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Recovery, "_replan", lambda self, transfer, *, again: None)


@planted
def a_failed_multicast_is_planned_anew_for_ever(patch: pytest.MonkeyPatch) -> None:
    replan = Recovery._replan
    patch.setattr(Recovery, "_replan", lambda self, transfer, *, again: replan(self, transfer, again=False))


@planted
def a_failed_instance_is_not_stopped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Recovery, "instance_failed", lambda self, instance_id, reason: None)


@planted
def requests_are_handed_over_twice_at_a_mode_switch(patch: pytest.MonkeyPatch) -> None:
    switch = Serving._switch_mode

    def twice(self: Serving, state: Any, pipeline: Any, rest: Any = ()) -> None:
        requests = list(pipeline.outstanding.values())
        switch(self, state, pipeline, rest)
        state.queue.extendleft(requests[:1])
        self._router.fill(state)

    patch.setattr(Serving, "_switch_mode", twice)


@planted
def the_last_request_is_left_behind_at_a_mode_switch(patch: pytest.MonkeyPatch) -> None:
    drop = Serving.drop

    def forgetful(self: Serving, state: Any, instance: Any) -> None:
        drop(self, state, instance)
        if instance.is_pipeline and len(instance.outstanding) > 1:
            instance.outstanding.popitem()
            state.running -= 1

    patch.setattr(Serving, "drop", forgetful)


@planted
def a_moved_requests_end_is_looked_for_at_its_pipeline(patch: pytest.MonkeyPatch) -> None:
    finished = ControlPlane._request_finished

    def without_moves(self: ControlPlane, event: Any) -> None:
        self.fleet.moved.clear()
        finished(self, event)

    patch.setattr(ControlPlane, "_request_finished", without_moves)


@planted
def kv_memory_is_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    pick = Router._pick
    patch.setattr(Router, "_pick", staticmethod(lambda state, kv_tokens: pick(state, 0)))


@planted
def a_slot_is_given_away_that_is_taken(patch: pytest.MonkeyPatch) -> None:
    stages = Serving._set_stages

    def one_more(self: Serving, state: Any, instance: Any, those: Any) -> None:
        stages(self, state, instance, those)
        instance.capacity += 1

    patch.setattr(Serving, "_set_stages", one_more)


@planted
def gpus_of_a_given_up_node_are_not_freed(patch: pytest.MonkeyPatch) -> None:
    give_up = Allocations.give_up

    def keeping(self: Allocations, state: Any, node: int) -> None:
        give_up(self, state, node)
        self._fleet.gpus_free[node] -= state.spec.gpus_per_replica

    patch.setattr(Allocations, "give_up", keeping)


@planted
def a_node_that_returns_keeps_what_it_held(patch: pytest.MonkeyPatch) -> None:
    lost = Recovery.node_lost

    def noticed(self: Recovery, node: int, *, returns: bool) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self._fleet.host, "forget", lambda node: None)
            lost(self, node, returns=returns)

    patch.setattr(Recovery, "node_lost", noticed)


@planted
def a_node_that_returns_is_not_taken_in(patch: pytest.MonkeyPatch) -> None:
    joined = ControlPlane._node_joined

    def once(self: ControlPlane, event: Any) -> None:
        if not self._provisioned:
            joined(self, event)

    patch.setattr(ControlPlane, "_node_joined", once)


@planted
def requests_wait_for_a_node_that_is_given_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Recovery, "node_given_up", lambda self, node: None)


@planted
def the_minimum_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ControlPlane, "_unsettled", lambda self, state: bool(state.queue or state.running))


@planted
def drained_replicas_are_never_released(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ScaleIn, "_release_empty", lambda self, state: None)


@planted
def a_replica_is_released_with_its_requests(patch: pytest.MonkeyPatch) -> None:
    def release_all(self: ScaleIn, state: Any) -> None:
        for instance in [i for i in state.instances.values() if i.draining]:
            if not any(state.allocations[node].transfers for node in instance.nodes):
                self._release(state, instance)

    patch.setattr(ScaleIn, "_release_empty", release_all)


@planted
def models_of_no_use_do_not_give_way(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ScaleIn, "claim", lambda self, state: None)


@planted
def a_pipeline_serves_before_its_last_block(patch: pytest.MonkeyPatch) -> None:
    expect = Serving.expect

    def early(self: Serving, state: Any, pipelines: Any) -> None:
        expect(self, state, pipelines)
        for pending in state.pending:
            if len(pending.missing) > 1:
                pending.missing.discard(max(pending.missing))

    patch.setattr(Serving, "expect", early)


@planted
def a_copy_stays_beyond_the_budget(patch: pytest.MonkeyPatch) -> None:
    put = HostCaches.put
    patch.setattr(HostCaches, "put", lambda self, *args: put(self, *args) and [])


@planted
def stopped_instances_go_on_computing(patch: pytest.MonkeyPatch) -> None:
    stop = Recovery._stop

    def silently(self: Recovery, state: Any, instance: Any, *, failed: bool = False) -> None:
        stop(self, state, instance, failed=failed)
        self._fleet.out = [c for c in self._fleet.out if not isinstance(c, StopInstance)]

    patch.setattr(Recovery, "_stop", silently)


@planted
def the_traffic_of_a_cancelled_transfer_stays(patch: pytest.MonkeyPatch) -> None:
    end = Transfers.end

    def counting(self: Transfers, transfer: Any) -> None:
        transfer.waiting = {}
        end(self, transfer)

    patch.setattr(Transfers, "end", counting)


@planted
def a_request_is_sent_to_two_instances(patch: pytest.MonkeyPatch) -> None:
    fill = Router.fill

    def twice(self: Router, state: Any) -> None:
        fill(self, state)
        sent = [c for c in self._fleet.out if isinstance(c, Dispatch)]
        others = [i for i in state.instances if sent and i != sent[-1].instance]
        if others:
            self._fleet.out.append(Dispatch(others[0], sent[-1].requests[:1]))

    patch.setattr(Router, "fill", twice)


@planted
def a_lost_node_still_counts_as_free(patch: pytest.MonkeyPatch) -> None:
    lost = Recovery.node_lost

    def still(self: Recovery, node: int, *, returns: bool) -> None:
        known = node in self._fleet.gpus_free
        lost(self, node, returns=returns)
        if known and not returns:
            self._fleet.gpus_free[node] = self._fleet.cluster.node(node).gpus

    patch.setattr(Recovery, "node_lost", still)


@planted
def an_allocation_lives_on_without_its_node(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Recovery, "_forget_allocation", lambda self, state, node: None)


@planted
def failures_in_a_row_are_not_bounded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Router, "_failed_too_often", lambda self, request_id: False)


@planted
def free_nodes_are_listed_that_have_no_gpu_left(patch: pytest.MonkeyPatch) -> None:
    free_nodes = Fleet.free_nodes

    def careless(self: Fleet, state: Any) -> list[int]:
        return free_nodes(self, state) or [n for n in self.candidates(state) if n not in state.allocations]

    patch.setattr(Fleet, "free_nodes", careless)


@planted
def a_lost_connection_is_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Recovery, "connection_lost", lambda self, node, peer: None)


def first_found(plant: Plant, seeds: Iterable[int]) -> tuple[int, Outcome] | None:
    """Return the first seed that finds a bug, and how it shows; None if none does."""
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        for seed in seeds:
            outcome = run(draw(seed))
            if outcome.broken:
                return seed, outcome
    return None


def main(seeds: int) -> None:
    """Print where each bug is found."""
    for name, plant in PLANTED.items():
        found = first_found(plant, range(seeds))
        where = "not found" if found is None else f"seed {found[0]}: {found[1].broken}: {found[1].case}"
        print(f"{name.replace('_', ' ')}: {where}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
