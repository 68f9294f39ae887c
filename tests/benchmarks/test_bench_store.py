"""Loading against the floor: a plain read of the same bytes into memory that is mapped and touched; and against safetensors.

Each test prints and records the percentage of the floor's rate: that of as many threads as the store has, which keep a small
machine's cores busy, and that of one thread. A load to a GPU has the same floor: copies go on while the next piece is read.
Cold means dropped from the page cache by posix_fadvise, which the kernel honours for clean pages only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from lambdascale.checkpoints import PackedModel, pack
from lambdascale.checkpoints.synthetic import PRESETS, write_random
from lambdascale.inference import BlockStore, StoreConfig
from lambdascale.inference.arena import touched_memory
from lambdascale.inference.verification import Verify

BLOCKS, ROUNDS = 8, 5
# About 1 GB in float32.
SIZE = PRESETS["small"] | {"hidden_size": 1152, "num_attention_heads": 18, "intermediate_size": 3072, "num_hidden_layers": 18}
CHUNK = 8 << 20
NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    root = tmp_path_factory.mktemp("store")
    (root / "source").mkdir()
    write_random(SIZE, root / "source", seed=1)
    pack(root / "source", root / "packed", BLOCKS)
    os.sync()
    return PackedModel.open(root / "packed")


def drop(model: PackedModel) -> None:
    for block in range(BLOCKS):
        descriptor = os.open(model.path(block), os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def plain_read(model: PackedModel, threads: int, direct: bool) -> Callable[[], object]:
    """The floor: nothing but preadv, in chunks, into a touched buffer."""
    total = sum(-(-size // 4096) * 4096 for size in model.block_bytes)
    memory = memoryview(touched_memory(total))

    def read() -> None:
        with ThreadPoolExecutor(threads) as pool:
            at, work, opened = 0, [], []
            for block, size in enumerate(model.block_bytes):
                descriptor = os.open(model.path(block), os.O_RDONLY | (os.O_DIRECT if direct else 0))
                opened.append(descriptor)
                offset = model.blocks[block].data_offset
                for begin in range(0, size, CHUNK):
                    piece = memory[at + begin : at + -(-min(begin + CHUNK, size) // 4096) * 4096]
                    work.append(pool.submit(os.preadv, descriptor, [piece], offset + begin))
                at += -(-size // 4096) * 4096
            for future in work:
                future.result()
            for descriptor in opened:
                os.close(descriptor)

    return read


def seconds(work: Callable[[], object], before: Callable[[], object]) -> float:
    before()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@pytest.mark.parametrize("verify", ["full", "off"])
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_load(benchmark: BenchmarkFixture, model: PackedModel, device: str, cold: bool, direct: bool, verify: Verify) -> None:
    total = sum(model.block_bytes)
    arena = sum(-(-size // 4096) * 4096 for size in model.block_bytes)
    config = StoreConfig(
        host_bytes=arena if device == "cuda" else 0,
        device_bytes=arena,
        device=device,
        direct="always" if direct else "never",
        verify=verify,
        chunk_bytes=CHUNK,
        readers=4,
    )
    with BlockStore(config) as store:
        store.add(model)

        def before() -> None:
            store.evict(model.name, "gpu")
            if cold:
                drop(model)

        def load() -> None:
            store.load(model.name, range(BLOCKS), keep_host=False).wait()

        contenders = [load, plain_read(model, config.readers, direct), plain_read(model, 1, direct)]
        times = [[seconds(work, before) for work in contenders] for _ in range(ROUNDS + 1)][1:]
        mine, floor, single = (median(column) for column in zip(*times, strict=True))
        benchmark.extra_info["percent_of_floor"] = round(100 * floor / mine)
        benchmark.extra_info["percent_of_one_thread"] = round(100 * single / mine)
        benchmark.extra_info["bytes_per_s"] = round(total / mine)
        print(
            f"\n{benchmark.name}: {total / mine / 1e9:.2f} GB/s, {100 * floor / mine:.0f} % of the floor "
            f"({total / floor / 1e9:.2f}), {100 * single / mine:.0f} % of one thread's read ({total / single / 1e9:.2f})"
        )
        benchmark.pedantic(load, setup=before, rounds=2)


def test_safetensors_cold(benchmark: BenchmarkFixture, model: PackedModel) -> None:
    """The usual loader, for comparison, with every page touched."""
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors as the reader")

    def load() -> None:
        for block in range(BLOCKS):
            for tensor in safetensors.load_file(model.path(block)).values():
                tensor.view(torch.uint8).flatten()[::4096].sum()

    times = [seconds(load, lambda: drop(model)) for _ in range(ROUNDS)]
    print(f"\n{benchmark.name}: {sum(model.block_bytes) / median(times) / 1e9:.2f} GB/s")
    benchmark.pedantic(load, setup=lambda: drop(model), rounds=2)
