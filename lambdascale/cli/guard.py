"""Exit status of every command: 0 on success, 2 with one line for a user's mistake, 1 for a fault in this package."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lambdascale.core.text import one_line
from lambdascale.experiments.mistakes import user_message


class _Terminated(KeyboardInterrupt):
    """End of a command by SIGTERM."""


def run_guarded(fn: Callable[[], int | None]) -> int:
    """Call ``fn`` and return an exit status; LAMBDASCALE_DEBUG=1 shows the traceback of an error.

    130 after Ctrl-C (SIGINT), 143 after SIGTERM: both end ``fn`` in the same way, so that it puts things in order.
    """
    try:
        with _sigterm_raises():
            return fn() or 0
    except _Terminated:
        print("terminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = user_message(error)
        if os.environ.get("LAMBDASCALE_DEBUG"):
            traceback.print_exc()
        if message is not None:
            print(f"error: {message}", file=sys.stderr)
            return 2
        if not os.environ.get("LAMBDASCALE_DEBUG"):
            what = one_line(f"{type(error).__name__}: {error}")
            print(f"internal error: {what} (LAMBDASCALE_DEBUG=1 shows where)", file=sys.stderr)
        return 1


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Have SIGTERM raise in the block; only the main thread may ask for that, elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated
