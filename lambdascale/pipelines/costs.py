"""Predicted times by which pipelines are chosen and filled: of a round, of a first pass through stages, until a mode switch."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from lambdascale.core import Stage


class Costs(Struct, frozen=True, kw_only=True):
    """Predicted times in seconds, of a transfer and of the requests that wait for it. The default counts time in rounds.

    ``round_s``: a round of the transfer. ``batch_s[c - 1]``: first pass (prefill) of ``c`` requests over the whole model by one
    node, up to a full batch. ``overhead_s``: added by every pass over a stage. ``hop_s[c - 1]``: their activations from one
    stage to the next. ``requests``: number of requests that wait.
    """

    round_s: float = 1.0
    batch_s: tuple[float, ...] = (0.0,)
    overhead_s: float = 0.0
    hop_s: tuple[float, ...] = (0.0,)
    requests: int = 1 << 30

    def alone_s(self, batch: int) -> float:
        """Seconds for the first pass of ``batch`` requests on one node that holds the whole model."""
        return self.overhead_s + self.batch_s[batch - 1]

    def pass_s(self, stages: Sequence[Stage], batch: int) -> float:
        """Seconds from the start of the first pass of ``batch`` requests to its tokens, through idle ``stages``."""
        hops = len(stages) if len(stages) > 1 else 0  # the tokens return to the first stage
        return len(stages) * self.overhead_s + self.batch_s[batch - 1] + hops * self.hop_s[batch - 1]

    def period_s(self, stages: Sequence[Stage], batch: int) -> float:
        """Seconds between the tokens of two batches that follow each other: what the busiest node computes for one of them."""
        blocks = stages[-1].last_block + 1
        work: dict[int, float] = {}
        for stage in stages:
            share = (stage.last_block - stage.first_block + 1) / blocks
            work[stage.node] = work.get(stage.node, 0.0) + self.overhead_s + share * self.batch_s[batch - 1]
        return max(work.values())

    def last_s(self, stages: Sequence[Stage], batch: int) -> float:
        """Seconds until the first tokens of ``batch`` requests for each node of idle ``stages``, batch by batch."""
        nodes = len({stage.node for stage in stages})
        return self.pass_s(stages, batch) + (nodes - 1) * self.period_s(stages, batch)

    def batch(self, nodes: int) -> int:
        """Number of the waiting requests for each of ``nodes`` nodes: at least one, a full batch at most."""
        return max(1, min(len(self.batch_s), -(-self.requests // nodes)))

    def room(self, stages: Sequence[Stage], left_s: float) -> int:
        """Number of requests that ``stages`` bring to their first tokens within ``left_s``, in a batch per node.

        Zero if that is too short for a first pass of what waits: such a pipeline gives nothing, and its mode switch
        would throw away what it has begun.
        """
        nodes = len({stage.node for stage in stages})
        if self.pass_s(stages, self.batch(nodes)) > left_s:
            return 0
        fitting = (batch for batch in range(len(self.batch_s), 0, -1) if self.last_s(stages, batch) <= left_s)
        return nodes * next(fitting, 0)

    def saved_s(self, stages: Sequence[Stage], ready_s: float, alone_from_s: Sequence[float], batch: int) -> float:
        """Seconds of waiting that a pipeline saves a batch of requests for each of its nodes.

        It begins at ``ready_s``, and its mode switch is at the last of ``alone_from_s``: the times, in order, at which without it
        each of its nodes would begin a batch alone. Batches without a token by the mode switch begin anew then.
        """
        first, period, alone = ready_s + self.pass_s(stages, batch), self.period_s(stages, batch), self.alone_s(batch)
        end_s = alone_from_s[-1]
        tokens = (first + index * period for index in range(len(alone_from_s)))
        pairs = zip(alone_from_s, tokens, strict=True)
        return batch * sum(from_s + alone - (at if at <= end_s else end_s + alone) for from_s, at in pairs)

    def most_saved_s(self, alone_from_s: Sequence[float], ready_s: float, batch: int) -> float:
        """Bound ``saved_s`` of every pipeline at ``ready_s`` or later on some of these nodes: as if one pass brought all tokens.

        No pipeline has fewer than two stages. Rounded as ``saved_s`` is, so that no rounding makes the bound too low.
        """
        first, alone = ready_s + (2 * self.overhead_s + self.batch_s[batch - 1] + 2 * self.hop_s[batch - 1]), self.alone_s(batch)
        return batch * sum(max(0.0, from_s + alone - first) for from_s in alone_from_s)


IN_ROUNDS = Costs()
