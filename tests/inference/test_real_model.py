"""SmolLM2-135M, packed from its Python package: real weights, real text, token by token as transformers answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lambdascale.checkpoints import HfCheckpoint, PackedModel, pack
from lambdascale.checkpoints.synthetic import smollm2_file, write_smollm2
from lambdascale.control import BatchLimits
from lambdascale.core import UserError
from lambdascale.inference import BlockStore, Engine, StoreConfig, Ticket, TransformerStage

from .greedy import is_greedy

PROMPTS = [
    "The capital of France is",
    "Write a haiku about the sea.",
    "def fibonacci(n):",
    "Once upon a time, in a village at the foot of a mountain, there lived a clockmaker who",
    "1, 1, 2, 3, 5, 8,",
    "Explain in one sentence why the sky is blue.",
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        smollm2_file()
    except UserError as error:
        pytest.skip(str(error))
    directory = tmp_path_factory.mktemp("real") / "smollm2"
    directory.mkdir()
    write_smollm2(directory)
    return directory


@pytest.fixture(scope="module")
def weights_of_the_package() -> dict[str, Any]:
    """Tensors of the package's file by name, as gguf reads them."""
    gguf = pytest.importorskip("gguf", reason="needs gguf, the format of the real model")
    return {tensor.name: tensor for tensor in gguf.GGUFReader(str(smollm2_file())).tensors}


@pytest.mark.slow
def test_answers_of_a_packed_real_model(smollm2: Path, tmp_path: Path, reference: Callable[[Path], Any]) -> None:
    """Packed as float32, loaded by the block store, run as a pipeline of three stages."""
    transformers = pytest.importorskip("transformers", reason="needs transformers, the reference")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": PROMPTS[5]}]
    asked = [tokenizer(text)["input_ids"] for text in PROMPTS]
    asked.append(tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))["input_ids"])
    pack(smollm2, tmp_path / "packed", 6, "F32")
    model = PackedModel.open(tmp_path / "packed")
    arena = sum(-(-size // 4096) * 4096 for size in model.block_bytes)
    with BlockStore(StoreConfig(host_bytes=0, device_bytes=arena)) as store:
        store.add(model)
        store.load(model.name, range(6), keep_host=False).wait(60)
        with store.weights(model.name, range(6)) as blocks:
            stages = [TransformerStage(model.architecture, blocks[2 * i : 2 * i + 2], 4, 256) for i in range(3)]
            engine = Engine(stages, BatchLimits(max_batch=4, max_tokens=32))
            sent = [Ticket(index, list(prompt), len(prompt), 32) for index, prompt in enumerate(asked)]
            for ticket in sent:
                engine.add(ticket)
            while len(engine):
                engine.step()
    for ticket in sent:
        assert len(ticket.output) == 32
        assert is_greedy(reference(smollm2), ticket.tokens[: ticket.prompt_tokens], ticket.output), ticket.request_id
    assert "Paris" in tokenizer.decode(sent[0].output)


@pytest.mark.slow
def test_it_is_an_ordinary_checkpoint(smollm2: Path) -> None:
    checkpoint = HfCheckpoint(smollm2)
    assert (checkpoint.dtype, checkpoint.architecture.layers, checkpoint.architecture.tied) == ("BF16", 30, True)
    assert 260e6 < (smollm2 / "model.safetensors").stat().st_size < 280e6
    config = (smollm2 / "config.json").read_text()
    assert "quantization" not in config
    assert str(Path.home()) not in config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packed", "ordinary"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
        ("blk.5.attn_v.weight", "model.layers.5.self_attn.v_proj.weight"),
        ("blk.29.ffn_down.weight", "model.layers.29.mlp.down_proj.weight"),
    ],
)
def test_its_weights_are_those_of_the_package(
    smollm2: Path, weights_of_the_package: dict[str, Any], packed: str, ordinary: str
) -> None:
    """Dequantised by gguf itself, without transformers (which keeps them quantised in memory in its newer versions)."""
    gguf = pytest.importorskip("gguf", reason="needs gguf, the format of the real model")
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors as the reader")
    found = weights_of_the_package[packed]
    wanted = torch.tensor(gguf.dequantize(found.data, found.tensor_type))
    assert torch.equal(safetensors.load_file(smollm2 / "model.safetensors")[ordinary], wanted.to(torch.bfloat16))
