"""Type check of configured dataclasses, since Hydra's ``instantiate`` does not enforce annotations."""

from __future__ import annotations

import types
import typing
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from lambdascale.core.errors import UserError

# The range of quantities: an exabyte, whose bytes fit 64 bits, and less than the time of a clock's tick.
LARGEST, SMALLEST = 1e18, 1e-15
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
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_quantity(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and _is_quantity(value)
    if origin is tuple:
        return isinstance(value, tuple) and _all_match(value, typing.get_args(hint))
    if getattr(hint, "_is_protocol", False):
        return not _lacking(value, hint)
    if origin is not None:
        return True
    return isinstance(value, hint) if isinstance(hint, type) else value is None and hint is None


def _lacking(value: object, protocol: type) -> list[str]:
    """Public members of a protocol that a value does not have."""
    return [name for name in dir(protocol) if not name.startswith("_") and not hasattr(value, name)]


def _is_quantity(value: float) -> bool:
    """True for 0 and for finite numbers whose size is in range."""
    return value == 0 or SMALLEST <= abs(value) <= LARGEST


def _all_match(values: tuple[object, ...], hints: tuple[Any, ...]) -> bool:
    if len(hints) == 2 and hints[1] is ...:
        return all(_matches(value, hints[0]) for value in values)
    return len(values) == len(hints) and all(map(_matches, values, hints))


def check_types(config: Any, *, any_size: Collection[str] = ()) -> None:
    """Raise UserError if a field of the dataclass ``config`` holds a value its annotation does not allow.

    Lists become tuples where a tuple is annotated, since Hydra passes lists. Numbers must be 0 or between ``SMALLEST`` and
    ``LARGEST`` in size: others are no quantity of a cluster, and overflow in places that cannot name them. Scalars, literals,
    unions, tuples and protocols (names of their members; the error names those lacking) are checked; generic mappings are not.
    Numbers of the fields ``any_size`` may have any size: their class bounds them.
    """
    hints = _hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list) and typing.get_origin(hints[field.name]) is tuple:
            value = tuple(value)
            object.__setattr__(config, field.name, value)
        if field.name in any_size and type(value) in ((int,) if hints[field.name] is int else (int, float)):
            continue
        if not _matches(value, hints[field.name]):
            wanted = str(field.type).replace("typing.", "")
            if isinstance(value, int | float) and not _is_quantity(value):
                wanted += f", 0 or from {SMALLEST:g} to {LARGEST:g} in size"
            if getattr(hints[field.name], "_is_protocol", False) and type(value).__module__ != "builtins":
                part = f"{type(value).__module__}.{type(value).__qualname__}"
                lacking = ", ".join(_lacking(value, hints[field.name]))
                raise UserError(f"{type(config).__name__}.{field.name}: {part} lacks {lacking} of {wanted}")
            raise UserError(f"{type(config).__name__}.{field.name} must be {wanted}, not {shown(value)}")


def shown(value: object, most: int = 60) -> str:
    """Return ``value`` as a short quotation for an error message."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python converts
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= most else text[:most] + "…"


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless ``condition`` holds; for values that come from the user."""
    if not condition:
        raise UserError(message)
