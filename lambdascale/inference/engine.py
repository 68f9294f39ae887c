"""The engine, which turns requests into tokens: one batch over the stages of a model that this process holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from lambdascale.control.batching import BatchLimits
from lambdascale.core.checks import require
from lambdascale.inference.batch import Batch, Produced, Ticket
from lambdascale.inference.stage import TransformerStage

Tensor = torch.Tensor


class Engine:
    """The stages of a whole model, run in order: the output of one is the input of the next.

    ``max_batch`` requests run at once, each in a KV slot of ``slot_tokens`` tokens (the stages' own). ``kv_tokens`` limits the
    KV tokens of all of them together; with None only the slots do.
    """

    def __init__(self, stages: Sequence[TransformerStage], limits: BatchLimits, kv_tokens: int | None = None) -> None:
        require(bool(stages) and stages[0].is_first and stages[-1].is_last, "an engine's stages must cover the model")
        for one, two in pairwise(stages):
            require(one.blocks[-1].layout.index + 1 == two.blocks[0].layout.index, "an engine's stages must follow one another")
        self.stages = tuple(stages)
        slots, slot_tokens = min(stage.kv.slots for stage in stages), min(stage.kv.slot_tokens for stage in stages)
        self.batch = Batch(limits, range(slots), slot_tokens, stages[0].architecture.vocab, kv_tokens)
        self._arrived_kv: dict[int, list[Tensor]] = {}

    @property
    def slot_tokens(self) -> int:
        """Largest number of tokens of a request, prompt included."""
        return self.batch.slot_tokens

    def __len__(self) -> int:
        """Number of requests in the engine, waiting ones included."""
        return len(self.batch)

    def check(self, ticket: Ticket) -> None:
        """Raise CapacityError or UserError unless the engine can take the request."""
        self.batch.check(ticket)

    def add(self, ticket: Ticket, kv: Sequence[Tensor] | None = None) -> None:
        """Take a request, also one that produced tokens elsewhere.

        ``kv``: per stage, what ``take`` returned; without it the KV of all tokens so far is computed anew. Raises CapacityError
        if prompt and answer do not fit a slot.
        """
        require(kv is None or len(kv) == len(self.stages), f"KV of {len(kv or ())} stages does not fit {len(self.stages)}")
        self.batch.add(ticket, cached=kv is not None)
        if kv is not None:
            self._arrived_kv[ticket.request_id] = list(kv)

    def take(self, request_id: int, *, with_kv: bool = False) -> tuple[Ticket, list[Tensor] | None]:
        """Remove a request between iterations. Return its ticket and, if asked, the KV of all tokens but the newest, per stage.

        The KV is None while it is not complete: the request waits or is in the middle of its prefill.
        """
        slot, kv = self.batch.cached_slot(request_id), self._arrived_kv.pop(request_id, None)
        ticket = self.batch.take(request_id)
        if with_kv and kv is None and slot is not None:
            kv = [stage.kv.read(slot, len(ticket.tokens) - 1) for stage in self.stages]
        return ticket, kv if with_kv else None

    def step(self) -> list[Produced]:
        """Run one iteration and return the tokens it produced, [] if the batch had nothing to run."""
        plan = self.batch.next()
        if plan is None:
            return []
        for request_id, slot in plan.settling:
            for stage, part in zip(self.stages, self._arrived_kv.pop(request_id), strict=True):
                stage.kv.write(slot, part)
        state = torch.tensor(plan.tokens, dtype=torch.long)
        *others, last = self.stages
        for stage in others:
            state = stage.run(plan.batch, _input(stage, state))
        return self.batch.complete(plan, last.answer(plan.batch, _input(last, state), plan.rules, plan.positions))


def _input(stage: TransformerStage, state: Tensor) -> Tensor:
    """Return token ids, which stay on the host, or hidden states on the stage's device."""
    return state if stage.is_first else state.to(stage.device)
