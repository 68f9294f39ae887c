"""Ends of a command that are allowed: status 0, or status 2 and one line on stderr."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout

from lambdascale.cli.guard import run_guarded


def ends_well(command: Callable[[], int | None], what: object) -> int:
    """Call ``command`` as a script does; return its exit status. AssertionError, naming ``what``, for any other end."""
    said, shown = io.StringIO(), io.StringIO()
    with redirect_stderr(said), redirect_stdout(shown):
        status = run_guarded(command)
    complaint = said.getvalue()
    assert status in (0, 2), f"{what}: status {status}: {complaint}"
    if status == 2:
        assert complaint.startswith("error: "), f"{what}: {complaint}"
        assert complaint.endswith("\n"), f"{what}: {complaint}"
        assert complaint[:-1].isprintable(), f"{what}: {complaint!r}"  # one line, and nothing that a terminal obeys
        assert len(complaint) < 1000, f"{what}: {complaint}"
    return status
