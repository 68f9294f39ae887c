"""The workload protocol: a frozen configuration that yields the requests of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lambdascale.core import TracedRequest


class Workload(Protocol):
    """A source of requests: a trace file or a generator."""

    def requests(self, *, models: Sequence[str], seed: int) -> Sequence[TracedRequest]:
        """Return all requests, sorted by arrival, ids 0, 1, 2, ... in that order, arrivals counted from 0.

        ``models`` are the names a request may carry. The same seed gives the same requests. Raises UserError
        (TraceError for a malformed file) for a user's mistake.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Origin of a run's requests, recorded in its manifest.

    ``source`` is the file read, None for a generator that reads none, and ``sha256`` the digest of its bytes.
    ``rows`` counts its rows (blank lines and comments excluded), ``skipped_rows`` the malformed rows skipped on
    request and ``dropped_failures`` the requests that the trace itself records as failed and that were left out.
    """

    source: str | None = None
    sha256: str | None = None
    rows: int = 0
    skipped_rows: int = 0
    dropped_failures: int = 0


@dataclass(frozen=True, kw_only=True)
class LoadedTrace:
    """Requests as :meth:`Workload.requests` returns them, with their provenance.

    ``failed``: requests that the trace records as failed and that count as failed here, without being served; their ids follow
    those of ``requests``.
    """

    requests: tuple[TracedRequest, ...]
    provenance: Provenance
    failed: tuple[TracedRequest, ...] = ()
