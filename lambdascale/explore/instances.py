"""Instances in a cluster with faults: what their heads still have, what is handed over, and what starts anew.

A lost node answers no command, also while its loss is not known yet. Requests are with the head of an instance (its first node)
and go on from the tokens that their clients have (see lambdascale.live.controller.answers and lambdascale.live.node.mode_switch).
"""

from __future__ import annotations

from collections.abc import Iterable

from lambdascale.control.batching import BatchedRequest
from lambdascale.core import NodeId
from lambdascale.core.commands import AllocateNode, Dispatch, ReleaseNode, Repartition, Serve, StopInstance, SwitchMode
from lambdascale.core.events import CommandFailed, TokensProduced
from lambdascale.explore.messages import Message, Messages
from lambdascale.explore.scenario import Scenario
from lambdascale.sim.instances import SimInstance

# Seconds after which an instance fails that a poisoned request or a bad node makes fail.
_FAILS_AFTER_S = 0.004
# Requests as they stand when an instance ends: (request, tokens produced).
_Works = list[BatchedRequest]


class Instances(Messages):
    """The cluster's instances, and what its nodes really hold."""

    def __init__(self, scenario: Scenario) -> None:
        # Set before the base class, whose table of handlers names overridden methods.
        self._blocks = scenario.system.blocks
        self._prompt_tokens = {each.request_id: each.prompt_tokens for each in scenario.requests}
        super().__init__(scenario)
        self._handlers[AllocateNode] = self._allocate
        self._poisoned: set[int] = set()
        self._bad: set[NodeId] = set()
        self._served: dict[int, Serve] = {}
        self._stages: dict[int, set[NodeId]] = {}
        self._stranded: dict[int, _Works] = {}
        self._switching: dict[int, tuple[NodeId, dict[int, int]]] = {}  # lost handovers: head, request -> target
        self._cut: set[frozenset[NodeId]] = set()  # pairs of living nodes that have lost their connection
        self._copying: dict[int, tuple[frozenset[NodeId], BatchedRequest, int]] = {}

    def _say(self, what: str) -> None:
        """Tell of a fault."""
        raise NotImplementedError

    def _end_instance(self, number: int) -> _Works:
        """Drain an instance; what it has produced counts, as far as its client can have it."""
        instance = self._instances.pop(number, None)
        works = [] if instance is None else instance.drain()
        for work in works:
            self._ledger.progress(work.request_id, work.produced)
        return works

    def _strand(self, number: int) -> None:
        """Stop an instance one of whose nodes died; its head, if it lives, still has the requests."""
        self._stranded[number] = self._end_instance(number)

    def _serve(self, command: Serve) -> None:
        nodes = tuple(dict.fromkeys(stage.node for stage in command.stages))
        self._served[command.instance] = command
        self._stages[command.instance] = set(nodes)
        self._ever[command.instance] = nodes
        super()._serve(command)
        if command.instance not in self._instances:
            self._stranded[command.instance] = []
        self._strand_where_cut(command.instance)
        if not self._bad.isdisjoint(nodes):
            self.kernel.at(self.kernel.now + _FAILS_AFTER_S, self._fail_instance, command.instance)

    def _repartition(self, command: Repartition) -> None:
        nodes = tuple(dict.fromkeys(stage.node for stage in command.stages))
        self._stages[command.instance] = set(nodes)
        self._ever[command.instance] = tuple(dict.fromkeys((*self._ever[command.instance], *nodes)))
        super()._repartition(command)
        self._strand_where_cut(command.instance)

    def _apart(self, nodes: Iterable[NodeId]) -> bool:
        """True if two of the nodes have lost their connection."""
        together = set(nodes)
        return any(pair <= together for pair in self._cut)

    def _strand_where_cut(self, number: int) -> None:
        if number in self._instances and self._apart(self._ever[number]):
            self._strand(number)

    def _dispatch(self, command: Dispatch) -> None:
        going = self._ledger.dispatch(command)
        self._end_moves(going)
        self._assign(command.instance, going)

    def _assign(self, number: int, requests: Iterable[int]) -> None:
        """Let an instance work on requests from the tokens on that are known to exist."""
        works = []
        for request_id in requests:
            answer = self._answer_tokens[request_id]
            produced = min(self._ledger.produced(request_id), answer - 1)
            works.append(BatchedRequest(request_id, self._prompt_tokens[request_id], answer, produced))
        if any(work.request_id in self._poisoned for work in works):
            self.kernel.at(self.kernel.now + _FAILS_AFTER_S, self._fail_instance, number)
        if number in self._instances:
            self._instances[number].take(works)
        elif number in self._stranded:
            self._stranded[number] += works

    def _stop_instance(self, command: StopInstance) -> None:
        self._end_instance(command.instance)
        self._ledger.stop(command)
        self._stranded.pop(command.instance, None)
        self._served.pop(command.instance, None)

    def _switch_mode(self, command: SwitchMode) -> None:
        self._ledger.switch(command)
        self._served.pop(command.pipeline, None)
        pipeline = self._instances.pop(command.pipeline, None)
        moves = dict(command.moves)
        if pipeline is not None:
            works = pipeline.drain()
            for work in works:
                self._ledger.progress(work.request_id, work.produced)
            self._hand_over(pipeline, works, moves, command)
            return
        head = self._ever[command.pipeline][0]
        if head in self._lost or head not in self._members:
            self._switching[command.pipeline] = (head, moves)
            if head not in self._members:
                del self._switching[command.pipeline]
                self._redo(moves)
            return
        for work in self._stranded.pop(command.pipeline, ()):
            if work.request_id in moves and self._handed(command.pipeline, work, moves[work.request_id]):
                self._resume(moves[work.request_id], work, cached=False)

    def _hand_over(self, pipeline: SimInstance, works: _Works, moves: dict[int, int], command: SwitchMode) -> None:
        # Answers that are complete: the word of it may be lost with the head.
        ended = moves.keys() - {work.request_id for work in works}
        if ended:
            self._switching[command.pipeline] = (self._ever[command.pipeline][0], {each: moves[each] for each in sorted(ended)})
        for work in works:
            target = moves.get(work.request_id)
            if target is None:
                continue  # the control plane believes it to be elsewhere
            if not self._handed(pipeline.instance_id, work, target):
                continue
            if command.kv == "copy" and work.produced and not self._apart((*pipeline.nodes, self._ever[target][0])):
                self._copying[work.request_id] = (frozenset(pipeline.nodes), work, target)
                self._copy_kv(pipeline, work, target)
            else:
                self._resume(target, work, cached=False)

    def _handed(self, pipeline: int, work: BatchedRequest, target: int) -> bool:
        """Hand a request over; False if its message is lost: the controller does it once the connection is made again."""
        head = self._ever[pipeline][0]
        if self._apart((head, self._ever[target][0])):
            self._switching.setdefault(pipeline, (head, {}))[1][work.request_id] = target
            return False
        self._arrive_at(target, work)
        return True

    def _arrive_at(self, target: int, work: BatchedRequest) -> None:
        """Let a target's head tell of the tokens that a request brings along; the pipeline's own word of them may be late."""
        if work.produced and not self._ledger.begun(work.request_id) and self._ever[target][0] not in self._lost:
            self._send(TokensProduced(self.kernel.now, target, work.request_id, 1, "pipeline"))

    def _resume(self, target: int, work: BatchedRequest, *, cached: bool) -> None:
        if cached and self._copying.pop(work.request_id, None) is None:
            return
        self._copying.pop(work.request_id, None)
        if target in self._stranded:  # its head takes the request, and hands it over once more
            self._stranded[target].append(work)
        else:
            super()._resume(target, work, cached=cached)

    # -- losses ------------------------------------------------------------------------------------------------------

    def _forget(self, node: NodeId) -> None:
        """Forget a member, and redo or report what depended on it, as a live controller does."""
        self._members.discard(node)
        for pipeline, (head, moves) in list(self._switching.items()):
            if head == node:
                del self._switching[pipeline]
                self._redo(moves)
        for number, nodes in self._ever.items():
            if number in self._served and node in nodes and node not in self._stages[number]:
                reason = f"node {node} was lost, which had stages of instance {number} before"
                self._heard.append((CommandFailed(0.0, "Repartition", reason, instance=number), False))

    def _end_moves(self, requests: Iterable[int]) -> None:
        """Forget that lost handovers carry requests."""
        for request_id in requests:
            for _, moves in self._switching.values():
                moves.pop(request_id, None)

    def _redo(self, moves: dict[int, int]) -> None:
        """Give requests whose handover is lost to the instances that own them now: they may have been moved on meanwhile."""
        self._end_moves(moves)
        for request_id in moves:
            for target in sorted(self._ledger.owners(request_id) & self._served.keys()):
                self._assign(target, [request_id])

    def _break_instances(self, node: NodeId) -> None:
        """Stop what a node that dies had a part in; KV that it was to send is computed anew."""
        for number in list(self._instances):
            if node in self._ever[number]:
                self._strand(number)
        for sources, work, target in list(self._copying.values()):
            if node in sources:
                self._resume(target, work, cached=False)

    def _reconnected(self, pair: frozenset[NodeId]) -> bool:
        if pair not in self._cut or not pair <= self._members or not pair.isdisjoint(self._lost):
            return False
        self._connect(pair)
        return True

    def _connect(self, pair: frozenset[NodeId]) -> None:
        self._cut.remove(pair)
        self._transfers.restored(*pair)

    def _redo_between(self, pair: frozenset[NodeId]) -> None:
        for pipeline, (head, moves) in list(self._switching.items()):
            if head in pair:
                del self._switching[pipeline]
                self._redo(moves)
        for number, nodes in self._ever.items():
            if number in self._served and pair <= set(nodes) and not pair <= self._stages[number]:
                reason = f"two nodes of instance {number} lost their connection"
                self._heard.append((CommandFailed(0.0, "Repartition", reason, instance=number), False))

    def _break_between(self, pair: frozenset[NodeId]) -> None:
        """Stop what needs a connection that is lost; KV that was to come over it is computed anew."""
        for number in list(self._instances):
            self._strand_where_cut(number)
        for sources, work, target in list(self._copying.values()):
            if pair <= {*sources, self._ever[target][0]}:
                self._resume(target, work, cached=False)

    def _fail_instance(self, number: int) -> None:
        if number in self._instances:
            self._say(f"instance {number} fails")
            self._strand(number)
            self._hear(Message(0.0, CommandFailed(0.0, "Serve", "broken", instance=number), -1, 0))
            self._wake()

    # -- what nodes hold ---------------------------------------------------------------------------------------------

    def held(self, node: NodeId, model: str) -> set[int]:
        """Return the blocks that a node really holds; all of them if it is dead, which nobody may know yet."""
        return self._holds.get((node, model), set()) if node not in self._lost else set(range(self._blocks))

    def _allocate(self, command: AllocateNode) -> None:
        if command.node not in self._lost:
            self._holds[command.node, command.model] = set()

    def _release(self, command: ReleaseNode) -> None:
        super()._release(command)
        self._holds.pop((command.node, command.model), None)
