"""The compute port of a simulated node: everything that computes on the node takes turns at it, as on a live node.

A model that is split over several GPUs of a node has a line of them there: an iteration visits the GPUs one after another, each
for an equal part of its time, and the next one may enter as soon as the first GPU is free. Nobody overtakes in the line.
"""

from __future__ import annotations

from math import inf
from typing import Protocol

from lambdascale.control.turns import ComputeTurns
from lambdascale.sim.kernel import Kernel
from lambdascale.sim.sharing import Pace

# Ports look for work after everything else that happens at the same time, so that simultaneous requests share a batch.
_LAST = 1


class Run(Protocol):
    """Occupant of a port: one stage's iteration, or a run of equal decode iterations that can be cut short."""

    @property
    def fixed(self) -> bool:
        """True if nothing but a withdrawal changes its end once it has begun."""
        ...

    def begin(self, pace: float) -> float:
        """Begin, ``pace`` times slower than alone; return the seconds until the end."""
        ...

    def cut(self, elapsed_s: float) -> float | None:
        """End with the iteration under way, ``elapsed_s`` seconds after the begin.

        Return the seconds from the begin to that end, None if the end stays where it is.
        """
        ...

    def last_s(self) -> float:
        """Return the seconds that the last iteration of the run takes."""
        ...

    def end(self) -> None:
        """Take note of the end; the port is free."""
        ...

    def end_at(self, end_s: float) -> None:
        """Schedule what follows the end, which is not told: the run is fixed, and nothing waits for the port."""
        ...

    def lose(self, elapsed_s: float) -> None:
        """Take note that the rest is lost, ``elapsed_s`` seconds after the begin."""
        ...


class Owner(Protocol):
    """An instance that has turns at the port; told apart by identity."""

    def __hash__(self) -> int: ...

    def next_run(self, alone: bool) -> Run | None:
        """Return its next iteration here, None if it has none now. ``alone``: nothing else waits for the port or is at it."""
        ...


