"""Loading through pinned memory, and the engine's tokens, on a CUDA device. Skipped where torch finds no GPU."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import xxhash

from lambdascale.checkpoints import PackedModel, pack
from lambdascale.checkpoints.synthetic import PRESETS, write_random
from lambdascale.control import BatchLimits
from lambdascale.inference import (
    BlockError,
    BlockStore,
    BlockWeights,
    Engine,
    Segment,
    StageBatch,
    StoreConfig,
    Ticket,
    TransformerStage,
    load_blocks,
    warm_up,
)
from lambdascale.inference.digest import block_digest, part_digests
from lambdascale.inference.forms import Form, usual_forms
from lambdascale.inference.sampling import GREEDY
from lambdascale.live import wire
from lambdascale.live.node.runners import TorchExecutor, TorchRunner
from lambdascale.transport import gpu_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")]
BLOCKS = 4
# Prints the state of GPU 0's primary context (1: it exists) after work on GPU 1, all of it in threads that set no device.
ONLY_GPU_1 = """
import ctypes, threading
from pathlib import Path
import torch
from lambdascale.checkpoints import PackedModel
from lambdascale.inference import BlockStore, Segment, StageBatch, StoreConfig, TransformerStage
from lambdascale.inference.digest import block_digest
torch.cuda.set_device(1)
model = PackedModel.open(Path("{directory}"))
size = sum(-(-size // 4096) * 4096 for size in model.block_bytes)
store = BlockStore(StoreConfig(host_bytes=size, device_bytes=size, device="cuda:1"))
store.add(model)
blocks = range(len(model.blocks))
store.load(model.name, blocks).wait(60)
def work():
    with store.using(model.name, blocks) as buffers, store.weights(model.name, blocks) as weights:
        assert block_digest(buffers[0]) == model.blocks[0].digest
        stage = TransformerStage(model.architecture, weights, 1, 64)
        stage.prepare()
        stage.run(StageBatch((Segment(0, 0, 1),), 1, (0,)), torch.tensor([1])).argmax().item()
thread = threading.Thread(target=work)
thread.start()
thread.join()
driver, device, flags, active = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
assert driver.cuDeviceGet(ctypes.byref(device), 0) == 0
assert driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)) == 0
print(active.value)
"""


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


def test_digests_of_what_is_on_the_device() -> None:
    """Digests of any size are the CPU's, even while the device computes something else."""
    data = torch.randint(0, 256, ((9 << 20) + 3,), dtype=torch.uint8, device="cuda:0")
    torch.cuda.synchronize()
    work = torch.ones(4096, 4096, device="cuda:0")
    for size in (0, 1, 4 << 20, (4 << 20) + 1, data.numel()):
        work = work @ work / 4096
        assert block_digest(data[:size]) == block_digest(data[:size].cpu())


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


def test_a_model_that_comes_back_has_its_recordings(model: PackedModel) -> None:
    """Evicted and loaded again, to the same memory, it answers alike with the graphs of before, and nothing is recorded."""
    with store_for(model) as store:
        executor, found, recorded = TorchExecutor(store, 256), [], []
        for _ in range(2):
            store.load(model.name, range(BLOCKS)).wait(60)
            runner = executor.runner(model.name, 0, BLOCKS - 1, 4)
            assert isinstance(runner, TorchRunner)
            runner._stage.prepare()
            tokens = [5, 9, 2]
            prompt = StageBatch((Segment(0, 0, 3),), 0, (2,))
            answers = runner.run(wire.Pass(prompt, 3, 3, 6, (GREEDY,), (3,)), tokens)
            for at in range(3, 8):
                assert isinstance(answers, list)
                decode = StageBatch((Segment(0, at, 1),), 1, (0,))
                tokens.append(answers[-1])
                answers = runner.run(wire.Pass(decode, 0, at, at, (GREEDY,), (at + 1,)), tokens[-1:])
            found.append(tokens)
            recorded.append(runner._stage.recordings)
            runner.close()
            assert store.evict(model.name, "gpu")
        assert found[0] == found[1]
        assert recorded[0] == recorded[1] > 0


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


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "graphs"])
def test_tokens_are_those_of_the_cpu(model: PackedModel, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, float32 without TF32, in a batch of six over two stages; by torch's operators, and by kernels and CUDA graphs."""
    monkeypatch.setattr("lambdascale.inference.stage.has_triton", lambda: kernels)
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
            for stage in stages:
                stage.prepare()
            assert answers(Engine(stages, limits)) == cpu
            assert [stage._replays is not None for stage in stages] == [kernels, kernels]


def test_a_replica_answers_while_its_kernels_are_compiled(model: PackedModel) -> None:
    """No step waits for them; the change-over within an answer changes no token."""
    prompt = list(range(40))
    limits = BatchLimits(max_batch=1, max_tokens=64)

    def answer(device: str) -> list[int]:
        blocks = [BlockWeights(block.layout, block.buffer.to(device)) for block in load_blocks(model)]
        engine, ticket = Engine([TransformerStage(model.architecture, blocks, 1, 512)], limits), Ticket(0, list(prompt), 40, 400)
        engine.add(ticket)
        while len(engine):
            engine.step()
        return ticket.output

    assert answer("cuda:0") == answer("cpu")


def test_tokens_of_prompts_beside_decodes_are_those_of_the_cpu(model: PackedModel) -> None:
    """Prompts of many lengths that come one by one while others decode: every iteration has a form, padded on the GPU."""
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in (1, 63, 64, 65, 130, 200, 7, 90)]
    limits = BatchLimits(max_batch=12, max_tokens=512)

    def answers(stage: TransformerStage) -> list[list[int]]:
        engine, tickets = Engine([stage], limits), [Ticket(index, list(p), len(p), 20) for index, p in enumerate(prompts)]
        for ticket in tickets:
            engine.add(ticket)
            engine.step()
        while len(engine):
            engine.step()
        return [ticket.output for ticket in tickets]

    blocks = load_blocks(model)
    cpu = answers(TransformerStage(model.architecture, blocks, 12, 256))
    moved = [BlockWeights(block.layout, block.buffer.to("cuda:0")) for block in blocks]
    stage = TransformerStage(model.architecture, moved, 12, 256)
    stage.prepare()
    assert answers(stage) == cpu, "prompts without a graph"
    while stage.record_next(lambda: False):
        pass
    assert answers(stage) == cpu, "prompts as graphs"
    assert stage._replays is not None
    assert {form.prompt for form in stage._replays._made} == {False, True}
    assert stage.recordings == len(stage._replays._made)


