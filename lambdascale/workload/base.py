"""What a workload is: a frozen configuration that yields the requests of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lambdascale.core import Request


class Workload(Protocol):
    """A source of requests: a trace file or a generator."""

    def requests(self, *, models: Sequence[str], seed: int) -> Sequence[Request]:
        """All requests, sorted by arrival, ids 0, 1, 2, ... in that order, arrivals counted from 0.

        ``models`` are the names a request may carry. The same seed gives the same requests. Raises UserError
        (TraceError for a malformed file) for a user's mistake.
        """
        ...
