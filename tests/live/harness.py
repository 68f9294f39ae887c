"""A live cluster of processes with a tiny model, driven by a trace; and the answers it ought to give."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from hydra.utils import instantiate

from lambdascale.checkpoints import PackedModel, pack
from lambdascale.checkpoints.synthetic import PRESETS, write_random
from lambdascale.control import BatchLimits, SystemConfig, build_system, drive
from lambdascale.core import ClusterSpec, TracedRequest, traced
from lambdascale.core.commands import Command
from lambdascale.core.events import Event
from lambdascale.experiments.compose import compose
from lambdascale.inference import Engine, Ticket, TransformerStage, load_blocks
from lambdascale.live.config import LiveConfig
from lambdascale.live.controller.backend import LiveBackend
from lambdascale.metrics import Recorder, requests_table
from lambdascale.testing.invariants import InvariantChecker

SLOT_TOKENS = 160
# With the paced executor an iteration takes at least so long: else a fast machine's only replica would answer everything before a
# pipeline forms.
ITERATION_S = 0.006
PATIENCE_S = 300.0  # a run takes seconds: the limit fails those that hang, and not those of a slow machine beside others
T = TypeVar("T")


@dataclass
class Outcome:
    """Outcome of a run: the answers by request, the rows, everything that happened, and the backend (closed)."""

    answers: dict[int, list[int]]
    rows: Any
    recorder: Recorder
    backend: LiveBackend

    def kinds(self) -> list[str]:
        return [type(entry).__name__ for _, entry in self.recorder.entries]


def of(outcome: Outcome, kind: type[T]) -> list[T]:
    """Events or commands of a kind."""
    return [entry for _, entry in outcome.recorder.entries if isinstance(entry, kind)]


class Watcher:
    """Calls ``act(backend)`` once, ``after_s`` after the first event or command for which ``when`` holds."""

    def __init__(self, when: Callable[[Event | Command], bool], act: Callable[[LiveBackend], None], after_s: float = 0.0) -> None:
        self._when, self._act, self._after_s = when, act, after_s
        self.backend: LiveBackend | None = None
        self.acted = False

    def on_event(self, event: Event) -> None:
        self._look(event)

    def on_command(self, at: float, command: Command) -> None:
        self._look(command)

    def _look(self, entry: Event | Command) -> None:
        if not self.acted and self._when(entry):
            self.acted = True
            assert self.backend is not None
            timer = threading.Timer(self._after_s, self._act, (self.backend,))
            timer.daemon = True
            timer.start()


@cache
def system_of(name: str, *overrides: str) -> SystemConfig:
    """A system as configured, for the tiny model's eight blocks; composed once, its parts are frozen."""
    group = compose([f"system={name}", "system.blocks=8", "system.batching.max_batch=4", *overrides]).system
    built = instantiate(group, _convert_="all")
    assert isinstance(built, SystemConfig)
    return built


@cache
def _desk() -> ClusterSpec:
    cluster = instantiate(compose(["cluster=desk"]).cluster, _convert_="all")
    assert isinstance(cluster, ClusterSpec)
    return cluster


def pack_tiny(root: Path) -> Path:
    """A packed model under ``root``: random weights, eight blocks of float32, 1.7 MB."""
    (root / "source").mkdir()
    write_random(PRESETS["tiny"], root / "source", seed=3)
    pack(root / "source", root / "tiny", 8)
    return root / "tiny"


def burst(count: int, prompt: int = 20, output: int = 100, at_s: float = 0.1) -> list[TracedRequest]:
    return [traced(i, at_s, "tiny", prompt + 3 * (i % 5), output + 5 * (i % 4), 2 * output) for i in range(count)]


def prompts(requests: Sequence[TracedRequest], vocab: int = 256) -> dict[int, list[int]]:
    return {r.request_id: np.random.default_rng(r.request_id).integers(0, vocab, r.prompt_tokens).tolist() for r in requests}


def expected(model: PackedModel, requests: Sequence[TracedRequest]) -> dict[int, list[int]]:
    """The engine's answers, one after the other on one node, in one thread: many would wait for each other, for a minute."""
    torch.set_num_threads(1)
    stage = TransformerStage(model.architecture, load_blocks(model), 1, SLOT_TOKENS)
    answers = {}
    for request in requests:
        engine = Engine([stage], BatchLimits(max_batch=1))
        ticket = Ticket(request.request_id, prompts([request])[request.request_id], request.prompt_tokens, request.output_tokens)
        engine.add(ticket)
        while len(engine):
            engine.step()
        answers[request.request_id] = ticket.output
    return answers


def run(
    directory: Path,
    requests: Sequence[TracedRequest],
    *,
    system: SystemConfig,
    nodes: int = 4,
    link: str = "1MB/s",
    executor: Literal["torch", "paced"] = "paced",
    watchers: Sequence[Watcher] = (),
    cluster_changes: dict[str, Any] | None = None,
    **config: Any,
) -> Outcome:
    """Start a cluster, serve the requests, check what no system may do, and end it."""
    model = PackedModel.open(directory, "tiny")
    cluster = _desk()
    changes = {"nodes": nodes, "nic_bytes_per_s": link, "pcie_bytes_per_s": "1GB/s", "ssd_bytes_per_s": "1GB/s"}
    compute = replace(cluster.compute, iteration_overhead_s=ITERATION_S)
    cluster = replace(cluster, compute=compute, **changes | (cluster_changes or {}))
    # One thread a node, as on a machine with more nodes than cores; results/LOG.md tells of a run with two that was not exact.
    live = LiveConfig(checkpoint=str(directory), executor=executor, slot_tokens=SLOT_TOKENS, threads=1, **config)
    tokens = prompts(requests)
    tickets = {r.request_id: Ticket(r.request_id, list(tokens[r.request_id]), r.prompt_tokens, r.output_tokens) for r in requests}
    recorder, checker = Recorder(), InvariantChecker(cluster, system.blocks)
    plane = build_system(system, cluster=cluster, models=[model.spec])
    backend = live.start(
        cluster=cluster,
        models=[("tiny", model)],
        system=system,
        trace=sorted(requests, key=lambda r: r.arrival_s),
        ticket_of=lambda request: tickets[request.request_id],
    )
    hung = threading.Event()

    def give_up() -> None:
        hung.set()
        backend.end()

    guard = threading.Timer(PATIENCE_S, give_up)
    guard.daemon = True
    guard.start()
    try:
        for watcher in watchers:
            watcher.backend = backend
        drive(plane, backend, [recorder, checker, *watchers])
    finally:
        guard.cancel()
        backend.close()
    assert not hung.is_set(), "the run does not end by itself"
    checker.finish()
    rows = requests_table(recorder, system.name).to_pandas()
    return Outcome({number: ticket.output for number, ticket in tickets.items()}, rows, recorder, backend)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def listening(pid: int) -> set[str]:
    """TCP addresses at which a process listens, as the kernel writes them (in hexadecimal, with the port)."""
    own = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in own}
