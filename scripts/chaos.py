"""Random faults in a live cluster under load: kills, stops and cut connections; every answer is compared, token for token.

python scripts/chaos.py [--faults 1000] [--minutes 5] [--seed 0] [--transport shm|tcp] [--nodes 5] [--every-s 1.0]
    [--device cpu|cuda] [--out results/tables]

A cluster with the tiny model answers greedy requests of clients that come in bursts, so that it scales out and in. Meanwhile a
fault comes every second or so: a node's process is killed (SIGKILL), stopped for a while (SIGSTOP, SIGCONT), longer than the
cluster waits for a silent node, or the connection of two living nodes is cut (their socket is shut down, by pidfd_getfd); now and
then this process, the controller, stops for three seconds. The run ends after so many faults, or so many minutes. Restarts of a
node come at most a second apart here, and without a limit, so that the faults find nodes. With ``--faults 0`` nothing is struck:
bursts alone, for as many minutes. Adds a row to reliability.csv; status 1 if a request was lost, answered twice or wrongly, or if
anything stays behind. Linux only; the same seed gives the same faults, at other moments of the cluster's life.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from hydra.utils import instantiate

from lambdascale.checkpoints import PackedModel, pack
from lambdascale.checkpoints.synthetic import PRESETS, write_random
from lambdascale.cli.guard import run_guarded
from lambdascale.cli.parser import Parser
from lambdascale.control import BatchLimits, build_system, drive
from lambdascale.core import Failure, Request
from lambdascale.core.commands import Command
from lambdascale.core.events import ConnectionLost, Event, NodeJoined, NodeLost
from lambdascale.experiments.compose import compose
from lambdascale.inference import Engine, Ticket, TransformerStage, load_blocks
from lambdascale.live.config import LiveConfig
from lambdascale.live.controller import supervisor
from lambdascale.live.controller.backend import LiveBackend
from lambdascale.live.controller.launch import LocalLauncher
from lambdascale.testing.process_faults import Faults, Sample, sample, slopes
from lambdascale.testing.reliability import Row, add_row, check_writable

PROMPTS, ANSWER, SLOT_TOKENS, BLOCKS = 48, 90, 160, 8
SILENCE_S = 2.0
PATIENCE_S = 90.0  # an answer that takes longer is lost
BURST, CALM, PERIOD_S = 24, 2, 12.0


@dataclass
class Tally:
    """Outcomes of the requests, and the faults."""

    requests: int = 0
    right: int = 0
    wrong: int = 0
    doubled: int = 0
    lost: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    returns_s: list[float] = field(default_factory=list)  # from a node's loss to its return
    mends_s: list[float] = field(default_factory=list)  # from a cut to the new connection
    answers_s: list[float] = field(default_factory=list)

    @property
    def flawless(self) -> bool:
        """True if every request was answered once, with the right tokens."""
        return self.right == self.requests


class Client:
    """One request at a time, until ``go_on`` says no. A sink for its answers; the control thread calls it."""

    def __init__(self, load: Load, number: int) -> None:
        self._load, self._number = load, number
        self.begun = 0.0
        self._tokens: list[int] = []
        self._want: list[int] = []
        self._over = True

    @property
    def waits(self) -> bool:
        return not self._over

    def ask(self) -> None:
        """Send the next request."""
        prompt, self._want = self._load.draw()
        self._tokens, self._over, self.begun = [], False, time.monotonic()
        self._load.tally.requests += 1
        request_id = self._load.next_id()
        ticket = Ticket(request_id, list(prompt), len(prompt), ANSWER)
        backend = self._load.backend
        backend.offer(Request(request_id, backend.now(), "tiny", len(prompt), ANSWER), ticket, self)

    def tokens(self, tokens: Sequence[int], finished: bool) -> None:
        """See Sink."""
        if self._over:
            self._load.tally.doubled += 1
            return
        self._tokens += tokens
        if finished:
            self._end(right=self._tokens == self._want)

    def failed(self, failure: Failure) -> None:
        """See Sink."""
        self._load.tally.lost += 1
        self._load.tally.reasons[failure.text] += 1
        self._over = True

    def _end(self, *, right: bool) -> None:
        self._over = True
        tally = self._load.tally
        tally.right += right
        tally.wrong += not right
        tally.answers_s.append(time.monotonic() - self.begun)


class Load:
    """Clients that ask in bursts: ``step`` lets those with an answer ask again, many in a burst and few between two."""

    def __init__(self, backend: LiveBackend, answers: list[tuple[list[int], list[int]]], seed: int) -> None:
        self.backend, self.tally = backend, Tally()
        self._answers, self._random = answers, random.Random(seed)
        self._id = 0
        self._clients = [Client(self, number) for number in range(BURST)]
        self._begun = time.monotonic()

    def draw(self) -> tuple[list[int], list[int]]:
        """Return a prompt and its answer."""
        return self._random.choice(self._answers)

    def next_id(self) -> int:
        self._id += 1
        return self._id

    def step(self) -> None:
        """Let clients ask."""
        calm = (time.monotonic() - self._begun) % PERIOD_S > 0.7 * PERIOD_S
        for client in self._clients[: CALM if calm else BURST]:
            if not client.waits:
                client.ask()

    def drain(self) -> None:
        """Wait for all answers; those that do not come are lost."""
        deadline = time.monotonic() + PATIENCE_S
        while any(client.waits for client in self._clients) and time.monotonic() < deadline:
            time.sleep(0.05)
        silent = sum(client.waits for client in self._clients)
        self.tally.lost += silent
        self.tally.reasons["no answer"] += silent


class Watch:
    """An observer: members, and how long losses last."""

    def __init__(self, tally: Callable[[], Tally]) -> None:
        self._tally = tally
        self.members: set[int] = set()
        self._lost: dict[int, float] = {}
        self.commands: Counter[str] = Counter()
        self.cuts: dict[frozenset[int], float] = {}

    def on_event(self, event: Event) -> None:
        """Take note of an event."""
        now = time.monotonic()
        if isinstance(event, NodeJoined):
            self.members.add(event.node)
            if event.node in self._lost:
                self._tally().returns_s.append(now - self._lost.pop(event.node))
        elif isinstance(event, NodeLost):
            self.members.discard(event.node)
            self._lost[event.node] = now
        elif isinstance(event, ConnectionLost):
            cut = self.cuts.pop(frozenset((event.node, event.peer)), None)
            if cut is not None:
                self._tally().mends_s.append(now - cut)

    def on_command(self, at: float, command: Command) -> None:
        """Count a command."""
        self.commands[type(command).__name__] += 1


# -- the run -------------------------------------------------------------------------------------------------------------


def reference(model: PackedModel, seed: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and the answers of an engine that nothing disturbs."""
    stage = TransformerStage(model.architecture, load_blocks(model), 1, SLOT_TOKENS)
    rng, found = np.random.default_rng(seed), []
    for number in range(PROMPTS):
        prompt = rng.integers(0, model.architecture.vocab, int(rng.integers(10, 50))).tolist()
        engine, ticket = Engine([stage], BatchLimits(max_batch=1)), Ticket(number, list(prompt), len(prompt), ANSWER)
        engine.add(ticket)
        while len(engine):
            engine.step()
        found.append((prompt, ticket.output))
    return found


