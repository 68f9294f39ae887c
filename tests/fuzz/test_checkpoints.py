"""Every value of a checkpoint's files with values of other types and sizes, and damaged bytes: packed and the same, or one line.

``LAMBDASCALE_FUZZ=5000`` draws more; see docs/contributing.md.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from math import inf, nan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdascale.checkpoints import HfCheckpoint, PackedModel
from lambdascale.checkpoints.packing import block_pieces
from lambdascale.checkpoints.source import INDEX, SINGLE
from lambdascale.checkpoints.synthetic import PRESETS, write_random
from lambdascale.cli.main import main
from lambdascale.live.serving.text import Text
from tests.fuzz.outcome import ends_well

EXAMPLES = os.environ.get("LAMBDASCALE_FUZZ", "60")
SETTINGS = settings(max_examples=int(EXAMPLES) if EXAMPLES.isdigit() else 3000, deadline=None)
CONFIG = PRESETS["tiny"] | {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 8,
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 1,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 16, 0.5, -0.5, 1e300, nan, inf, -inf, 2**63, 10**30, 10**9),
    *("", "x", "F32", "F8_E4M3", "../x", "/etc/passwd", "model.safetensors", "x" * 3000),
    *("ü\n\u2028", "\x1b[2J\u202e\x00", "\ud800"),
    *([], [1], [0, 4], [4, 0], [None], [[]], {}, {"x": 1}, {"quant_method": "gptq"}),
)
FILES = ("config.json", INDEX, "tokenizer.json", "tokenizer_config.json", "blocks.json")


@pytest.fixture(scope="module")
def whole() -> Iterator[Path]:
    """A packed model, which is also a checkpoint in two files with an index."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "source").mkdir()
        write_random(CONFIG, folder / "source", seed=1, dtype="BF16")
        assert (
            ends_well(lambda: main(["pack", str(folder / "source"), str(folder / "packed"), "--blocks", "2"]), "the model") == 0
        )
        yield folder / "packed"


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value of a document; of a long mapping or list, to the first ones and the last."""
    yield path
    entries = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
    for key, value in entries if len(entries) < 60 else [*entries[:3], entries[-1]]:
        yield from places(value, (*path, key))


def put(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of ``document`` with another value at ``path``."""
    if not path:
        return value
    changed = copy.copy(document)
    changed[path[0]] = put(document[path[0]], path[1:], value)
    return changed


def read(folder: Path) -> int:
    """Read a packed model as ``serve`` does before it starts nodes."""
    assert PackedModel.open(folder).spec.size_bytes > 0
    Text(folder).encode("a")
    return 0


def pack(folder: Path) -> int:
    """Pack with the command; the packed tensors are those of the source."""
    target = folder.with_name("again")
    status = main(["pack", str(folder), str(target), "--blocks", "1"])
    if status == 0:
        source, packed = HfCheckpoint(folder), PackedModel.open(target)
        data = packed.path(0).read_bytes()[packed.blocks[0].data_offset :]
        assert b"".join(block_pieces(source, packed.layouts[0])) == data
    return status


def changed(whole: Path, name: str, change: Callable[[bytes], bytes], what: object) -> int:
    """Use a copy of the model with one file changed; return the exit status."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        shutil.copytree(whole, folder)
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        return max(ends_well(lambda: pack(folder), what), ends_well(lambda: read(folder), what))


def test_the_model_as_it_is(whole: Path) -> None:
    assert changed(whole, "config.json", bytes, "as it is") == 0


@SETTINGS
@given(data=st.data())
def test_a_changed_value(whole: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    document = json.loads((whole / name).read_text())
    path = data.draw(st.sampled_from(list(places(document))))
    value = data.draw(st.sampled_from(VALUES) | st.integers(-3, 300))
    text = json.dumps(put(document, path, value))
    changed(whole, name, lambda before: text.encode(), f"{name} {path} {value!r:.100}")


@SETTINGS
@given(data=st.data())
def test_a_changed_header(whole: Path, data: st.DataObject) -> None:
    name = sorted(path.name for path in whole.glob("*.safetensors"))[0]
    before = (whole / name).read_bytes()
    (length,) = struct.unpack("<Q", before[:8])
    document = json.loads(before[8 : 8 + length])
    path = data.draw(st.sampled_from(list(places(document))))
    value = data.draw(st.sampled_from(VALUES) | st.integers(-3, 5000))
    text = json.dumps(put(document, path, value)).encode()
    # Keep the length where possible, so that the shard has the size that blocks.json states.
    text = text.ljust(length)
    after = struct.pack("<Q", len(text)) + text + before[8 + length :]
    changed(whole, name, lambda _: after, f"header {path} {value!r:.100}")


@SETTINGS
@given(data=st.data())
def test_damaged_bytes(whole: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(path.name for path in whole.iterdir())))
    before = (whole / name).read_bytes()
    at = data.draw(st.integers(0, min(len(before), 5000) - 1))
    kind = data.draw(st.sampled_from(("cut", "flip", "insert", "deep")))
    piece = data.draw(st.binary(min_size=1, max_size=9))
    after = {
        "cut": before[:at],
        "flip": before[:at] + piece + before[at + len(piece) :],
        "insert": before[:at] + piece + before[at:],
        "deep": before[:at] + b"[" * 20_000 + before[at:],
    }[kind]
    changed(whole, name, lambda _: after, f"{name} {kind} at {at} {piece!r}")


def test_the_single_file_is_read_too(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole.parent / "source", tmp_path / "model")
    assert (tmp_path / "model" / SINGLE).is_file()
    assert pack(tmp_path / "model") == 0
