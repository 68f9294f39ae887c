"""A batch of sequences over the stages of a model, without the arithmetic: what to run next, and what came of it.

It decides nothing about batching: ``BatchScheduler`` (the control plane's, which the simulator also uses) says what the next
iteration runs. The engine of one process, the head of a pipeline and the timed executor all keep their sequences here.
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
    """An iteration as every stage sees it: prefills first, then ``decodes`` segments of one token each, ordered by slot.

    ``wanted``: the rows (of all tokens in the order of the segments) whose logits the last stage returns.
    """

    segments: tuple[Segment, ...]
    decodes: int
    wanted: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Tokens altogether."""
        return sum(segment.tokens for segment in self.segments)


@dataclass
class Ticket:
    """A request as it travels: its tokens so far (prompt, then output), the bound of its output, how it samples and stops."""

    request_id: int
    tokens: list[int]
    prompt_tokens: int
    max_tokens: int
    sampling: Sampling = GREEDY
    stop_tokens: frozenset[int] = frozenset()

    @property
    def produced(self) -> int:
        """Output tokens so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def output(self) -> list[int]:
        """The output tokens so far."""
        return self.tokens[self.prompt_tokens :]


@dataclass(frozen=True)
class Produced:
    """What an iteration yielded: a token of a request, its place in the answer, and whether it was the last."""

    request_id: int
    token: int
    index: int
    finished: bool


@dataclass
class BatchPlan:
    """An iteration under way: the scheduler's order, the stages' batch, the tokens to feed, who gets a token.

    ``settling``: (request, slot) of those that join with KV computed elsewhere, to be written before the iteration runs.
    """

    iteration: Iteration
    batch: StageBatch
    tokens: list[int]
    getting: list[Ticket] = field(default_factory=list)
    settling: list[tuple[int, int]] = field(default_factory=list)

    @property
    def rules(self) -> list[Sampling]:
        """How to choose each wanted token."""
        return [ticket.sampling for ticket in self.getting]

    @property
    def positions(self) -> list[int]:
        """The place of each wanted token in its answer."""
        return [ticket.produced for ticket in self.getting]


class Batch:
    """Sequences in KV slots of ``slot_tokens`` tokens each; at most one per slot runs. ``vocab`` bounds token ids."""

    def __init__(self, limits: BatchLimits, slots: range, slot_tokens: int, vocab: int) -> None:
        require(len(slots) >= limits.max_batch, f"{len(slots)} KV slots are too few for batches of {limits.max_batch}")
        self.slot_tokens = slot_tokens
        self._vocab = vocab
        self._scheduler = BatchScheduler(limits, len(slots) * slot_tokens)
        self._tickets: dict[int, Ticket] = {}
        self._slots: dict[int, int] = {}
        self._free = list(slots)

    def __len__(self) -> int:
        """Requests inside, waiting ones included."""
        return len(self._scheduler)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._tickets

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._tickets))

    def add(self, ticket: Ticket, *, cached: bool = False) -> None:
        """Take a request, also one that produced tokens elsewhere. ``cached``: the KV of all but its newest token comes along.

        CapacityError or UserError if it cannot be taken.
        """
        self.check(ticket)
        require(not cached or ticket.produced > 0, f"request {ticket.request_id} has no token yet: its KV cannot be handed over")
        self._tickets[ticket.request_id] = ticket
        self._scheduler.add(BatchedRequest(ticket.request_id, ticket.prompt_tokens, ticket.max_tokens, ticket.produced, cached))

    def check(self, ticket: Ticket) -> None:
        """CapacityError or UserError unless the batch can take the request."""
        require(ticket.prompt_tokens >= 1, f"request {ticket.request_id} has an empty prompt")
        require(ticket.produced < ticket.max_tokens, f"request {ticket.request_id} wants {ticket.max_tokens} tokens")
        require(ticket.request_id not in self._tickets, f"request {ticket.request_id} is here already")
        require(
            min(ticket.tokens) >= 0 and max(ticket.tokens) < self._vocab,
            f"request {ticket.request_id} has tokens outside 0 to {self._vocab - 1}",
        )
        if ticket.prompt_tokens + ticket.max_tokens > self.slot_tokens:
            wanted = ticket.prompt_tokens + ticket.max_tokens
            raise CapacityError(f"request {ticket.request_id} needs {wanted} tokens of KV memory, a slot has {self.slot_tokens}")

    def cached_slot(self, request_id: int) -> int | None:
        """The slot with the KV of all of a request's tokens but the newest; None while it is not all there."""
        return self._slots.get(request_id) if request_id in self._scheduler.decoding else None

    def ticket(self, request_id: int) -> Ticket:
        """A request's ticket as it is now."""
        return self._tickets[request_id]

    def take(self, request_id: int) -> Ticket:
        """Remove a request between iterations; its slot is free at once."""
        require(request_id in self._tickets, f"request {request_id} is not here")
        self._scheduler.remove(request_id)
        self._release(request_id)
        return self._tickets.pop(request_id)

    def next(self) -> BatchPlan | None:
        """The next iteration, None if there is nothing to run."""
        iteration = self._scheduler.schedule()
        if iteration is None:
            return None
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
        """Take note of the iteration's tokens, one for each of ``plan.getting``."""
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
            del self._tickets[request_id]
            self._release(request_id)

    def _take_slot(self, request_id: int) -> int:
        """The lowest free slot, so that decoding sequences lie close together."""
        assert self._free, "the scheduler admits no more sequences than there are slots"
        slot = min(self._free)
        self._free.remove(slot)
        self._slots[request_id] = slot
        return slot

    def _release(self, request_id: int) -> None:
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)
