"""Gaps between the tokens of answers: all of a run in one array, which may have millions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TokenGaps:
    """``seconds`` from ``offsets[i]`` up to ``offsets[i + 1]`` are the gaps of the i-th of ``request_ids``, which ascend."""

    request_ids: Ints
    offsets: Ints
    seconds: Floats

    @classmethod
    def of(cls, gaps: Mapping[int, Sequence[float] | Floats]) -> TokenGaps:
        """Gaps by request."""
        numbers = sorted(gaps)
        offsets = np.cumsum([0, *(len(gaps[number]) for number in numbers)])
        return cls(
            np.array(numbers, dtype=np.int64), offsets, np.concatenate([np.empty(0), *(gaps[number] for number in numbers)])
        )

    def by_request(self) -> dict[int, Floats]:
        """Gaps by request."""
        parts = np.split(self.seconds, self.offsets[1:-1])
        return dict(zip(self.request_ids.tolist(), parts, strict=False))

    def of_requests(self, request_ids: Ints) -> TokenGaps:
        """Gaps of those among these requests."""
        kept = np.isin(self.request_ids, request_ids)
        if kept.all():
            return self
        lengths = np.diff(self.offsets)
        offsets = np.concatenate([[0], np.cumsum(lengths[kept])])
        return TokenGaps(self.request_ids[kept], offsets, self.seconds[np.repeat(kept, lengths)])

    def longest(self) -> Floats:
        """The longest gap of each request; NaN for an answer of one token."""
        found = np.full(len(self.request_ids), np.nan)
        some = np.diff(self.offsets) > 0
        if some.any():
            found[some] = np.maximum.reduceat(self.seconds, self.offsets[:-1][some])
        return found
