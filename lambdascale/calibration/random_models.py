"""Models of random weights in the shapes of Llama 2, packed for measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lambdascale.calibration.engine_rates import SHAPES, config

SIZES = tuple(SHAPES)
_COMMAND = [sys.executable, "-c", "import sys; from lambdascale.cli.main import main; sys.exit(main())"]


def packed(sizes: Sequence[str], folder: Path, blocks: int) -> dict[str, Path]:
    """Pack models of ``sizes`` as ``blocks`` under ``folder``, all at once; return their folders. Those there are kept."""
    found = {size: folder / f"{size}-{blocks}" for size in sizes}
    packing = {size: _pack(size, path, blocks) for size, path in found.items() if not path.exists()}
    for size, process in packing.items():
        if process.wait():
            raise RuntimeError(f"packing {size} under {folder} failed: exit status {process.returncode}")
    return found


def _pack(size: str, path: Path, blocks: int) -> subprocess.Popen[bytes]:
    described = path.with_suffix(".json")
    described.write_text(json.dumps(config(size)))
    return subprocess.Popen([*_COMMAND, "pack", "--random", str(described), "--dtype", "bf16", "--blocks", str(blocks), str(path)])
