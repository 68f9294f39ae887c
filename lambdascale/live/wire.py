"""Messages between controller and agents, and among agents: msgpack of tagged structs, never pickle.

Commands and events travel as they are; other messages carry what only a live cluster has: addresses, prompts, tokens, hidden
states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

from msgspec import Meta, MsgspecError, Struct, field, msgpack, structs

from lambdascale.core.commands import AnyCommand, Repartition, Serve, SwitchMode
from lambdascale.core.events import CommandFailed, Mode, NodeEvent
from lambdascale.core.plan import NodeId, Stage
from lambdascale.core.text import one_line
from lambdascale.inference.batch import StageBatch, Ticket
from lambdascale.inference.sampling import Sampling
from lambdascale.live.wire_places import AskForPlaces as AskForPlaces
from lambdascale.live.wire_places import GiveBack as GiveBack
from lambdascale.live.wire_places import Grant as Grant
from lambdascale.live.wire_places import Landed as Landed
from lambdascale.live.wire_places import Message as Message
from lambdascale.live.wire_places import NoMoreKv as NoMoreKv
from lambdascale.live.wire_places import Offer as Offer
from lambdascale.live.wire_places import Vacate as Vacate

T = TypeVar("T")
# No message between controller and agents is larger: a prompt for every slot of an instance takes a hundredth.
MOST_BYTES = 64 << 20
_MOST_PARTS = 32  # of a start; it has some ten
Address = Annotated[str, Meta(max_length=300, pattern="^[!-~]*$")]


# -- controller to agent -------------------------------------------------------------------------------------------------


class Directory(Message, frozen=True, tag=True):
    """The nodes of the cluster from now on: ``number`` counts directories, ``addresses`` are their endpoints'.

    ``generations``: how many processes each node has had before. Connect to nodes with a lower id, then answer Connected.
    """

    number: int
    addresses: dict[NodeId, str]
    generations: dict[NodeId, int]


class Sever(Message, frozen=True, tag=True):
    """End the connection to a peer, which has lost its end; answer Severed, unless this end is lost as well."""

    peer: NodeId


class Do(Message, frozen=True, tag=True):
    """Carry a command out."""

    command: AnyCommand


class Assign(Message, frozen=True, tag=True):
    """A dispatch, with the contents of the requests."""

    instance: int
    tickets: tuple[Ticket, ...]


class Switch(Message, frozen=True, tag=True):
    """A mode switch; ``homes``: the head of each target instance."""

    command: SwitchMode
    homes: dict[int, NodeId]


class NewStages(Message, frozen=True, tag=True):
    """A repartition, for all nodes that have or had stages of the instance.

    ``version`` numbers the instance's partitions; ``first`` started it with number 0. ``batches`` is the largest number of
    batches that any partition so far keeps in flight.
    """

    command: Repartition
    version: int
    first: Serve
    batches: int


class Abort(Message, frozen=True, tag=True):
    """End a request whose client has left."""

    request_id: int


class Shutdown(Message, frozen=True, tag=True):
    """Order to an agent to end."""


# -- agent to controller -------------------------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag=True):
    """An agent is up; ``address`` is its endpoint's, ``parts`` says how many seconds each part of its start took."""

    node: NodeId
    address: Address
    pid: int
    parts: dict[str, float] = field(default_factory=dict)


class Connected(Message, frozen=True, tag=True):
    """An agent is connected to all nodes with a lower id in the directory of this number."""

    node: NodeId
    number: int


class Happened(Message, frozen=True, tag=True):
    """An event; the controller gives it its time."""

    event: NodeEvent


class Placed(Message, frozen=True, tag=True):
    """A host copy that PlaceCopy asked for is in place."""

    node: NodeId
    model: str


class Token(Struct, frozen=True, gc=False, array_like=True):
    """A token of an answer, ``index`` counted from 0."""

    request_id: int
    index: int
    token: int
    finished: bool


class Tokens(Message, frozen=True, tag=True):
    """Tokens that an iteration of an instance produced, and the requests that lost their KV memory to it."""

    instance: int
    mode: Mode
    tokens: tuple[Token, ...]
    preempted: tuple[int, ...] = ()


class Aborted(Message, frozen=True, tag=True):
    """A request was ended before its last token."""

    instance: int
    request_id: int


class Resumed(Message, frozen=True, tag=True):
    """Requests of a dissolved pipeline are with their new instance, each with the output tokens that it brought along.

    The pipeline has reported these tokens too, but from another node: that message may come later, or be lost with its node.
    Those in ``waiting`` go on once their KV has come, from all nodes of the pipeline.
    """

    instance: int
    outputs: dict[int, tuple[int, ...]]
    waiting: frozenset[int] = frozenset()


class Severed(Message, frozen=True, tag=True):
    """An agent has lost its connection to a peer, which may be alive."""

    peer: NodeId
    reason: str


class Unreached(Message, frozen=True, tag=True):
    """An agent cannot connect to a peer of the directory."""

    peer: NodeId
    reason: str


class Beat(Message, frozen=True, tag=True):
    """An agent is alive."""


class Fault(Message, frozen=True, tag=True):
    """An agent has to end; ``users``: true if the cause is a user's mistake."""

    node: NodeId
    reason: str
    users: bool


ToAgent = Directory | Sever | Do | Assign | Switch | NewStages | Abort | Shutdown
ToController = Hello | Connected | Happened | Placed | Tokens | Aborted | Resumed | Severed | Unreached | Beat | Fault


# -- agent to agent ------------------------------------------------------------------------------------------------------


