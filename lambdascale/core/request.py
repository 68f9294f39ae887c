"""A request: the only thing a workload yields and the unit every system serves."""

from __future__ import annotations

from msgspec import Struct


class Request(Struct, frozen=True, gc=False):
    """One inference request of a trace.

    ``arrival_s`` counts from the start of the run. ``output_tokens`` is how many tokens the answer has (from the
    trace where it knows); a live engine treats it as the limit.
    """

    request_id: int
    arrival_s: float
    model: str
    prompt_tokens: int
    output_tokens: int