def test_a_recording_that_is_given_up_leaves_nothing_behind(model: PackedModel) -> None:
    """Between any two layers, of the computation or of the recording; afterwards the stage serves, and records, as before."""
    blocks = [BlockWeights(block.layout, block.buffer.to("cuda:0")) for block in load_blocks(model)]
    stage = TransformerStage(model.architecture, blocks, 2, 512)
    stage.prepare()
    before = stage.kv.both.clone()
    layers = model.architecture.layers
    for stop in range(1, 2 * layers + 1):
        asked = iter(range(1, 2 * layers + 1))
        assert stage.record_next(lambda asked=asked, stop=stop: next(asked) == stop)
        assert stage.recordings == 0
    batch, ids = StageBatch((Segment(0, 0, 40),), 0, (39,)), torch.arange(40)
    wanted = stage.run(batch, ids)
    assert stage.recordings == 0, "a prompt's form is not recorded at its first use"
    after = stage.kv.both.clone()
    while stage.record_next(lambda: False):
        pass
    forms = stage.recordings
    assert forms == len(list(usual_forms(2, 1024)))
    assert torch.equal(stage.kv.both, after)
    assert not before.any()
    torch.testing.assert_close(stage.run(batch, ids), wanted, rtol=0, atol=1e-4)
    assert stage.run(decode := StageBatch((Segment(0, 40, 1),), 1, (0,)), torch.tensor([3])).isfinite().all()
    assert stage.answer(decode, torch.tensor([3]), [GREEDY], [0]) == stage.run(decode, torch.tensor([3])).argmax(-1).tolist()
    assert stage.recordings == forms


def test_what_other_threads_do_breaks_no_recording(model: PackedModel) -> None:
    """A node's other threads warm up, load, verify and evict while its compute thread records."""
    blocks = [BlockWeights(block.layout, block.buffer.to("cuda:0")) for block in load_blocks(model)]
    ended, failed = threading.Event(), []

    def others(store: BlockStore) -> None:
        try:
            while not ended.is_set():
                warm_up(model, "cuda:0", kernels=True)
                store.load(model.name, range(BLOCKS)).wait(60)
                with store.using(model.name, [0]) as (buffer,):
                    block_digest(buffer)
                store.evict(model.name, "gpu")
        except Exception as error:
            failed.append(error)

    with store_for(model) as store:
        thread = threading.Thread(target=others, args=(store,))
        thread.start()
        try:
            for _ in range(5):
                stage = TransformerStage(model.architecture, blocks, 8, 512)
                stage.prepare()
                while stage.record_next(lambda: False):
                    pass
                assert stage.recordings == len(list(usual_forms(8, 1024)))
        finally:
            ended.set()
            thread.join()
    assert not failed


def test_a_dropped_stage_is_freed_at_once(model: PackedModel) -> None:
    """KV memory and recordings do not wait for garbage collection."""
    blocks = [BlockWeights(block.layout, block.buffer.to("cuda:0")) for block in load_blocks(model)]
    stage = TransformerStage(model.architecture, blocks, 4, 64)
    stage.prepare([Form(1), Form(4), Form(64, True, 8)])
    stage.run(StageBatch((Segment(0, 0, 1),), 1, (0,)), torch.tensor([1]))
    dropped = weakref.ref(stage)
    gc.disable()
    try:
        del stage
        assert dropped() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("size", [0, 5, 8, 4096, (4 << 20) - 8, (9 << 20) + 3])
def test_digests_are_those_of_the_cpu(size: int) -> None:
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda:0")
    assert part_digests(data).tolist() == part_digests(data.cpu()).tolist()
    assert part_digests(data, 64).tolist() == part_digests(data.cpu(), 64).tolist()
    assert block_digest(data) == block_digest(data.cpu())


def test_packed_models_have_the_digests_of_their_blocks(model: PackedModel) -> None:
    for block, weights in zip(model.blocks, load_blocks(model), strict=True):
        assert block_digest(weights.buffer.to("cuda:0")) == block.digest


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nothing_of_a_node_on_gpu_1_is_on_gpu_0(model: PackedModel) -> None:
    """Loads, checksums, digests and decode steps leave GPU 0 without a context: in a process of its own, which says so."""
    code = ONLY_GPU_1.format(directory=str(model.directory))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "0", done.stdout
