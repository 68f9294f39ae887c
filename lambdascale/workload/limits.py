"""Limits of requests against the KV memory of the nodes that are to serve them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import structs

from lambdascale.core import Request, TracedRequest


def bounded(requests: Sequence[TracedRequest], kv_tokens: Mapping[str, int]) -> tuple[Sequence[TracedRequest], int]:
    """Lower the limit of each request to what fits beside its prompt in the ``kv_tokens`` of its model, as engines do.

    Return the requests and the number of answers that this cuts short. A request whose prompt leaves no place for an answer keeps
    a limit of 1, and is refused.
    """
    found, cut = [], 0
    for traced in requests:
        bound = _within(traced.request, kv_tokens[traced.request.model])
        if bound is not traced.request:
            cut += bound.max_tokens < traced.answer_tokens
            traced = TracedRequest(bound, traced.output_tokens)
        found.append(traced)
    return found, cut


def _within(request: Request, kv_tokens: int) -> Request:
    if request.kv_tokens <= kv_tokens:
        return request
    return structs.replace(request, max_tokens=max(1, kv_tokens - request.prompt_tokens))
