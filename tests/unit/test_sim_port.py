"""The compute port where nothing tells it the end of a run: a fixed run is over when its time is."""

from __future__ import annotations

from lambdascale.sim.kernel import Kernel
from lambdascale.sim.port import ComputePort


class Pass:
    """A fixed run of ``lasts`` seconds; ``log`` gets (time, what happened, name)."""

    fixed = True

    def __init__(self, kernel: Kernel, log: list[tuple[float, str, str]], name: str, lasts: float = 1.0) -> None:
        self._kernel, self._log, self._name, self._lasts = kernel, log, name, lasts

    def _note(self, what: str) -> None:
        self._log.append((self._kernel.now, what, self._name))

    def begin(self, pace: float) -> float:
        self._note("begin")
        return pace * self._lasts

    def end_at(self, end_s: float) -> None:
        self._kernel.at(end_s, lambda _: self._note("end"))

    def end(self) -> None:
        self._note("end")

    def cut(self, elapsed_s: float) -> float | None:
        self._note("cut")
        return None

    def lose(self, elapsed_s: float) -> None:
        self._note("lose")

    def last_s(self) -> float:
        return self._lasts


class Nobody:
    """An owner with passes only."""

    def next_run(self, alone: bool) -> None:
        return None


class World:
    """A port, and calls to it at given times."""

    def __init__(self) -> None:
        self.kernel, self.log = Kernel(), list[tuple[float, str, str]]()
        self.port, self.owner = ComputePort(self.kernel, None), Nobody()

    def add(self, at: float, name: str, owner: Nobody | None = None) -> None:
        run = Pass(self.kernel, self.log, name)
        self.kernel.at(at, lambda _: self.port.add_pass(owner or self.owner, run))

    def run(self) -> list[tuple[float, str, str]]:
        while self.kernel.step():
            pass
        return self.log


def test_a_pass_begins_at_once_on_a_port_whose_run_is_over() -> None:
    world = World()
    world.add(0.0, "first")
    world.add(1.5, "second")
    assert world.run() == [(0.0, "begin", "first"), (1.0, "end", "first"), (1.5, "begin", "second"), (2.5, "end", "second")]


def test_passes_that_wait_begin_when_the_run_before_ends() -> None:
    world = World()
    for at, name in ((0.0, "first"), (0.25, "second"), (0.5, "third")):
        world.add(at, name)
    begun = [(at, name) for at, what, name in world.run() if what == "begin"]
    assert begun == [(0.0, "first"), (1.0, "second"), (2.0, "third")]
    assert sum(what == "end" for _, what, _ in world.log) == 3


def test_a_run_that_is_over_is_not_cut() -> None:
    """The batch may be in another port by then, in a run that can be cut."""
    world = World()
    world.add(0.0, "first")
    world.kernel.at(1.5, lambda _: world.port.cut())
    assert [what for _, what, _ in world.run()] == ["begin", "end"]


def test_a_port_taken_during_a_run_begins_nothing_until_it_is_given_back() -> None:
    world = World()
    world.add(0.0, "first")
    world.kernel.at(0.5, lambda _: world.port.occupy(True))
    world.add(0.75, "second")
    world.kernel.at(3.0, lambda _: world.port.occupy(False))
    assert [(at, name) for at, what, name in world.run() if what == "begin"] == [(0.0, "first"), (3.0, "second")]


def test_a_port_is_free_once_its_run_is_withdrawn() -> None:
    world, other = World(), Nobody()
    world.add(0.0, "lost")
    world.add(0.25, "waits", other)
    world.kernel.at(0.5, lambda _: world.port.withdraw(world.owner))
    log = [entry for entry in world.run() if entry != (1.0, "end", "lost")]  # which its owner ignores
    assert log == [(0.0, "begin", "lost"), (0.5, "lose", "lost"), (0.5, "begin", "waits"), (1.5, "end", "waits")]


def test_what_is_over_is_not_withdrawn() -> None:
    world = World()
    world.add(0.0, "first")
    world.kernel.at(1.5, lambda _: world.port.withdraw(world.owner))
    assert "lose" not in [what for _, what, _ in world.run()]
