"""Packing: the same model afterwards, in blocks to be read directly into memory; no incomplete output after a failure."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from lambdascale.checkpoints import HfCheckpoint, PackedModel, block_layouts, pack, parse_architecture
from lambdascale.checkpoints.checksums import Checksums
from lambdascale.checkpoints.safetensors_file import ALIGNMENT, read_header
from lambdascale.checkpoints.synthetic import PRESETS, write_random
from lambdascale.cli.main import main
from lambdascale.core import UserError
from lambdascale.multicast.elbow import elbow, multicast_s

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    directory.mkdir()
    write_random(TINY | {"tie_word_embeddings": True}, directory, seed=5)
    return directory


class TestPacked:
    @pytest.mark.parametrize("blocks", [1, 3, 8])
    def test_a_block_is_its_bytes_in_memory(self, tiny: Path, tmp_path: Path, blocks: int) -> None:
        pack(tiny, tmp_path / "p", blocks)
        model = PackedModel.open(tmp_path / "p")
        assert len(model.blocks) == blocks
        for block, layout in zip(model.blocks, model.layouts, strict=True):
            data = (tmp_path / "p" / block.file).read_bytes()
            assert block.data_offset % ALIGNMENT == 0
            assert xxhash.xxh3_64_hexdigest(data[block.data_offset :]) == block.xxh3_64
            for slot in layout.slots:
                name = "model.embed_tokens.weight" if slot.name == "lm_head.weight" else slot.name
                file, info = HfCheckpoint(tiny).find(name)
                begin = block.data_offset + slot.offset
                assert data[begin : begin + slot.size_bytes] == file.read_bytes()[info.begin : info.end]

    def test_every_part_has_its_checksum(self, tiny: Path, tmp_path: Path) -> None:
        pack(tiny, tmp_path / "p", 3, part_bytes=5 * ALIGNMENT)
        model = PackedModel.open(tmp_path / "p")
        assert model.part_bytes == 5 * ALIGNMENT
        for block in model.blocks:
            data = (tmp_path / "p" / block.file).read_bytes()[block.data_offset :]
            parts = [data[at : at + model.part_bytes] for at in range(0, len(data), model.part_bytes)]
            assert [xxhash.xxh3_64_hexdigest(part) for part in parts] == list(block.parts)

    @given(st.binary(max_size=60), st.integers(1, 9), st.lists(st.integers(0, 60), max_size=6))
    def test_checksums_do_not_depend_on_how_the_bytes_come(self, data: bytes, part: int, cuts: list[int]) -> None:
        checksums = Checksums(part)
        bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        for begin, end in pairwise(bounds):
            checksums.update(data[begin:end])
        assert checksums.whole == xxhash.xxh3_64_hexdigest(data)
        assert list(checksums.parts) == [xxhash.xxh3_64_hexdigest(data[at : at + part]) for at in range(0, len(data), part)]

    @pytest.mark.parametrize("tied", [False, True])
    def test_transformers_loads_it(self, tmp_path: Path, tied: bool) -> None:
        transformers = pytest.importorskip("transformers", reason="needs transformers, the reference")
        (tmp_path / "m").mkdir()
        write_random(TINY | {"tie_word_embeddings": tied}, tmp_path / "m", seed=1)
        pack(tmp_path / "m", tmp_path / "p", 4)
        ids = torch.tensor([[1, 2, 3, 200]])
        kind = transformers.AutoModelForCausalLM
        one, two = (kind.from_pretrained(tmp_path / name)(ids).logits for name in ("m", "p"))
        assert torch.equal(one, two)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "p")
        assert tokenizer.decode(tokenizer("naïve 日本")["input_ids"]) == "naïve 日本"

    def test_other_tools_read_the_shards(self, tiny: Path, tmp_path: Path) -> None:
        safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors as the reader")
        pack(tiny, tmp_path / "p", 4)
        index = json.loads((tmp_path / "p" / "model.safetensors.index.json").read_text())
        for name, file in index["weight_map"].items():
            assert name in safetensors.load_file(tmp_path / "p" / file)

    def test_bf16_is_rounded_to_nearest(self, tiny: Path, tmp_path: Path) -> None:
        safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors as the reader")
        pack(tiny, tmp_path / "p", 2, "BF16")
        before = safetensors.load_file(tiny / "model.safetensors")
        for path in (tmp_path / "p").glob("*.safetensors"):
            for name, tensor in safetensors.load_file(path).items():
                assert torch.equal(tensor, before.get(name, before["model.embed_tokens.weight"]).bfloat16())
        assert json.loads((tmp_path / "p" / "config.json").read_text())["dtype"] == "bfloat16"

    def test_packing_a_packed_model_again(self, tiny: Path, tmp_path: Path) -> None:
        pack(tiny, tmp_path / "p", 2)
        pack(tmp_path / "p", tmp_path / "q", 5)
        pack(tiny, tmp_path / "r", 5)
        q, r = PackedModel.open(tmp_path / "q"), PackedModel.open(tmp_path / "r")
        assert [block.xxh3_64 for block in q.blocks] == [block.xxh3_64 for block in r.blocks]

    def test_sizes_are_what_the_control_plane_reckons_with(self, tiny: Path, tmp_path: Path) -> None:
        pack(tiny, tmp_path / "p", 4)
        model = PackedModel.open(tmp_path / "p")
        planned = [block.size_bytes for block in model.spec.partition(4)]
        assert model.block_bytes == pytest.approx(planned, rel=0.01)


class TestNothingHalfMade:
    def broken(self, tiny: Path, tmp_path: Path) -> Path:
        """A copy of a model without its last tensor."""
        copy = tmp_path / "m"
        copy.mkdir()
        (copy / "config.json").write_text((tiny / "config.json").read_text())
        data = (tiny / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(data.replace(b"model.norm.weight", b"model.morn.weight"))
        return copy

    def test_a_missing_tensor(self, tiny: Path, tmp_path: Path) -> None:
        source = self.broken(tiny, tmp_path)
        with pytest.raises(UserError, match=r"lacks the tensor model\.norm\.weight"):
            pack(source, tmp_path / "p", 2)
        assert [path.name for path in tmp_path.iterdir()] == ["m"]

    def test_a_full_disk(self, tiny: Path, tmp_path: Path) -> None:
        """A limit on file sizes simulates a full disk: the write fails in the middle of a shard."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
            with pytest.raises(UserError, match="could not be written"):
                pack(tiny, tmp_path / "p", 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert not list(tmp_path.iterdir())

    def test_killed(self, tiny: Path, tmp_path: Path) -> None:
        code = (
            "import os, signal, sys\n"
            "from pathlib import Path\n"
            "from lambdascale.checkpoints import pack\n"
            "pack(Path(sys.argv[1]), Path(sys.argv[2]), 4, None, lambda n: os.kill(os.getpid(), signal.SIGKILL))\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tiny), str(tmp_path / "p")], timeout=60, check=False)
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / "p").exists()

    @pytest.mark.parametrize("change", [-1, 1])
    def test_a_source_of_the_wrong_length(self, tiny: Path, tmp_path: Path, change: int) -> None:
        source = tmp_path / "m"
        source.mkdir()
        (source / "config.json").write_text((tiny / "config.json").read_text())
        data = (tiny / "model.safetensors").read_bytes()
        (source / "model.safetensors").write_bytes(data[:-1] if change < 0 else data + b"x")
        with pytest.raises(UserError, match="truncated" if change < 0 else "damaged"):
            pack(source, tmp_path / "p", 2)


class TestOpening:
    def test_what_is_no_packed_model(self, tiny: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="make one with: lambdascale pack"):
            PackedModel.open(tiny)
        with pytest.raises(UserError, match="not a packed model"):
            PackedModel.open(tmp_path)

    def test_a_truncated_shard_is_noticed_without_reading_it(self, tiny: Path, tmp_path: Path) -> None:
        pack(tiny, tmp_path / "p", 4)
        path = PackedModel.open(tmp_path / "p").path(2)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(UserError, match=r"block 2: .*truncated"):
            PackedModel.open(tmp_path / "p")

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"format": 1}, "has format 1; this version reads 2: pack the model again"),
            ({"part_bytes": ALIGNMENT}, "block 0 .* does not fit config.json"),
            ({"part_bytes": 0}, "block 0 .* does not fit config.json"),
            ({"part_bytes": 5}, "block 0 .* does not fit config.json"),
            ({"dtype": "I8"}, "block 0 .* does not fit config.json"),
            ({"blocks": []}, "do not cover the 8 layers"),
            ({"blocks": None}, "cannot be read"),
        ],
    )
    def test_a_manifest_that_does_not_fit(self, tiny: Path, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
        pack(tiny, tmp_path / "p", 2)
        path = tmp_path / "p" / "blocks.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(UserError, match=reason):
            PackedModel.open(tmp_path / "p")

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 20, b"\x08\0\0\0\0\0\0\0[1,2,3] "])
    def test_what_is_no_safetensors_file(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.safetensors"):
            read_header(tmp_path / "x.safetensors")


class TestArchitectures:
    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            ({"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM is not supported; choose from LlamaForCausalLM"),
            ({}, "none given"),
            (TINY | {"hidden_act": "gelu"}, "gelu"),
            (TINY | {"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
            ({key: value for key, value in TINY.items() if key != "hidden_size"}, "hidden_size"),
            ([1, 2], "does not hold a model's configuration"),
            (TINY | {"num_hidden_layers": "many"}, "num_hidden_layers must be a whole number .*, not 'many'"),
            (TINY | {"num_attention_heads": 0}, "num_attention_heads must be .*, not 0"),
            (TINY | {"num_key_value_heads": 3}, "4 heads cannot share 3 KV heads"),
            (TINY | {"num_attention_heads": 64, "num_key_value_heads": 64}, "even number"),
            (TINY | {"head_dim": 15}, "heads have 15 elements"),
            (TINY | {"hidden_size": 66}, "66 is not a multiple of the 4 heads"),
            (TINY | {"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window must be .*, not 0"),
            (TINY | {"architectures": "LlamaForCausalLMs"}, "LlamaForCausalLMs is not supported"),
            (TINY | {"architectures": [["LlamaForCausalLM"]]}, "is not supported"),
            (TINY | {"tie_word_embeddings": "false"}, "true or false, not 'false'"),
            (TINY | {"partial_rotary_factor": 0.5}, "partial rotary factor 0.5"),
            (TINY | {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "the same for all layers"),
            (TINY | {"rope_theta": 0}, "rope_theta must be a positive number, not 0"),
            (TINY | {"quantization_config": {"quant_method": "gptq"}}, r"quantised checkpoint \(gptq\)"),
        ],
    )
    def test_unknown_ones_are_refused(self, config: dict[str, Any], reason: str) -> None:
        with pytest.raises(UserError, match=reason):
            parse_architecture(config)

    @pytest.mark.parametrize(
        ("config", "windows"),
        [
            ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, (4096, 4096, 4096)),
            ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (None, None, None)),
            ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 131072, "use_sliding_window": False}, (None, None, None)),
            ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32768}, (None, None, None)),
            (
                {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1},
                (None, 9, 9),
            ),
            ({"sliding_window": 4096}, (None, None, None)),
        ],
    )
    def test_windows_as_published_configs_mean_them(self, config: dict[str, Any], windows: tuple[int | None, ...]) -> None:
        assert parse_architecture(TINY | {"num_hidden_layers": 3} | config).windows == windows

    @given(layers=st.integers(1, 40), data=st.data())
    def test_blocks_are_even_to_a_layer(self, layers: int, data: st.DataObject) -> None:
        architecture = parse_architecture(TINY | {"num_hidden_layers": layers, "vocab_size": data.draw(st.integers(1, 20_000))})
        blocks = data.draw(st.integers(1, layers))
        layouts = block_layouts(architecture, "BF16", blocks)
        covered = [layer for layout in layouts for layer in range(layout.first_layer, layout.last_layer + 1)]
        assert covered == list(range(layers))
        layer = max(layout.size_bytes for layout in block_layouts(architecture, "BF16", 1)) // layers
        sizes = [layout.size_bytes for layout in layouts]
        several = [size for size, layout in zip(sizes, layouts, strict=True) if layout.last_layer > layout.first_layer]
        # If a block of several layers were larger than the smallest by more than a layer, one layer could move there.
        assert max(several, default=0) - min(sizes) <= layer + 1000 or blocks == 1


