"""JSON files of a checkpoint, from untrusted authors: one object, every key once, of bounded depth."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from lambdascale.core import UserError
from lambdascale.core.checks import shown

# Far more than any description has (a tokenizer's vocabulary included); the reference limit of a safetensors header.
LARGEST_BYTES = 100_000_000
# A surrogate: half of a character that needs two UTF-16 units, written as an escape.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def read_document(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; UserError if it is unreadable or anything else. FileNotFoundError if it is missing."""
    try:
        size = path.stat().st_size
        if size > LARGEST_BYTES:
            raise UserError(f"cannot read {path}: it has {size} bytes, a description at most {LARGEST_BYTES}")
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return parse_document(content, path)


def parse_document(content: bytes, where: object) -> dict[str, Any]:
    """JSON object in ``content``, which errors call ``where``.

    UserError for anything else, for a duplicate key, or for a lone surrogate.
    """
    try:
        text = content.decode()
        document = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
        if _HALF.search(text):
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError:
        raise UserError(f"cannot read {where}: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"cannot read {where}: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"cannot read {where}: it holds a {type(document).__name__} instead of a JSON object")
    return document


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice in an object")
        found[key] = value
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def inside(directory: Path, name: Any, where: object) -> Path:
    """File ``name`` of ``directory``; UserError, which names the file ``where`` it stands, unless it is a plain file name.

    A description may not reach out of its folder, by ``..``, by an absolute path or into another folder. A symbolic link in
    the folder is followed: whoever made the folder chose its target, and Hugging Face's cache consists of such links.
    """
    plain = isinstance(name, str) and name.isprintable() and len(name) < 200 and not any(sign in name for sign in "/\\")
    if not plain or name in ("", ".", ".."):
        raise UserError(f"{where} names the file {shown(name)}: it must be a plain name of a file in {directory}")
    return directory / str(name)
