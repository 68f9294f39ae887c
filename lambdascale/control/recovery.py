"""Failures of nodes, transfers and instances: nothing is lost that a living node still holds."""

from __future__ import annotations

from collections.abc import Iterable

from lambdascale.control.allocations import Allocations
from lambdascale.control.router import Router
from lambdascale.control.serving import Serving
from lambdascale.control.state import Allocation, Fleet, Instance, ModelState, TransferState
from lambdascale.control.transfers import Transfers
from lambdascale.core import NodeId, PlanError
from lambdascale.core.commands import CancelTransfer, StopInstance, Tier
from lambdascale.multicast import plan_from_holdings

# A node is not used for a model any more after so many failures in a row of the model's instances on it.
_TRIES = 3


class Recovery:
    """Re-plans transfers over the survivors and restarts the requests of lost instances."""

    def __init__(self, fleet: Fleet, router: Router, transfers: Transfers, allocations: Allocations, serving: Serving) -> None:
        self._fleet = fleet
        self._router = router
        self._transfers = transfers
        self._allocations = allocations
        self._serving = serving

    def node_lost(self, node: NodeId, *, returns: bool) -> None:
        """Forget the node, restart its requests elsewhere, and re-plan the transfers it took part in.

        ``returns``: the node will be started again, and requests that no living node can serve wait for it.
        """
        fleet = self._fleet
        if fleet.gpus_free.pop(node, None) is None:
            return
        if returns:
            fleet.returning.add(node)
        broken = [t for t in fleet.transfers.values() if node in t.members]
        for transfer in broken:
            self._cancel(transfer)
        fleet.host.forget(node)
        for state in fleet.models.values():
            self._forget_allocation(state, node)
        for transfer in broken:
            transfer.waiting.pop(node, None)
            if transfer.waiting:
                self._replan(transfer, again=transfer.again)
        for state in fleet.models.values():
            self._router.give_up(state)

    def node_given_up(self, node: NodeId) -> None:
        """Wait no more for a lost node; fail the requests that no other node can serve."""
        self._fleet.returning.discard(node)
        for state in self._fleet.models.values():
            self._router.give_up(state)

    def connection_lost(self, node: NodeId, peer: NodeId) -> None:
        """Restart what two living nodes had under way with each other; none of it counts as a failure."""
        fleet = self._fleet
        for transfer in [t for t in fleet.transfers.values() if node in t.members and peer in t.members]:
            self._cancel(transfer)
            self._replan(transfer, again=transfer.again)
        for instance in [i for i in fleet.instances.values() if node in i.nodes and peer in i.nodes]:
            state = fleet.models[instance.model]
            self._stop(state, instance)
            self._serve_on(state, instance.nodes)
        for state in fleet.models.values():
            self._router.fill(state)

    def transfer_failed(self, transfer_id: int) -> None:
        """Handle a transfer that failed on living nodes: a damaged block, no room.

        What a multicast has not brought is planned anew from what nodes hold; if that fails too, each loads the rest from its own
        storage; nodes whose loads fail are given up, and the autoscaler will ask again.
        """
        transfer = self._fleet.transfers.get(transfer_id)
        if transfer is None:
            return
        self._cancel(transfer)
        if not transfer.multicast:
            self._give_up(transfer)
        elif not transfer.again:
            self._replan(transfer, again=True)
        else:
            for node in sorted(transfer.waiting):
                self._transfers.load_missing(self._fleet.models[transfer.model], node)

    def instance_failed(self, instance_id: int, reason: str) -> None:
        """Restart the requests of an instance that failed, and let its complete nodes serve anew.

        A request that was on three failed instances is failed. A node is given up for the model after three failures in a row.
        """
        instance = self._fleet.instances.get(instance_id)
        if instance is None:
            return
        state = self._fleet.models[instance.model]
        state.reason = reason
        for node in instance.nodes:
            state.allocations[node].failures += 1
        self._stop(state, instance, failed=True)
        for node in instance.nodes:
            allocation = state.allocations[node]
            if allocation.failures >= _TRIES and not allocation.instances and not allocation.transfers:
                state.unfit.add(node)
                self._allocations.give_up(state, node)
        self._serve_on(state, instance.nodes)
        self._router.fill(state)
        self._router.give_up(state)

    def _cancel(self, transfer: TransferState) -> None:
        self._fleet.out.append(CancelTransfer(transfer.transfer_id))
        self._transfers.end(transfer)

    def _give_up(self, transfer: TransferState) -> None:
        state = self._fleet.models[transfer.model]
        for node in sorted(transfer.waiting):
            # Others that bring it blocks, or that it passes blocks on for.
            broken = [t for t in self._fleet.transfers.values() if t.model == transfer.model and _needs_gpus_of(t, node)]
            for other in broken:
                self._cancel(other)
            others = self._stop_all(state, state.allocations[node])
            self._allocations.give_up(state, node)
            self._serve_on(state, others)
            for other in broken:
                other.waiting.pop(node, None)
                if other.waiting:
                    self._replan(other, again=other.again)
        self._router.fill(state)

    def _forget_allocation(self, state: ModelState, node: NodeId) -> None:
        allocation = state.allocations.get(node)
        if allocation is None:
            return
        partners = self._stop_all(state, allocation)
        self._allocations.forget(state, node)
        # The other nodes of a broken pipeline go on receiving and serve alone once they are complete.
        self._serve_on(state, partners)
        self._router.fill(state)

    def _serve_on(self, state: ModelState, nodes: Iterable[NodeId]) -> None:
        """Let nodes of a broken pipeline serve alone: complete ones now, those with a share once they have loaded the rest."""
        for node in dict.fromkeys(nodes):
            allocation = state.allocations.get(node)
            if allocation is not None and allocation.is_share and not allocation.instances:
                self._allocations.widen(state, allocation, range(state.blocks))
                self._transfers.load_missing(state, node)
        self._serving.serve_alone(state, nodes)

    def _stop_all(self, state: ModelState, allocation: Allocation) -> list[NodeId]:
        """Stop the instances that serve on a node; return the other nodes they served on or were to serve on."""
        stopped = list(allocation.instances.values())
        for instance in stopped:
            self._stop(state, instance)
        lists = [p.plan.nodes for p in state.pending if allocation.node in p.plan.nodes]
        lists += [instance.nodes for instance in stopped]
        return [node for nodes in lists for node in nodes if node != allocation.node]

    def _stop(self, state: ModelState, instance: Instance, *, failed: bool = False) -> None:
        self._fleet.out.append(StopInstance(instance.instance_id))
        self._serving.drop(state, instance)
        self._router.requeue(state, instance, failed=failed)

    def _replan(self, transfer: TransferState, *, again: bool) -> None:
        """Bring what a broken multicast still owes: from what the survivors hold, else from each node's own storage."""
        state = self._fleet.models[transfer.model]
        destinations = sorted(transfer.waiting)
        holdings, tiers = self._holdings(state, destinations)
        try:
            plan = plan_from_holdings(holdings, destinations, state.blocks)
        except PlanError:
            for node in destinations:
                self._transfers.load_missing(state, node)
            return
        self._transfers.multicast(state, plan, [(node, tiers[node]) for node in plan.sources], again=again)

    def _holdings(self, state: ModelState, destinations: list[NodeId]) -> tuple[dict[NodeId, set[int]], dict[NodeId, Tier]]:
        fleet, name = self._fleet, state.spec.name
        everything = set(range(state.blocks))
        holdings: dict[NodeId, set[int]] = {}
        tiers: dict[NodeId, Tier] = {}
        for node in fleet.host.holders(fleet.gpus_free, name, fleet.at):
            holdings[node], tiers[node] = everything, "host"
        for node, allocation in state.allocations.items():
            if allocation.complete or node in destinations:
                holdings[node], tiers[node] = set(allocation.blocks), "gpu"
        return holdings, tiers


def _needs_gpus_of(transfer: TransferState, node: NodeId) -> bool:
    """True if the transfer still needs what a node has in GPU memory; a host copy outlives the allocation."""
    return node in transfer.waiting or (node in transfer.members and (node, "host") not in transfer.sources)
