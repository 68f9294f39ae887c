"""Limits of requests against the KV memory of the nodes that are to serve them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import structs

from lambdascale.core import TracedRequest


def bounded(requests: Sequence[TracedRequest], kv_tokens: Mapping[str, int]) -> tuple[Sequence[TracedRequest], int]:
    """Lower the limit of each request to what fits beside its prompt in the ``kv_tokens`` of its model, as engines do.

    Return the requests and the number of answers that this cuts short. A request whose prompt leaves no place for an answer keeps
    a limit of 1, and is refused.
    """
    found, cut = [], 0
    for traced in requests:
        request = traced.request
        room = kv_tokens[request.model]
        if request.prompt_tokens + request.max_tokens <= room:
            found.append(traced)
            continue
        limit = max(1, room - request.prompt_tokens)
        cut += limit < traced.answer_tokens
        found.append(structs.replace(traced, request=structs.replace(request, max_tokens=limit)))
    return found, cut
