"""The closed set of reasons why a request has no answer: ``code`` in HTTP errors, ``reason`` in the metrics."""

from __future__ import annotations

from typing import Literal, get_args

from lambdascale.core import FAILURE_REASONS, FailureReason

# An HTTP request, or a connection, that was not accepted.
Refusal = Literal[
    "api_key",
    "bad_request",
    "bodies",
    "body_too_large",
    "client_share",
    "closed",
    "compressed_body",
    "connections",
    "displaced",
    "head_too_large",
    "host",
    "malformed",
    "no_route",
    "origin",
    "queue_requests",
    "queue_tokens",
    "slow_request",
    "transfer_encoding",
    "unknown_model",
]
# The end of an accepted prompt that the front end decides on, beside those that the cluster does.
Abandoned = Literal["client_left", "deadline"]
Unanswered = FailureReason | Abandoned
Reason = Refusal | Unanswered

UNANSWERED: tuple[Unanswered, ...] = (*FAILURE_REASONS, *get_args(Abandoned))
REASONS: tuple[Reason, ...] = (*get_args(Refusal), *UNANSWERED)
