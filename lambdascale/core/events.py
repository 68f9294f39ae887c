"""Events in a cluster, as the control plane sees them. Every event carries its time ``at`` (seconds of the run).

Events are plain frozen structs with a tag, so that the same values travel in memory (simulation) and on the wire (live).
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from lambdascale.core.plan import NodeId
from lambdascale.core.request import Request

Mode = Literal["local", "pipeline"]


class Event(Struct, frozen=True, gc=False, tag=True):
    """Base of all events."""

    at: float


class RequestArrived(Event, frozen=True, gc=False, tag=True):
    """A request reached the front end."""

    request: Request


class BlockArrived(Event, frozen=True, gc=False, tag=True):
    """``node`` now holds ``block`` of ``model`` in GPU memory, verified; ``transfer_id`` names the command behind it."""

    transfer_id: int
    node: NodeId
    model: str
    block: int


class SetUpDone(Event, frozen=True, gc=False, tag=True):
    """Bytes of the transfer can come to ``node`` from now on: its communicator is built, and its process runs.

    Only of transfers that had to wait for either.
    """

    transfer_id: int
    node: NodeId


class TokensProduced(Event, frozen=True, gc=False, tag=True):
    """A request has ``tokens`` output tokens so far. At least the first token of a request is reported."""

    instance: int
    request_id: int
    tokens: int
    mode: Mode


class RequestFinished(Event, frozen=True, gc=False, tag=True):
    """The last token of a request was produced."""

    instance: int
    request_id: int
    tokens: int


class RequestPreempted(Event, frozen=True, gc=False, tag=True):
    """A running request lost its KV memory to others of its batch; it waits at the head of the queue to be prefilled anew."""

    instance: int
    request_id: int


class TimerFired(Event, frozen=True, gc=False, tag=True):
    """The timer set by SetTimer with this id is due."""

    timer_id: int


class NodeJoined(Event, frozen=True, gc=False, tag=True):
    """A node is up and ready for commands. The first events of every run."""

    node: NodeId


class NodeLost(Event, frozen=True, gc=False, tag=True):
    """A node is lost with everything on it. ``returns``: it will be started again; NodeJoined or NodeGivenUp follows."""

    node: NodeId
    returns: bool = False


class NodeGivenUp(Event, frozen=True, gc=False, tag=True):
    """A lost node that was to return is not started again."""

    node: NodeId


class ConnectionLost(Event, frozen=True, gc=False, tag=True):
    """Two living nodes have replaced a lost connection: what they had under way with each other is lost, the nodes are not."""

    node: NodeId
    peer: NodeId


class CommandFailed(Event, frozen=True, gc=False, tag=True):
    """A command could not be carried out. ``transfer_id``, ``instance`` and ``model`` name what it concerned, where known."""

    command: str
    reason: str
    transfer_id: int = -1
    instance: int = -1
    model: str = ""


# What nodes report to the controller of a live cluster.
NodeEvent = BlockArrived | SetUpDone | CommandFailed
