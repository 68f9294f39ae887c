"""Type check of configured dataclasses, since Hydra's ``instantiate`` does not enforce annotations."""

from __future__ import annotations

import types
import typing
from dataclasses import fields
from typing import Any

from lambdascale.core.errors import UserError

_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def _matches(value: object, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is tuple:
        args = typing.get_args(hint)
        return isinstance(value, tuple) and (len(args) != 2 or args[1] is not ... or all(_matches(v, args[0]) for v in value))
    if getattr(hint, "_is_protocol", False):
        return isinstance(value, hint) if getattr(hint, "_is_runtime_protocol", False) else True
    if origin is not None:
        return True
    return isinstance(value, hint) if isinstance(hint, type) else value is None and hint is None


def check_types(config: Any) -> None:
    """Raise UserError if a field of the dataclass ``config`` holds a value its annotation does not allow.

    Lists become tuples where a tuple is annotated, since Hydra passes lists. Scalars, literals, unions, homogeneous tuples and
    runtime-checkable protocols (names of their members) are checked; other protocols and generic mappings are not.
    """
    hints = _hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list) and typing.get_origin(hints[field.name]) is tuple:
            value = tuple(value)
            object.__setattr__(config, field.name, value)
        if not _matches(value, hints[field.name]):
            wanted = str(field.type).replace("typing.", "")
            raise UserError(f"{type(config).__name__}.{field.name} must be {wanted}, not {value!r}")


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless ``condition`` holds; for values that come from the user."""
    if not condition:
        raise UserError(message)
