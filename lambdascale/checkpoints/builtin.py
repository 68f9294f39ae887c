"""Built-in packed models: made on first use and kept in the user's cache."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from lambdascale.checkpoints.layout import SHORT_NAMES
from lambdascale.checkpoints.packed import FORMAT, PackedModel
from lambdascale.checkpoints.packing import pack
from lambdascale.core import UserError

NAMES = ("smollm2", "small", "tiny")
USUAL_BLOCKS = 16
_SEED = 0


def cache_directory() -> Path:
    """Folder of cached models: LAMBDASCALE_CACHE, else lambdascale/ below XDG_CACHE_HOME or ~/.cache."""
    given = os.environ.get("LAMBDASCALE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lambdascale"


def builtin_model(name: str, blocks: int, dtype: str = "bf16") -> PackedModel:
    """Open SmolLM2 (from its Python package) or a random model, divided into ``blocks``; the first call makes it.

    UserError for an unknown name or type, or if SmolLM2 is not installed.
    """
    if name not in NAMES:
        raise UserError(f"unknown built-in model {name}: choose from {', '.join(NAMES)} or give a packed model's directory")
    if dtype not in SHORT_NAMES:
        raise UserError(f"dtype must be one of {', '.join(SHORT_NAMES)}, not {dtype}")
    # Models of an older format version stay in the cache, for installations that still use it.
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
                if not target.is_dir():  # else another process made it meanwhile
                    raise
    return PackedModel.open(target, name)


def _write(name: str, directory: Path, dtype: str) -> None:
    # Imported only when a model has to be made: torch and transformers take seconds to import.
    from lambdascale.checkpoints.synthetic import PRESETS, write_random, write_smollm2

    if name == "smollm2":
        write_smollm2(directory)
    else:
        write_random(PRESETS[name], directory, _SEED, SHORT_NAMES[dtype])


def open_model(model: str, blocks: int | None = None, dtype: str | None = None) -> PackedModel:
    """Return a built-in model, in ``blocks`` blocks (None: 16) of ``dtype`` (None: bf16), or the packed model in a folder.

    UserError for a packed model with blocks or a type, since it has its own.
    """
    if model in NAMES:
        return builtin_model(model, USUAL_BLOCKS if blocks is None else blocks, dtype or "bf16")
    packed = PackedModel.open(Path(model))
    for option, value in (("--blocks", blocks), ("--dtype", dtype)):
        if value is not None:
            raise UserError(f"{option} is for built-in models: {model} is packed as it is, in {len(packed.blocks)} blocks")
    return packed
