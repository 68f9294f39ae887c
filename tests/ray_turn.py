"""Turns at Ray: a program that starts Ray joins the instance of another one on the machine, and ``ray stop`` ends them all."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def ray_turn() -> Iterator[None]:
    """Wait until no other test of this machine, in whatever process, uses Ray."""
    with (Path(tempfile.gettempdir()) / "lambdascale-tests-ray.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