@contextmanager
def cluster(model: PackedModel, directory: Path, options: argparse.Namespace, watch: Watch) -> Iterator[LiveBackend]:
    """A running cluster, and its control thread."""
    group = compose([f"system={options.system}", f"system.blocks={BLOCKS}", "system.batching.max_batch=4", *EAGER])
    system = instantiate(group.system, _convert_="all")
    spec = instantiate(compose(["cluster=desk"]).cluster, _convert_="all")
    spec = replace(spec, nodes=options.nodes, nic_bytes_per_s="4MB/s", pcie_bytes_per_s="1GB/s", ssd_bytes_per_s="20MB/s")
    live = LiveConfig(
        checkpoint=str(directory),
        transport=options.transport,
        device=options.device,
        slot_tokens=SLOT_TOKENS,
        threads=1,
        silence_s=SILENCE_S,
        restarts=1_000_000,
        spares=2,
    )
    models = [("tiny", model)]
    plane = build_system(system, cluster=live.seen(spec, models, system), models=[model.spec])
    backend = live.start(cluster=spec, models=models, system=system, open_ended=True)
    thread = threading.Thread(target=drive, args=(plane, backend, [watch]), name="control")
    thread.start()
    try:
        yield backend
    finally:
        backend.end()
        thread.join()
        backend.close()


EAGER = (
    "system.autoscaler.keep_alive_s=1",
    "system.memory.keep_alive_s=1",
    "system.kv=copy",
    "+system.start.pipelines.form=always",
)


def trouble(
    load: Load, faults: Faults, watch: Watch, launcher: LocalLauncher, options: argparse.Namespace
) -> dict[int, list[Sample]]:
    """Strike until enough faults are in or the time is over; return samples by process."""
    samples = defaultdict[int, list[Sample]](list)
    pauses = random.Random(options.seed + 1)
    begun = time.monotonic()
    next_fault, next_sample = (begun + 3.0 if options.faults else math.inf), begun
    while time.monotonic() - begun < options.minutes * 60 and (not options.faults or faults.done.total() < options.faults):
        load.step()
        now = time.monotonic()
        if now >= next_fault:
            pair = faults.strike(watch.members)
            if pair:
                watch.cuts[pair] = time.monotonic()
            next_fault = time.monotonic() + pauses.expovariate(1 / options.every_s)
        if now >= next_sample:
            next_sample = now + 1.0
            for pid in (os.getpid(), *(launcher.pid(node) for node in sorted(watch.members))):
                found = sample(pid)
                if found is not None:
                    samples[pid].append(found)
        time.sleep(0.02)
    return samples


