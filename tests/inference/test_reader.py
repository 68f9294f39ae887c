"""Files in the page cache are read from there, others past it; shared memory is populated whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lambdascale.inference import reader
from lambdascale.inference.reader import ChunkReader, cached
from lambdascale.transport import shm

PAGE = 4096


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "block"
    path.write_bytes(bytes(256 * PAGE))
    return path


def test_a_file_just_written_is_cached(file: Path) -> None:
    assert cached(file)


@pytest.mark.parametrize(("missing", "answer"), [(0.0, True), (0.05, True), (0.5, False), (1.0, False)])
def test_a_file_counts_as_cached_if_little_is_missing(
    missing: float, answer: bool, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_in_memory", lambda descriptor, offset: offset >= missing * 256 * PAGE)
    assert cached(file) == answer


def test_a_kernel_that_cannot_say(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> bool:
        raise OSError(95, "not supported")

    monkeypatch.setattr(reader, "_in_memory", refuse)
    assert not cached(file)


@pytest.mark.parametrize("in_cache", [True, False])
def test_auto_reads_cached_files_through_the_cache(in_cache: bool, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "cached", lambda path: in_cache)
    chunks = ChunkReader(1, PAGE, "auto")
    try:
        direct = _can_read_past_the_cache(file)
        with chunks.open(file):
            assert chunks.used_direct == (direct and not in_cache)
    finally:
        chunks.close()


def _can_read_past_the_cache(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("size", [1, PAGE, 10 * PAGE + 5, 1000 * PAGE])
def test_every_page_of_shared_memory_is_there(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads populate it, none of which has a round share."""
    monkeypatch.setattr(shm, "_LEAST_BYTES", 3 * PAGE)
    monkeypatch.setattr(shm, "_threads", lambda: 7)
    descriptor = os.memfd_create("test")
    try:
        os.ftruncate(descriptor, size)
        memory = shm._mapped(descriptor, size)
        assert os.fstat(descriptor).st_blocks * 512 == -(-size // PAGE) * PAGE
        memory.close()
    finally:
        os.close(descriptor)
