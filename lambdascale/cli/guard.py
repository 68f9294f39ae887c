"""Exit status of every command: 0 on success, 2 with one line for a user's mistake, 1 for a fault in this package."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from lambdascale.core import UserError


def run_guarded(fn: Callable[[], int | None]) -> int:
    """Call ``fn`` and return an exit status, 130 after an interrupt; LAMBDASCALE_DEBUG=1 shows the traceback of an error."""
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
    ours = [cause for cause in chain if isinstance(cause, HydraException | OmegaConfBaseException)]
    return " ".join(dict.fromkeys(_first_lines(cause) for cause in ours)) or None


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _first_lines(error: BaseException) -> str:
    """What Hydra's and OmegaConf's messages say, without the hints at their internals that follow."""
    lines = []
    for line in (line.strip() for line in str(error).splitlines()):
        if "$VALUE" in line or line.startswith(
            ("Config search path", "full_key:", "object_type=", "reference_type=", "Set the env", "To append", "See https")
        ):
            break
        lines.append(line)
    return " ".join(line for line in lines if line)
