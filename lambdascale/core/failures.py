"""Failures of requests: a closed set of reasons, by which programs tell them apart, and words for people."""

from __future__ import annotations

from typing import Literal, get_args

from msgspec import Struct

FailureReason = Literal[
    "traced",  # its trace records it as failed: no system was asked to serve it
    "too_large",  # its KV cache fits no node
    "no_node",  # no node is left to serve it
    "unfit_nodes",  # its model's instances fail on every node
    "instance_failed",  # it was on too many instances that failed
    "unsendable",  # it cannot be put into a message to a node
    "stopping",  # the run or the server ends
    "server_failed",  # the controller has failed
]
FAILURE_REASONS: tuple[FailureReason, ...] = get_args(FailureReason)


class Failure(Struct, frozen=True, gc=False):
    """The end of a request without a whole answer. Nothing is decided by ``text``: people read it."""

    reason: FailureReason
    text: str
