"""Real processes, real bytes, real tokens: scale-outs, pipelines, mode switches and deaths, token for token."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from lambdascale.checkpoints import PackedModel
from lambdascale.core import traced
from lambdascale.core.commands import Command, LoadBlocks, Serve, StartMulticast, SwitchMode
from lambdascale.core.events import BlockArrived, ConnectionLost, Event, NodeJoined, NodeLost, RequestFinished, TokensProduced
from lambdascale.live.controller.backend import LiveBackend
from lambdascale.live.controller.launch import LocalLauncher
from lambdascale.testing.systems import small_cluster, with_kv_tokens
from tests.live.faults import Both, Break, Damage, Hold, OnlyPlaced, check_damage, inject
from tests.live.harness import Outcome, Watcher, burst, expected, listening, of, run, system_of

pytestmark = pytest.mark.live
REQUESTS = burst(32)
TWO_SOURCES = ("system.memory.initial_copies=2", "system.start.sources=2")


@cache
def _answers(directory: Path) -> dict[int, list[int]]:
    return expected(PackedModel.open(directory, "tiny"), REQUESTS)


def check(outcome: Outcome, directory: Path) -> None:
    assert outcome.answers == _answers(directory)
    assert (outcome.rows.status == "ok").all()


ALWAYS = "+system.start.pipelines.form=always"  # whatever a slow or busy machine makes of them
LAST = {1: 7, 2: 6, 3: 7}  # blocks of the multicast's last round, by destination: nobody hands them on


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("kv", ["recompute", "copy", "cheapest"])
def test_execute_while_load(tiny: Path, transport: str, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of pipelines, across a mode switch and of replicas are the engine's.

    No destination holds the whole model until a pipeline has produced a token.
    """
    hold = Hold.back(LAST)
    inject(hold, monkeypatch)
    watcher = Watcher(_tokens_of_pipeline, hold.release(1, 2, 3))
    system = system_of("lambdascale", f"system.kv={kv}", ALWAYS)
    outcome = run(tiny, REQUESTS, system=system, transport=transport, watchers=[watcher])
    assert watcher.acted
    check(outcome, tiny)
    assert "SwitchMode" in outcome.kinds()
    assert (outcome.rows.first_token_mode == "pipeline").any()
    assert (outcome.rows.restarts == 0).all()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_kv_goes_into_the_memory_of_its_new_node(tiny: Path, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No node sends KV in a message, and every token is the engine's."""
    fault = OnlyPlaced(multiprocessing.get_context("forkserver").Event())
    hold = Hold.back(LAST)
    inject(Both(fault, hold), monkeypatch)
    watcher = Watcher(_tokens_of_pipeline, hold.release(1, 2, 3))
    system = system_of("lambdascale", "system.kv=copy", ALWAYS)
    outcome = run(tiny, REQUESTS, system=system, transport=transport, watchers=[watcher])
    assert fault.placed.is_set()
    check(outcome, tiny)
    assert "NodeLost" not in outcome.kinds()


@pytest.mark.parametrize("kv", ["recompute", "copy"])
def test_each_node_leaves_its_pipeline(tiny: Path, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that holds the whole model leaves, the others go on in a smaller pipeline with some of the requests."""
    hold = Hold.back(LAST)
    inject(hold, monkeypatch)
    pipelines: list[Serve] = []

    def answered_by_the_smaller(entry: Event | Command) -> bool:
        if isinstance(entry, Serve) and entry.is_pipeline:
            pipelines.append(entry)
        return isinstance(entry, RequestFinished) and entry.instance in [each.instance for each in pipelines[1:]]

    watchers = [Watcher(_tokens_of_pipeline, hold.release(1)), Watcher(answered_by_the_smaller, hold.release(2, 3))]
    system = system_of("lambdascale", f"system.kv={kv}", ALWAYS, "+system.start.pipelines.switch=each")
    outcome = run(tiny, REQUESTS, system=system, watchers=watchers)
    assert all(watcher.acted for watcher in watchers)
    check(outcome, tiny)
    assert [{stage.node for stage in command.stages} for command in pipelines] == [{1, 2, 3}, {2, 3}]
    first, second = of(outcome, SwitchMode)
    assert [first.pipeline, second.pipeline] == [command.instance for command in pipelines]
    assert pipelines[1].instance in {instance for _, instance in first.moves}
    assert (outcome.rows.restarts == 0).all()


def _tokens_of_pipeline(entry: Event | Command) -> bool:
    return isinstance(entry, TokensProduced) and entry.mode == "pipeline"


@pytest.mark.parametrize("name", ["faasnet", "nccl_broadcast", "serverlessllm", "ideal", "lambdascale"])
@pytest.mark.parametrize("nodes", [1, 3])
def test_every_system(tiny: Path, name: str, nodes: int) -> None:
    """The baselines on the same processes."""
    check(run(tiny, REQUESTS, system=system_of(name), nodes=nodes, executor="torch"), tiny)


def test_several_sources_and_a_second_burst(tiny: Path) -> None:
    """A host copy feeds the multicast too; after a pause, released nodes come back from their host copies."""
    system = system_of("lambdascale", *TWO_SOURCES, "system.autoscaler.keep_alive_s=0.3")
    again = burst(32, at_s=6.0)
    requests = [*REQUESTS, *(traced(r.request_id + 100, r.arrival_s, r.model, r.prompt_tokens, r.output_tokens) for r in again)]
    outcome = run(tiny, requests, system=system, link="2MB/s")
    assert outcome.answers == expected(PackedModel.open(tiny, "tiny"), requests)
    assert "ReleaseNode" in outcome.kinds()
    plans = [e.plan for _, e in outcome.recorder.entries if isinstance(e, StartMulticast)]
    assert any(len(plan.sources) == 2 for plan in plans)


def test_scarce_kv_memory(tiny: Path) -> None:
    """Room for two of a batch's four requests at their longest, in replicas and pipelines: the others are computed anew."""
    scarce = with_kv_tokens(small_cluster(), 260, model=PackedModel.open(tiny, "tiny").spec)
    outcome = run(tiny, REQUESTS, system=system_of("lambdascale"), cluster_changes={"gpu": scarce.gpu})
    check(outcome, tiny)
    assert {e.kv_tokens for e in of(outcome, Serve)} == {260}
    assert any(e.is_pipeline for e in of(outcome, Serve))


def test_from_nothing(tiny: Path) -> None:
    """No replica at first: the first node loads, the others get it from there or from their own disks."""
    check(run(tiny, REQUESTS, system=system_of("lambdascale", "system.autoscaler.min_replicas=0"), link="5MB/s"), tiny)


def test_nothing_to_do(tiny: Path) -> None:
    """A run without requests ends by itself."""
    assert run(tiny, [], system=system_of("lambdascale"), nodes=2).answers == {}


def test_nothing_is_left_behind(tiny: Path) -> None:
    """No process, no shared memory. And nobody listens beyond loopback meanwhile."""
    pids: list[int] = []
    addresses: set[str] = set()

    def note(backend: LiveBackend) -> None:
        launcher = backend.launcher
        assert isinstance(launcher, LocalLauncher)
        pids.extend(launcher.pid(node) for node in range(2))
        addresses.update(*(listening(pid) for pid in (os.getpid(), *pids)))

    watcher = Watcher(lambda entry: isinstance(entry, RequestFinished), note)
    run(tiny, burst(3), system=system_of("lambdascale"), nodes=2, watchers=[watcher])
    assert len(pids) == 2
    assert len(addresses) >= 4, "two of the controller, one of each node"
    assert all(address.startswith("0100007F:") for address in addresses), addresses
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    # Other programs may use shared memory meanwhile; ours would be under these names, torch's or multiprocessing's.
    ours = ("lambdascale", "torch_", "psm_", "gloo")
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(ours)]


# -- deaths --------------------------------------------------------------------------------------------------------------


def kill(node: int) -> Callable[[LiveBackend], None]:
    return lambda backend: backend.launcher.kill(node)


def first(kind: type, **fields: int) -> Callable[[Event | Command], bool]:
    return lambda entry: isinstance(entry, kind) and all(getattr(entry, name) == value for name, value in fields.items())


PHASES = {
    "multicast begins": (first(StartMulticast), 0.0),
    "multicast under way": (first(BlockArrived, node=2, block=3), 0.05),
    "pipeline": (lambda entry: isinstance(entry, Serve) and entry.is_pipeline, 0.1),
    "mode switch": (first(SwitchMode), 0.0),
    "local": (first(SwitchMode), 0.4),
}


@pytest.mark.parametrize("node", [0, 1, 2, 3])
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_node_loses_no_request(tiny: Path, phase: str, node: int) -> None:
    """Source, head of the pipeline or one of its stages: everything is answered, once, with the same tokens."""
    when, after_s = PHASES[phase]
    watcher = Watcher(when, kill(node), after_s)
    outcome = run(tiny, REQUESTS, system=system_of("lambdascale"), watchers=[watcher])
    assert watcher.acted
    assert any(isinstance(entry, NodeLost) for _, entry in outcome.recorder.entries)
    check(outcome, tiny)


def test_a_killed_node_with_its_kv_on_the_way(tiny: Path) -> None:
    """The KV of its layers never comes: it is computed anew."""
    watcher = Watcher(first(SwitchMode), kill(1))
    outcome = run(tiny, REQUESTS, system=system_of("lambdascale", "system.kv=copy"), watchers=[watcher])
    check(outcome, tiny)


@pytest.mark.parametrize("node", [0, 2])
def test_a_broadcast_breaks(tiny: Path, node: int) -> None:
    """A member of a communicator dies: the survivors make a new one, or load for themselves."""
    watcher = Watcher(first(BlockArrived, node=1, block=3), kill(node))
    outcome = run(tiny, REQUESTS, system=system_of("nccl_broadcast"), watchers=[watcher])
    assert watcher.acted
    check(outcome, tiny)


def test_a_silent_node_is_given_up(tiny: Path) -> None:
    """A stopped process does not answer: after a while it is none of the cluster any more."""

    def stop(backend: LiveBackend) -> None:
        launcher = backend.launcher
        assert isinstance(launcher, LocalLauncher)
        os.kill(launcher.pid(2), 19)

    watcher = Watcher(first(BlockArrived, node=2, block=2), stop)
    outcome = run(tiny, REQUESTS, system=system_of("lambdascale"), watchers=[watcher], silence_s=5.0)
    check(outcome, tiny)
    assert [entry.node for _, entry in outcome.recorder.entries if isinstance(entry, NodeLost)] == [2]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_lost_nodes_come_back(tiny: Path, transport: str) -> None:
    """The node that serves dies; once it is back, the other one does: a new process, reached in either direction, takes over."""
    again = Watcher(lambda entry: isinstance(entry, NodeJoined) and entry.at > 0 and entry.node == 0, kill(1))
    watchers = [Watcher(first(TokensProduced), kill(0)), again]
    requests = REQUESTS + [traced(r.request_id + 32, 8.0, r.model, r.prompt_tokens, r.output_tokens) for r in REQUESTS]
    system = system_of("lambdascale")
    outcome = run(tiny, requests, system=system, nodes=2, watchers=watchers, transport=transport, restarts=3, spares=1)
    assert again.acted
    assert [event.node for event in of(outcome, NodeLost)] == [0, 1]
    assert [event.node for event in of(outcome, NodeJoined)] == [0, 1, 0, 1]
    assert (outcome.rows.status == "ok").all()
    back = min(at for at, entry in outcome.recorder.entries if isinstance(entry, NodeJoined) and at > 0)
    assert any(isinstance(entry, Serve) and at > back for at, entry in outcome.recorder.entries)


def test_requests_wait_for_the_only_node(tiny: Path) -> None:
    """The node dies while it serves; its requests go on where they were once it is back."""
    watchers = [Watcher(first(TokensProduced), kill(0))]
    outcome = run(tiny, REQUESTS, system=system_of("lambdascale"), nodes=1, watchers=watchers, restarts=1)
    check(outcome, tiny)
    assert of(outcome, NodeLost) == [NodeLost(of(outcome, NodeLost)[0].at, 0, returns=True)]
    assert (outcome.rows.status == "ok").all()


def test_requests_fail_when_the_only_node_is_given_up(tiny: Path) -> None:
    """The node dies once more often than it may be started again."""
    again = Watcher(lambda entry: isinstance(entry, NodeJoined) and entry.at > 0, kill(0))
    watchers = [Watcher(first(TokensProduced), kill(0)), again]
    outcome = run(tiny, REQUESTS, system=system_of("lambdascale"), nodes=1, watchers=watchers, restarts=1)
    assert [event.returns for event in of(outcome, NodeLost)] == [True, False]
    assert (outcome.rows.status == "failed").any()
    assert set(outcome.rows.status) <= {"ok", "failed"}


# -- faults of the transport ---------------------------------------------------------------------------------------------


def test_a_damaged_block_is_brought_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block damaged on the way is planned anew from what everybody holds; nobody computes with it, nobody starts over."""
    inject(Damage(block=3), monkeypatch)
    outcome = run(tiny, REQUESTS, system=system_of("lambdascale"), transport="tcp")
    check(outcome, tiny)
    check_damage(outcome, block=3)
    assert not of(outcome, NodeLost)
    assert not [load for load in of(outcome, LoadBlocks) if load.tier != "instant"]
    assert (outcome.rows.restarts == 0).all()


def test_a_block_that_is_damaged_every_time(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that lack it after the second time load from their own disks."""
    inject(Damage(block=3, times=1000, node=None), monkeypatch)
    outcome = run(tiny, REQUESTS, system=system_of("lambdascale"), transport="tcp")
    check(outcome, tiny)
    check_damage(outcome, block=3)
    assert any(3 in load.blocks for load in of(outcome, LoadBlocks) if load.tier == "ssd")


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_broken_connection(tiny: Path, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is made again, nobody is given up, and what was under way over it begins anew."""
    inject(Break(node=0, peer=2, after=2), monkeypatch)
    outcome = run(tiny, REQUESTS, system=system_of("lambdascale"), transport=transport)
    check(outcome, tiny)
    assert not of(outcome, NodeLost)
    assert {(event.node, event.peer) for event in of(outcome, ConnectionLost)} == {(0, 2)}


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_connection_that_breaks_all_the_time(tiny: Path, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its ends is given up after a few times, and everything is answered."""
    inject(Break(node=0, peer=2, after=1, always=True), monkeypatch)
    outcome = run(tiny, REQUESTS, system=system_of("lambdascale"), transport=transport)
    check(outcome, tiny)
    assert len(of(outcome, ConnectionLost)) >= 2
    assert [event.node for event in of(outcome, NodeLost)] == [2]
