"""The compute port of a simulated node: everything that computes on the node takes turns at it, as on a live node."""

from __future__ import annotations

from typing import Protocol

from lambdascale.control.turns import ComputeTurns
from lambdascale.sim.kernel import Kernel
from lambdascale.sim.sharing import SharedCores

# Ports look for work after everything else that happens at the same time, so that simultaneous requests share a batch.
_LAST = 1


class Run(Protocol):
    """Occupant of a port: one stage's iteration, or a run of equal decode iterations that can be cut short."""

    def begin(self, pace: float) -> float:
        """Begin, ``pace`` times slower than alone; return the seconds until the end."""
        ...

    def cut(self) -> float | None:
        """End with the iteration under way; return the seconds from the begin to that end, None if the end stays where it is."""
        ...

    def end(self) -> None:
        """Take note of the end; the port is free."""
        ...

    def lose(self) -> None:
        """Take note that the rest is lost."""
        ...


class Owner(Protocol):
    """An instance that has turns at the port; told apart by identity."""

    def __hash__(self) -> int: ...

    def next_run(self, *, alone: bool) -> Run | None:
        """Return its next iteration here, None if it has none now. ``alone``: nothing else waits for the port."""
        ...


class ComputePort:
    """One stage's iteration at a time; passes of iterations under way first, then instances in turn (see ComputeTurns).

    ``cores``: the cores that the node shares with others, if it does.
    """

    __slots__ = (
        "_began_s",
        "_cores",
        "_kernel",
        "_occupied",
        "_owner",
        "_run",
        "_ticket",
        "_turns",
        "_version",
        "_woken",
    )

    def __init__(self, kernel: Kernel, cores: SharedCores | None) -> None:
        self._kernel = kernel
        self._cores = cores
        self._turns: ComputeTurns[Owner, Run] = ComputeTurns()
        self._owner: Owner | None = None
        self._run: Run | None = None
        self._began_s = 0.0
        self._ticket = -1
        self._version = 0
        self._woken = False
        self._occupied = 0

    def want(self, owner: Owner) -> None:
        """Queue the start of an iteration of ``owner``; a long run of another instance ends with its iteration under way."""
        self._turns.add_head(owner)
        self._look(owner)

    def resume(self, owner: Owner) -> None:
        """Queue the next iteration of ``owner``; a free port begins before requests that arrive at this very time can join."""
        if self._run is not None:
            self.want(owner)
        elif self._turns or self._occupied:
            self._turns.add_head(owner)
            self._next()
        elif (run := owner.next_run(alone=True)) is not None:
            self._begin(owner, run)

    def add_pass(self, owner: Owner, run: Run) -> None:
        """Run a later stage's part of an iteration under way: at once on a free port, else before all that is to begin."""
        if self._run is None and not self._occupied and not self._turns:
            self._begin(owner, run)
            return
        self._turns.add_pass(owner, run)
        self._look(owner)

    def _look(self, owner: Owner) -> None:
        if self._run is None:
            self._wake()
        elif self._owner is not owner:
            self.cut()

    def withdraw(self, owner: Owner) -> None:
        """Drop everything of ``owner``, waiting or running: what was running is lost."""
        self._turns.remove(owner)
        if self._run is not None and self._owner is owner:
            self._lose()
            self._wake()

    def occupy(self, busy: bool) -> None:
        """Take the GPUs for something else (a collective's kernels), or give them back: no iteration begins meanwhile."""
        self._occupied += 1 if busy else -1
        assert self._occupied >= 0, "a port is given back that was not occupied"
        if busy:
            self.cut()
        elif not self._occupied:
            self._wake()

    def cut(self) -> None:
        """Let a long run end with the iteration under way."""
        if self._run is None:
            return
        lasts = self._run.cut()
        if lasts is not None:
            self._version += 1
            self._kernel.at(max(self._began_s + lasts, self._kernel.now), self._end, self._version)

    def _wake(self) -> None:
        if not self._woken and self._run is None:
            self._woken = True
            self._kernel.at(self._kernel.now, self._awake, priority=_LAST)

    def _awake(self, _: object) -> None:
        self._woken = False
        self._next()

    def _next(self) -> None:
        while self._run is None and not self._occupied:
            turn = self._turns.next()
            if turn is None:
                return
            owner, run = turn
            if run is None:
                run = owner.next_run(alone=not self._turns)
            if run is not None:
                self._begin(owner, run)

    def _begin(self, owner: Owner, run: Run) -> None:
        self._owner, self._run = owner, run
        self._began_s = now = self._kernel.now
        self._version = version = self._version + 1
        pace = 1.0
        if self._cores is not None:
            self._ticket, pace = self._cores.enter(self.cut)
        self._kernel.at(now + run.begin(pace), self._end, version)

    def _end(self, version: int) -> None:
        run = self._run
        if version != self._version or run is None:
            return
        self._run = None
        if self._cores is not None:
            self._cores.leave(self._ticket)
        run.end()
        if self._turns and self._run is None:
            self._next()

    def _lose(self) -> None:
        """Drop what is running."""
        assert self._run is not None, "only what runs is lost"
        self._run.lose()
        self._run = None
        self._version += 1
        if self._cores is not None:
            self._cores.leave(self._ticket)
