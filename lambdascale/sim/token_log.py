"""Times of single tokens, kept as the iterations of batches: no event per token, and all gaps are computed after the run.

A request that a batch decodes takes part in each of its iterations. So a batch keeps the ends of these, and a request the range
that it was in; the gaps between its tokens follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np

from lambdascale.core.token_gaps import Floats, TokenGaps

# Of each iteration in order: decode steps that the batch has done by its end, its end, its steps, its begin, and by how much a
# step is longer than the one before, since the KV cache grows. Steps that were run as one (Iteration.max_steps) are one entry.
# Times in seconds; a flat list, since the garbage collector would look at a hundred thousand tuples again and again.
BatchLog = list[float]
_ENTRY = 5
# Entries, and answers, that are worked out together.
_ITERATIONS = 2048
_ANSWERS = 256


class Stay(NamedTuple):
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
        """Gaps between the tokens of each request that was answered: of all as if they had one stay, then of those with more."""
        last = sorted(self._last.items())
        steps = _Steps([stay.log for _, stay in last] + [stay.log for stays in self._earlier.values() for stay in stays])
        lengths = np.array([stay.produced - 1 for _, stay in last], dtype=np.int64)
        offsets = np.cumsum([0, *lengths])
        joined = np.array([steps.first[id(stay.log)] + stay.joined for _, stay in last], dtype=np.int64)
        seconds = np.empty(offsets[-1])
        for some in _slices(len(last), _ANSWERS):
            begin, end = offsets[some.start], offsets[some.stop]
            place = np.repeat(joined[some] - offsets[some], lengths[some]) + np.arange(begin, end)
            steps.gaps.take(place, mode="clip", out=seconds[begin:end])
        begun = lengths > 0
        after = joined[begun]
        seconds[offsets[:-1][begun]] = steps.ends.take(after + 1, mode="clip") - steps.joins[after]
        for index, (request_id, stay) in enumerate(last):
            earlier = self._earlier.get(request_id)
            if earlier is not None:  # what was entered above, wherever it was found, does not hold
                seconds[offsets[index] : offsets[index + 1]] = np.diff(_times([*earlier, stay], steps))
            else:
                assert stay.start == 1, "the prefill gives the first token"
        return TokenGaps(np.array([number for number, _ in last], dtype=np.int64), offsets, seconds)


def _slices(length: int, size: int) -> Iterator[slice]:
    """Cut ``range(length)``: arrays of everything at once are fresh memory, which costs more than the arithmetic."""
    return (slice(begin, min(begin + size, length)) for begin in range(0, length, size))


class _Steps:
    """Decode steps of all batches in a row; those of a batch begin at ``first``, by the identity of its log, with step 0.

    ``ends`` of the steps, ``gaps`` between them, and ``joins``: ends of the iterations after which a request joined.
    """

    def __init__(self, logs: list[BatchLog]) -> None:
        distinct = list({id(log): log for log in logs}.values())
        lengths = [len(log) // _ENTRY for log in distinct]
        table = np.fromiter(chain.from_iterable(distinct), np.float64, _ENTRY * sum(lengths)).reshape(-1, _ENTRY)
        bases = np.cumsum([0, *(int(log[-_ENTRY]) + 1 if log else 1 for log in distinct)])
        self.first = {id(log): base for log, base in zip(distinct, bases.tolist(), strict=False)}
        base = np.repeat(bases[:-1], lengths)
        after = table[:, 0].astype(np.int64) + base
        self.joins = np.full(bases[-1], np.nan)
        self.joins[after] = table[:, 1]  # of iterations after which the same number of steps is done, the last counts
        # The first iteration of a batch has step 0 before it.
        before = np.maximum(np.concatenate([[0], after[:-1]]), base) if len(after) else after
        decodes = after > before
        self.ends = np.full(bases[-1], np.nan)
        last, entries = after[decodes], table[decodes]
        for some in _slices(len(last), _ITERATIONS):
            self._fill(last[some], entries[some])
        self.gaps = np.diff(self.ends, append=np.nan)

    def _fill(self, last: np.ndarray[tuple[int], np.dtype[np.int64]], table: Floats) -> None:
        """Enter the ends of decode steps; ``last``: the last step of each entry."""
        _, until, steps, begin, growth = table.T
        first = (until - begin - growth * steps * (steps - 1) / 2) / steps
        count = steps.astype(np.int64)
        number = np.arange(1, count.sum() + 1) - np.repeat(np.cumsum(count) - count, count)
        grown = np.repeat(growth, count) * number * (number - 1) / 2
        self.ends[np.repeat(last - count, count) + number] = np.repeat(begin, count) + np.repeat(first, count) * number + grown
        self.ends[last] = until


def _times(stays: list[Stay], steps: _Steps) -> list[float]:
    """Token times of a request that was in several batches; a token that comes again, after a loss, counts when it first came."""
    times: list[float] = []
    for stay in stays:
        start, base = stay.start, steps.first[id(stay.log)]
        if start > len(times):  # KV that was copied needs no prefill, which gives a token
            times.append(float(steps.joins[base + stay.joined]) if stay.alone_s is None else stay.alone_s)
        if stay.alone_s is None:
            times += steps.ends[base + stay.joined + 1 + len(times) - start : base + stay.left + 1].tolist()
    assert len(times) == stays[-1].produced, "every token was produced"
    return times
