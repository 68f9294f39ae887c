"""Exit status of every command: 0 on success, 2 with one line for a user's mistake, 1 for a fault in this package."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from lambdascale.core.text import one_line
from lambdascale.experiments.mistakes import user_message


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
            what = one_line(f"{type(error).__name__}: {error}")
            print(f"internal error: {what} (LAMBDASCALE_DEBUG=1 shows where)", file=sys.stderr)
        return 1
