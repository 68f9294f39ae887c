"""Scale-out: which nodes get a model."""

from __future__ import annotations

from lambdascale.control.allocations import Allocations
from lambdascale.control.serving import Serving
from lambdascale.control.start import StartPolicy
from lambdascale.control.state import Fleet, ModelState
from lambdascale.control.transfers import Transfers
from lambdascale.core import NodeId


class Scaler:
    """Carries the autoscaler's wishes out on the fleet, for every system alike; the start policy decides how replicas start."""

    def __init__(
        self, fleet: Fleet, transfers: Transfers, allocations: Allocations, serving: Serving, start: StartPolicy
    ) -> None:
        self._fleet = fleet
        self._transfers = transfers
        self._allocations = allocations
        self._serving = serving
        self._start = start

    def provision(self, state: ModelState, replicas: int) -> None:
        """Put ``replicas`` in place at the start of a run, without loading time."""
        for node in self.free_nodes(state)[:replicas]:
            self._allocations.allocate(state, node)
            self._transfers.load(state, node, "instant", range(state.blocks))

    def scale_out(self, state: ModelState, replicas: int) -> None:
        """Start up to ``replicas`` more replicas of a model on the best free nodes, as the start policy decides."""
        nodes = self.free_nodes(state)
        if not nodes:
            return
        decision = self._start.start(self._fleet, state, nodes, replicas)
        shares = dict(decision.wanted)
        for node in decision.nodes:
            self._allocations.allocate(state, node, shares.get(node))
        for load in decision.loads:
            self._transfers.load(state, load.node, load.tier, load.blocks)
        for order in decision.multicasts:
            self._transfers.multicast(state, order.plan, order.sources, barrier_s=order.barrier_s)
        self._serving.expect(state, decision.pipelines)

    def free_nodes(self, state: ModelState) -> list[NodeId]:
        """Nodes that could take an allocation of the model, best first."""
        return self._start.rank(self._fleet, state, self._fleet.free_nodes(state))
