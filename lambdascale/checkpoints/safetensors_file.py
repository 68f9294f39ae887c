"""The part of the safetensors file format (8-byte length, JSON header, contiguous data) that moving bytes needs.

The data of a file we write starts at a multiple of ``ALIGNMENT``, so that it can be read with O_DIRECT straight into a buffer:
the header is padded with spaces, which the format allows.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lambdascale.checkpoints.documents import LARGEST_BYTES, parse_document
from lambdascale.core import UserError

ALIGNMENT = 4096
ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8},
}
# Types that weights can be converted between.
FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file: element type (named as in the format), shape, and its bytes [begin, end) from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Length of the tensor in bytes."""
        return self.end - self.begin


def read_header(path: Path) -> tuple[dict[str, TensorInfo], int]:
    """Read the tensors of a file and the offset of its data in bytes; UserError if the file is missing, damaged or truncated.

    As the format requires, every name occurs once, a tensor's bytes are as many as its type and shape say, and the tensors lie
    one after the other without gaps.
    """
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else LARGEST_BYTES + 1
            header = file.read(length) if length <= LARGEST_BYTES else None
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path} as safetensors: {error.strerror or error}") from error
    if header is None or len(header) < length:
        raise UserError(f"{path} is not a safetensors file, or is truncated")
    document = parse_document(header, f"the safetensors header of {path}")
    entries = {name: entry for name, entry in document.items() if name != "__metadata__"}
    tensors = {name: _tensor(entry, 8 + length, f"{path}: the entry of tensor {name!r}") for name, entry in entries.items()}
    _check_places(tensors, 8 + length, size, path)
    return tensors, 8 + length


def _tensor(entry: Any, data: int, where: str) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where} is damaged") from None
    if not isinstance(dtype, str) or not isinstance(shape, list) or not all(map(_is_count, (begin, end, *shape))):
        raise UserError(f"{where} is damaged: {entry!r:.200}")
    if begin > end:
        raise UserError(f"{where} is damaged: its bytes begin at {begin} and end at {end}")
    if dtype in ITEM_BYTES and prod(shape) * ITEM_BYTES[dtype] != end - begin:
        raise UserError(f"{where} is damaged: a {dtype} of shape {shape} does not have {end - begin} bytes")
    return TensorInfo(dtype, tuple(shape), data + begin, data + end)


def _is_count(value: object) -> bool:
    """True for a whole number of at least 0 that fits the format's 64 bits."""
    return type(value) is int and 0 <= value < 1 << 63


def _check_places(tensors: Mapping[str, TensorInfo], data: int, size: int, path: Path) -> None:
    """Raise UserError unless the tensors fill the file from ``data`` to its end, each byte once."""
    end, before = data, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != end:
            kind = "overlaps" if info.begin < end else "leaves a gap after"
            raise UserError(f"{path} is damaged: tensor {name!r} {kind} {f'tensor {before!r}' if before else 'the header'}")
        end, before = info.end, name
    if size != end:
        raise UserError(f"{path} is {'truncated' if size < end else 'damaged'}: it has {size} bytes instead of {end}")


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]]) -> bytes:
    """Length and header of a file, padded to ALIGNMENT; tensors are name -> (dtype, shape, begin, end) from the data's start."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape, begin, end) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    return struct.pack("<Q", length) + text.ljust(length)
