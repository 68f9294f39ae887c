"""Packing: any safetensors checkpoint into one shard per block. Streams, so memory stays at a few chunks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec

from lambdascale.checkpoints.checksums import Checksums
from lambdascale.checkpoints.documents import read_document
from lambdascale.checkpoints.layout import EMBEDDING, HEAD, BlockLayout, TensorSlot, block_layouts
from lambdascale.checkpoints.packed import FORMAT, MANIFEST, Manifest, PackedBlock
from lambdascale.checkpoints.safetensors_file import ALIGNMENT, FLOATING, TensorInfo, header_bytes
from lambdascale.checkpoints.source import INDEX, HfCheckpoint
from lambdascale.core import UserError
from lambdascale.core.checks import require

_CHUNK_BYTES = 16 << 20
# Blocks written at a time: hashing takes a core each, and a disk likes few writers.
_MOST_THREADS = 4
# Several to a read of the block store, and few enough that a 70B model's manifest stays below 1 MB.
PART_BYTES = 4 << 20
# What a model directory has besides weights and is worth keeping.
_COMPANIONS = ("*.json", "*.model", "*.jinja", "additional_chat_templates/*.jinja", "*.txt", "*.tiktoken")
_NOT_COPIED = (INDEX, MANIFEST)

Advance = Callable[[int], None]


def pack(
    source: Path,
    target: Path,
    blocks: int,
    dtype: str | None = None,
    advance: Advance = lambda written: None,
    *,
    part_bytes: int = PART_BYTES,
) -> None:
    """Write the checkpoint in ``source`` as ``target``, cut into ``blocks`` blocks of element type ``dtype`` (None: as it is).

    ``advance`` is told the bytes of each piece written, from several threads. ``target`` appears when it is complete; UserError
    if it exists, if the disk is full, or for anything wrong with the source. ``part_bytes``, whole pages: the size of what gets
    checksums of its own.
    """
    require(part_bytes > 0 and part_bytes % ALIGNMENT == 0, f"part_bytes must be a multiple of {ALIGNMENT}, not {part_bytes}")
    checkpoint = HfCheckpoint(source)
    dtype = dtype or checkpoint.dtype
    layouts = block_layouts(checkpoint.architecture, dtype, blocks, source.name)
    for slot in (slot for layout in layouts for slot in layout.slots):
        _origin(checkpoint, slot, dtype)
    with new_directory(target) as temporary:
        with ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:
            pending = [
                pool.submit(_write_block, checkpoint, layout, temporary, len(layouts), Checksums(part_bytes), advance)
                for layout in layouts
            ]
            try:
                written = [block.result() for block in pending]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        _write_index(temporary, layouts, written)
        _copy_companions(source, temporary, dtype)
        manifest = Manifest(FORMAT, dtype, source.resolve().name, part_bytes, tuple(written))
        (temporary / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside ``target`` that is renamed to it if the block succeeds, and removed if not."""
    if target.exists():
        raise UserError(f"{target} exists already; remove it or choose another name")
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        temporary.rename(target)
    except OSError as error:
        raise UserError(f"{target} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_block(
    checkpoint: HfCheckpoint, layout: BlockLayout, directory: Path, count: int, checksums: Checksums, advance: Advance
) -> PackedBlock:
    name = f"model-{layout.index + 1:05d}-of-{count:05d}.safetensors"
    entries = {s.name: (layout.dtype, s.shape, s.offset, s.offset + s.size_bytes) for s in layout.slots}
    head = header_bytes(entries)
    with (directory / name).open("wb") as file:
        file.write(head)
        for piece in block_pieces(checkpoint, layout):
            checksums.update(piece)
            file.write(piece)
            advance(len(piece))
        file.flush()
        os.fsync(file.fileno())
    first, last = layout.first_layer, layout.last_layer
    return PackedBlock(name, len(head), layout.size_bytes, checksums.whole, first, last, checksums.parts, checksums.digests)


def block_pieces(checkpoint: HfCheckpoint, layout: BlockLayout) -> Iterator[bytes]:
    """The bytes of a block, a chunk at a time, gathered from wherever the checkpoint has them."""
    for slot in layout.slots:
        yield from _pieces(checkpoint, slot, layout.dtype)


def _pieces(checkpoint: HfCheckpoint, slot: TensorSlot, dtype: str) -> Iterator[bytes]:
    """The bytes of a tensor in the wanted type, a chunk at a time."""
    path, info = _origin(checkpoint, slot, dtype)
    with path.open("rb") as file:
        file.seek(info.begin)
        left = info.size_bytes
        while left:
            piece = file.read(min(_CHUNK_BYTES, left))
            if not piece:
                raise UserError(f"{path} ends within tensor {slot.name}")
            left -= len(piece)
            yield piece if info.dtype == dtype else _converted(piece, info.dtype, dtype)


def _origin(checkpoint: HfCheckpoint, slot: TensorSlot, dtype: str) -> tuple[Path, TensorInfo]:
    """File and place of the tensor that fills ``slot``; UserError unless its shape and type allow that."""
    name = EMBEDDING if slot.name == HEAD and checkpoint.architecture.tied else slot.name
    path, info = checkpoint.find(name)
    if info.shape != slot.shape:
        raise UserError(f"{path}: tensor {name} has shape {info.shape}, its config says {slot.shape}")
    if info.dtype not in FLOATING:
        raise UserError(f"{path}: tensor {name} has type {info.dtype}, which cannot be converted to {dtype}")
    return path, info


def _converted(piece: bytes, old: str, new: str) -> bytes:
    # torch takes seconds to import; most packing does without.
    from lambdascale.checkpoints.convert import convert

    return convert(piece, old, new)


def _write_index(directory: Path, layouts: tuple[BlockLayout, ...], written: list[PackedBlock]) -> None:
    weight_map = {slot.name: block.file for layout, block in zip(layouts, written, strict=True) for slot in layout.slots}
    total = sum(block.size_bytes for block in written)
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1) + "\n")


def _copy_companions(source: Path, target: Path, dtype: str) -> None:
    for pattern in _COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.name not in _NOT_COPIED:
                copy = target / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
    config = read_document(target / "config.json")
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
