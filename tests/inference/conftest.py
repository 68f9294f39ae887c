"""Small models and transformers' answers to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lambdascale.checkpoints.synthetic import PRESETS, write_random

Answer = Callable[[Path, Sequence[Sequence[int]], int], list[list[int]]]

TINY = dict(PRESETS["tiny"])
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# What distinguishes the architectures, on the tiny model.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": TINY,
    "llama_tied": TINY | {"tie_word_embeddings": True},
    "llama_biased": TINY | {"attention_bias": True, "mlp_bias": True},
    "llama_head_dim": TINY | {"head_dim": 24},
    "llama3": TINY | {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
    "mistral": TINY | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 17},
    "qwen2": TINY | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_window": TINY
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 13,
        "max_window_layers": 3,
    },
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a variant, written at its first use."""
    root = tmp_path_factory.mktemp("models")

    def directory(name: str) -> Path:
        path = root / name
        if not path.exists():
            path.mkdir()
            write_random(VARIANTS[name], path, seed=7)
        return path

    return directory


@pytest.fixture(scope="session")
def reference() -> Callable[[Path], Any]:
    """transformers' model of a directory, in float32."""
    transformers = pytest.importorskip("transformers", reason="needs transformers, the reference")
    loaded: dict[Path, Any] = {}

    def load(directory: Path) -> Any:
        if directory not in loaded:
            transformers.utils.logging.disable_progress_bar()
            kind = transformers.AutoModelForCausalLM
            model = kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
            model.generation_config.eos_token_id = None  # answers of a fixed length
            loaded[directory] = model
        return loaded[directory]

    return load


@pytest.fixture(scope="session")
def answers(reference: Callable[[Path], Any]) -> Answer:
    """transformers' greedy continuation of each prompt, one at a time."""

    @cache
    def one(directory: Path, prompt: tuple[int, ...], tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        done = reference(directory).generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        found: list[int] = done[0, len(prompt) :].tolist()
        return found

    return lambda directory, prompts, tokens: [one(directory, tuple(prompt), tokens) for prompt in prompts]
