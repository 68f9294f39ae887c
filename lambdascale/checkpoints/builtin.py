"""Packed models that are made when they are first asked for, and kept in the user's cache."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from lambdascale.checkpoints.layout import SHORT_NAMES
from lambdascale.checkpoints.packed import FORMAT, PackedModel
from lambdascale.checkpoints.packing import pack
from lambdascale.core import UserError

NAMES = ("smollm2", "small", "tiny")
_SEED = 0


def cache_directory() -> Path:
    """LAMBDASCALE_CACHE, or the usual place for caches."""
    given = os.environ.get("LAMBDASCALE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lambdascale"


def builtin_model(name: str, blocks: int, dtype: str = "bf16") -> PackedModel:
    """SmolLM2 (from its Python package) or one with random weights, cut into ``blocks``; made at the first call.

    UserError for an unknown name or type, and where SmolLM2 is not installed.
    """
    if name not in NAMES:
        raise UserError(f"there is no built-in model {name}: choose one of {', '.join(NAMES)} or give a packed model's directory")
    if dtype not in SHORT_NAMES:
        raise UserError(f"dtype must be one of {', '.join(SHORT_NAMES)}, not {dtype}")
    # Those of an older version stay where they are, for whoever still runs it.
    target = cache_directory() / "models" / f"{name}-{blocks}-{dtype}-v{FORMAT}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            source = Path(scratch) / name
            source.mkdir()
            _write(name, source, dtype)
            packed = Path(scratch) / "packed"
            pack(source, packed, blocks, SHORT_NAMES[dtype])
            try:
                packed.rename(target)
            except OSError:
                if not target.is_dir():  # otherwise another process was faster
                    raise
    return PackedModel.open(target, name)


def _write(name: str, directory: Path, dtype: str) -> None:
    # torch and transformers take seconds to import: only when there is something to make.
    from lambdascale.checkpoints.synthetic import PRESETS, write_random, write_smollm2

    if name == "smollm2":
        write_smollm2(directory)
    else:
        write_random(PRESETS[name], directory, _SEED, SHORT_NAMES[dtype])
