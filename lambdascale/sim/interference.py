"""Multicasts under way and the GPUs of their members: they slow iterations there, or keep them from beginning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from lambdascale.core import NodeId
from lambdascale.sim.options import TransferOptions

Occupy = Callable[[NodeId, bool], None]
Disturb = Callable[[NodeId, float, bool], None]


class Interference:
    """Tells of GPUs that multicasts take or slow. ``occupy(node, busy)``: a collective takes the node's GPUs, or gives them back.

    ``disturb(node, slowdown, begins)``: a multicast slows the node's iterations, or has ended; needed only if the options
    say that one does.
    """

    def __init__(self, options: TransferOptions, occupy: Occupy, disturb: Disturb | None) -> None:
        assert disturb is not None or not options.slows, "whoever slows iterations is told of multicasts"
        self._options = options
        self._occupy = occupy
        self._disturb = disturb
        self._ends: dict[int, list[Callable[[], None]]] = {}

    def one_sided(self, transfer_id: int, nodes: Sequence[NodeId]) -> None:
        """Let a one-sided multicast begin that reads or writes the memory of the GPUs of ``nodes``."""
        if self._options.one_sided_slowdown > 1:
            self._slow(transfer_id, nodes, self._options.one_sided_slowdown)

    def collective(self, transfer_id: int, sources: Sequence[NodeId]) -> None:
        """Let a collective begin, whose kernels run on the GPUs of ``sources``."""
        if self._options.collective_slowdown is not None:
            self._slow(transfer_id, sources, self._options.collective_slowdown)
            return
        for node in sources:
            self._occupy(node, True)
            self._ends.setdefault(transfer_id, []).append(partial(self._occupy, node, False))

    def release(self, transfer_id: int) -> None:
        """Let a transfer end; nothing happens if it has ended, or took nothing."""
        for end in self._ends.pop(transfer_id, ()):
            end()

    def _slow(self, transfer_id: int, nodes: Sequence[NodeId], slowdown: float) -> None:
        disturb = self._disturb
        assert disturb is not None, "checked on construction"
        for node in nodes:
            disturb(node, slowdown, True)
            self._ends.setdefault(transfer_id, []).append(partial(disturb, node, slowdown, False))