def left_behind(before: set[str]) -> list[str]:
    """Return the children of this process that still run, and shared memory that did not exist ``before``."""
    done = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False)
    helpers = ("resource_tracker", "forkserver", "ps -o")
    children = [line for line in done.stdout.splitlines() if not any(helper in line for helper in helpers)]
    return children + sorted(set(os.listdir("/dev/shm")) - before)


def spread(seconds: list[float]) -> str:
    """Return the distribution of durations in words."""
    if not seconds:
        return "none"
    p50, p90, p99 = np.percentile(seconds, [50, 90, 99])
    return f"n={len(seconds)} p50={p50:.2f} p90={p90:.2f} p99={p99:.2f} max={max(seconds):.2f}"


def growth(samples: dict[int, list[Sample]]) -> str:
    """Return the growth of the controller, and the median over nodes that lived for half a minute or longer."""
    parts = []
    mine = slopes(samples[os.getpid()])
    nodes = [slopes(found) for pid, found in samples.items() if pid != os.getpid() and len(found) >= 30]
    for name, found in (("controller", [mine] if mine else []), (f"{len(nodes)} nodes", nodes)):
        values = {key: float(np.median([each[key] for each in found])) for key in (found[0] if found else ())}
        parts.append(f"{name}: " + " ".join(f"{key}={value:+.2f}" for key, value in values.items()))
    return "; ".join(parts)


def report(
    watch: Watch, tally: Tally, faults: Faults, growth: str, left: list[str], seconds: float, options: argparse.Namespace
) -> bool:
    """Print the outcome and add its row; True if nothing went wrong."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(faults.done.items()))
    commands = (("multicasts", "StartMulticast"), ("loads", "LoadBlocks"), ("scale-ins of a node", "ReleaseNode"))
    scaled = ", ".join(f"{watch.commands[command]} {name}" for name, command in commands)
    load = "random faults under load" if options.faults else "bursts without faults"
    detail = (
        f"{kinds or 'no faults'}; {faults.missed} missed; {scaled}; node back s: {spread(tally.returns_s)}; "
        f"connection back s: {spread(tally.mends_s)}; answers s: {spread(tally.answers_s)}; "
        f"growth a minute: {growth}; left behind: {len(left)}; {seconds:.0f} s"
    )
    row = Row(
        what=f"{load}, {options.transport}, {options.nodes} nodes, {options.device}",
        tried=f"{faults.done.total()} faults",
        requests=tally.requests,
        lost=tally.lost,
        doubled=tally.doubled,
        wrong=tally.wrong,
        detail=detail,
        command=shlex.join(["python", *sys.argv]),
    )
    print("\n".join(f"{key}: {value}" for key, value in asdict(row).items()))
    for reason, count in (+tally.reasons).items():
        print(f"lost {count}: {reason}", file=sys.stderr)
    print(*left, sep="\n", file=sys.stderr)
    add_row(row, options.out)
    return tally.flawless and not tally.doubled and not left


def chaos(options: argparse.Namespace) -> int:
    """Run; return the exit status."""
    check_writable(options.out)
    supervisor.LONGEST_S = 1.0
    before = set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "source").mkdir()
        write_random(PRESETS["tiny"], root / "source", seed=3)
        pack(root / "source", root / "tiny", BLOCKS)
        model = PackedModel.open(root / "tiny", "tiny")
        answers = reference(model, options.seed)
        begun = time.monotonic()
        loads: list[Load] = []
        watch = Watch(lambda: loads[0].tally if loads else Tally())
        with cluster(model, root / "tiny", options, watch) as backend:
            launcher = backend.launcher
            assert isinstance(launcher, LocalLauncher), "nodes are local"
            loads.append(Load(backend, answers, options.seed))
            faults = Faults(launcher.pid, options.nodes, SILENCE_S, options.seed)
            samples = trouble(loads[0], faults, watch, launcher, options)
            loads[0].drain()
    seconds, left = time.monotonic() - begun, left_behind(before)
    return 0 if report(watch, loads[0].tally, faults, growth(samples), left, seconds, options) else 1


def main() -> int:
    """Run the script; return the exit status."""
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = Parser(description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--faults",
        type=int,
        default=1000,
        help="end after so many faults; 0: bursts without faults (default: %(default)s)",
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="end after so many minutes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and of the requests (default: %(default)s)")
    parser.add_argument(
        "--transport", choices=["shm", "tcp"], default="shm", help="way of the blocks between nodes (default: %(default)s)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="nodes compute on (default: %(default)s)")
    parser.add_argument("--system", default="lambdascale", help="a choice of conf/system (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=5, help="node processes (default: %(default)s)")
    parser.add_argument("--every-s", type=float, default=1.0, help="mean seconds from a fault to the next (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("results/tables"), help="folder of reliability.csv (default: %(default)s)"
    )
    options = parser.parse_args()
    return run_guarded(lambda: chaos(options))


if __name__ == "__main__":
    sys.exit(main())
