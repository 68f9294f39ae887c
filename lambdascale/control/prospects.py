"""Predictions for pipelines, from the cluster's description and from what has arrived: rounds, first passes, mode switches."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import lru_cache
from itertools import chain, islice
from math import inf
from typing import TYPE_CHECKING

from lambdascale.core import ClusterSpec, ModelSpec, NodeId
from lambdascale.core.commands import Tier
from lambdascale.core.timing import ComputeModel, Iteration
from lambdascale.pipelines import Costs

if TYPE_CHECKING:
    from lambdascale.control.state import Allocation, Fleet, ModelState

# Number of requests whose prompts stand for all.
_SAMPLE = 64
# Number of pairs of a model and a length whose first passes are remembered.
_REMEMBERED = 1024


class Passes:
    """Times of first passes on the slowest kind of node, for batches of up to ``max_batch`` requests of one length."""

    def __init__(self, cluster: ClusterSpec, max_batch: int) -> None:
        self._cluster = cluster
        self._max_batch = max_batch
        self._specs: dict[str, ModelSpec] = {}
        self._models: dict[str, list[ComputeModel]] = {}
        self._rate = cluster.rdma_efficiency * min(node.nic_bytes_per_s for node in cluster.kinds)
        # Asked for mostly for the same prompts.
        self._passes = lru_cache(_REMEMBERED)(self._pass_times)

    def costs(self, spec: ModelSpec, prompt_tokens: int, *, requests: int, round_s: float) -> Costs:
        """Return the costs for ``requests`` of ``prompt_tokens``. Activations travel at the network's rate, alone."""
        if spec.name not in self._specs:
            self._specs[spec.name] = spec
        batch_s, overhead_s, hop_s = self._passes(spec.name, prompt_tokens)
        return Costs(round_s=round_s, batch_s=batch_s, overhead_s=overhead_s, hop_s=hop_s, requests=requests)

    def _pass_times(self, name: str, prompt_tokens: int) -> tuple[tuple[float, ...], float, tuple[float, ...]]:
        """Return ``batch_s``, ``overhead_s`` and ``hop_s`` of Costs. By name: hashing a ModelSpec takes longer than all else."""
        spec, models = self._specs[name], self._models.get(name)
        if models is None:
            models = self._models[name] = [ComputeModel(kind, spec) for kind in self._cluster.kinds]
        sizes = [
            Iteration(batch * prompt_tokens, batch * prompt_tokens * (prompt_tokens + 1) // 2)
            for batch in range(1, self._max_batch + 1)
        ]
        overhead_s = max(model.iteration_s(sizes[0], 0.0) for model in models)
        token_s = spec.hidden * spec.dtype_bytes / self._rate
        batch_s = tuple(max(model.iteration_s(size) for model in models) - overhead_s for size in sizes)
        return batch_s, overhead_s, tuple(self._cluster.hop_latency_s + size.prefill_tokens * token_s for size in sizes)


def multicast_costs(
    fleet: Fleet, state: ModelState, nodes: Iterable[NodeId], sources: Iterable[tuple[NodeId, Tier]], loading: Collection[NodeId]
) -> Costs:
    """Predict for a multicast among ``nodes`` from (node, tier) pairs ``sources``: every link at the rate of the slowest.

    A source in host memory is as fast as its PCIe, and half as fast where it is among the nodes ``loading`` their own copies: the
    send and the load share PCIe max-min fairly, as flows in the simulated cluster do.
    """
    cluster = fleet.cluster
    rates = [cluster.node(node).nic_bytes_per_s * cluster.rdma_efficiency for node in nodes]
    rates += [cluster.node(n).pcie_bytes_per_s / (2 if n in loading else 1) for n, tier in sources if tier == "host"]
    return _costs(fleet, state, cluster.link_latency_s + max(state.block_bytes) / min(rates))


def rounds_per_block(fleet: Fleet, state: ModelState, node: NodeId, *, round_s: float, feeds: bool) -> float:
    """Return the rounds of a multicast, of ``round_s`` seconds, in which a node loads a block of its host copy.

    A node that ``feeds`` the multicast from that copy sends a block a round over the same PCIe; the load has what is left.
    """
    block_bytes = max(state.block_bytes)
    pcie = fleet.cluster.node(node).pcie_bytes_per_s - (block_bytes / round_s if feeds else 0.0)
    return block_bytes / pcie / round_s


def load_costs(fleet: Fleet, state: ModelState, nodes: Iterable[NodeId]) -> Costs:
    """Predict for loads by ``nodes`` from their own memory or storage: a block a round, at the rate of the slowest."""
    cluster, rates = fleet.cluster, []
    for number in nodes:
        node, tier = cluster.node(number), fleet.own_tier(state, number)
        storage = {"host": inf, "ssd": node.ssd_bytes_per_s, "remote": float(cluster.remote_bytes_per_s)}
        rates.append(min(node.pcie_bytes_per_s, storage[tier]))
    return _costs(fleet, state, max(state.block_bytes) / min(rates))


def costs_now(fleet: Fleet, state: ModelState) -> Costs:
    """Predict the first passes of what waits now; ``round_s`` has no meaning.

    Asked for at every block that arrives while a pipeline serves, and kept from one to the next: see Fleet.
    """
    if fleet.out:
        return _costs(fleet, state, inf)
    costs = fleet.costs.get(state.spec.name)
    if costs is None:
        costs = fleet.costs[state.spec.name] = _costs(fleet, state, inf)
    return costs


def left_s(allocation: Allocation, at: float) -> float:
    """Predict the seconds until a node holds the whole model, at the pace at which its blocks came; infinite for a share."""
    held, total = len(allocation.blocks), allocation.total
    if len(allocation.wanted) < total:
        return inf
    missing = total - held
    if not missing:
        return 0.0
    if held < 2 or allocation.first_at is None:
        return missing * (at - allocation.began_at)
    return missing * (at - allocation.first_at) / (held - 1)


def _costs(fleet: Fleet, state: ModelState, round_s: float) -> Costs:
    """Costs for the requests that wait, by the mean of their prompts; without any, for one like those that run."""
    running = chain.from_iterable(instance.outstanding.values() for instance in state.instances.values())
    prompts = [request.prompt_tokens for request in islice(state.queue or running, _SAMPLE)]
    mean = max(1, round(sum(prompts) / len(prompts))) if prompts else 1
    return fleet.passes.costs(state.spec, mean, requests=max(1, len(state.queue)), round_s=round_s)
