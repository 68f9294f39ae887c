"""Models of random weights in the shapes of Llama 2, packed for measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: The console command of this interpreter.
COMMAND = [sys.executable, "-c", "import sys; from lambdascale.cli.main import main; sys.exit(main())"]
_LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
# Llama 2's published shapes: hidden size, layers, heads, intermediate size. LARGE: those with 8 heads for keys and values.
SHAPES = {"7B": (4096, 32, 32, 11008), "13B": (5120, 40, 40, 13824)}
LARGE = {"70B": (8192, 80, 64, 28672)}


def config(model: str) -> dict[str, Any]:
    """Return the config.json of Llama 2 in a size of SHAPES or LARGE; of «70B/4», with a quarter of its layers."""
    size, _, parts = model.partition("/")
    hidden, layers, heads, intermediate = (SHAPES | LARGE)[size]
    kv_heads = 8 if size in LARGE else heads
    return _LLAMA2 | {
        "hidden_size": hidden,
        "num_hidden_layers": layers // int(parts or 1),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
    }


def packed(models: Sequence[str], folder: Path, blocks: int) -> dict[str, Path]:
    """Pack models as ``blocks`` under ``folder``, all at once; return their folders. Existing ones are kept.

    A model is what ``config`` takes or ``lambdascale pack --random`` has a name for.
    """
    found = {model: folder / f"{model.replace('/', '-of-')}-{blocks}" for model in models}
    packing = {model: _pack(model, path, blocks) for model, path in found.items() if not path.exists()}
    for model, process in packing.items():
        if process.wait():
            raise RuntimeError(f"packing {model} under {folder} failed: exit status {process.returncode}")
    return found


def _pack(model: str, path: Path, blocks: int) -> subprocess.Popen[bytes]:
    which = model
    if model.partition("/")[0] in SHAPES | LARGE:
        described = path.with_suffix(".json")
        described.write_text(json.dumps(config(model)))
        which = str(described)
    return subprocess.Popen([*COMMAND, "pack", "--random", which, "--dtype", "bf16", "--blocks", str(blocks), str(path)])
