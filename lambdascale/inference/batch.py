"""The bookkeeping of a batch of requests over the stages of a model: the next iteration, and the tokens it produced.

``BatchScheduler`` (the control plane's, which the simulator also uses) decides what the next iteration runs. The engine of one
process and the head of an instance keep their requests here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from msgspec import Struct

from lambdascale.control.batching import BatchedRequest, BatchLimits, BatchScheduler, Iteration
from lambdascale.core import CapacityError
from lambdascale.core.checks import require
from lambdascale.inference.sampling import GREEDY, Sampling


class Segment(Struct, frozen=True, gc=False):
    """``tokens`` consecutive tokens of the sequence in ``slot``, the first at position ``start``."""

    slot: int
    start: int
    tokens: int


class StageBatch(Struct, frozen=True):
    """An iteration as every stage runs it: prefills first, then ``decodes`` segments of one token each, ordered by slot.

    ``wanted``: the rows (of all tokens in the order of the segments) whose logits the last stage returns.
    """

    segments: tuple[Segment, ...]
    decodes: int
    wanted: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Number of tokens in all segments."""
        return sum(segment.tokens for segment in self.segments)


@dataclass
class Ticket:
    """A request as nodes pass it on: its tokens so far (prompt, then output), the limit of its output, sampling, stop tokens."""

    request_id: int
    tokens: list[int]
    prompt_tokens: int
    max_tokens: int
    sampling: Sampling = GREEDY
    stop_tokens: frozenset[int] = frozenset()

    @property
    def produced(self) -> int:
        """Number of output tokens so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def output(self) -> list[int]:
        """The output tokens so far."""
        return self.tokens[self.prompt_tokens :]


@dataclass(frozen=True)
class Produced:
    """A token that an iteration produced for a request; ``index`` is its place in the answer, ``finished`` marks the last."""

    request_id: int
    token: int
    index: int
    finished: bool


@dataclass
class BatchPlan:
    """An iteration under way: the scheduler's order, the stages' batch, the tokens to feed, the requests that get a token.

    ``settling``: (request, slot) of those that join with KV computed elsewhere; it is written before the iteration runs.
    """

    iteration: Iteration
    batch: StageBatch
    tokens: list[int]
    getting: list[Ticket] = field(default_factory=list)
    settling: list[tuple[int, int]] = field(default_factory=list)

    @property
    def rules(self) -> list[Sampling]:
        """Sampling of each token that the iteration produces."""
        return [ticket.sampling for ticket in self.getting]

    @property
    def positions(self) -> list[int]:
        """Position of each such token in its answer."""
        return [ticket.produced for ticket in self.getting]


class Batch:
    """Requests in KV slots of ``slot_tokens`` tokens each; at most one per slot runs. ``vocab`` bounds token ids.

    ``kv_tokens`` bounds the tokens in all slots together; None: nothing but the slots does. Slots are places in memory: the
    scheduler counts tokens, and a request that it preempts loses its slot.

    A batch gives out the slots in ``slots``. Requests absorbed from another batch keep the other's slots until they end.
    """

    def __init__(self, limits: BatchLimits, slots: range, slot_tokens: int, vocab: int, kv_tokens: int | None = None) -> None:
        require(len(slots) >= limits.max_batch, f"{len(slots)} KV slots are too few for batches of {limits.max_batch}")
        self.slot_tokens = slot_tokens
        self._vocab = vocab
        self._all_slots = len(slots) * slot_tokens
        self._scheduler = BatchScheduler(limits, self._room(kv_tokens))
        self._tickets: dict[int, Ticket] = {}
        self._works: dict[int, BatchedRequest] = {}
        self._slots: dict[int, int] = {}
        self.slots = slots
        self._free = list(slots)

    def _room(self, kv_tokens: int | None) -> int:
        return self._all_slots if kv_tokens is None else min(kv_tokens, self._all_slots)

    def limit(self, kv_tokens: int) -> None:
        """Set the limit of KV tokens in all slots together, from the next iteration on."""
        self._scheduler.kv_tokens = self._room(kv_tokens)

    @property
    def preemptions(self) -> int:
        """Number of preemptions so far: a request lost its KV to requests admitted before it."""
        return self._scheduler.preemptions

    def __len__(self) -> int:
        """Number of requests in the batch, waiting ones included."""
        return len(self._scheduler)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._tickets

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._tickets))

    def add(self, ticket: Ticket, *, cached: bool = False) -> None:
        """Take a request, also one that produced tokens elsewhere. ``cached``: the KV of all but its newest token comes along.

        Raises CapacityError or UserError if the batch cannot take the request.
        """
        self.check(ticket)
        require(not cached or ticket.produced > 0, f"request {ticket.request_id} has no token yet: its KV cannot be handed over")
        self._enter(ticket, cached)

    def _enter(self, ticket: Ticket, cached: bool) -> None:
        work = BatchedRequest(ticket.request_id, ticket.prompt_tokens, ticket.max_tokens, ticket.produced, cached)
        self._tickets[ticket.request_id] = ticket
        self._works[ticket.request_id] = work
        self._scheduler.add(work)

    def check(self, ticket: Ticket) -> None:
        """Raise CapacityError or UserError unless the batch can take the request."""
        require(ticket.prompt_tokens >= 1, f"request {ticket.request_id} has an empty prompt")
        require(
            ticket.produced < ticket.max_tokens,
            f"request {ticket.request_id} already has {ticket.produced} of its {ticket.max_tokens} tokens",
        )
        require(ticket.request_id not in self._tickets, f"request {ticket.request_id} is in this batch already")
        require(
            min(ticket.tokens) >= 0 and max(ticket.tokens) < self._vocab,
            f"request {ticket.request_id} has tokens outside 0 to {self._vocab - 1}",
        )
        wanted, room = ticket.prompt_tokens + ticket.max_tokens, self._scheduler.kv_tokens
        if wanted > min(self.slot_tokens, room):
            found = f"a slot has {self.slot_tokens}" if self.slot_tokens <= room else f"the instance has {room}"
            raise CapacityError(f"request {ticket.request_id} needs {wanted} tokens of KV memory, {found}")

    def cached_slot(self, request_id: int) -> int | None:
        """Return the slot with the KV of all of a request's tokens but the newest; None while that KV is not complete."""
        return self._slots.get(request_id) if self._is_complete(request_id) else None

    def _is_complete(self, request_id: int) -> bool:
        return request_id in self._scheduler.decoding or self._works[request_id].cached

    def kv_slots(self) -> list[tuple[int, int]]:
        """Return (slot, tokens) for all KV in slots, also of requests in the middle of their prefill. Between iterations."""
        found = [(slot, self._kv_tokens(request_id)) for request_id, slot in self._slots.items()]
        return [(slot, tokens) for slot, tokens in found if tokens]

    def _kv_tokens(self, request_id: int) -> int:
        if self._is_complete(request_id):
            return len(self._tickets[request_id].tokens) - 1
        return self._works[request_id].prefilled

    @property
    def borrowed(self) -> list[int]:
        """Slots of other batches that absorbed requests are in."""
        return [slot for slot in self._slots.values() if slot not in self.slots]

    def absorb(self, other: Batch) -> None:
        """Take all requests of ``other``, between two of its iterations. Complete KV stays in its slot, without a prefill.

        Requests in the middle of their prefill begin it anew. ``other`` must take no requests while its slots are borrowed.
        """
        complete = {request_id for request_id in other if other._is_complete(request_id)}
        slots, other._slots, other._free = other._slots, {}, list(other.slots)
        for work in other._scheduler.drain():
            request_id = work.request_id
            del other._works[request_id]
            if request_id in complete and request_id in slots:
                self._slots[request_id] = slots[request_id]
            self._enter(other._tickets.pop(request_id), cached=request_id in complete)

    def recompute(self) -> None:
        """Give up the KV of all requests: each is prefilled anew from its tokens so far. Between iterations."""
        for work in self._scheduler.drain():
            self._release(work.request_id)
            self._enter(self._tickets[work.request_id], cached=False)

    def uncache(self) -> list[int]:
        """Give up KV that waiting requests bring along outside of slots: they are prefilled instead. Return their ids."""
        changed = [work for work in self._scheduler.waiting if work.cached and work.request_id not in self._slots]
        for work in changed:
            work.cached = False
        return [work.request_id for work in changed]

    def ticket(self, request_id: int) -> Ticket:
        """Return a request's ticket as it is now."""
        return self._tickets[request_id]

    def take(self, request_id: int) -> Ticket:
        """Remove a request between iterations; its slot is free at once."""
        require(request_id in self._tickets, f"request {request_id} is not in this batch")
        self._scheduler.remove(request_id)
        self._release(request_id)
        del self._works[request_id]
        return self._tickets.pop(request_id)

    def next(self) -> BatchPlan | None:
        """Return the next iteration, None if the batch has nothing to run. Requests preempted for it lose their slots."""
        iteration = self._scheduler.schedule()
        if iteration is None:
            return None
        for work in iteration.preempted:
            self._release(work.request_id)
        segments, tokens, getting, wanted = [], [], [], []
        for work, count in iteration.prefills:
            ticket = self._tickets[work.request_id]
            slot = self._slots.get(work.request_id)
            slot = self._take_slot(work.request_id) if slot is None else slot
            segments.append(Segment(slot, work.prefilled, count))
            tokens += ticket.tokens[work.prefilled : work.prefilled + count]
            if work.prefilled + count == work.context_tokens:
                getting.append(ticket)
                wanted.append(len(tokens) - 1)
        joining = [request_id for request_id in self._scheduler.decoding if request_id not in self._slots]
        settling = [(request_id, self._take_slot(request_id)) for request_id in joining]
        decoding = sorted((self._slots[request_id], request_id) for request_id in self._scheduler.decoding)
        for slot, request_id in decoding:
            ticket = self._tickets[request_id]
            segments.append(Segment(slot, len(ticket.tokens) - 1, 1))
            wanted.append(len(tokens))
            tokens.append(ticket.tokens[-1])
            getting.append(ticket)
        return BatchPlan(iteration, StageBatch(tuple(segments), len(decoding), tuple(wanted)), tokens, getting, settling)

    def complete(self, plan: BatchPlan, chosen: Sequence[int]) -> list[Produced]:
        """Record the iteration's tokens, one for each of ``plan.getting``, and return them."""
        stopped = set()
        for ticket, token in zip(plan.getting, chosen, strict=True):
            ticket.tokens.append(token)
            if token in ticket.stop_tokens:
                stopped.add(ticket.request_id)
        _, finished = self._scheduler.complete(plan.iteration, 1, stopped)
        ended = {work.request_id for work in finished}
        self._forget(ended)
        return [
            Produced(ticket.request_id, token, ticket.produced - 1, ticket.request_id in ended)
            for ticket, token in zip(plan.getting, chosen, strict=True)
        ]

    def _forget(self, request_ids: Collection[int]) -> None:
        for request_id in request_ids:
            del self._tickets[request_id], self._works[request_id]
            self._release(request_id)

    def _take_slot(self, request_id: int) -> int:
        """Take the lowest free slot, so that decoding requests lie close together."""
        assert self._free, "the scheduler admits no more requests than it has slots"
        slot = min(self._free)
        self._free.remove(slot)
        self._slots[request_id] = slot
        return slot

    def _release(self, request_id: int) -> None:
        slot = self._slots.pop(request_id, None)
        if slot is not None and slot in self.slots:
            self._free.append(slot)
