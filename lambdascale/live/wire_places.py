"""Messages about places: memory of a node that others write hidden states and KV to. Part of the messages in wire.py."""

from __future__ import annotations

from msgspec import Struct

from lambdascale.core.plan import NodeId


class Message(Struct, frozen=True, tag=True):
    """Base of all messages."""


class Landed(Struct, frozen=True):
    """Data of ``size`` bytes that the sender has written to byte ``offset`` of the receiver's registered memory."""

    offset: int
    size: int


class Offer(Message, frozen=True, tag=True):
    """A place of ``size`` bytes at ``offset`` of ``node``'s memory for the hidden states of a batch, from the stage before.

    The receiver's stage comes right before one of ``node``'s in partition ``version``, which may not have come yet.
    """

    instance: int
    node: NodeId
    version: int
    batch: int
    offset: int
    size: int


class Vacate(Message, frozen=True, tag=True):
    """``node`` writes nothing more to these places, which it was offered for an instance."""

    instance: int
    node: NodeId
    offsets: tuple[int, ...]


class AskForPlaces(Message, frozen=True, tag=True):
    """``node`` has KV of ``instance``, dissolved or moving, for the receiver, in so many parts: each needs a place."""

    instance: int
    node: NodeId
    parts: int


class Grant(Message, frozen=True, tag=True):
    """The place at ``offset`` of ``node``'s memory is for one part of KV; answered by KvPart, SlotKv or GiveBack.

    ``number`` is that of no other grant, of this process or an earlier one of the node.
    """

    instance: int
    node: NodeId
    number: int
    offset: int


class GiveBack(Message, frozen=True, tag=True):
    """A granted place is not needed any more, and nothing has been written there."""

    instance: int
    number: int


class NoMoreKv(Message, frozen=True, tag=True):
    """The sender could not read or write its KV of a dissolved pipeline, ``instance``: the receiver waits for none of it."""

    instance: int
