"""The part of the safetensors file format (8-byte length, JSON header, contiguous data) that moving bytes needs.

The data of a file we write starts at a multiple of ``ALIGNMENT``, so that it can be read with O_DIRECT straight into a buffer:
the header is padded with spaces, which the format allows.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lambdascale.core import UserError

ALIGNMENT = 4096
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_LARGEST_HEADER = 100_000_000  # the reference implementation's limit


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
    """Read the tensors of a file and the offset of its data in bytes; UserError if the file is missing, damaged or truncated."""
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _LARGEST_HEADER + 1
            document = json.loads(file.read(length)) if length <= _LARGEST_HEADER else None
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as safetensors: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} is not a safetensors file")
    tensors = _tensors(document, 8 + length, path)
    end = max((info.end for info in tensors.values()), default=8 + length)
    if size != end:
        raise UserError(f"{path} is {'truncated' if size < end else 'damaged'}: it has {size} bytes instead of {end}")
    return tensors, 8 + length


def _tensors(document: Mapping[str, Any], data: int, path: Path) -> dict[str, TensorInfo]:
    tensors = {}
    for name, entry in document.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = entry["data_offsets"]
            info = TensorInfo(entry["dtype"], tuple(entry["shape"]), data + begin, data + end)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: the entry of tensor {name} is damaged") from None
        tensors[name] = info
    return tensors


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]]) -> bytes:
    """Length and header of a file, padded to ALIGNMENT; tensors are name -> (dtype, shape, begin, end) from the data's start."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape, begin, end) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    return struct.pack("<Q", length) + text.ljust(length)