class ComputePort:
    """One stage's iteration at a time; passes of iterations under way first, then instances in turn (see ComputeTurns).

    ``pace``: of iterations that others slow, None if none ever does. ``gpus``: the length of the line. An iteration is what runs
    until it leaves the first GPU; then it is in the line, and nothing but its owner's withdrawal changes its end.

    A fixed run that nothing waits for ends without an event of the port's: it is over once its time, ``_until_s``, has come.
    That is infinite for a run whose end the port tells.
    """

    __slots__ = (
        "_began_s",
        "_free_s",
        "_kernel",
        "_line",
        "_occupied",
        "_owner",
        "_pace",
        "_run",
        "_shared",
        "_ticket",
        "_turns",
        "_until_s",
        "_version",
        "_woken",
    )

    def __init__(self, kernel: Kernel, pace: Pace | None, gpus: int = 1) -> None:
        self._kernel = kernel
        self._pace = pace
        self._shared = pace is not None or gpus > 1
        self._turns: ComputeTurns[Owner, Run] = ComputeTurns()
        self._owner: Owner | None = None
        self._run: Run | None = None
        self._began_s = 0.0
        self._until_s = inf
        self._ticket = -1
        self._version = 0
        self._woken = False
        self._occupied = 0
        # Behind the first GPU: when each of the others is free, and the iterations there and their begin by version.
        self._free_s = [0.0] * (gpus - 1)
        self._line: dict[int, tuple[Owner, Run, float]] = {}

    def want(self, owner: Owner) -> None:
        """Queue the start of an iteration of ``owner``; a long run of another instance ends with its iteration under way."""
        self._turns.add_head(owner)
        self._look()

    def resume(self, owner: Owner) -> None:
        """Queue the next iteration of ``owner``; a free port begins before requests that arrive at this very time can join."""
        if self._run is not None and self._kernel.now < self._until_s:
            self.want(owner)
        elif self._turns.waiting or self._occupied:
            self._run = None
            self._turns.add_head(owner)
            self._next()
        elif (run := owner.next_run(not self._line)) is not None:
            self._begin(owner, run)

    def add_pass(self, owner: Owner, run: Run) -> None:
        """Run a later stage's part of an iteration under way: at once on a free port, else before all that is to begin."""
        if (self._run is None or self._kernel.now >= self._until_s) and not self._occupied and not self._turns.waiting:
            self._begin(owner, run)
            return
        self._turns.add_pass(owner, run)
        self._look()

    def _look(self) -> None:
        self._settle()
        if self._run is None:
            self._wake()
        elif self._until_s < inf:  # something waits for its end now
            self._kernel.at(self._until_s, self._free, self._version)
            self._until_s = inf
        else:
            self.cut()

    def _settle(self) -> None:
        """Record that a run whose end is not reported is over."""
        if self._until_s <= self._kernel.now:
            self._run, self._until_s = None, inf

    def withdraw(self, owner: Owner) -> None:
        """Drop everything of ``owner``, waiting or running: what was running is lost."""
        self._settle()
        self._turns.remove(owner)
        for version in [version for version, (other, *_) in self._line.items() if other is owner]:
            _, run, began_s = self._line.pop(version)
            run.lose(self._kernel.now - began_s)
        if not self._line:
            self._free_s = [0.0] * len(self._free_s)
        if self._run is not None and self._owner is owner:
            self._lose()
            self._wake()

    def occupy(self, busy: bool) -> None:
        """Take the GPUs for something else (a collective's kernels), or give them back: no iteration begins meanwhile."""
        self._occupied += 1 if busy else -1
        assert self._occupied >= 0, "a port is given back that was not occupied"
        self._settle()
        if busy:
            self.cut()
        elif not self._occupied:
            self._wake()

    def cut(self) -> None:
        """Let a long run end with the iteration under way."""
        run = self._run
        if run is None or self._until_s < inf:
            return
        lasts = run.cut(self._kernel.now - self._began_s)
        if lasts is not None:
            self._version += 1
            self._schedule(run, lasts)

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
                run = owner.next_run(not self._turns.waiting and not self._line)
            if run is not None:
                self._begin(owner, run)

    def _begin(self, owner: Owner, run: Run) -> None:
        kernel = self._kernel
        self._owner = owner
        self._run = run
        self._began_s = now = kernel.now
        self._version = version = self._version + 1
        self._until_s = inf
        if self._shared:
            self._begin_shared(run)
            return
        end_s = now + run.begin(1.0)
        if run.fixed and not self._turns.waiting:
            self._until_s = end_s
            run.end_at(end_s)
        else:
            kernel.at(end_s, self._end, version)

    def _begin_shared(self, run: Run) -> None:
        pace = 1.0
        if self._pace is not None:
            self._ticket, pace = self._pace.enter(self.cut)
        self._schedule(run, run.begin(pace))

    def _schedule(self, run: Run, lasts: float) -> None:
        """Set the end of what runs, ``lasts`` seconds after its begin if no GPU keeps it waiting."""
        kernel, end_s = self._kernel, self._began_s + lasts
        if not self._free_s:
            kernel.at(max(end_s, kernel.now), self._end, self._version)
            return
        # A long run that is cut may have left the first GPU already.
        part_s = run.last_s() / (len(self._free_s) + 1)
        left_s = end_s - len(self._free_s) * part_s
        kernel.at(max(left_s, kernel.now), self._pass_on, (self._version, left_s, part_s))

    def _pass_on(self, entry: tuple[int, float, float]) -> None:
        """Let an iteration leave the first GPU, at ``left_s``; the line's other GPUs take it as they get free."""
        version, at, part_s = entry
        run, owner = self._run, self._owner
        if version != self._version or run is None or owner is None:
            return
        self._run = None
        if self._pace is not None:
            self._pace.leave(self._ticket)
        for gpu, free_s in enumerate(self._free_s):
            at = self._free_s[gpu] = max(at, free_s) + part_s
        self._line[version] = owner, run, self._began_s
        self._kernel.at(max(at, self._kernel.now), self._leave, version)
        if self._turns.waiting:
            self._next()

    def _leave(self, version: int) -> None:
        if version in self._line:
            self._line.pop(version)[1].end()

    def _end(self, version: int) -> None:
        run = self._run
        if version != self._version or run is None:
            return
        self._run = None
        if self._pace is not None:
            self._pace.leave(self._ticket)
        run.end()
        if self._turns.waiting and self._run is None:
            self._next()

    def _free(self, version: int) -> None:
        """Begin what waits for the end of a run whose end is not reported."""
        if version == self._version and self._run is not None:
            self._run = None
            self._next()

    def _lose(self) -> None:
        """Drop what is running."""
        assert self._run is not None, "only what runs is lost"
        self._run.lose(self._kernel.now - self._began_s)
        self._run, self._until_s = None, inf
        self._version += 1
        if self._pace is not None:
            self._pace.leave(self._ticket)
