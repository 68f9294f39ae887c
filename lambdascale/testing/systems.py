"""Conformance of serving systems: driven over the simulated cluster through what goes wrong in practice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from lambdascale.control import Autoscaler, Backend, SystemConfig, build_system, drive
from lambdascale.core import ClusterSpec, ComputeSpec, GpuSpec, ModelSpec, NodeId, NodeOverride, TracedRequest, traced
from lambdascale.core.commands import CancelTransfer, Command, ReleaseNode
from lambdascale.core.events import BlockArrived, CommandFailed, Event, RequestFinished, TokensProduced
from lambdascale.metrics import Recorder, events_table
from lambdascale.sim import SimConfig, TransferOptions
from lambdascale.testing.invariants import InvariantChecker

# Limit on the answers of requests here: above every answer, and far below the KV memory.
LIMIT = 100


def small_cluster(nodes: int = 6, gpus_per_node: int = 1) -> ClusterSpec:
    """A cluster on which a 1 GB model takes tenths of a second to move and hundredths to run."""
    return ClusterSpec(
        name="small",
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=GpuSpec(name="test", memory_bytes="4GB", hbm_bytes_per_s="100GB/s", peak_flops=1e13),
        compute=ComputeSpec(flops_efficiency=0.5, bandwidth_efficiency=0.5),
        nic_bytes_per_s="4GB/s",
        rdma_efficiency=0.8,
        collective_efficiency=0.9,
        link_latency_s=1e-5,
        hop_latency_s=1e-4,
        pcie_bytes_per_s="2GB/s",
        ssd_bytes_per_s="0.5GB/s",
        host_memory_bytes="3GB",
        usd_per_gpu_hour=1.0,
    )


def with_kv_tokens(
    cluster: ClusterSpec, tokens: int, nodes: Sequence[int] | None = None, model: ModelSpec | None = None
) -> ClusterSpec:
    """The cluster with memory for so many tokens of KV cache beside a model (None: a small one) on ``nodes`` (None: on all)."""
    model = model or small_model()
    gpus = model.gpus_per_replica
    needed = model.size_bytes + gpus * (tokens + 0.5) * model.kv_bytes_per_token
    gpu = replace(cluster.gpu, memory_bytes=round(needed / gpus / 0.9))
    if nodes is None:
        return replace(cluster, gpu=gpu)
    return replace(cluster, overrides=(NodeOverride(nodes=tuple(nodes), gpu=gpu),))


def small_model(name: str = "small") -> ModelSpec:
    """A 1 GB model of 16 layers."""
    return ModelSpec(name=name, layers=16, hidden=1024, heads=16, kv_heads=8, vocab=8000, weight_bytes="1GB")


def burst(count: int, at_s: float = 0.0, first_id: int = 0, model: str = "small") -> list[TracedRequest]:
    """Requests that all arrive at once, with the same limit."""
    return [traced(first_id + i, at_s, model, 20 + 7 * (i % 5), 5 + 11 * (i % 4), LIMIT) for i in range(count)]


def _checker(config: SystemConfig, cluster: ClusterSpec) -> InvariantChecker:
    return InvariantChecker(cluster, config.blocks, desired=config.autoscaler.desired, max_batch=config.batching.max_batch)


class Damaging:
    """A cluster where, of each of the first ``times`` transfers, the ``arrival``-th block to arrive somewhere is damaged.

    Nodes tell of a block once, as real ones do, although it may be under way a second time when its transfer is called off.
    """

    def __init__(self, backend: Backend, times: int, arrival: int) -> None:
        self._backend, self._times, self._arrival = backend, times, arrival
        self._arrived: Counter[int] = Counter()
        self._told: set[tuple[NodeId, int]] = set()
        self.failed: list[int] = []

    def submit(self, command: Command) -> None:
        """See Backend."""
        if isinstance(command, ReleaseNode):
            self._told = {(node, block) for node, block in self._told if node != command.node}
        self._backend.submit(command)

    def next_event(self) -> Event | None:
        """See Backend."""
        while True:
            event = self._backend.next_event()
            if not isinstance(event, BlockArrived):
                return event
            if (event.node, event.block) in self._told:
                continue
            if event.at and self._is_damaged(event.transfer_id):  # what runs start with is in place already
                return CommandFailed(event.at, "StartMulticast", f"block {event.block}", transfer_id=event.transfer_id)
            self._told.add((event.node, event.block))
            return event

    def _is_damaged(self, number: int) -> bool:
        self._arrived[number] += 1
        if self._arrived[number] != self._arrival or len(self.failed) == self._times:
            return False
        self.failed.append(number)
        return True


class SystemConformance:
    """Subclass with ``make_system``: a SystemConfig that cuts models into at most 16 blocks."""

    def make_system(self) -> SystemConfig:
        """The system under test."""
        raise NotImplementedError

    def run(
        self,
        requests: Sequence[TracedRequest],
        *,
        cluster: ClusterSpec | None = None,
        models: Sequence[ModelSpec] = (),
        seed: int = 0,
        transfers: dict[str, Any] | None = None,
        failures: Sequence[tuple[int, float]] = (),
        **changes: Any,
    ) -> tuple[InvariantChecker, Recorder]:
        """Drive the system to the end and check everything on the way; ``changes`` are the autoscaler's."""
        config = self.make_system()
        config = replace(config, autoscaler=replace(cast(Autoscaler, config.autoscaler), **changes))
        cluster, models = cluster or small_cluster(), models or [small_model()]
        backend = SimConfig(transfers=TransferOptions(**(transfers or {})), node_failures=tuple(failures)).build(
            cluster=cluster, models=models, requests=requests, batching=config.batching, seed=seed
        )
        checker, recorder = _checker(config, cluster), Recorder()
        drive(build_system(config, cluster=cluster, models=models), backend, [checker, recorder])
        checker.finish()
        assert not checker.failed
        wanted = {request.request_id: request.output_tokens for request in requests}
        assert checker.finished == wanted, "every request gets all its tokens"
        return checker, recorder

    def test_nothing_to_do(self) -> None:
        """No requests: the run ends by itself."""
        self.run([])

    def test_one_request_of_one_token(self) -> None:
        """The smallest answer."""
        self.run([traced(0, 3.7, "small", 1, 1)])

    @pytest.mark.parametrize("min_replicas", [0, 1, 3])
    def test_a_burst_scales_out_and_back(self, min_replicas: int) -> None:
        """The burst begins and ends with zero, one or several replicas."""
        _, recorder = self.run(burst(60) + burst(5, 30.0, 60), min_replicas=min_replicas, keep_alive_s=0.5)
        assert "AllocateNode" in {type(entry).__name__ for _, entry in recorder.entries}

    @pytest.mark.parametrize("nodes", [1, 2, 3, 5, 7])
    def test_any_cluster_size(self, nodes: int) -> None:
        """One node, and numbers that are no power of two."""
        self.run(burst(50), cluster=small_cluster(nodes))

    def test_equal_timestamps_and_waves(self) -> None:
        """Waves that hit every phase of the scale-out before."""
        waves = [burst(12, 0.07 * wave, 12 * wave) for wave in range(12)]
        self.run([request for wave in waves for request in wave])

    def test_several_models_share_the_cluster(self) -> None:
        """More models than nodes: idle replicas make room."""
        names = [f"small-{i}" for i in range(5)]
        requests = [r for i, name in enumerate(names) for r in burst(9, 2.0 * i, 9 * i, name)]
        again = [r for i, name in enumerate(names) for r in burst(3, 15.0 + 0.1 * i, 100 + 3 * i, name)]
        models = [small_model(name) for name in names]
        self.run(requests + again, models=models, cluster=small_cluster(3), min_replicas=0)

    def test_models_share_a_node_of_several_gpus(self) -> None:
        """Two models side by side on the GPUs of the same nodes."""
        models = [small_model("a"), small_model("b")]
        requests = sorted(burst(20, 0.0, 0, "a") + burst(20, 0.3, 20, "b"), key=lambda r: r.arrival_s)
        self.run(requests, models=models, cluster=small_cluster(3, gpus_per_node=2))

    @pytest.mark.parametrize("at_s", [0.05, 0.25, 0.45])
    def test_a_model_split_over_the_gpus_of_its_nodes(self, at_s: float) -> None:
        """Several batches in flight on each node; a lost node loses no request."""
        split = replace(small_model(), gpus_per_replica=2)
        self.run(burst(80), models=[split], cluster=small_cluster(4, gpus_per_node=2), failures=[(1, at_s)])

    @pytest.mark.parametrize("at_s", [0.0, 0.05, 0.15, 0.25, 0.3, 0.35, 0.45, 0.7, 1.5])
    @pytest.mark.parametrize("node", [0, 1, 3])
    def test_a_lost_node_loses_no_request(self, node: int, at_s: float) -> None:
        """Source or destination, in any phase: every request is answered exactly once."""
        self.run(burst(60), failures=[(node, at_s)])

    def test_all_but_one_node_are_lost(self) -> None:
        """The survivor does everything."""
        self.run(burst(30), failures=[(node, 0.1 + 0.12 * node) for node in range(5)])

    def test_when_all_nodes_are_lost_requests_fail(self) -> None:
        """Requests that wait fail, and so do later ones: a run without nodes ends."""
        config, cluster = self.make_system(), small_cluster(3)
        requests = burst(30) + burst(2, 5.0, 30)
        backend = SimConfig(node_failures=((0, 0.1), (1, 0.1), (2, 0.15))).build(
            cluster=cluster, models=[small_model()], requests=requests, batching=config.batching, seed=0
        )
        checker = _checker(config, cluster)
        drive(build_system(config, cluster=cluster, models=[small_model()]), backend, [checker])
        checker.finish()
        assert {30, 31} <= checker.failed

    @pytest.mark.parametrize("arrival", [1, 7, 16])
    @pytest.mark.parametrize("times", [1, 2, 3])
    def test_damaged_blocks_lose_no_request(self, times: int, arrival: int) -> None:
        """The transfer, and also the one that makes up for it, may fail: what is missing is brought another way."""
        config, cluster, requests = self.make_system(), small_cluster(), burst(60)
        backend = SimConfig().build(cluster=cluster, models=[small_model()], requests=requests, batching=config.batching, seed=0)
        damaging, checker, recorder = Damaging(backend, times, arrival), _checker(config, cluster), Recorder()
        drive(build_system(config, cluster=cluster, models=[small_model()]), damaging, [checker, recorder])
        checker.finish()
        assert checker.finished == {request.request_id: request.output_tokens for request in requests}
        entries = [entry for _, entry in recorder.entries]
        assert set(damaging.failed) <= {entry.transfer_id for entry in entries if isinstance(entry, CancelTransfer)}

    def test_prototype_barrier(self) -> None:
        """The same plans under the prototype's round barrier."""
        self.run(burst(60), transfers={"barrier": True})

    def test_a_request_that_cannot_fit_is_refused_at_once(self) -> None:
        """The others are served."""
        config, cluster = self.make_system(), small_cluster()
        requests = [traced(0, 0.0, "small", 10_000_000, 5), traced(1, 0.0, "small", 10, 5)]
        backend = SimConfig().build(cluster=cluster, models=[small_model()], requests=requests, batching=config.batching, seed=0)
        checker = _checker(config, cluster)
        drive(build_system(config, cluster=cluster, models=[small_model()]), backend, [checker])
        assert checker.failed == {0}
        assert checker.finished == {1: 5}

    @pytest.mark.parametrize("kv_tokens", [600, 79_345])
    def test_no_decision_depends_on_where_answers_end(self, kv_tokens: int) -> None:
        """Dealing the ends out anew changes nothing until the first answer ends, even if KV memory runs out before."""
        ends = [60 + 37 * i % 240 for i in range(60)]
        logs = []
        for dealt in (ends, ends[23:] + ends[:23]):
            requests = [traced(i, 0.0, "small", 20 + 7 * (i % 5), end, 400) for i, end in enumerate(dealt)]
            _, recorder = self.run(requests, cluster=with_kv_tokens(small_cluster(), kv_tokens))
            logs.append(recorder.entries)
        first = min(at for log in logs for at, entry in log if isinstance(entry, RequestFinished))
        before = [[(at, entry) for at, entry in log if at < first] for log in logs]
        assert before[0] == before[1]
        assert any(isinstance(entry, TokensProduced) for _, entry in before[0])

    def test_scarce_kv_memory(self) -> None:
        """Room for two requests at their longest: the others wait or are computed anew, and all are answered."""
        self.run(burst(60), cluster=with_kv_tokens(small_cluster(), 300))

    @pytest.mark.parametrize("small", [(0, 1, 2), (3, 4, 5), (0, 2, 4)])
    def test_nodes_with_different_kv_memory(self, small: tuple[int, ...]) -> None:
        """Large requests are served by the nodes that can hold them, whichever those are; nobody waits for ever."""
        cluster = with_kv_tokens(small_cluster(), 300, small)
        large = [traced(60 + i, 0.01 * i, "small", 2000, 20) for i in range(4)]
        late = [traced(70, 20.0, "small", 2000, 20)]
        requests = sorted([*burst(60), *large], key=lambda request: request.arrival_s) + late
        self.run(requests, cluster=cluster, min_replicas=1)

    def test_a_fixed_number_of_replicas_on_nodes_too_small(self) -> None:
        """The only replica gives way, once it is idle, to one on the node that can hold the request."""
        cluster = with_kv_tokens(small_cluster(3), 300, (0, 1))
        requests = [traced(0, 0.5, "small", 20, 50), traced(1, 0.6, "small", 2000, 20)]
        self.run(requests, cluster=cluster, min_replicas=1, max_replicas=1)

    def test_the_same_seed_gives_the_same_events(self) -> None:
        """Byte for byte."""
        one, two = (events_table(self.run(burst(60), seed=3)[1]) for _ in range(2))
        assert one.equals(two)
