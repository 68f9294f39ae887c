"""Calm: the loads with which a further evaluation of the autoscaler is known to decide nothing."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(slots=True, eq=False)
class Calm:
    """Findings of a look at a model (see ScaleIn), which spare most of those that follow it.

    They are about as many ``allocations``, ``spared`` blocks and drained instances (``draining``; if any, of ``instances``, and
    with none of them empty): ``serving`` replicas are not drained, and of those ``enough`` are sure to need no drained one back.
    A look decides nothing while

    - none lacks: the load wants no more than ``enough``, as ``queued`` waiting and ``running`` running requests do;
    - none is to spare: the peak of the last ``keep_alive_s`` wants all that serve; or it is at least ``peak_queued`` and
      ``peak_running``, which could not do with one fewer, and no instance is idle for ``keep_alive_s`` before ``until``: neither
      one that was idle or in use at that look, nor one that started later.

    All that it depends on is compared or bounded by ``until``: no event has to invalidate it. More requests never want fewer
    replicas.
    """

    until: float = -inf
    queued: int = -1
    running: int = -1
    peak_queued: int = 0
    peak_running: int = 0
    allocations: int = 0
    spared: int = 0
    draining: int = 0
    instances: int = 0
    serving: float = inf
    enough: int = -1
