"""The simulated cluster, command by command, against times worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest

from lambdascale.control import BatchLimits
from lambdascale.core import (
    ClusterSpec,
    ComputeTable,
    Failure,
    ModelSpec,
    MulticastPlan,
    Request,
    Send,
    Stage,
    TracedRequest,
    UserError,
    traced,
)
from lambdascale.core.commands import (
    AllocateNode,
    CancelTransfer,
    Command,
    Dispatch,
    EvictBlocks,
    FailRequest,
    LoadBlocks,
    PlaceCopy,
    ReleaseNode,
    Repartition,
    Serve,
    SetTimer,
    StartMulticast,
    StopInstance,
    SwitchMode,
)
from lambdascale.core.events import (
    BlockArrived,
    CommandFailed,
    Event,
    NodeJoined,
    NodeLost,
    RequestArrived,
    RequestFinished,
    TimerFired,
    TokensProduced,
)
from lambdascale.sim import SimConfig, TransferOptions
from lambdascale.sim.backend import SimBackend
from lambdascale.sim.links import Grant
from lambdascale.testing.systems import small_cluster, small_model

# A prefill takes 0.1 s, a decode step 0.02 s, whatever their size; a hop 0.01 s. 100 MB/s of network, every byte of it goodput.
TABLE = ComputeTable(model="small", prefill_tokens=(1.0,), prefill_s=(0.1,), decode_batch=(1.0,), decode_s=(0.02,))
CLUSTER = replace(
    small_cluster(4),
    hop_latency_s=0.01,
    link_latency_s=0.0,
    nic_bytes_per_s=1e8,
    rdma_efficiency=1.0,
    compute=replace(small_cluster().compute, measured=(TABLE,)),
)
BLOCKS = (250_000_000,) * 4
KV_BYTES = small_model().kv_bytes_per_token
KV = 79_345


class Cluster:
    """A backend with commands at given times, and the events that come of them."""

    def __init__(
        self,
        *,
        cluster: ClusterSpec = CLUSTER,
        models: tuple[ModelSpec, ...] = (small_model(),),
        requests: tuple[TracedRequest, ...] = (),
        max_batch: int = 8,
        mode: Literal["continuous", "static"] = "continuous",
        **config: object,
    ) -> None:
        options = TransferOptions(record_grants=True, communicator_setup=False, chunk_bytes=1)
        self.backend: SimBackend = SimConfig(transfers=options, **config).build(
            cluster=cluster, models=models, requests=requests, batching=BatchLimits(max_batch=max_batch, mode=mode), seed=0
        )

    def at(self, at_s: float, *commands: Command) -> Cluster:
        for command in commands:
            self.backend.kernel.at(at_s, lambda _, command=command: self.backend.submit(command))
        return self

    def events(self) -> list[Event]:
        found = []
        while (event := self.backend.next_event()) is not None:
            if not isinstance(event, NodeJoined):
                found.append(event)
        return found

    def grants(self) -> list[Grant]:
        return self.backend._transfers.links.grants or []


def serve(instance: int, *nodes: int) -> Serve:
    size = len(BLOCKS) // len(nodes)
    return Serve(instance, "small", tuple(Stage(n, i * size, (i + 1) * size - 1) for i, n in enumerate(nodes)), BLOCKS, KV)


def request(number: int, tokens: int, prompt: int = 9) -> Request:
    return Request(number, 0.0, "small", prompt, tokens)


def shown(events: list[Event]) -> list[tuple[float, str, int]]:
    """(time, kind, the request, node, block or timer)."""
    names = ("request_id", "block", "node", "timer_id", "instance")
    return [(round(e.at, 6), type(e).__name__, next(getattr(e, n) for n in names if hasattr(e, n))) for e in events]


# -- serving ---------------------------------------------------------------------------------------------------------


def test_a_pipeline_hands_iterations_on_and_its_tokens_back() -> None:
    """Two stages of half a prefill or step each, a hop after each."""
    events = Cluster().at(0.0, serve(1, 0, 1), Dispatch(1, (request(0, 3),))).events()
    assert shown(events) == [(0.12, "TokensProduced", 0), (0.20, "RequestFinished", 0)]
    assert [e.mode for e in events if isinstance(e, TokensProduced)] == ["pipeline"]
    assert [e.tokens for e in events if isinstance(e, RequestFinished)] == [3]


def test_a_replica_decodes_in_one_go_and_is_cut_for_newcomers() -> None:
    """Request 1 arrives during the third decode step: it is prefilled after it."""
    events = Cluster().at(0.0, serve(1, 0), Dispatch(1, (request(0, 11),))).at(0.15, Dispatch(1, (request(1, 1),))).events()
    assert shown(events) == [
        *[(0.1, "TokensProduced", 0), (0.26, "TokensProduced", 1), (0.26, "RequestFinished", 1), (0.38, "RequestFinished", 0)],
    ]


def test_requests_that_come_together_share_a_batch() -> None:
    events = Cluster().at(0.0, serve(1, 0), Dispatch(1, (request(0, 1),)), Dispatch(1, (request(1, 1),))).events()
    assert {e.at for e in events} == {0.1}


def test_a_pipeline_spreads_requests_over_its_batches() -> None:
    """Two batches of one: the second enters the first stage when the first leaves it."""
    events = Cluster(max_batch=1).at(0.0, serve(1, 0, 1), Dispatch(1, (request(0, 1), request(1, 1)))).events()
    assert shown(events)[::2] == [(0.12, "TokensProduced", 0), (0.17, "TokensProduced", 1)]


# -- mode switch -----------------------------------------------------------------------------------------------------


def switched(kv: str, moves: tuple[tuple[int, int], ...], *, at_s: float = 0.15, nodes: tuple[int, int] = (0, 1)) -> Cluster:
    """A pipeline on nodes 0 and 1 that has prefilled requests of 3000 tokens is dissolved into replicas 2 and 3."""
    cluster = Cluster().at(0.0, serve(1, 0, 1), Dispatch(1, tuple(request(r, 5, prompt=3000) for r, _ in moves)))
    return cluster.at(at_s, serve(2, nodes[0]), serve(3, nodes[1]), SwitchMode(1, moves, kv))


@pytest.mark.parametrize(("target", "src", "dst"), [(2, 1, 0), (3, 0, 1)])
def test_kv_is_copied_from_the_stages_that_ran_the_layers_to_the_target(target: int, src: int, dst: int) -> None:
    """Mutation: KV copied the wrong way. Half of the layers of 3000 tokens; the newest token has no KV yet."""
    cluster = switched("copy", ((0, target),))
    (finished,) = [e for e in cluster.events() if isinstance(e, RequestFinished)]
    (grant,) = cluster.grants()
    assert grant.ports == (f"nic_out:{src}", f"nic_in:{dst}")
    assert (grant.end_s - grant.begin_s) * grant.rate == pytest.approx(3000 * KV_BYTES / 2)
    assert finished.at == pytest.approx(0.15 + 3000 * KV_BYTES / 2 / 1e8 + 4 * 0.02)
    assert (finished.instance, finished.tokens) == (target, 5)


def test_kv_of_a_moved_boundary_goes_from_the_old_node_to_the_new_one() -> None:
    """Mutation: the KV copied the wrong way."""
    cluster = Cluster().at(0.0, serve(1, 0), Dispatch(1, (request(0, 5, prompt=3000),)))
    cluster.at(0.11, Repartition(1, (Stage(1, 0, 3),), "copy", KV)).events()
    (grant,) = cluster.grants()
    assert grant.ports == ("nic_out:0", "nic_in:1")


def test_a_target_outside_the_pipeline_fetches_from_all_its_stages() -> None:
    cluster = switched("copy", ((0, 2),), nodes=(2, 3))
    (finished,) = [e for e in cluster.events() if isinstance(e, RequestFinished)]
    assert {(g.ports, round((g.end_s - g.begin_s) * g.rate)) for g in cluster.grants()} == {
        (("nic_out:0", "nic_in:2"), round(3000 * KV_BYTES / 2)),
        (("nic_out:1", "nic_in:2"), round(3000 * KV_BYTES / 2)),
    }
    assert finished.at == pytest.approx(0.15 + 3000 * KV_BYTES / 1e8 + 4 * 0.02), "it goes on when all of it has arrived"


def test_recomputed_kv_is_prefilled_with_the_tokens_so_far() -> None:
    cluster = switched("recompute", ((0, 2),))
    events = cluster.events()
    assert shown(events) == [(0.12, "TokensProduced", 0), (pytest.approx(0.15 + 0.1 + 3 * 0.02), "RequestFinished", 0)]
    assert cluster.grants() == []


def test_a_request_without_a_token_has_no_kv_to_copy() -> None:
    cluster = switched("copy", ((0, 2),), at_s=0.05)
    assert shown(cluster.events()) == [(0.15, "TokensProduced", 0), (0.23, "RequestFinished", 0)]
    assert cluster.grants() == []


def test_requests_go_where_they_are_moved() -> None:
    events = switched("recompute", ((0, 2), (1, 3), (2, 2))).events()
    assert {e.request_id: e.instance for e in events if isinstance(e, RequestFinished)} == {0: 2, 1: 3, 2: 2}


@pytest.mark.parametrize("kv", ["copy", "recompute"])
def test_a_target_that_is_lost_drops_its_requests(kv: str) -> None:
    cluster = Cluster(node_failures=((0, 0.14),)).at(0.0, serve(1, 2, 1), Dispatch(1, (request(0, 5, 3000),)))
    events = cluster.at(0.15, serve(2, 0), serve(3, 1), SwitchMode(1, ((0, 2),), kv)).events()
    assert shown(events)[1:] == [(0.14, "NodeLost", 0)]


def test_kv_that_is_under_way_to_a_stopped_instance_wakes_nobody() -> None:
    cluster = switched("copy", ((0, 2),)).at(0.2, StopInstance(2))
    assert len(cluster.events()) == 1


def test_iterations_of_a_replica_that_are_over_count_when_it_is_dissolved() -> None:
    """Tokens at 0.1, 0.12 and 0.14; the step under way at 0.15 is redone by the prefill."""
    cluster = Cluster().at(0.0, serve(1, 0), Dispatch(1, (request(0, 5),)))
    events = cluster.at(0.15, serve(2, 1), SwitchMode(1, ((0, 2),), "recompute")).events()
    assert shown(events) == [(0.1, "TokensProduced", 0), (0.27, "RequestFinished", 0)]


def test_batches_of_a_pipeline_that_shrinks_to_a_node_are_merged_with_their_kv() -> None:
    """Two batches of one become one of two; copied KV saves the prefill that takes 0.1 s."""
    ends = {}
    for kv in ("copy", "recompute"):
        cluster = Cluster().at(0.0, serve(1, 0, 1), Dispatch(1, (request(0, 21), request(1, 21))))
        events = cluster.at(0.5, Repartition(1, serve(1, 0).stages, kv, KV)).events()
        assert {e.request_id: e.tokens for e in events if isinstance(e, RequestFinished)} == {0: 21, 1: 21}
        ends[kv] = max(e.at for e in events)
    assert 0.06 < ends["recompute"] - ends["copy"] < 0.2


def test_a_switch_of_an_unknown_pipeline_is_ignored() -> None:
    assert Cluster().at(0.0, SwitchMode(7, ((0, 2),), "copy"), StopInstance(9), Dispatch(8, (request(0, 1),))).events() == []


# -- the rest of the commands ----------------------------------------------------------------------------------------


def test_bookkeeping_takes_no_time() -> None:
    commands = [AllocateNode(0, "small", 1), ReleaseNode(0, "small", 1), PlaceCopy(0, "small"), EvictBlocks(0, "small", "host")]
    assert Cluster().at(0.0, *commands, FailRequest(0, Failure("no_node", "no"))).events() == []


def test_nodes_join_first_and_requests_come_before_what_else_happens_then() -> None:
    cluster = Cluster(requests=(traced(0, 0.0, "small", 9, 1), traced(1, 0.5, "small", 1, 1), traced(2, 2.0, "small", 1, 1)))
    cluster.at(0.0, SetTimer(5, 0.5), SetTimer(6, 1.0))
    assert [type(cluster.backend.next_event()) for _ in range(4)] == [NodeJoined] * 4
    assert shown_requests(cluster.events()) == [(0.0, 0), (0.5, 1), (0.5, "timer 5"), (1.0, "timer 6"), (2.0, 2)]


def shown_requests(events: list[Event]) -> list[tuple[float, int | str]]:
    found: list[tuple[float, int | str]] = []
    for event in events:
        if isinstance(event, RequestArrived):
            found.append((event.at, event.request.request_id))
        elif isinstance(event, TimerFired):
            found.append((event.at, f"timer {event.timer_id}"))
    return found


def load(transfer: int, node: int, tier: str = "host") -> LoadBlocks:
    return LoadBlocks(transfer, "small", node, (2, 0), BLOCKS, tier, "pipelined")


def test_loads_and_their_cancellation() -> None:
    events = Cluster().at(0.0, load(1, 0), load(2, 1)).at(0.2, CancelTransfer(2)).events()
    assert [(e.at, e.transfer_id, e.node, e.model, e.block) for e in events if isinstance(e, BlockArrived)] == [
        (0.125, 1, 0, "small", 2),
        (0.125, 2, 1, "small", 2),
        (0.25, 1, 0, "small", 0),
    ]


PAIR = MulticastPlan(members=(0, 1), sources=(0,), blocks=4, rounds=tuple((Send(0, 1, b),) for b in range(4)), streaming=True)


def test_a_collective_takes_the_sources_gpu_from_its_instances() -> None:
    """1 GB at 100 MB/s times 0.9: 11.11 s. The iteration under way ends, the next one waits."""
    cluster = Cluster().at(0.0, serve(1, 0), serve(2, 1), Dispatch(1, (request(0, 11),)), Dispatch(2, (request(1, 11),)))
    cluster.at(0.15, StartMulticast(1, "small", PAIR, BLOCKS, ("gpu",), "collective"))
    events = cluster.events()
    ended = {e.request_id: e.at for e in events if isinstance(e, RequestFinished)}
    assert ended[1] == pytest.approx(0.3), "the destination's GPU computes on"
    over = next(e.at for e in events if isinstance(e, BlockArrived))
    assert over == pytest.approx(0.15 + 1e9 / 0.9e8)
    assert ended[0] == pytest.approx(over + 7 * 0.02), "three steps were done by 0.16"


def test_one_sided_writes_take_no_gpu() -> None:
    cluster = Cluster().at(0.0, serve(1, 0), Dispatch(1, (request(0, 11),)))
    cluster.at(0.15, StartMulticast(1, "small", PAIR, BLOCKS, ("gpu",), "one_sided"))
    assert shown(cluster.events())[1] == (0.3, "RequestFinished", 0)


# -- losses ----------------------------------------------------------------------------------------------------------


def test_a_lost_node_takes_its_instances_and_transfers_with_it() -> None:
    cluster = Cluster(node_failures=((1, 0.15),))
    cluster.at(0.0, serve(1, 0, 1), serve(2, 2), Dispatch(1, (request(0, 9),)), Dispatch(2, (request(1, 9),)), load(3, 1))
    cluster.at(0.2, Dispatch(1, (request(2, 1),)), serve(4, 1), serve(5, 0, 1), Repartition(2, serve(2, 1).stages, "copy", KV))
    assert shown(cluster.events()) == [
        *[(0.1, "TokensProduced", 1), (0.12, "TokensProduced", 0), (0.125, "BlockArrived", 2), (0.15, "NodeLost", 1)],
        (0.26, "RequestFinished", 1),
    ]


def test_a_lost_source_of_moving_kv_fails_the_instance_that_waits_for_it() -> None:
    cluster = Cluster(node_failures=((0, 0.5),)).at(0.0, serve(1, 0), Dispatch(1, (request(0, 9, 3000),)))
    events = cluster.at(0.15, Repartition(1, serve(1, 1).stages, "copy", KV)).events()
    assert [type(e) for e in events] == [TokensProduced, NodeLost, CommandFailed]
    failure = events[-1]
    assert isinstance(failure, CommandFailed)
    assert (failure.command, failure.instance, failure.transfer_id) == ("Repartition", 1, -1)
    assert failure.reason == "node 0 is lost, and an iteration or KV of instance 1 was still on it"


# -- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"node_failures": ((0, -1.0),)}, r"backend.node_failures takes \[node, time\] pairs, not \(0, -1.0\)"),
        ({"node_failures": ((0, 1.0, 2.0),)}, "node_failures must be"),
        ({"slow_nodes": ((0, 0.0),)}, r"backend.slow_nodes takes \[node, share up to 1\] pairs, not \(0, 0.0\)"),
        ({"slow_nodes": ((0, 1.1),)}, "backend.slow_nodes takes"),
        ({"unforeseen_slowdown": 0.0}, "backend.unforeseen_slowdown must be positive, not 0.0"),
    ],
)
def test_settings_are_checked(config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SimConfig(**config)


@pytest.mark.parametrize(
    ("name", "value"), [("node_failures", ((4, 1.0),)), ("slow_nodes", ((-1, 0.5),)), ("slow_nodes", ((4, 1),))]
)
def test_settings_name_nodes_of_the_cluster(name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"backend.{name} names node -?\d, the cluster has 0 to 3"):
        Cluster(**{name: value})


def test_settings_that_are_fine() -> None:
    config = SimConfig(node_failures=[[0, 0.0]], slow_nodes=[[3, 1.0]])
    assert (config.node_failures, config.slow_nodes, config.label) == (((0, 0.0),), ((3, 1.0),), "sim")
    Cluster(node_failures=((0, 1.0), (3, 1.0)), slow_nodes=((0, 0.5),))


def test_a_slow_node_slows_its_transfers() -> None:
    pair = replace_sends(PAIR)
    events = Cluster(slow_nodes=((1, 0.5),)).at(0.0, StartMulticast(1, "small", pair, BLOCKS, ("gpu",), "one_sided")).events()
    assert [e.at for e in events] == pytest.approx([5.0, 10.0, 15.0, 20.0])


def replace_sends(plan: MulticastPlan) -> MulticastPlan:
    """The same sends without streaming."""
    return MulticastPlan(members=plan.members, sources=plan.sources, blocks=plan.blocks, rounds=plan.rounds)
