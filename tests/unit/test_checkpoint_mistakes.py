"""Checkpoints that somebody damaged, mixed up or made to deceive: one line of explanation, and nothing packed."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lambdascale.checkpoints import HfCheckpoint, PackedModel, load_architecture, pack
from lambdascale.checkpoints.safetensors_file import read_header
from lambdascale.checkpoints.source import INDEX, SINGLE
from lambdascale.checkpoints.synthetic import PRESETS, write_random
from lambdascale.cli.main import main
from lambdascale.core import UserError
from lambdascale.live.serving.text import Text

DEEP = "[" * 100_000 + "]" * 100_000
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    directory.mkdir()
    write_random(PRESETS["tiny"], directory, seed=5, dtype="BF16")
    return directory


def tensors_of(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of every tensor of a model in one file."""
    data = (directory / SINGLE).read_bytes()
    found, _ = read_header(directory / SINGLE)
    return {name: (info.dtype, list(info.shape), data[info.begin : info.end]) for name, info in found.items()}


def write_shard(path: Path, tensors: Mapping[str, tuple[str, list[int], bytes]]) -> None:
    entries: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    write_raw(path, json.dumps(entries), b"".join(data for _, _, data in tensors.values()))


def write_raw(path: Path, header: str, data: bytes) -> None:
    text = header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def sharded(tiny: Path, tmp_path: Path) -> Path:
    """The model in two files with an index; the second also holds a stale copy of a tensor of the first."""
    directory = tmp_path / "sharded"
    directory.mkdir()
    for path in tiny.glob("*.json"):
        (directory / path.name).write_bytes(path.read_bytes())
    tensors = tensors_of(tiny)
    names = list(tensors)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    dtype, shape, data = tensors[first[0]]
    write_shard(directory / "one.safetensors", {name: tensors[name] for name in first})
    write_shard(directory / "two.safetensors", {first[0]: (dtype, shape, bytes(len(data)))} | {n: tensors[n] for n in second})
    weight_map = dict.fromkeys(first, "one.safetensors") | dict.fromkeys(second, "two.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def reindex(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((directory / INDEX).read_text())
    change(document["weight_map"])
    (directory / INDEX).write_text(json.dumps(document))


class TestIndex:
    def test_the_weight_map_decides_which_copy_counts(self, tiny: Path, sharded: Path, tmp_path: Path) -> None:
        pack(sharded, tmp_path / "p", 3)
        pack(tiny, tmp_path / "q", 3)
        one, two = (PackedModel.open(tmp_path / name) for name in "pq")
        assert [block.xxh3_64 for block in one.blocks] == [block.xxh3_64 for block in two.blocks]

    def test_two_copies_that_the_weight_map_does_not_name(self, sharded: Path) -> None:
        reindex(sharded, lambda weight_map: weight_map.pop("model.embed_tokens.weight"))
        with pytest.raises(UserError, match=r"embed_tokens\.weight is in .*one.* and in .*two.*does not say which"):
            HfCheckpoint(sharded)

    def test_a_tensor_that_is_not_where_the_weight_map_says(self, sharded: Path) -> None:
        reindex(sharded, lambda weight_map: weight_map.update({NORM: "one.safetensors"}))
        with pytest.raises(UserError, match=r"one\.safetensors holds tensor model\.norm\.weight, which it lacks"):
            HfCheckpoint(sharded)

    @pytest.mark.parametrize(
        "name", ["../tiny/x", "/etc/passwd", "..", "", "sub/two.safetensors", "a\\b", "a\0b", None, 7, ["x"]]
    )
    def test_a_file_outside_its_folder(self, sharded: Path, name: object) -> None:
        reindex(sharded, lambda weight_map: weight_map.update({NORM: name}))
        with pytest.raises(UserError, match="must be a plain name of a file"):
            HfCheckpoint(sharded)

    def test_links_are_followed_as_caches_need(self, sharded: Path, tmp_path: Path) -> None:
        (sharded / "two.safetensors").rename(tmp_path / "blob")
        (sharded / "two.safetensors").symlink_to(tmp_path / "blob")
        assert HfCheckpoint(sharded).find(NORM)[0] == sharded / "two.safetensors"

    def test_an_index_and_a_single_file(self, tiny: Path, sharded: Path) -> None:
        (sharded / SINGLE).write_bytes((tiny / SINGLE).read_bytes())
        with pytest.raises(UserError, match="has both"):
            HfCheckpoint(sharded)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (DEEP, "nested too deeply"),
            ('{"weight_map": ' + DEEP + "}", "nested too deeply"),
            ("{", "cannot read"),
            ("[]", "list instead of a JSON object"),
            ("{}", "names no tensors"),
            ('{"weight_map": []}', "names no tensors"),
            ('{"weight_map": {"a": "x", "a": "y"}}', "the key 'a' stands twice"),
        ],
    )
    def test_what_is_no_index(self, sharded: Path, content: str, reason: str) -> None:
        (sharded / INDEX).write_text(content)
        with pytest.raises(UserError, match=reason) as caught:
            HfCheckpoint(sharded)
        assert len(str(caught.value)) < 500


