"""Calm: the loads with which a further evaluation of the autoscaler is known to decide nothing."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(slots=True, eq=False)
class Calm:
    """Findings of a look at a model (see ScaleIn), which spare most of those that follow it.

    A look decides nothing until time ``until`` while at most ``queued`` requests wait and ``running`` run, the peak of the last
    ``keep_alive_s`` is at least ``peak_queued`` and ``peak_running``, the model has as many replicas as ``allocations`` and
    ``spared`` blocks make, and ``draining`` of them are drained, none of which is empty; if any is, of as many ``instances``. All
    that it depends on is compared or bounded by ``until``: no event has to invalidate it. Invariants (more requests never want
    fewer replicas), where replicas that serve are those that are not drained:

    - None lacks: ``queued`` and ``running`` want no more replicas than serve.
    - None is to spare: the peak wants all that serve; or it could not do with one fewer, and no instance is idle for
      ``keep_alive_s`` before ``until``: neither one that was idle or in use at that look, nor one that started later.
    """

    until: float = -inf
    queued: int = 0
    running: int = 0
    peak_queued: int = 0
    peak_running: int = 0
    allocations: int = 0
    spared: int = 0
    draining: int = 0
    instances: int = 0
