"""One-line messages for a user's mistakes, whichever library noticed them."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lambdascale.core import UserError
from lambdascale.core.text import one_line

# Settings of earlier versions, and what they are now.
_FORMER = {
    "drop_failures": "workload.failures=drop, count or refuse",
    "zero_tokens": "workload.failures=drop, count or refuse",
    "use_trace_models": "workload.model_column=Model",
}

# What a system says of a place that the user chose: the package's own are made by itself.
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOSPC)
_TARGET = re.compile(r"Error locating target '([^']+)'")
_ARGUMENTS = re.compile(r"(\w+)\.__init__\(\) (?:got an unexpected keyword argument '(\w+)'|missing .*arguments?: (.+))")
_PLACE = re.compile(r"^full_key: (\S+)$", re.MULTILINE)
_ELSEWHERE = (
    " (an experiment sets keys of its own workload, which no other has: choose workload= without experiment=; "
    "for a run that is played again replay=FOLDER takes their place)"
)
_ALIKE = 0.7  # of difflib: a key that is less alike is not what was meant


def user_message(error: BaseException) -> str | None:
    """Return the one-line message of a user's mistake, also of one wrapped by Hydra; None if the error is not the user's."""
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, UserError):
            return one_line(str(cause))
        if isinstance(cause, OSError) and cause.errno == errno.ENAMETOOLONG:
            # Files that the package names itself have short names: this one is a setting's.
            return one_line(f"the name of a file or folder is too long: {cause.filename}")
        if isinstance(cause, OSError) and cause.errno in _REFUSED and cause.filename is not None:
            return one_line(f"{cause.filename}: {cause.strerror}")
    found = next(filter(None, (_plain(cause, chain) for cause in chain)), None) or _of_libraries(chain)
    message = one_line(found)
    now = next((f" ({name} is now {setting})" for name, setting in _FORMER.items() if name in message), "")
    return f"{message}{now}" if message else None


def internal_error(error: BaseException) -> str:
    """Return the one-line message of an error that is not the user's."""
    return f"internal error: {one_line(f'{type(error).__name__}: {error}')} (LAMBDASCALE_DEBUG=1 shows where)"


def _of_libraries(chain: Sequence[BaseException]) -> str:
    """Return what Hydra and OmegaConf say, each thing once; an empty text if the error is not one of theirs."""
    said: list[str] = []
    for line in (_first_lines(cause) for cause in chain if isinstance(cause, HydraException | OmegaConfBaseException)):
        if not any(line in before for before in said):
            said.append(line)
    return " ".join(said)


def _plain(cause: BaseException, chain: Sequence[BaseException]) -> str | None:
    """Return the message of a mistake that the libraries describe by their own internals; None for any other."""
    text = str(cause)
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
        return _unknown_key(str(cause.full_key), str(cause.key), cause.parent_node)
    if isinstance(cause, OverrideParseException):
        said = next((str(each) for each in chain[1:] if isinstance(each, HydraException)), text).splitlines()[0]
        return f"{cause.override!r} is not a setting KEY=VALUE: {said}"
    if isinstance(cause, UserWarning) and "hydra.searchpath" in text:
        return f"hydra.searchpath: {text.partition('path=')[2].removesuffix(' is not available.')} is not a folder"
    if isinstance(cause, ValueError) and text.startswith("Config group override must be"):
        return f"a choice of a group is a name: {text}"
    if (target := _TARGET.match(text)) is not None and len(chain) > 1:
        reason = chain[-1]
        kind = "" if isinstance(reason, ImportError | AttributeError) else f"{type(reason).__name__}: "
        hint = " (PYTHONPATH must name the folder of a module of yours)" if isinstance(reason, ModuleNotFoundError) else ""
        return f"cannot import {target[1]}: {kind}{reason}{hint}"
    if isinstance(cause, TypeError) and (wrong := _ARGUMENTS.match(text)) is not None:
        cls, unknown, missing = wrong.groups()
        place = found[1] if (found := _PLACE.search(str(chain[0]))) else ""
        about = f"needs the keys {missing}" if missing else f"has no key {unknown}"
        return f"{place and place + ': '}{cls} {about}{_ELSEWHERE if unknown and place == 'workload' else ''}"
    return None


def _unknown_key(full_key: str, key: str, parent: DictConfig) -> str:
    """Return the message about a key that ``parent`` lacks: the one that was meant, or all that it has."""
    keys = sorted(name for name in map(str, parent) if name not in ("_target_", "hydra"))
    above = full_key.removesuffix(key)
    alike = get_close_matches(key, keys, n=1, cutoff=_ALIKE)
    meant = f"did you mean {above}{alike[0]}?" if alike else f"{above.rstrip('.') or 'a run'} has {', '.join(keys)}"
    more = f" (+{full_key}=VALUE adds a key that its file leaves out)" if "_target_" in parent else ""
    return f"unknown key {full_key}; {meant}{more}"


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
