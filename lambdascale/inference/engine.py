"""The engine: sequences in, tokens out. One batch over the stages of a model that this process holds.

It decides nothing about batching: ``BatchScheduler`` (the control plane's, which the simulator also uses) says what the next
iteration runs. Several engines, or one engine over several stages, are how pipelines are put together.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from lambdascale.control.batching import BatchLimits, BatchScheduler, Iteration
from lambdascale.control.batching import Sequence as Work
from lambdascale.core import CapacityError
from lambdascale.core.checks import require
from lambdascale.inference.sampling import GREEDY, Sampling, choose
from lambdascale.inference.stage import Segment, Stage, StageBatch

Tensor = torch.Tensor


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
    """What an iteration yielded: a token of a request, and whether it was the last."""

    request_id: int
    token: int
    finished: bool


@dataclass
class _Plan:
    """An iteration under way: the scheduler's order, the stages' batch, the tokens to feed, and who gets a token."""

    iteration: Iteration
    batch: StageBatch
    tokens: list[int]
    getting: list[Ticket] = field(default_factory=list)


class Engine:
    """Runs the stages in order, the output of one being the input of the next.

    ``max_batch`` sequences at once, each in a KV slot of ``slot_tokens`` tokens (the stages' own). CapacityError for a
    request whose prompt and answer do not fit a slot.
    """

    def __init__(self, stages: Sequence[Stage], limits: BatchLimits) -> None:
        require(bool(stages) and stages[0].is_first and stages[-1].is_last, "an engine's stages must cover the model")
        for one, two in pairwise(stages):
            require(one.blocks[-1].layout.index + 1 == two.blocks[0].layout.index, "an engine's stages must follow one another")
        slots = min(stage.kv.slots for stage in stages)
        require(slots >= limits.max_batch, f"{slots} KV slots are too few for batches of {limits.max_batch}")
        self.stages = tuple(stages)
        self.slot_tokens = min(stage.kv.slot_tokens for stage in stages)
        self._scheduler = BatchScheduler(limits, slots * self.slot_tokens)
        self._tickets: dict[int, Ticket] = {}
        self._slots: dict[int, int] = {}
        self._arrived_kv: dict[int, list[Tensor]] = {}
        self._free = list(range(slots))

    def __len__(self) -> int:
        """Requests inside, waiting ones included."""
        return len(self._scheduler)

    def add(self, ticket: Ticket, kv: Sequence[Tensor] | None = None) -> None:
        """Take a request, also one that produced tokens elsewhere. ``kv``: per stage, what ``take`` gave; without it the KV of
        all tokens so far is computed anew.
        """
        self.check(ticket)
        if kv is not None:
            require(ticket.produced > 0, f"request {ticket.request_id} has no token yet: its KV cannot be handed over")
            require(len(kv) == len(self.stages), f"KV of {len(kv)} stages does not fit {len(self.stages)}")
            self._arrived_kv[ticket.request_id] = list(kv)
        self._tickets[ticket.request_id] = ticket
        self._scheduler.add(
            Work(ticket.request_id, ticket.prompt_tokens, ticket.max_tokens, ticket.produced, cached=kv is not None)
        )

    def check(self, ticket: Ticket) -> None:
        """CapacityError or UserError unless the engine can take the request."""
        require(ticket.prompt_tokens >= 1, f"request {ticket.request_id} has an empty prompt")
        require(ticket.produced < ticket.max_tokens, f"request {ticket.request_id} wants {ticket.max_tokens} tokens")
        require(ticket.request_id not in self._tickets, f"request {ticket.request_id} is here already")
        vocab = self.stages[0].architecture.vocab
        require(
            min(ticket.tokens) >= 0 and max(ticket.tokens) < vocab,
            f"request {ticket.request_id} has tokens outside 0 to {vocab - 1}",
        )
        if ticket.prompt_tokens + ticket.max_tokens > self.slot_tokens:
            wanted = ticket.prompt_tokens + ticket.max_tokens
            raise CapacityError(f"request {ticket.request_id} needs {wanted} tokens of KV memory, a slot has {self.slot_tokens}")

    def take(self, request_id: int, *, with_kv: bool = False) -> tuple[Ticket, list[Tensor] | None]:
        """Remove a request between iterations: its ticket and, if asked, the KV of all tokens but the newest, per stage.

        No KV is given (None) while not all of it is there: the request is waiting or in the middle of its prefill.
        """
        require(request_id in self._tickets, f"request {request_id} is not here")
        decoding = request_id in self._scheduler.decoding
        self._scheduler.remove(request_id)
        ticket, kv = self._tickets.pop(request_id), self._arrived_kv.pop(request_id, None)
        if with_kv and kv is None and decoding:
            kv = [stage.kv.read(self._slots[request_id], len(ticket.tokens) - 1) for stage in self.stages]
        self._release(request_id)
        return ticket, kv if with_kv else None

    def step(self) -> list[Produced]:
        """Run one iteration; the tokens it produced, [] if there is nothing to run."""
        plan = self._next()
        if plan is None:
            return []
        state = torch.tensor(plan.tokens, dtype=torch.long)
        for stage in self.stages:
            state = stage.run(plan.batch, state.to(stage.device))
        return self._complete(plan, state)

    # -- one iteration -----------------------------------------------------------------------------------------------

    def _next(self) -> _Plan | None:
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
        for request_id in self._scheduler.decoding:
            if request_id not in self._slots:
                self._settle(request_id)
        decoding = sorted((self._slots[request_id], request_id) for request_id in self._scheduler.decoding)
        for slot, request_id in decoding:
            ticket = self._tickets[request_id]
            segments.append(Segment(slot, len(ticket.tokens) - 1, 1))
            wanted.append(len(tokens))
            tokens.append(ticket.tokens[-1])
            getting.append(ticket)
        return _Plan(iteration, StageBatch(tuple(segments), len(decoding), tuple(wanted)), tokens, getting)

    def _complete(self, plan: _Plan, logits: Tensor) -> list[Produced]:
        chosen = []
        if plan.getting:
            chosen = choose(logits, [t.sampling for t in plan.getting], [t.produced for t in plan.getting])
        stopped = set()
        for ticket, token in zip(plan.getting, chosen, strict=True):
            ticket.tokens.append(token)
            if token in ticket.stop_tokens:
                stopped.add(ticket.request_id)
        _, finished = self._scheduler.complete(plan.iteration, 1, stopped)
        ended = {work.request_id for work in finished}
        self._forget(ended)
        return [Produced(t.request_id, token, t.request_id in ended) for t, token in zip(plan.getting, chosen, strict=True)]

    def _forget(self, request_ids: Collection[int]) -> None:
        for request_id in request_ids:
            del self._tickets[request_id]
            self._release(request_id)

    def _settle(self, request_id: int) -> None:
        """Put the KV that came with a request into a slot, now that it joins the batch."""
        slot = self._take_slot(request_id)
        for stage, part in zip(self.stages, self._arrived_kv.pop(request_id), strict=True):
            stage.kv.write(slot, part)

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
