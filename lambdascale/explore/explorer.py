"""Many seeds, in parallel: what was found, shrunk, and the command that replays it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from lambdascale.explore.run import run
from lambdascale.explore.scenario import Scenario, draw, preset
from lambdascale.explore.shrink import shrink
from lambdascale.testing.reliability import Row, add_row, check_writable

# Seeds that a process takes at a time.
_CHUNK = 20


@dataclass(frozen=True)
class Found:
    """A seed that breaks an invariant, and the ``faults`` that matter, by index."""

    seed: int
    preset: str
    broken: str
    case: str
    faults: tuple[int, ...]

    def command(self, system: str | None) -> str:
        """Return the command that replays it."""
        chosen = f" --system {system}" if system else ""
        faults = ",".join(map(str, self.faults)) or "none"
        return f"lambdascale explore --seeds {self.seed}:{self.seed + 1}{chosen} --faults {faults}"


@dataclass
class Tally:
    """Counts of an exploration: seeds by system, their requests and faults, events, and what was found."""

    seeds: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    faults: int = 0
    events: int = 0
    found: list[Found] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add the counts of another."""
        self.seeds += other.seeds
        self.requests += other.requests
        self.faults += other.faults
        self.events += other.events
        self.found += other.found

    def row(self, command: str, system: str | None = None) -> Row:
        """Return a row of the table of trials: see lambdascale.testing.reliability."""
        broken = Counter(found.broken for found in self.found)
        lost, doubled = broken["none lost"], broken["finished once"]
        names = ", ".join(f"{count} {name}" for name, count in sorted(broken.items())) or "nothing found"
        return Row(
            what=f"seeded faults in simulation, {system or f'{len(self.seeds)} systems'}",
            tried=f"{self.seeds.total()} seeds",
            requests=self.requests,
            lost=lost,
            doubled=doubled,
            wrong=len(self.found) - lost - doubled,
            detail=f"{self.faults} faults drawn, {self.events} events; {names}",
            command=command,
        )


def try_seed(seed: int, system: str | None = None) -> tuple[Found | None, int, Scenario]:
    """Run a seed; return what it breaks, shrunk, the number of its events, and its scenario."""
    scenario = draw(seed, system)
    outcome = run(scenario)
    if not outcome.broken:
        return None, outcome.events, scenario

    def fails(kept: Sequence[int]) -> bool:
        return run(scenario.only(kept)).broken == outcome.broken

    kept = shrink(len(scenario.faults), fails)
    case = run(scenario.only(kept)).case
    return Found(seed, scenario.preset, outcome.broken, case, tuple(kept)), outcome.events, scenario


def _try_seeds(seeds: Sequence[int], system: str | None) -> Tally:
    tally = Tally()
    for seed in seeds:
        found, events, scenario = try_seed(seed, system)
        tally.seeds[scenario.preset] += 1
        tally.requests += len(scenario.requests)
        tally.faults += len(scenario.faults)
        tally.events += events
        if found is not None:
            tally.found.append(found)
    return tally


def explore(
    seeds: range, *, system: str | None = None, jobs: int = 1, progress: Callable[[Tally], None] = lambda tally: None
) -> Tally:
    """Try all seeds in ``jobs`` processes; ``progress`` hears of every part in order. UserError for an unknown ``system``."""
    if system is not None:
        preset(system)
    total = Tally()
    chunks = (seeds[begin : begin + _CHUNK] for begin in range(0, len(seeds), _CHUNK))
    for part in _parts(partial(_try_seeds, system=system), chunks, jobs):
        total.add(part)
        progress(part)
    return total


def check_table(folder: Path) -> None:
    """Raise UserError unless a row can be added to ``reliability.csv`` in a folder."""
    check_writable(folder)


def add_to_table(tally: Tally, folder: Path, command: str, system: str | None = None) -> None:
    """Add an exploration to ``reliability.csv`` in a folder."""
    add_row(tally.row(command, system), folder)


def _parts(work: Callable[[Sequence[int]], Tally], chunks: Iterable[range], jobs: int) -> Iterator[Tally]:
    if jobs == 1:
        yield from map(work, chunks)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, chunks)
