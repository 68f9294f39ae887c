"""Faults as values: what goes wrong, and upon which event or command."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from lambdascale.core import NodeId


class Trigger(Struct, frozen=True):
    """The ``nth`` event or command (counted from 1) of the kind ``what``, the name of its class; "Event" counts all events.

    The fault happens ``after_s`` seconds later, at once if 0.
    """

    what: str
    nth: int
    after_s: float = 0.0

    def __str__(self) -> str:
        later = f", {self.after_s:.3f} s later" if self.after_s else ""
        return f"at {self.what} {self.nth}{later}"


class Fault(Struct, frozen=True, tag=True):
    """Base of all faults. ``pick``: the number by which the node it concerns is chosen, ``near``: among those of its trigger."""

    when: Trigger
    pick: int = 0
    near: bool = False


class Loss(Fault, frozen=True, tag=True):
    """A node dies with everything on it. The control plane hears of it ``noticed_s`` later; not at all if that is None.

    ``then``: it comes back ``back_s`` after that, empty; it was to return and is given up then; or it never returns.
    """

    noticed_s: float | None = 0.0
    then: Literal["back", "given up", "never"] = "never"
    back_s: float = 1.0


class Cut(Fault, frozen=True, tag=True):
    """The connection of two living nodes is lost, with all that is on it. ``mended_s`` later they have a new one, which is told.

    ``other``: the number by which the second node is chosen.
    """

    other: int = 0
    mended_s: float = 0.0


class Slow(Fault, frozen=True, tag=True):
    """A node's GPU takes ``compute`` times as long and its NIC has the share ``nic`` of its rate, for ``lasts_s`` seconds.

    ``flaps``: it is slow so many times, with breaks as long.
    """

    compute: float = 1.0
    nic: float = 1.0
    lasts_s: float = 1.0
    flaps: int = 1


class Late(Fault, frozen=True, tag=True):
    """Messages of a node take ``delay_s`` longer for ``lasts_s`` seconds. They stay in order, but come behind those of others."""

    delay_s: float = 0.1
    lasts_s: float = 1.0


class Pause(Fault, frozen=True, tag=True):
    """The controller stops for ``lasts_s`` seconds, as on a suspended machine; all that happened meanwhile comes at once."""

    lasts_s: float = 1.0


class Repeat(Fault, frozen=True, tag=True):
    """The next ``count`` messages of nodes come twice, the second time ``after_s`` later."""

    count: int = 1
    after_s: float = 0.0


class Broken(Fault, frozen=True, tag=True):
    """The transfer or instance that its trigger starts or uses fails.

    ``damage``: of a transfer, the next block to arrive is damaged; otherwise the failure is reported alone. ``times``: number of
    the model's transfers that are damaged in a row.
    """

    damage: bool = True
    times: int = 1


class Poison(Fault, frozen=True, tag=True):
    """Every instance that the request with the index ``pick`` (of those that arrived by then) is sent to from now on fails."""


class BadNode(Fault, frozen=True, tag=True):
    """Every instance that is to serve on the node from now on fails there, until the node is lost and returns."""


class ClockStep(Fault, frozen=True, tag=True):
    """The controller's clock steps by ``step_s``, forwards or backwards; times of events never go back, so it stands still."""

    step_s: float = 1.0


class Burst(Fault, frozen=True, tag=True):
    """``count`` more requests arrive at ``at_s`` for the model with the index ``pick``; it needs no trigger."""

    at_s: float = 0.0
    count: int = 10


AnyFault = Loss | Cut | Slow | Late | Pause | Repeat | Broken | Poison | BadNode | ClockStep | Burst


def victim(fault: Fault, near: tuple[NodeId, ...], nodes: int) -> NodeId:
    """Return the node that a fault concerns: if ``fault.near`` asks for it, one of ``near``, the nodes its trigger names."""
    return near[fault.pick % len(near)] if fault.near and near else fault.pick % nodes


def pair(fault: Cut, near: tuple[NodeId, ...], nodes: int) -> frozenset[NodeId]:
    """Return the two nodes whose connection a fault cuts, one alone in a cluster of one."""
    first = victim(fault, near, nodes)
    others = [node for node in near if fault.near and node != first] or [node for node in range(nodes) if node != first]
    return frozenset((first, others[fault.other % len(others)])) if others else frozenset((first,))


def lasts_s(fault: Fault) -> float:
    """Return the seconds for which a fault can delay what is under way."""
    match fault:
        case Loss():
            return (fault.noticed_s or 0.0) + fault.back_s
        case Cut():
            return fault.mended_s
        case Slow():
            return 2 * fault.lasts_s * fault.flaps
        case Late():
            return fault.delay_s + fault.lasts_s
        case Pause():
            return fault.lasts_s
        case Repeat():
            return fault.after_s
        case ClockStep():
            return abs(fault.step_s)
    return 0.0
