"""Conversion of rates and sizes as people write them (``50GB/s``, ``400Gb/s``, ``80GiB``) into bytes/s and bytes."""

from __future__ import annotations

import re

from lambdascale.core.checks import LARGEST, shown
from lambdascale.core.errors import UserError

_PREFIX = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_QUANTITY = re.compile(
    r"\s*(?P<number>[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*(?P<prefix>[KMGT]i|[kKMGT]?)(?P<unit>[bB])"
)


def _parse(value: str, suffix: str, what: str, example: str) -> float:
    match = _QUANTITY.fullmatch(value.strip().removesuffix(suffix)) if value.strip().endswith(suffix) else None
    if match is None:
        raise UserError(f"{what} {shown(value)} is not valid; write a number or text such as {example}")
    scale = _BINARY.get(match["prefix"]) or _PREFIX[match["prefix"]]
    quantity = float(match["number"]) * scale / (8 if match["unit"] == "b" else 1)
    if not quantity <= LARGEST:
        raise UserError(f"{what} {value!r} is too large: at most {LARGEST:g} bytes")
    return quantity


def parse_rate(value: float | str) -> float:
    """Bytes per second from a number (bytes/s) or a string: ``"50GB/s"`` is bytes, ``"400Gb/s"`` bits. UserError if invalid."""
    return _parse(value, "/s", "rate", "50GB/s or 400Gb/s") if isinstance(value, str) else float(value)


def parse_size(value: float | str) -> int:
    """Bytes from a number or a string such as ``"80GiB"`` (binary) or ``"13.48GB"`` (decimal). UserError if invalid."""
    return round(_parse(value, "", "size", "80GiB or 13.48GB")) if isinstance(value, str) else int(value)
