"""Times of single tokens, kept as the iterations of batches: no event per token, and all gaps are computed after the run.

A request that a batch decodes takes part in each of its iterations. So a batch keeps the ends of these, and a request the range
that it was in; the gaps between its tokens follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Literal

import numpy as np
from msgspec import Struct

from lambdascale.core.token_gaps import Floats, Ints, TokenGaps

# Of each iteration in order: decode steps that the batch has done by its end, its end, its begin, and by how much a step is
# longer than the one before, since the KV cache grows. Steps that were run as one (Iteration.max_steps) are one entry.
# Times in seconds; a flat list, since the garbage collector would look at a hundred thousand tuples again and again.
BatchLog = list[float]
_ENTRY = 4
# Values of each request in ``TokenLog.ended``.
_ENDED = 5
# Entries that are worked out together.
_ITERATIONS = 2048


class Stay(Struct, frozen=True, gc=False):
    """A request's tokens in one batch: those of the decode steps after ``joined`` up to ``left``, and one of the prefill before.

    ``produced``: its tokens at the end. ``alone_s``: time of the prefill's token, of a request that ended with it.
    """

    batch: int
    joined: int
    left: int
    produced: int
    alone_s: float | None = None

    @property
    def start(self) -> int:
        """Number of the first token of a decode step."""
        return self.produced if self.alone_s is not None else self.produced - (self.left - self.joined)


class TokenLog:
    """Iterations of all batches of a run, and stays of all requests.

    ``ended``: of each request that was answered, in the order of their ends, its number and its last stay (batch, joined, left,
    produced); flat, as a BatchLog is. ``alone_s``: when those ended whose last stay had no decode step.
    """

    def __init__(self) -> None:
        self.batches: list[BatchLog] = []
        self.ended: list[int] = []
        self.alone_s: dict[int, float] = {}
        self._earlier: dict[int, list[Stay]] = {}

    def open(self, log: BatchLog) -> int:
        """Take the log of a new batch; return the batch's number."""
        self.batches.append(log)
        return len(self.batches) - 1

    def stay(self, request_id: int, stay: Stay) -> None:
        """Note the end of a stay after which the answer goes on elsewhere, or anew."""
        self._earlier.setdefault(request_id, []).append(stay)

    def gaps(self) -> TokenGaps:
        """Gaps between the tokens of each request that was answered."""
        rows = np.array(self.ended, np.int64).reshape(-1, _ENDED)
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        # An end that came too late to count is followed by another.
        rows = rows[np.append(rows[1:, 0] != rows[:-1, 0], True)] if len(rows) else rows
        numbers, batch, joined, _, produced = np.ascontiguousarray(rows.T)
        steps = _Steps(self.batches)
        lengths = produced - 1
        begins = np.where(lengths > 0, steps.first[batch] + joined, 0)
        several = np.flatnonzero(np.isin(numbers, [*self._earlier]))
        moved = [np.diff(_times(self._stays(*rows[index].tolist()), steps)) for index in several]
        begins[several] = len(steps.gaps) + np.cumsum(lengths[several]) - lengths[several]
        return TokenGaps(numbers, begins, lengths, np.concatenate([steps.gaps, *moved]) if moved else steps.gaps)

    def _stays(self, request_id: int, batch: int, joined: int, left: int, produced: int) -> list[Stay]:
        return [*self._earlier[request_id], Stay(batch, joined, left, produced, self.alone_s.get(request_id))]


class _Steps:
    """Decode steps of all batches in a row: step 1 of a batch is at ``first[batch]``.

    ``gaps``: seconds from the end of the iteration before each step to its own; of a batch's first iteration, from its begin. A
    request that a prefill gave its first token decodes in the next iteration, so that these are its gaps too.
    """

    def __init__(self, logs: list[BatchLog]) -> None:
        lengths = np.array([len(log) // _ENTRY for log in logs], np.int64)
        table = np.fromiter(chain.from_iterable(logs), np.float64, _ENTRY * lengths.sum()).reshape(-1, _ENTRY)
        done, self._until, began, growth = np.ascontiguousarray(table.T)
        self._rows = np.cumsum(np.append(0, lengths))
        self._done = done.astype(np.int64)
        counts, since = np.diff(self._done, prepend=0), np.append(began[:1], self._until[:-1])
        heads = self._rows[:-1][lengths > 0]
        counts[heads], since[heads] = self._done[heads], began[heads]
        before = np.cumsum(np.append(0, counts))
        self.first = before[self._rows]
        self.gaps = _gaps(counts, before, since, began, self._until, growth)

    def end_s(self, batch: int, step: int, which: Literal["first", "last"]) -> float:
        """Return the end of the first or last iteration after which so many steps of a batch were done; NaN without one."""
        low, high = self._rows[batch : batch + 2]
        done = self._done[low:high]
        index = np.searchsorted(done, step) if which == "first" else np.searchsorted(done, step, "right") - 1
        found = 0 <= index < len(done) and done[index] == step
        return float(self._until[low + index]) if found else np.nan


def _gaps(counts: Ints, before: Ints, since: Floats, began: Floats, until: Floats, growth: Floats) -> Floats:
    """Gaps before the steps of iterations of ``counts`` steps each, ``before`` which so many were done, from times of each."""
    gaps = np.empty(before[-1])
    steps = np.maximum(counts, 1)
    lasts = (until - began) / steps - growth * (steps - 1) / 2
    # In parts: arrays of all steps at once are fresh memory, which costs more than the arithmetic.
    for some in _slices(len(counts), _ITERATIONS):
        low, count = before[some.start], counts[some]
        part = gaps[low : before[some.stop]]
        part[:] = np.arange(len(part))
        part *= np.repeat(growth[some], count)
        part += np.repeat(lasts[some] - growth[some] * (before[some] - low), count)
    decodes = counts > 0
    gaps[before[:-1][decodes]] = np.where(counts == 1, until - since, began - since + lasts)[decodes]
    return gaps


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + size, length)) for begin in range(0, length, size))


def _times(stays: list[Stay], steps: _Steps) -> list[float]:
    """Token times of a request that was in several batches; a token that comes again, after a loss, counts when it first came."""
    times: list[float] = []
    for stay in stays:
        start, batch = stay.start, stay.batch
        if start > len(times):  # KV that was copied needs no prefill, which gives a token
            times.append(steps.end_s(batch, stay.joined, "last") if stay.alone_s is None else stay.alone_s)
        if stay.alone_s is None and stay.left > stay.joined:
            first = int(steps.first[batch])
            after = steps.gaps[first + stay.joined + 1 : first + stay.left]
            until_end = np.append(np.cumsum(after[::-1])[::-1], 0.0)
            times += (steps.end_s(batch, stay.left, "first") - until_end)[len(times) - start :].tolist()
    assert len(times) == stays[-1].produced, "every token was produced"
    return times
