"""On a CUDA device: loading through pinned memory, and the engine's tokens. Skipped where torch finds no GPU."""

from __future__ import annotations

import pytest
import torch
import xxhash

from lambdascale.checkpoints import PackedModel, pack
from lambdascale.checkpoints.synthetic import PRESETS, write_random
from lambdascale.control import BatchLimits
from lambdascale.inference import BlockError, BlockStore, Engine, StoreConfig, Ticket, TransformerStage, load_blocks
from lambdascale.inference.read_back import ReadBack
from lambdascale.transport import gpu_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")]
BLOCKS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    root = tmp_path_factory.mktemp("cuda")
    (root / "source").mkdir()
    write_random(PRESETS["small"], root / "source", seed=3)
    pack(root / "source", root / "packed", BLOCKS)
    return PackedModel.open(root / "packed")


def store_for(model: PackedModel) -> BlockStore:
    arena = sum(-(-size // 4096) * 4096 for size in model.block_bytes)
    store = BlockStore(StoreConfig(host_bytes=arena, device_bytes=arena, device="cuda"))
    store.add(model)
    return store


def test_checksums_of_what_is_on_the_device() -> None:
    """Pieces of any size, also while the device computes something else."""
    read_back = ReadBack(torch.device("cuda:0"))
    data = torch.randint(0, 256, ((9 << 20) + 3,), dtype=torch.uint8, device="cuda:0")
    torch.cuda.synchronize()
    work = torch.ones(4096, 4096, device="cuda:0")
    for size in (0, 1, 4 << 20, (4 << 20) + 1, data.numel()):
        work = work @ work / 4096
        assert read_back.xxh3_64(data[:size]) == xxhash.xxh3_64_hexdigest(data[:size].cpu().numpy().tobytes())


def test_blocks_that_others_write_into_the_device_arena(model: PackedModel) -> None:
    """Verified there; a damaged one does not count, and what landed can be used, copied to the host and evicted."""
    arena = sum(-(-size // 4096) * 4096 for size in model.block_bytes)
    memory = gpu_of(0).allocate(arena)
    landing = torch.as_tensor(memory, device="cuda:0")
    config = StoreConfig(host_bytes=arena, device_bytes=arena, device="cuda:0", land_on_device=True)
    with BlockStore(config, landing) as store:
        store.add(model)
        assert store.landing_tier == "gpu"
        reception = store.expect(model.name, range(BLOCKS))
        offsets = reception.offsets
        for block, offset in offsets.items():
            with model.path(block).open("rb") as file:
                file.seek(model.blocks[block].data_offset)
                memory[offset : offset + model.block_bytes[block]].fill(file.read(model.block_bytes[block]))
        landing[offsets[2] + 5] += 1
        torch.cuda.synchronize()
        with pytest.raises(BlockError, match="block 2"):
            reception.arrived(2)
        landing[offsets[2] + 5] -= 1
        torch.cuda.synchronize()
        for block in range(BLOCKS):
            reception.arrived(block)
        assert store.mirror(model.name) == sum(model.block_bytes)
        store.evict(model.name, "gpu")
        assert store.resident(model.name, "host") == frozenset(range(BLOCKS))
        assert store.free_bytes("gpu") == arena
    del landing
    gpu_of(0).free(memory)


@pytest.mark.parametrize("keep_host", [True, False])
def test_blocks_arrive_whole(model: PackedModel, keep_host: bool) -> None:
    with store_for(model) as store:
        assert store._tiers["host"].arena.pinned
        for _ in range(2):
            store.load(model.name, range(BLOCKS), keep_host=keep_host).wait(60)
            for block in range(BLOCKS):
                with store.using(model.name, [block]) as (buffer,):
                    assert xxhash.xxh3_64_hexdigest(buffer.cpu().numpy().tobytes()) == model.blocks[block].xxh3_64
            assert len(store.resident(model.name, "host")) == (BLOCKS if keep_host else 0)
            store.evict(model.name, "gpu")


def test_tokens_are_those_of_the_cpu(model: PackedModel) -> None:
    """Greedy, float32 without TF32, in a batch of six over two stages."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in (1, 5, 17, 40, 64, 99)]

    def answers(engine: Engine) -> list[list[int]]:
        tickets = [Ticket(index, list(prompt), len(prompt), 48) for index, prompt in enumerate(prompts)]
        for ticket in tickets:
            engine.add(ticket)
        while len(engine):
            engine.step()
        return [ticket.output for ticket in tickets]

    limits = BatchLimits(max_batch=6, max_tokens=64)
    cpu = answers(Engine([TransformerStage(model.architecture, load_blocks(model), 6, 256)], limits))
    with store_for(model) as store:
        store.load(model.name, range(BLOCKS)).wait(60)
        with store.weights(model.name, range(BLOCKS)) as weights:
            stages = [TransformerStage(model.architecture, part, 6, 256) for part in (weights[:2], weights[2:])]
            assert answers(Engine(stages, limits)) == cpu
