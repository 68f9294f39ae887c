"""Processes that make the runs of studies: one pool for a whole command, since each process takes seconds to start."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context

from lambdascale.core import UserError
from lambdascale.experiments.compose import compose
from lambdascale.experiments.jobs import attempt, failed
from lambdascale.experiments.outcomes import Outcome
from lambdascale.experiments.progress import JobProgress

# Overrides of one run, without sweeps.
Job = tuple[str, ...]


@contextmanager
def processes() -> Iterator[ProcessPoolExecutor]:
    """Yield a process for each core that this one may use; what has not begun when an exception ends the block is given up."""
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_jobs(pool: ProcessPoolExecutor, jobs: Sequence[Job], stamp: str) -> dict[Job, Outcome]:
    """Make every run once, showing how many remain and for how long; ``stamp`` marks this command in the names of groups."""
    found: dict[Job, Outcome] = {}
    numbers = {job: number for number, job in enumerate(dict.fromkeys(jobs))}
    # Mixed, so that the time taken so far tells what the rest will take. The order is the same each time.
    mixed = random.Random(0).sample(list(numbers), len(numbers))
    waiting: dict[Future[Outcome], Job] = {pool.submit(_make, job, numbers[job], stamp): job for job in mixed}
    with JobProgress(len(waiting)) as progress:
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