class TestHeader:
    A = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'

    @pytest.mark.parametrize(
        ("header", "reason"),
        [
            (f"{{{A}, {A}}}", "the key 'a' stands twice"),
            (f'{{{A}, "b": {{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}}}', "tensor 'b' overlaps tensor 'a'"),
            (f'{{{A}, "b": {{"dtype": "U8", "shape": [2], "data_offsets": [6, 8]}}}}', "'b' leaves a gap after tensor 'a'"),
            ('{"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "'b' leaves a gap after the header"),
            ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}', "begin at 8 and end at 0"),
            ('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', r"shape \[3\] does not have 8 bytes"),
            ('{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}', "damaged"),
            ('{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}', "damaged"),
            ('{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "damaged"),
            ('{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}', "damaged"),
            ('{"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}', "damaged"),
            ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": "08"}}', "damaged"),
            ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9223372036854775808]}}', "damaged"),
            ('{"a": null}', "damaged"),
            (f'{{"a": {DEEP}}}', "nested too deeply"),
        ],
    )
    def test_what_the_format_forbids(self, tmp_path: Path, header: str, reason: str) -> None:
        write_raw(tmp_path / "x.safetensors", header, bytes(8))
        with pytest.raises(UserError, match=reason) as caught:
            read_header(tmp_path / "x.safetensors")
        assert len(str(caught.value)) < 500

    def test_a_length_beyond_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 1000) + b"{}")
        with pytest.raises(UserError, match="truncated"):
            read_header(tmp_path / "x.safetensors")

    def test_a_tensor_without_elements_is_allowed(self, tmp_path: Path) -> None:
        header = '{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "b": {"dtype": "U8", "shape": [8], '
        write_raw(tmp_path / "x.safetensors", header + '"data_offsets": [0, 8]}}', bytes(8))
        assert [info.size_bytes for info in read_header(tmp_path / "x.safetensors")[0].values()] == [0, 8]


