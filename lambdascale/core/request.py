"""The request: what a system is asked to serve, and what a workload knows about it beyond that."""

from __future__ import annotations

from msgspec import Struct


class Request(Struct, frozen=True, gc=False):
    """One inference request as a serving system sees it.

    ``arrival_s`` is in seconds from the start of the run. ``max_tokens`` bounds the answer, as its client states it; nobody knows
    where the answer ends before it does.
    """

    request_id: int
    arrival_s: float
    model: str
    prompt_tokens: int
    max_tokens: int

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache that it may need at most: for its prompt and the longest answer."""
        return self.prompt_tokens + self.max_tokens


class TracedRequest(Struct, frozen=True, gc=False):
    """A request of a workload, with the end of its answer: ``output_tokens`` from the trace, or drawn; ``session`` names its
    session, if the trace has sessions.

    Backends replay these. Events and commands carry ``request`` alone, so that no decision can depend on an answer's length.
    """

    request: Request
    output_tokens: int
    session: str | None = None

    @property
    def request_id(self) -> int:
        """See Request."""
        return self.request.request_id

    @property
    def arrival_s(self) -> float:
        """See Request."""
        return self.request.arrival_s

    @property
    def model(self) -> str:
        """See Request."""
        return self.request.model

    @property
    def prompt_tokens(self) -> int:
        """See Request."""
        return self.request.prompt_tokens

    @property
    def answer_tokens(self) -> int:
        """Number of tokens in the answer: it ends by itself, or at the request's limit."""
        tokens, limit = self.output_tokens, self.request.max_tokens
        return tokens if tokens < limit else limit


def traced(
    request_id: int, arrival_s: float, model: str, prompt_tokens: int, output_tokens: int, max_tokens: int | None = None
) -> TracedRequest:
    """Return a request with the end of its answer; ``max_tokens`` None: the limit is where the answer ends."""
    limit = output_tokens if max_tokens is None else max_tokens
    return TracedRequest(Request(request_id, arrival_s, model, prompt_tokens, limit), output_tokens)