class TestElbow:
    @given(st.integers(10**6, 10**11), st.integers(2, 64), st.floats(0, 0.01))
    def test_within_a_tenth_of_the_best_and_no_more_blocks_than_that_takes(self, size: int, nodes: int, overhead: float) -> None:
        choices = range(1, 65)
        times = {b: multicast_s(size, b, nodes, 4e10, overhead) for b in choices}
        chosen = elbow(size, choices, nodes, 4e10, overhead)
        assert times[chosen] <= 1.1 * min(times.values())
        assert all(times[b] > 1.1 * min(times.values()) for b in choices if b < chosen)


class TestCommand:
    def test_random(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for name in ("a", "b"):
            assert (
                main(["pack", "--random", "tiny", str(tmp_path / name), "--seed", "4", "--blocks", "4", "--dtype", "bf16"]) == 0
            )
        assert "4 blocks of BF16" in capsys.readouterr().out
        a, b = (PackedModel.open(tmp_path / name) for name in ("a", "b"))
        assert [block.xxh3_64 for block in a.blocks] == [block.xxh3_64 for block in b.blocks]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]

    @pytest.mark.parametrize(
        ("arguments", "about"),
        [
            (["nowhere", "OUT"], "nowhere is not a directory"),
            (["OUT"], "either SRC or --random"),
            (["--random", "huge", "OUT"], "huge is neither"),
            (["--random", "tiny", "OUT", "--blocks", "9"], "1 to 8 blocks, not 9"),
            (["--random", "tiny", "OUT", "--blocks", "few"], "number or auto"),
            (["--random", "tiny", "OUT", "--nodes", "1"], "--nodes must be at least 2"),
            (["--random", "tiny", "OUT", "--profile", "moon"], "moon"),
            (["--random", "tiny", "."], "already exists"),
        ],
    )
    def test_mistakes(self, arguments: list[str], about: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["pack", *(argument.replace("OUT", str(tmp_path / "out")) for argument in arguments)]) == 2
        complaint = capsys.readouterr().err
        assert about in complaint
        assert complaint.count("\n") == 1
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pack", "smollm2", "DST", "--seed", "1"], "--seed is for --random"),
        (["pack", "--random", "tiny", "DST", "--blocks", "4", "--nodes", "3"], "are for --blocks auto, not --blocks 4"),
        (["pack", "--random", "tiny", "DST", "--blocks", "4", "--profile", "testbed2"], "are for --blocks auto, not --blocks 4"),
        (["multicast", "--model", "PACKED", "--blocks", "8"], "--blocks is for built-in models"),
        (["serve", "--model", "PACKED", "--blocks", "8", "--no-view"], "--blocks is for built-in models"),
        (["serve", "--model", "PACKED", "--dtype", "fp16", "--no-view"], "--dtype is for built-in models"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    assert main(["pack", "--random", "tiny", str(packed), "--blocks", "4"]) == 0
    places = {"DST": str(tmp_path / "dst"), "PACKED": str(packed)}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()
