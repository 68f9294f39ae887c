"""How every command ends: 0 on success, 2 with one line on a user's mistake, 1 on a fault of ours."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from lambdascale.core import UserError


def run_guarded(fn: Callable[[], int | None]) -> int:
    """Call ``fn`` and turn what it raises into an exit status; the traceback of a fault is shown if LAMBDASCALE_DEBUG is set."""
    try:
        return fn() or 0
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
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"internal error: {what} (LAMBDASCALE_DEBUG=1 shows where)", file=sys.stderr)
        return 1


def user_message(error: BaseException) -> str | None:
    """One line for a user's mistake, also one that Hydra wrapped; None if the error is not the user's."""
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, UserError):
            return " ".join(str(cause).split())
    for cause in reversed(chain):
        if isinstance(cause, HydraException | OmegaConfBaseException):
            return _one_line(cause)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _one_line(error: BaseException) -> str:
    """Hydra's messages span lines and end in hints for its own tracebacks; the first ones say what is wrong."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [
        line for line in lines if line and not line.startswith(("full_key:", "object_type=", "reference_type=", "Set the env"))
    ]
    return " ".join(kept) or type(error).__name__
