"""Processes that make the runs of studies: one pool for a whole command, since each process takes seconds to start."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process

from lambdascale.core import UserError
from lambdascale.experiments.compose import compose
from lambdascale.experiments.jobs import attempt, failed
from lambdascale.experiments.outcomes import Outcome
from lambdascale.experiments.progress import JobProgress

# Overrides of one run, without sweeps.
Job = tuple[str, ...]


@contextmanager
def processes() -> Iterator[ProcessPoolExecutor]:
    """Yield a process for each core that this one may use. They end at once with an exception in the block, or with this process.

    A run that is cut off leaves no finished folder, so that the same command makes it again.
    """
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn"), initializer=_begin_process) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            raise


def _begin_process() -> None:
    # Ctrl-C reaches every process of the terminal: the first one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_first, name="end-with-parent", daemon=True).start()


def _end_with_the_first() -> None:
    """End this process when the one that started it has died, however it did: nobody would take its results."""
    parent = parent_process()
    assert parent is not None, "a pool's process has a parent"
    parent.join()
    os._exit(1)


def run_jobs(pool: ProcessPoolExecutor, jobs: Sequence[Job], stamp: str) -> dict[Job, Outcome]:
    """Make every run once, showing how many remain and for how long; ``stamp`` marks this command in the names of groups."""
    found: dict[Job, Outcome] = {}
    numbers = {job: number for number, job in enumerate(dict.fromkeys(jobs))}
    # Mixed, so that the time taken so far tells what the rest will take. The order is the same each time.
    mixed = random.Random(0).sample(list(numbers), len(numbers))
    waiting: dict[Future[Outcome], Job] = {pool.submit(_make, job, numbers[job], stamp): job for job in mixed}
    with JobProgress(len(waiting), "runs") as progress:
        for future in as_completed(waiting):
            found[waiting[future]] = future.result()
            progress.advance()
    return found


def _make(job: Job, number: int, stamp: str) -> Outcome:
    begin = time.process_time()
    outcome = Outcome(number, ",".join(job))
    try:
        config = compose(job)
    except UserError as error:
        failed(outcome, error)
    else:
        attempt(config, outcome, f"{config.name}-{stamp}")
    outcome.core_s = time.process_time() - begin
    return outcome
