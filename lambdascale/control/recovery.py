"""What happens when a node or a transfer fails: nothing is lost that somebody still holds."""

from __future__ import annotations

from lambdascale.control.router import Router
from lambdascale.control.scaling import Scaler
from lambdascale.control.state import Allocation, Fleet, ModelState, TransferState
from lambdascale.core import NodeId, PlanError
from lambdascale.core.commands import CancelTransfer, ReleaseNode, StopInstance, Tier
from lambdascale.multicast import plan_from_holdings


class Recovery:
    """Re-plans transfers over the survivors and restarts the requests of lost instances."""

    def __init__(self, fleet: Fleet, router: Router, scaler: Scaler) -> None:
        self._fleet = fleet
        self._router = router
        self._scaler = scaler

    def node_lost(self, node: NodeId) -> None:
        """Forget the node, restart its requests elsewhere, and re-plan the transfers it took part in."""
        fleet = self._fleet
        if fleet.gpus_free.pop(node, None) is None:
            return
        broken = [t for t in fleet.transfers.values() if node in t.members]
        for transfer in broken:
            self._cancel(transfer)
        fleet.host.forget(node)
        for state in fleet.models.values():
            self._forget_allocation(state, node)
        for transfer in broken:
            transfer.waiting.discard(node)
            if transfer.waiting:
                self._replan(transfer, again=transfer.again)
        if not fleet.gpus_free:
            for state in fleet.models.values():
                self._router.give_up(state)

    def transfer_failed(self, transfer_id: int) -> None:
        """Something was wrong on nodes that live: a damaged block, no room.

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
                self._scaler.load_missing(self._fleet.models[transfer.model], node)

    def _cancel(self, transfer: TransferState) -> None:
        self._fleet.out.append(CancelTransfer(transfer.transfer_id))
        self._scaler.end_transfer(transfer)

    def _give_up(self, transfer: TransferState) -> None:
        state = self._fleet.models[transfer.model]
        for node in sorted(transfer.waiting):
            allocation = state.allocations[node]
            self._stop_instance(state, allocation)
            self._drop_allocation(state, node)
            self._fleet.gpus_free[node] += state.spec.gpus_per_replica
            self._fleet.out.append(ReleaseNode(node, transfer.model, state.spec.gpus_per_replica))
        self._router.fill(state)

    def instance_failed(self, instance_id: int) -> None:
        """Restart the requests of an instance that failed, and let its complete nodes serve anew."""
        instance = self._fleet.instances.get(instance_id)
        if instance is None:
            return
        state = self._fleet.models[instance.model]
        self._stop_instance(state, state.allocations[instance.nodes[0]])
        self._scaler.serve_alone(state, instance.nodes)
        self._router.fill(state)

    def _forget_allocation(self, state: ModelState, node: NodeId) -> None:
        allocation = state.allocations.get(node)
        if allocation is None:
            return
        instance = allocation.instance
        self._stop_instance(state, allocation)
        self._drop_allocation(state, node)
        if instance is not None:
            # The other nodes of a broken pipeline go on receiving and serve alone once they are complete.
            self._scaler.serve_alone(state, [n for n in instance.nodes if n != node])
        self._router.fill(state)

    def _stop_instance(self, state: ModelState, allocation: Allocation) -> None:
        instance = allocation.instance
        if instance is not None:
            self._fleet.out.append(StopInstance(instance.instance_id))
            self._scaler.drop_instance(state, instance)
            self._router.requeue(state, [instance])

    @staticmethod
    def _drop_allocation(state: ModelState, node: NodeId) -> None:
        del state.allocations[node]
        state.pending = [p for p in state.pending if node not in p.plan.nodes]

    def _replan(self, transfer: TransferState, *, again: bool) -> None:
        """Bring the rest of a broken transfer about: from what the survivors hold, else from each node's own storage."""
        state = self._fleet.models[transfer.model]
        destinations = sorted(transfer.waiting)
        blocks = len(state.block_bytes)
        holdings, tiers = self._holdings(state, destinations, blocks)
        try:
            if not transfer.multicast:
                raise PlanError("a load has no other source")
            plan = plan_from_holdings(holdings, destinations, blocks)
        except PlanError:
            for node in destinations:
                self._scaler.load_missing(state, node)
            return
        self._scaler.start_multicast(state, plan, [(node, tiers[node]) for node in plan.sources], again=again)

    def _holdings(
        self, state: ModelState, destinations: list[NodeId], blocks: int
    ) -> tuple[dict[NodeId, set[int]], dict[NodeId, Tier]]:
        fleet, name = self._fleet, state.spec.name
        everything = set(range(blocks))
        holdings: dict[NodeId, set[int]] = {}
        tiers: dict[NodeId, Tier] = {}
        for node in fleet.host.holders(fleet.gpus_free, name, fleet.at):
            holdings[node], tiers[node] = everything, "host"
        for node, allocation in state.allocations.items():
            if allocation.complete or node in destinations:
                holdings[node], tiers[node] = set(allocation.blocks), "gpu"
        return holdings, tiers
