"""Slowdown of nodes that are processes of one machine, by the number that compute: they share cores, caches and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from threading import BrokenBarrierError
from typing import Any

import torch

from lambdascale.calibration.iterations import decode, inputs_of, loaded
from lambdascale.checkpoints import PackedModel
from lambdascale.core import UserError
from lambdascale.inference import TransformerStage

_CONTEXT = 64
_PATIENCE_S = 300.0


def shared_slowdown(model: PackedModel, processes: int, threads: int | None, seconds: float = 2.0) -> tuple[float, ...]:
    """Measure how much longer a decode iteration of the whole model takes while 1 to ``processes`` processes compute.

    Each number of processes is measured for ``seconds``; the result is their time over that of one alone. UserError if the
    processes fail, for example for lack of memory.
    """
    context = get_context("spawn")
    barrier, rates = context.Barrier(processes, timeout=_PATIENCE_S), context.SimpleQueue()
    arguments = (model.directory, model.name, threads, seconds, barrier, rates)
    workers = [context.Process(target=_compute, args=(index, processes, *arguments), daemon=True) for index in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise UserError(f"{processes} processes with {model.name} each could not compute at once on this machine")
    found = [rates.get() for _ in range(processes * (processes + 1) // 2)]
    return slowdowns([[rate for among, rate in found if among == count] for count in range(1, processes + 1)])


def slowdowns(rates: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return slowdowns from ``rates``, whose item k - 1 is iterations/s of each of k processes.

    More processes are never taken to be faster: such a difference is noise.
    """
    alone = fmean(rates[0])
    return tuple(accumulate((alone / fmean(row) for row in rates), max, initial=1.0))[1:]


def _compute(
    index: int, processes: int, directory: Path, name: str, threads: int | None, seconds: float, barrier: Any, rates: Any
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    model = PackedModel.open(directory, name)
    slot_tokens = min(model.architecture.max_position, 2 * _CONTEXT)
    with loaded(model, "cpu") as weights:
        stages = [TransformerStage(model.architecture, [block], 1, slot_tokens) for block in weights]
        batch = decode(1, slot_tokens // 2)
        inputs = [inputs_of(stage, batch) for stage in stages]

        def iterate() -> None:
            for stage, given in zip(stages, inputs, strict=True):
                stage.run(batch, given)

        iterate()
        try:
            for among in range(1, processes + 1):
                barrier.wait()
                if index < among:
                    rates.put((among, _rate(iterate, seconds)))
        except BrokenBarrierError as error:
            raise SystemExit(1) from error


def _rate(iterate: Callable[[], None], seconds: float) -> float:
    """Return iterations per second."""
    began, done = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < seconds:
        iterate()
        done += 1
    return done / took