class Ready(Message, frozen=True, tag=True):
    """A destination's request for a block whose turn it is: write it to ``offset``, or skip it (None: it is resident already)."""

    transfer_id: int
    block: int
    offset: int | None


class Pass(Struct, frozen=True, array_like=True):
    """An iteration as the stages of an instance hand it on: the batch, its size for timing, and how its tokens are chosen."""

    batch: StageBatch
    prefill_tokens: int
    context_tokens: int
    attended_tokens: int
    rules: tuple[Sampling, ...]
    positions: tuple[int, ...]

    @property
    def decodes(self) -> int:
        """Number of requests that decode."""
        return self.batch.decodes


class Forward(Message, frozen=True, tag=True):
    """An iteration of a batch, for stage ``stage`` of the instance's partition ``version``.

    ``inputs``: token ids, from the head, for the first stage; for the others hidden states from the stage before, or where it
    has written them.
    """

    instance: int
    batch: int
    version: int
    stage: int
    work: Pass
    inputs: bytes | tuple[int, ...] | Landed


class Chosen(Message, frozen=True, tag=True):
    """The tokens of an iteration, from the last stage to the head."""

    instance: int
    batch: int
    tokens: tuple[int, ...]


class MoveBatch(Message, frozen=True, tag=True):
    """A batch runs on partition ``version`` from its next iteration on, from the head to all that have or had stages.

    It ran on partition ``before`` with stages ``stages_before`` so far and has no iteration under way. ``kv``: (slot, tokens)
    whose KV goes along, from each layer's old node to its new one.
    """

    instance: int
    batch: int
    before: int
    stages_before: tuple[Stage, ...]
    version: int
    kv: tuple[tuple[int, int], ...]


class SlotKv(Message, frozen=True, tag=True):
    """The KV of a slot of ``batch`` in ``layers`` layers from ``first_layer`` on, for partition ``version``.

    ``data`` and ``grant``: see KvPart.
    """

    instance: int
    batch: int
    version: int
    slot: int
    first_layer: int
    layers: int
    data: bytes | Landed
    grant: int = -1


class Handover(Message, frozen=True, tag=True):
    """Requests of a dissolved pipeline for ``instance``.

    Those in ``with_kv`` wait for their KV, which comes in parts (KvPart) from the nodes in ``sources``.
    """

    instance: int
    tickets: tuple[Ticket, ...]
    pipeline: int
    with_kv: frozenset[int] = frozenset()
    sources: tuple[NodeId, ...] = ()


class KvMove(Struct, frozen=True, array_like=True):
    """The KV of ``tokens`` tokens in ``slot`` goes to ``node`` for ``instance``; the request's batch ran on ``version``."""

    request_id: int
    batch: int
    version: int
    slot: int
    tokens: int
    instance: int
    node: NodeId


class Collect(Message, frozen=True, tag=True):
    """A pipeline, ``instance``, is dissolved: send the KV of these requests off, then forget the pipeline."""

    instance: int
    moves: tuple[KvMove, ...]


class KvPart(Message, frozen=True, tag=True):
    """The KV of a request of a dissolved pipeline in ``layers`` layers from ``first_layer`` on, for ``instance``.

    ``data``: the KV, or where the sender has written it, a place of grant ``grant``.
    """

    instance: int
    request_id: int
    pipeline: int
    first_layer: int
    layers: int
    data: bytes | Landed
    grant: int = -1


class Rendezvous(Message, frozen=True, tag=True):
    """Address at which the members of a broadcast meet to make their communicator."""

    transfer_id: int
    address: Address


_ForStages = Offer | Vacate | Forward | Chosen | MoveBatch | SlotKv | Handover | Collect
OfKv = AskForPlaces | Grant | GiveBack | KvPart | NoMoreKv
ForInstance = Assign | _ForStages | OfKv
Peer = Ready | Rendezvous | _ForStages | OfKv

encode = msgpack.Encoder().encode
_agents: msgpack.Decoder[ToAgent] = msgpack.Decoder(ToAgent)
_controllers: msgpack.Decoder[ToController] = msgpack.Decoder(ToController)
_peers: msgpack.Decoder[Peer] = msgpack.Decoder(Peer)


class Garbled(ValueError):
    """Bytes that are no message for this end."""


def to_agent(data: bytes) -> ToAgent:
    """Return a message to an agent; Garbled if it is none."""
    return _decoded(_agents.decode, data)


def to_controller(data: bytes) -> ToController:
    """Return a message to the controller; Garbled if it is none. Free texts of a node become printable."""
    message = _decoded(_controllers.decode, data)
    if isinstance(message, Fault | Severed | Unreached):
        return structs.replace(message, reason=one_line(message.reason))
    if isinstance(message, Happened) and isinstance(message.event, CommandFailed):
        event = message.event
        return Happened(structs.replace(event, command=one_line(event.command, 60), reason=one_line(event.reason)))
    if isinstance(message, Hello):
        parts = list(message.parts.items())[:_MOST_PARTS]
        return structs.replace(message, parts={one_line(name, 60): seconds for name, seconds in parts})
    return message


def to_peer(data: bytes) -> Peer:
    """Return a message of another agent; Garbled if it is none."""
    return _decoded(_peers.decode, data)


def _decoded(decode: Callable[[bytes], T], data: bytes) -> T:
    try:
        return decode(data)
    except (MsgspecError, ValueError, RecursionError) as error:  # the last: fields that nobody knows, nested without end
        raise Garbled(f"{len(data)} bytes that are no message: {one_line(str(error), 200)}") from error
