"""Gaps between the tokens of answers: all of a run in one array, which may have millions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TokenGaps:
    """Gaps of the i-th of ``request_ids``, which ascend: the ``lengths[i]`` seconds of ``pool`` from ``begins[i]`` on.

    Requests share them where one batch decoded both: ``pool`` is shorter than all gaps one after another.
    """

    request_ids: Ints
    begins: Ints
    lengths: Ints
    pool: Floats

    @classmethod
    def of(cls, gaps: Mapping[int, Sequence[float] | Floats]) -> TokenGaps:
        """Gaps by request."""
        numbers = sorted(gaps)
        lengths = np.array([len(gaps[number]) for number in numbers], dtype=np.int64)
        pool = np.concatenate([np.empty(0), *(gaps[number] for number in numbers)])
        return cls(np.array(numbers, dtype=np.int64), np.cumsum(lengths) - lengths, lengths, pool)

    @property
    def seconds(self) -> Floats:
        """Gaps of all requests, one after another: a copy, which may be long."""
        return self.joined(self.pool)

    def joined(self, pool: NDArray[Any]) -> NDArray[Any]:
        """Return all gaps one after another, in the form in which ``pool`` has them."""
        ranges = zip(self.begins.tolist(), (self.begins + self.lengths).tolist(), strict=True)
        return np.concatenate([pool[:0], *(pool[begin:end] for begin, end in ranges)])

    def by_request(self) -> dict[int, Floats]:
        """Gaps by request."""
        columns = (self.request_ids, self.begins, self.begins + self.lengths)
        return {number: self.pool[begin:end] for number, begin, end in zip(*(c.tolist() for c in columns), strict=True)}

    def of_requests(self, request_ids: Ints) -> TokenGaps:
        """Gaps of those among these requests."""
        kept = np.isin(self.request_ids, request_ids)
        return self if kept.all() else TokenGaps(self.request_ids[kept], self.begins[kept], self.lengths[kept], self.pool)

    def longest(self) -> Floats:
        """The longest gap of each request; NaN for an answer of one token."""
        found = np.full(len(self.request_ids), np.nan)
        some = np.flatnonzero(self.lengths)
        if len(some) == 0:
            return found
        # In the order of the pool: reduceat looks at what lies between two requests too.
        some = some[np.argsort(self.begins[some])]
        first, last = self.begins[some], self.begins[some] + self.lengths[some] - 1
        found[some] = np.maximum(np.maximum.reduceat(self.pool, np.column_stack([first, last]).ravel())[::2], self.pool[last])
        return found
