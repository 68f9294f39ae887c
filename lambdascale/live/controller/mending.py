"""Connections that two living nodes have lost: made again a few times, before one of the two is given up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from lambdascale.core import NodeId

Pair = frozenset[NodeId]

PATIENCE_S = 3.0  # from the loss to the new connection, at least
_OF_SILENCE = 0.5  # and this part of the time for which a silent node is waited for
_TRIES = 4  # within the window
_WINDOW_S = 60.0
_DEAD_S = 1.0  # a peer that died is known to be dead by then


@dataclass
class _Case:
    """A lost connection. ``heard``: the ends that have reported the loss; ``number``: the directory by which it is made again."""

    since: float
    heard: set[NodeId] = field(default_factory=set)
    number: int | None = None


class Mending:
    """``sever(node, peer)`` has a node end its connection; ``announce()`` has all connect, and returns the directory's number.

    ``silence_s``: see LiveConfig; a connection has half of that to be made again, 3 s at least. ``clock``: AttendedTime, so that
    a pause of the controller, which alone can make it again, does not count.

    A connection is made again when both ends have reported its loss: then nothing of it is under way any more. Its node with the
    higher id connects. Belongs to the control thread.
    """

    def __init__(
        self,
        sever: Callable[[NodeId, NodeId], None],
        announce: Callable[[], int],
        *,
        clock: Callable[[], float],
        tries: int = _TRIES,
        silence_s: float = 0.0,
    ) -> None:
        self._sever, self._announce = sever, announce
        self._tries = tries
        self._patience = max(PATIENCE_S, _OF_SILENCE * silence_s)
        self._clock = clock
        self._cases: dict[Pair, _Case] = {}
        self._tried: dict[Pair, list[float]] = {}
        self._mended: list[Pair] = []

    @property
    def under_way(self) -> bool:
        """True while a connection is missing."""
        return bool(self._cases)

    @property
    def trying(self) -> bool:
        """True while a connection is being made again."""
        return any(case.number is not None for case in self._cases.values())

    def severed(self, node: NodeId, peer: NodeId) -> bool:
        """Take note that a member has lost its connection to another one; True if that is news."""
        pair = frozenset((node, peer))
        case = self._cases.get(pair)
        news = case is None
        if case is None:
            case = self._cases[pair] = _Case(self._clock())
        elif case.number is not None:  # the new connection is lost as well
            case.heard.clear()
            case.number = None
        case.heard.add(node)
        if not self._may_try(pair):
            return news
        if case.heard == pair:
            self._try(pair, case)
        else:
            self._sever(peer, node)
        return news

    def unreached(self, node: NodeId, peer: NodeId) -> None:
        """Take note that a member could not connect to another one.

        If that has been told to end the connection, and has not yet, it refuses for this: its report is waited for.
        """
        pair = frozenset((node, peer))
        case = self._cases.setdefault(pair, _Case(self._clock(), set(pair)))
        if case.heard == pair and self._may_try(pair):
            self._try(pair, case)

    def _may_try(self, pair: Pair) -> bool:
        now = self._clock()
        self._tried[pair] = [at for at in self._tried.get(pair, ()) if now - at < _WINDOW_S]
        return len(self._tried[pair]) < self._tries

    def _try(self, pair: Pair, case: _Case) -> None:
        self._tried[pair].append(self._clock())
        case.number = self._announce()

    def connected(self, node: NodeId, number: int) -> None:
        """Take note that a node has connected to all with lower ids in the directory of this number."""
        for pair, case in list(self._cases.items()):
            if max(pair) == node and case.number is not None and number >= case.number:
                del self._cases[pair]
                self._mended.append(pair)

    def take_mended(self) -> list[Pair]:
        """Return the pairs that are connected again since the last time."""
        mended, self._mended = self._mended, []
        return mended

    def remove(self, node: NodeId) -> None:
        """Forget what concerns a node that is a member no more."""
        self._cases = {pair: case for pair, case in self._cases.items() if node not in pair}
        self._tried = {pair: tried for pair, tried in self._tried.items() if node not in pair}
        self._mended = [pair for pair in self._mended if node not in pair]

    def cut_off(self) -> set[NodeId]:
        """Return, of two members whose connection was not made again, the one that has lost more connections.

        Blocks and hidden states may take any connection, and the end that failed is not known: such a node counts as lost.
        """
        now = self._clock()
        if not any(now - case.since >= self._patience_s(pair) for pair, case in self._cases.items()):
            return set()
        losses = Counter(node for pair in self._cases for node in pair)
        return {max(losses, key=lambda node: (losses[node], node))}

    def _patience_s(self, pair: Pair) -> float:
        return self._patience if len(self._tried.get(pair, ())) < self._tries else _DEAD_S