class TestQuantised:
    @pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
    def test_by_a_file_beside_it(self, sharded: Path, name: str) -> None:
        (sharded / name).write_text("{}")
        with pytest.raises(UserError, match=f"quantised checkpoint .{name}"):
            HfCheckpoint(sharded)

    @pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.qweight", "model.layers.0.mlp.up_proj.weight_scale"])
    def test_by_the_name_of_a_tensor(self, tiny: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
        write_shard(tmp_path / SINGLE, {name: ("I32", [1], bytes(4))})
        with pytest.raises(UserError, match=f"quantised checkpoint .{name}"):
            HfCheckpoint(tmp_path)

    def test_by_the_type_of_a_tensor(self, tiny: Path, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
        tensors = tensors_of(tiny)
        name = next(name for name in tensors if name.endswith("up_proj.weight"))
        shape = tensors[name][1]
        write_shard(tmp_path / SINGLE, tensors | {name: ("F8_E4M3", shape, bytes(shape[0] * shape[1]))})
        with pytest.raises(UserError, match=r"up_proj\.weight has type F8_E4M3, which cannot be converted"):
            pack(tmp_path, tmp_path / "p", 2)
        assert not (tmp_path / "p").exists()

    @pytest.mark.parametrize("kind", ["F8_E4M3", "\x1b[2J"])
    def test_by_the_type_of_the_whole(self, tiny: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
        """The embedding's type is not ours; the command asks for sizes before it packs."""
        (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
        tensors = tensors_of(tiny)
        name = "model.embed_tokens.weight"
        shape = tensors[name][1]
        write_shard(tmp_path / SINGLE, tensors | {name: (kind, shape, bytes(shape[0] * shape[1]))})
        assert main(["pack", str(tmp_path), str(tmp_path / "p"), "--blocks", "2"]) == 2
        complaint = capsys.readouterr().err
        assert "does not compute with weights of type" in complaint
        assert complaint.removesuffix("\n").isprintable()


class TestDescriptions:
    """Files of a packed model, as ``serve`` and live runs read them."""

    @pytest.fixture
    def packed(self, tiny: Path, tmp_path: Path) -> Path:
        pack(tiny, tmp_path / "packed", 3)
        return tmp_path / "packed"

    @pytest.mark.parametrize("content", [DEEP, '{"format": 2, "dtype": ' + DEEP + "}", '{"format": 1e400}', "\udcff"])
    def test_blocks_json(self, packed: Path, content: str) -> None:
        (packed / "blocks.json").write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=r"blocks\.json cannot be read"):
            PackedModel.open(packed)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"file": "../packed/model-00001-of-00003.safetensors"}, "plain name"),
            ({"file": "/etc/passwd"}, "plain name"),
            ({"xxh3_64": "zz"}, "hexadecimal"),
            ({"digests": ["0x1"]}, "hexadecimal"),
            ({"data_offset": -4096}, "no whole page"),
            ({"data_offset": 100}, "no whole page"),
        ],
    )
    def test_a_block(self, packed: Path, change: dict[str, Any], reason: str) -> None:
        document = json.loads((packed / "blocks.json").read_text())
        document["blocks"][0] |= change
        (packed / "blocks.json").write_text(json.dumps(document))
        with pytest.raises(UserError, match=reason):
            PackedModel.open(packed)

    @pytest.mark.parametrize("content", [DEEP, '{"rope_scaling": ' + DEEP + "}", '{"vocab_size": NaN}', "", "null", "\udcff"])
    def test_config_json(self, packed: Path, content: str) -> None:
        (packed / "config.json").write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=r"cannot read .*config\.json"):
            load_architecture(packed)

    @pytest.mark.parametrize("content", ["", "{}", DEEP, '{"model": {"type": "BPE", "vocab": 3}}', "\udcff"])
    def test_tokenizer_json(self, packed: Path, content: str) -> None:
        (packed / "tokenizer.json").write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
            Text(packed)

    @pytest.mark.parametrize("content", ["", "[]", DEEP, '{"eos_token": "\\uD800"}', '{"eos_token": "\ud800"}'])
    def test_tokenizer_config_json(self, packed: Path, content: str) -> None:
        (packed / "tokenizer_config.json").write_bytes(content.encode(errors="surrogatepass"))
        with pytest.raises(UserError, match=r"cannot read .*tokenizer_config\.json"):
            Text(packed)


def test_the_command_ends_with_one_line(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sharded / "config.json").write_text(DEEP)
    assert main(["pack", str(sharded), str(tmp_path / "p")]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: cannot read")
    assert complaint.count("\n") == 1
