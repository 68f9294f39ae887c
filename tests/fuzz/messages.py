"""Mutated messages at everything that takes bytes of others, in process: none crashes it, hangs it or makes it take memory.

python -m tests.fuzz.messages [--count 1000000] [--seed 0] [--only NAME] [--begin N] [--out results/tables]

Each is taken for a message, or refused with the error that is meant for it; anything else is a failure, and printed with the
command that replays it. Memory is bounded by RLIMIT_AS. Adds a row per surface to reliability.csv; status 1 after a failure.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

from lambdascale.live.serving.text import Text
from lambdascale.testing.reliability import Row, add_row
from tests.fuzz.strangers import Frames, Handshakes, Http
from tests.fuzz.surfaces import BATCH, AgentLine, Controller, Peers, Surface
from tests.live.harness import pack_tiny

# Address space beyond what is in use when the first message comes, and growth of the resident memory that counts as absurd.
ROOM_BYTES = 1 << 30
MOST_GROWTH_BYTES = 128 << 20
PATIENCE_S = 30.0


def surfaces(text: Text) -> list[tuple[Surface, float]]:
    """Return all surfaces, each with its share of the messages."""
    return [
        (Controller(), 0.30),
        (AgentLine(), 0.15),
        (Peers(), 0.15),
        (Frames(), 0.15),
        (Handshakes(), 0.10),
        (Http(text, whole=False), 0.10),
        (Http(text, whole=True), 0.05),
    ]


class Hang(BaseException):
    """A message has taken too long. Nothing that a surface catches."""


@dataclass
class Tally:
    """Outcomes at one surface; ``failures``: (number of the message, what happened, its first bytes)."""

    accepted: int = 0
    refused: int = 0
    failures: list[tuple[int, str, bytes]] = field(default_factory=list)
    seconds: float = 0.0
    growth_bytes: int = 0

    @property
    def tried(self) -> int:
        return self.accepted + self.refused + len(self.failures)


def mutants(surface: Surface, seed: int, numbers: range) -> Iterator[tuple[int, bytes]]:
    """Yield mutated messages, each from its own number: a part of them is the same as in the whole."""
    rng = Random()
    mutate, corpus = surface.mutator(rng), surface.corpus
    for number in numbers:
        rng.seed((seed << 40) + number)
        yield number, mutate(rng.choice(corpus), rng.choice(corpus))


def attack(surface: Surface, seed: int, numbers: range) -> Tally:
    """Try mutated messages; a surface that has failed starts anew."""
    tally, begun, before = Tally(), time.monotonic(), _resident_bytes()
    surface.begin()
    for number, data in mutants(surface, seed, numbers):
        if number > numbers.start and number % BATCH == 0:
            _try(tally, number - 1, b"", lambda _: surface.end())
            surface.begin()
        found = _try(tally, number, data, surface.attempt)
        tally.accepted += found is True
        tally.refused += found is False
        if found is None:
            surface.begin()
    _try(tally, numbers.stop - 1, b"", lambda _: surface.end())
    tally.seconds, tally.growth_bytes = time.monotonic() - begun, _resident_bytes() - before
    if tally.growth_bytes > MOST_GROWTH_BYTES:
        tally.failures.append((numbers.start, f"memory grew by {tally.growth_bytes >> 20} MiB", b""))
    return tally


def _try(tally: Tally, number: int, data: bytes, attempt: Callable[[bytes], bool | None]) -> bool | None:
    """Return what an attempt says; None after a failure, which is noted."""
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    try:
        return attempt(data)
    except (Exception, Hang) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
        tally.failures.append((number, f"{type(error).__name__}: {str(error)[:300]} ({place})", data[:120]))
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextmanager
def bounded() -> Iterator[None]:
    """Bound this process's memory, and raise Hang after each alarm."""

    def hang(number: int, frame: FrameType | None) -> None:
        raise Hang(f"not through within {PATIENCE_S:g} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, limits = signal.signal(signal.SIGALRM, hang), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def report(surface: Surface, tally: Tally, options: argparse.Namespace) -> None:
    """Print the outcome and add its row."""
    rate = tally.tried / max(tally.seconds, 1e-9)
    detail = (
        f"{tally.accepted} taken, {tally.refused} refused, {len(tally.failures)} failures; {tally.seconds:.0f} s "
        f"({rate:.0f}/s); peak of resident memory grew by {tally.growth_bytes >> 20} MiB"
    )
    print(f"{surface.name}: {tally.tried} messages: {detail}", flush=True)
    for number, what, data in tally.failures[:10]:
        begin = number - number % BATCH
        again = f"--seed {options.seed} --only {shlex.quote(surface.name)} --begin {begin} --count {BATCH}"
        print(f"    message {number}: {what}\n        {data.hex()}\n        python -m tests.fuzz.messages {again}", flush=True)
    if options.out is not None:
        command = f"python -m tests.fuzz.messages --count {options.count} --seed {options.seed}"
        row = Row(
            what=f"mutated messages, {surface.name}",
            tried=f"{tally.tried} messages",
            wrong=len(tally.failures),
            detail=detail,
            command=command,
        )
        add_row(row, options.out)


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status."""
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="NAME", help="all messages to one surface")
    parser.add_argument("--begin", type=int, default=0, metavar="N", help="number of the first message")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="add rows to FOLDER/reliability.csv")
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        found = surfaces(Text(pack_tiny(Path(folder))))
        chosen = [(surface, share) for surface, share in found if options.only in (None, surface.name)]
        with bounded(), open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # the controller's log
            for surface, share in chosen:
                count = options.count if options.only else round(options.count * share)
                tally = attack(surface, options.seed, range(options.begin, options.begin + count))
                report(surface, tally, options)
                failed += len(tally.failures)
        for surface, _ in found:
            surface.close()
    if not chosen:
        parser.error(f"--only names no surface: {options.only}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
