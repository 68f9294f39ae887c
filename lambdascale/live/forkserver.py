"""The process that local nodes are forked from. It imports what nodes need, which takes seconds, beside its parent.

Nothing heavy is imported here: commands call ``prepare`` before they import torch themselves.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

_TUNABLES = "GLIBC_TUNABLES"
# glibc writes past the caches only what is nearly as large as the last of them. A processor with a large shared one then reads
# all that it overwrites: copies take twice as long (7 instead of 13 GB/s a core on a Sapphire Rapids with 480 MiB). Read at exec.
_COPY_PAST_CACHES = "glibc.cpu.x86_non_temporal_threshold=0x100000"


def prepare() -> ForkServerContext:
    """Start the process unless it runs already; return the context to start nodes with. Does not wait for its imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lambdascale.live.node.agent", "lambdascale.live.node.preload"])
    with _tuned():
        forkserver.ensure_running()
    return context


@contextmanager
def _tuned() -> Iterator[None]:
    """Have programs that are executed meanwhile copy large pieces past the caches, unless the user has tuned that."""
    before = os.environ.get(_TUNABLES)
    if before is None or "non_temporal_threshold" not in before:
        os.environ[_TUNABLES] = ":".join(filter(None, (before, _COPY_PAST_CACHES)))
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TUNABLES]
        else:
            os.environ[_TUNABLES] = before
