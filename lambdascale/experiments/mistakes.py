"""One-line messages for a user's mistakes, whichever library noticed them."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from lambdascale.core import UserError
from lambdascale.core.text import one_line

# Settings of earlier versions, and what they are now.
_FORMER = {
    "drop_failures": "workload.failures=drop, count or refuse",
    "zero_tokens": "workload.failures=drop, count or refuse",
    "use_trace_models": "workload.model_column=Model",
}


def user_message(error: BaseException) -> str | None:
    """Return the one-line message of a user's mistake, also of one wrapped by Hydra; None if the error is not the user's."""
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, UserError):
            return one_line(str(cause))
        if isinstance(cause, OSError) and cause.errno == errno.ENAMETOOLONG:
            # Files that the package names itself have short names: this one is a setting's.
            return one_line(f"the name of a file or folder is too long: {cause.filename}")
    ours = [cause for cause in chain if isinstance(cause, HydraException | OmegaConfBaseException)]
    message = one_line(" ".join(dict.fromkeys(_first_lines(cause) for cause in ours)))
    if "RecordedRun.__init__" in message:
        message += " (settings of an experiment for its own workload: replay=FOLDER takes their place, workload=run does not)"
    now = next((f" ({name} is now {setting})" for name, setting in _FORMER.items() if name in message), "")
    return f"{message}{now}" if message else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _first_lines(error: BaseException) -> str:
    """First lines of a message of Hydra or OmegaConf, without the hints about their internals that follow."""
    lines = []
    for line in (line.strip() for line in str(error).splitlines()):
        if "$VALUE" in line or line.startswith(
            ("Config search path", "full_key:", "object_type=", "reference_type=", "Set the env", "To append", "See https")
        ):
            break
        lines.append(line)
    return " ".join(line for line in lines if line)
