"""The request: what a workload yields and a system serves."""

from __future__ import annotations

from msgspec import Struct


class Request(Struct, frozen=True, gc=False):
    """One inference request of a trace.

    ``arrival_s`` is in seconds from the start of the run. ``output_tokens`` is the number of tokens in the answer (from the
    trace, if recorded); a live engine treats it as the limit.
    """

    request_id: int
    arrival_s: float
    model: str
    prompt_tokens: int
    output_tokens: int
