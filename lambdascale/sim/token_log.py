"""Times of single tokens, kept as the iterations of batches: no event per token, and all gaps are computed after the run.

A request that a batch decodes takes part in each of its iterations. So a batch keeps the ends of these, and a request the range
that it was in; the gaps between its tokens follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np
from msgspec import Struct

from lambdascale.core.token_gaps import Floats, Ints, TokenGaps

# Of each iteration in order: decode steps that the batch has done by its end, its end, its steps, its begin, and by how much a
# step is longer than the one before, since the KV cache grows. Steps that were run as one (Iteration.max_steps) are one entry.
# Times in seconds; a flat list, since the garbage collector would look at a hundred thousand tuples again and again.
BatchLog = list[float]
_ENTRY = 5
# Entries, and steps, that are worked out together.
_ITERATIONS = 2048
_STEPS = 65536


class Stay(Struct, frozen=True, gc=False):
    """A request's tokens in one batch: those of the decode steps after ``joined`` up to ``left``, and one of the prefill before.

    ``produced``: its tokens at the end. ``alone_s``: time of the prefill's token, of a request that ended with it.
    """

    log: BatchLog
    joined: int
    left: int
    produced: int
    alone_s: float | None = None

    @property
    def start(self) -> int:
        """Number of the first token of a decode step."""
        return self.produced if self.alone_s is not None else self.produced - (self.left - self.joined)


class TokenLog:
    """Stays of all requests of a run, those at whose end they were answered apart."""

    def __init__(self) -> None:
        self._earlier: dict[int, list[Stay]] = {}
        self._last: dict[int, Stay] = {}

    def stay(self, request_id: int, stay: Stay) -> None:
        """Note the end of a stay after which the answer goes on elsewhere, or anew."""
        self._earlier.setdefault(request_id, []).append(stay)

    def finish(self, request_id: int, stay: Stay) -> None:
        """Note a request's last stay."""
        self._last[request_id] = stay

    def gaps(self) -> TokenGaps:
        """Gaps between the tokens of each request that was answered."""
        answered = sorted(self._last)
        last = [self._last[request_id] for request_id in answered]
        steps = _Steps([stay.log for stay in last] + [stay.log for stays in self._earlier.values() for stay in stays])
        batch, joined, produced = (
            np.array([(steps.number[id(s.log)], s.joined, s.produced) for s in last], np.int64).reshape(-1, 3).T
        )
        several = [index for index, request_id in enumerate(answered) if request_id in self._earlier] if self._earlier else []
        moved = [np.diff(_times([*self._earlier[answered[index]], last[index]], steps)) for index in several]
        alone = produced > 1  # with one stay, in which the prefill gives the first token
        alone[several] = False
        begun = steps.first[batch] + joined
        from_prefill = steps.ends[begun[alone]] - steps.joins(batch[alone], joined[alone])
        gaps = steps.take_gaps()
        parts = [gaps[low:high] for low, high in zip(begun.tolist(), (begun + produced - 1).tolist(), strict=True)]
        for index, found in zip(several, moved, strict=True):
            parts[index] = found
        offsets = np.cumsum(np.concatenate([[0], produced - 1]))
        seconds = np.concatenate([np.empty(0), *parts])
        seconds[offsets[:-1][alone]] = from_prefill
        return TokenGaps(np.array(answered, dtype=np.int64), offsets, seconds)


def _slices(length: int, size: int) -> Iterator[slice]:
    """Cut ``range(length)``: arrays of everything at once are fresh memory, which costs more than the arithmetic."""
    return (slice(begin, min(begin + size, length)) for begin in range(0, length, size))


class _Steps:
    """Decode steps of all batches in a row. ``number``: the batch's, by the identity of its log.

    ``ends``: the end of each step; step 1 of a batch is at ``first[number]``.
    """

    def __init__(self, logs: list[BatchLog]) -> None:
        distinct = list({id(log): log for log in logs}.values())
        lengths = [len(log) // _ENTRY for log in distinct]
        table = np.fromiter(chain.from_iterable(distinct), np.float64, _ENTRY * sum(lengths)).reshape(-1, _ENTRY)
        self.number = {id(log): number for number, log in enumerate(distinct)}
        self.first = np.cumsum([0, *(int(log[-_ENTRY]) if log else 0 for log in distinct)])
        # Ascends over all iterations: the number of steps done, counted with a step 0 of each batch.
        base = np.repeat(self.first[:-1] + np.arange(len(distinct)), lengths)
        self._after = after = table[:, 0].astype(np.int64) + base
        self._until = table[:, 1]
        decodes = table[after > np.maximum(np.concatenate([[0], after[:-1]]), base)] if len(after) else table
        self.ends = np.empty(self.first[-1])
        end = 0
        for some in _slices(len(decodes), _ITERATIONS):
            begin, end = end, end + int(decodes[some, 2].sum())
            _fill(decodes[some], self.ends[begin:end])

    def take_gaps(self) -> Floats:
        """Return the gap before each step, in place of ``ends``; the first has no meaning."""
        ends = self.ends
        for some in reversed([*_slices(len(ends) - 1, _STEPS)]):
            ends[some.start + 1 : some.stop + 1] -= ends[some].copy()
        return ends

    def joins(self, batch: Ints, joined: Ints) -> Floats:
        """Return the ends of the iterations after which so many steps of batches were done; NaN where none was before."""
        if len(self._after) == 0:
            return np.full(len(batch), np.nan)
        done = self.first[batch] + batch + joined
        found = np.searchsorted(self._after, done, "right") - 1  # of those after which as many steps are done, the last counts
        return np.where(self._after[found] == done, self._until[found], np.nan)


def _fill(table: Floats, ends: Floats) -> None:
    """Enter the ends of the steps of decode iterations."""
    _, until, steps, begin, growth = table.T
    count = steps.astype(np.int64)
    until_now = np.cumsum(count)
    number = np.arange(1.0, len(ends) + 1) - np.repeat(until_now - count, count)
    # Of each step from the iteration's begin: the first step's time for each, and what the later ones have grown.
    np.multiply(number - 1, np.repeat(growth / 2, count), out=ends)
    ends += np.repeat((until - begin) / steps - growth * (steps - 1) / 2, count)
    ends *= number
    ends += np.repeat(begin, count)
    ends[until_now - 1] = until


def _times(stays: list[Stay], steps: _Steps) -> list[float]:
    """Token times of a request that was in several batches; a token that comes again, after a loss, counts when it first came."""
    times: list[float] = []
    for stay in stays:
        start, batch = stay.start, steps.number[id(stay.log)]
        if start > len(times):  # KV that was copied needs no prefill, which gives a token
            joins = steps.joins(np.array([batch]), np.array([stay.joined]))
            times.append(float(joins[0]) if stay.alone_s is None else stay.alone_s)
        if stay.alone_s is None:
            first = int(steps.first[batch])
            times += steps.ends[first + stay.joined + len(times) - start : first + stay.left].tolist()
    assert len(times) == stays[-1].produced, "every token was produced"
    return times
