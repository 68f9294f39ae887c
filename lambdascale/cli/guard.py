"""Exit status of every command: 0 on success, 2 with one line for a user's mistake, 1 for a fault in this package."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lambdascale.experiments.mistakes import internal_error, user_message


class _Terminated(KeyboardInterrupt):
    """End of a command by SIGTERM."""


def run_guarded(fn: Callable[[], int | None]) -> int:
    """Call ``fn`` and return an exit status; LAMBDASCALE_DEBUG=1 shows the traceback of an error.

    130 after Ctrl-C (SIGINT), 143 after SIGTERM: both end ``fn`` in the same way, so that it puts things in order. 141, silently,
    when whoever reads the output has closed it (``| head``).
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
    except BrokenPipeError as error:
        return _unread(error)
    except Exception as error:
        return _report(error)


def _unread(error: BrokenPipeError) -> int:
    """Return the status after a write into a pipe that nobody reads: of the standard output, or of something inside."""
    if not _has_no_reader(sys.stdout.fileno()):
        return _report(error)
    # What is buffered would be written once more at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _has_no_reader(descriptor: int) -> bool:
    """True if a descriptor writes to a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _report(error: Exception) -> int:
    """Print an error in a line and return the exit status it means."""
    message = user_message(error)
    debugging = bool(os.environ.get("LAMBDASCALE_DEBUG"))
    if debugging:
        traceback.print_exc()
    if message is not None:
        print(f"error: {message}", file=sys.stderr)
        return 2
    if not debugging:
        print(internal_error(error), file=sys.stderr)
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
