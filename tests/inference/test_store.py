"""The block store: what lands is right, what fails leaves no trace, what is in use stays."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lambdascale.checkpoints import PackedModel, pack
from lambdascale.checkpoints.synthetic import PRESETS, write_random
from lambdascale.core import CapacityError, UserError
from lambdascale.inference import BlockError, BlockInUseError, BlockStore, StoreConfig
from lambdascale.inference.arena import Arena, Extents
from lambdascale.inference.reception import BlockState
from lambdascale.inference.verification import is_verified

BLOCKS = 8
PAGE = 4096
PART = 4 * PAGE


def packed(root: Path, name: str, seed: int) -> PackedModel:
    source = root / f"{name}-source"
    source.mkdir()
    write_random(PRESETS["tiny"], source, seed)
    pack(source, root / name, BLOCKS, part_bytes=PART)
    return PackedModel.open(root / name)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PackedModel]:
    root = tmp_path_factory.mktemp("packed")
    return {name: packed(root, name, seed) for seed, name in enumerate("ab")}


def pages(model: PackedModel) -> int:
    return sum(-(-size // PAGE) * PAGE for size in model.block_bytes)


@pytest.fixture
def make(two: dict[str, PackedModel]) -> Iterator[Callable[..., BlockStore]]:
    """A store that knows both models; the arenas hold ``host`` and ``gpu`` models."""
    with ExitStack() as stack:

        def build(host: float = 2, gpu: float = 2, **changes: object) -> BlockStore:
            size = pages(two["a"])
            sizes = {"host_bytes": int(host * size), "device_bytes": int(gpu * size), "chunk_bytes": 64 * 1024}
            config = StoreConfig(**sizes | changes)
            store = stack.enter_context(BlockStore(config))
            for model in two.values():
                store.add(model)
            return store

        yield build


def right(store: BlockStore, name: str, tier: str) -> bool:
    """Return True if every resident block of the model has the bytes its manifest says."""
    model = store.model(name)
    for block in store.resident(name, tier):
        with store.using(name, [block], tier) as (buffer,):
            if xxhash.xxh3_64_hexdigest(buffer.numpy().tobytes()) != model.blocks[block].xxh3_64:
                return False
    return True


class TestLoading:
    @pytest.mark.parametrize("direct", ["auto", "never"])
    @pytest.mark.parametrize("keep_host", [True, False])
    def test_blocks_land_in_order_and_are_right(self, make: Callable[..., BlockStore], direct: str, keep_host: bool) -> None:
        store, order = make(direct=direct), [3, 0, 7, 1, 2, 6, 5, 4]
        landed: list[int] = []
        load = store.load("a", order, keep_host=keep_host, on_block=lambda _, block: landed.append(block))
        load.wait(30)
        assert landed == load.landed == order
        assert right(store, "a", "gpu")
        assert store.resident("a", "host") == (frozenset(range(BLOCKS)) if keep_host else frozenset())
        assert right(store, "a", "host")

    def test_a_block_is_usable_while_others_are_coming(self, make: Callable[..., BlockStore]) -> None:
        store, seen = make(), []

        def check(name: str, block: int) -> None:
            with store.weights(name, [block]) as (weights,):
                seen.append(bool(torch.isfinite(weights.layers[0].qkv).all()))

        store.load("a", range(BLOCKS), on_block=check).wait(30)
        assert seen == [True] * BLOCKS

    def test_from_host_memory_without_the_disk(self, make: Callable[..., BlockStore], monkeypatch: pytest.MonkeyPatch) -> None:
        store = make()
        store.load("a", range(BLOCKS), to="host").wait(30)
        monkeypatch.setattr(store.reader, "open", lambda path: pytest.fail("the disk is read"))
        store.load("a", range(BLOCKS)).wait(30)
        assert right(store, "a", "gpu")

    def test_what_is_there_lands_at_once(self, make: Callable[..., BlockStore]) -> None:
        store = make()
        store.load("a", [0, 1]).wait(30)
        again = store.load("a", [0, 1, 2])
        again.wait(30)
        assert again.landed == [0, 1, 2]

    def test_views_are_not_copies(self, make: Callable[..., BlockStore]) -> None:
        store = make()
        store.load("a", [2]).wait(30)
        with store.using("a", [2]) as (buffer,), store.weights("a", [2]) as (weights,):
            begin, end = buffer.data_ptr(), buffer.data_ptr() + buffer.numel()
            assert all(begin <= layer.gate_up.data_ptr() < end for layer in weights.layers)

    def test_two_models_at_the_same_time(self, make: Callable[..., BlockStore]) -> None:
        store = make()
        loads = [store.load(name, range(BLOCKS)) for name in "ab"]
        for load in loads:
            load.wait(30)
        assert all(right(store, name, tier) for name in "ab" for tier in ("host", "gpu"))

    def test_whoever_waits_hears_of_a_fault_in_on_block(self, make: Callable[..., BlockStore]) -> None:
        def faulty(name: str, block: int) -> None:
            raise ZeroDivisionError("mine")

        store = make()
        with pytest.raises(ZeroDivisionError):
            store.load("a", range(BLOCKS), on_block=faulty).wait(30)
        store.load("a", range(BLOCKS)).wait(30)
        assert right(store, "a", "gpu")

    def test_cancelled(self, make: Callable[..., BlockStore]) -> None:
        store, go = make(), threading.Event()
        load = store.load("a", range(BLOCKS), on_block=lambda *_: go.wait(10))
        load.cancel()
        go.set()
        load.wait(30)
        assert len(load.landed) < BLOCKS
        assert store.resident("a", "gpu") == set(load.landed)
        store.load("a", range(BLOCKS)).wait(30)
        assert right(store, "a", "gpu")


class TestRefusals:
    def test_an_arena_that_does_not_fit_the_machine(self) -> None:
        with pytest.raises(CapacityError, match="does not fit"):
            BlockStore(StoreConfig(host_bytes="900TB", device_bytes=0))

    def test_no_room_begins_nothing(self, make: Callable[..., BlockStore]) -> None:
        store = make(gpu=0.5)
        free = store.free_bytes("gpu"), store.free_bytes("host")
        with pytest.raises(CapacityError, match="no room for block"):
            store.load("a", range(BLOCKS))
        assert (store.free_bytes("gpu"), store.free_bytes("host")) == free

    def test_unknown_model_or_block(self, make: Callable[..., BlockStore]) -> None:
        store = make()
        with pytest.raises(UserError, match="does not know the model c"):
            store.load("c", [0])
        with pytest.raises(UserError, match=r"has blocks 0 to 7, not \[8\]"):
            store.load("a", [8])

    def test_two_models_with_one_name(self, make: Callable[..., BlockStore], two: dict[str, PackedModel]) -> None:
        with pytest.raises(UserError, match="two models are called a"):
            make().add(PackedModel.open(two["b"].directory, name="a"))

    def test_the_same_blocks_twice_at_a_time(self, make: Callable[..., BlockStore]) -> None:
        store, go = make(), threading.Event()
        load = store.load("a", range(BLOCKS), on_block=lambda *_: go.wait(10))
        with pytest.raises(UserError, match="is being loaded already"):
            store.load("a", [BLOCKS - 1])
        go.set()
        load.wait(30)

    def test_a_block_in_use_is_not_evicted(self, make: Callable[..., BlockStore]) -> None:
        store = make()
        store.load("a", range(BLOCKS)).wait(30)
        with store.using("a", [5]), pytest.raises(BlockInUseError, match="block 5 of a"):
            store.evict("a", "gpu")
        assert store.resident("a", "gpu") == frozenset(range(BLOCKS)), "all or nothing"
        assert store.evict("a", "gpu") == pages(store.model("a"))

    def test_the_source_of_a_load_is_not_evicted(self, make: Callable[..., BlockStore]) -> None:
        store, go = make(), threading.Event()
        store.load("a", range(BLOCKS), to="host").wait(30)
        load = store.load("a", range(BLOCKS), on_block=lambda *_: go.wait(10))
        with pytest.raises(BlockInUseError):
            store.evict("a", "host")
        go.set()
        load.wait(30)
        assert store.evict("a", "host") > 0


class TestDamage:
    """Something is wrong with one shard: the error names it, what came before stays, and the store goes on."""

    @pytest.fixture
    def damaged(self, tmp_path: Path) -> PackedModel:
        return packed(tmp_path, "c", 9)

    def check(self, store: BlockStore, model: PackedModel, reason: str) -> None:
        store.add(model)
        free = store.free_bytes("gpu")
        load = store.load("c", range(BLOCKS))
        with pytest.raises(BlockError, match=reason) as failure:
            load.wait(30)
        assert (failure.value.block, failure.value.file) == (3, model.path(3))
        assert str(model.path(3)) in str(failure.value)
        assert load.landed == [0, 1, 2]
        assert store.resident("c", "gpu") == store.resident("c", "host") == {0, 1, 2}
        assert right(store, "c", "gpu")
        store.evict("c", "gpu")
        assert store.free_bytes("gpu") == free, "nothing is lost"
        store.load("a", range(BLOCKS)).wait(30)
        assert right(store, "a", "gpu")

    def test_a_flipped_bit(self, make: Callable[..., BlockStore], damaged: PackedModel) -> None:
        with damaged.path(3).open("r+b") as file:
            file.seek(damaged.blocks[3].data_offset + 5 * PART)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        self.check(make(host=3), damaged, f"is damaged: checksum of bytes {5 * PART} to {6 * PART - 1} is")

    @pytest.mark.parametrize("chunk", [PAGE, PART + PAGE, 3 * PART, 100 * PART])
    def test_a_flipped_last_bit_with_chunks_of_any_length(
        self, make: Callable[..., BlockStore], damaged: PackedModel, chunk: int
    ) -> None:
        with damaged.path(3).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 128]))
        size = damaged.block_bytes[3]
        self.check(make(host=3, chunk_bytes=chunk), damaged, f"checksum of bytes {size // PART * PART} to {size - 1} is")

    def test_a_truncated_shard(self, make: Callable[..., BlockStore], damaged: PackedModel) -> None:
        os.truncate(damaged.path(3), damaged.path(3).stat().st_size - 5000)
        self.check(make(host=3), damaged, "ends .* bytes too early")

    def test_a_missing_shard(self, make: Callable[..., BlockStore], damaged: PackedModel) -> None:
        damaged.path(3).unlink()
        self.check(make(host=3), damaged, "cannot be opened: No such file")

    def test_an_unreadable_disk(
        self, make: Callable[..., BlockStore], damaged: PackedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An input/output error in the middle, as a failing disk gives it."""
        preadv, bad = os.preadv, damaged.path(3).stat().st_ino

        def failing(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            if os.fstat(descriptor).st_ino == bad and offset > PAGE:
                raise OSError(5, "Input/output error")
            return preadv(descriptor, buffers, offset, flags)

        monkeypatch.setattr(os, "preadv", failing)
        self.check(make(host=3), damaged, "Input/output error")

    def test_without_verification_a_flipped_bit_goes_unnoticed(
        self, make: Callable[..., BlockStore], damaged: PackedModel
    ) -> None:
        with damaged.path(3).open("r+b") as file:
            file.seek(damaged.blocks[3].data_offset)
            file.write(b"\xff")
        store = make(host=3, verify="off")
        store.add(damaged)
        store.load("c", range(BLOCKS)).wait(30)
        assert not right(store, "c", "gpu")


def write(store: BlockStore, name: str, blocks: list[int]) -> None:
    """Put the right bytes where the store expects them, as another node would."""
    model = store.model(name)
    for block in blocks:
        with model.path(block).open("rb") as file:
            file.seek(model.blocks[block].data_offset)
            file.readinto(store.landing(name, block).numpy().data)


@pytest.fixture(params=[True, False], ids=["lands on the device", "lands in host memory"])
def landing(request: pytest.FixtureRequest, make: Callable[..., BlockStore]) -> BlockStore:
    return make(land_on_device=request.param)


class TestReception:
    def test_from_expected_to_usable(self, landing: BlockStore) -> None:
        """On the device, right, and with no memory left reserved."""
        reception = landing.expect("a", [3, 1])
        assert list(reception.offsets) == [3, 1]
        assert reception.resident == ()
        write(landing, "a", [3, 1])
        for block in (3, 1):
            assert reception.state(block) is BlockState.EXPECTED
            assert not landing.holds("a", block, landing.landing_tier)
            reception.arrived(block)
            assert reception.state(block) is BlockState.USABLE
        assert landing.resident("a", "gpu") == {1, 3}
        assert right(landing, "a", "gpu")
        assert not landing.awaited("a", 3)
        landing.evict("a", "gpu")

    def test_a_damaged_block_is_still_expected(self, landing: BlockStore) -> None:
        reception = landing.expect("a", [2])
        write(landing, "a", [2])
        landing.landing("a", 2)[5] ^= 1
        with pytest.raises(BlockError, match=r"block 2 of a .* arrived with checksum"):
            reception.arrived(2)
        assert reception.state(2) is BlockState.EXPECTED
        assert not landing.resident("a", "gpu")
        landing.landing("a", 2)[5] ^= 1
        reception.arrived(2)
        assert landing.resident("a", "gpu") == {2}

    def test_a_hash_of_the_transport_is_taken(self, landing: BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(landing, "block_hash", lambda data: pytest.fail("it has been computed"))
        reception = landing.expect("a", [2])
        with pytest.raises(BlockError, match="checksum 0000000000000007"):
            reception.arrived(2, 7)
        write(landing, "a", [2])
        reception.arrived(2, int(landing.model("a").blocks[2].xxh3_64, 16))

    @pytest.mark.parametrize("tier", ["host", "gpu"])
    def test_resident_blocks_need_no_write(self, landing: BlockStore, tier: str) -> None:
        landing.load("a", [4, 6], to=tier, keep_host=False).wait(30)
        reception = landing.expect("a", [5, 4, 6])
        there = () if (tier, landing.landing_tier) == ("host", "gpu") else (4, 6)
        assert reception.resident == there
        write(landing, "a", list(reception.offsets))
        for block in (5, 4, 6):
            reception.arrived(block)
        assert landing.resident("a", "gpu") == {4, 5, 6}
        assert right(landing, "a", "gpu")

    def test_what_is_waiting_for_the_device_is_not_evicted(self, make: Callable[..., BlockStore]) -> None:
        store = make(land_on_device=False)
        store.load("a", [4], to="host").wait(30)
        reception = store.expect("a", [4])
        assert reception.state(4) is BlockState.PRESENT
        with pytest.raises(BlockInUseError):
            store.evict("a", "host")
        reception.close()
        assert store.evict("a", "host") > 0

    def test_memory_is_kept_until_the_last_reception_gives_it_up(self, landing: BlockStore) -> None:
        """One place for both: either's sender writes the same bytes there."""
        free = landing.free_bytes(landing.landing_tier)
        one, two = landing.expect("a", [1, 2]), landing.expect("a", [2, 3])
        assert one.offsets[2] == two.offsets[2]
        one.close()
        assert [landing.awaited("a", block) for block in (1, 2, 3)] == [False, True, True]
        write(landing, "a", [2])
        two.arrived(2)
        two.close()
        assert landing.evict("a", landing.landing_tier) > 0
        assert landing.free_bytes(landing.landing_tier) == free

    def test_a_block_that_others_may_write_is_not_evicted(self, landing: BlockStore) -> None:
        """It has arrived by one transfer, and the sender of another is writing it still."""
        one, two = landing.expect("a", [2]), landing.expect("a", [2])
        write(landing, "a", [2])
        one.arrived(2)
        with pytest.raises(BlockInUseError):
            landing.evict("a", landing.landing_tier)
        two.give_up([2])
        assert landing.evict("a", landing.landing_tier) > 0

    def test_no_room(self, make: Callable[..., BlockStore]) -> None:
        """Nothing is reserved; and on the device, the block stays where it landed."""
        store = make(gpu=0, host=1, land_on_device=False)
        free = store.free_bytes("host")
        store.load("b", [0], to="host").wait(30)
        with pytest.raises(CapacityError):
            store.expect("a", range(BLOCKS))
        assert not any(store.awaited("a", block) for block in range(BLOCKS))
        reception = store.expect("a", [1])
        write(store, "a", [1])
        with pytest.raises(CapacityError, match="in gpu memory"):
            reception.arrived(1)
        assert reception.state(1) is BlockState.PRESENT
        reception.close()
        store.evict("a", "host"), store.evict("b", "host")
        assert store.free_bytes("host") == free

    def test_blocks_that_are_being_loaded(self, landing: BlockStore) -> None:
        go = threading.Event()
        load = landing.load("a", [0, 1, 2], on_block=lambda *_: go.wait(10))
        with pytest.raises(UserError, match="is being loaded already"):
            landing.expect("a", [2])
        with pytest.raises(BlockInUseError):
            landing.evict("a", "gpu")
        go.set()
        load.wait(30)


@pytest.mark.parametrize(("verify", "blocks"), [("off", []), ("sampled", [0, 8, 16, 19]), ("full", list(range(20)))])
def test_whose_checksums_are_compared(verify: Any, blocks: list[int]) -> None:
    assert [block for block in range(20) if is_verified(verify, block, 20)] == blocks


def test_sampled_loads_and_arrivals(make: Callable[..., BlockStore], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same blocks when they are read and when they arrive: of eight, the first and the last."""
    store, hashed = make(verify="sampled", land_on_device=True), []
    read, read_parts = store.reader.read, []
    monkeypatch.setattr(store.reader, "read", lambda *a: read_parts.append(a[-1]) or read(*a))
    store.load("a", range(BLOCKS), keep_host=False).wait(30)
    assert [parts is not None for parts in read_parts] == [True, *[False] * 6, True]
    monkeypatch.setattr(store, "block_hash", lambda data: hashed.append(data.numel()) or 0)
    reception = store.expect("b", range(BLOCKS))
    for block in range(BLOCKS):
        with suppress(BlockError):
            reception.arrived(block)
    assert len(hashed) == 2
    assert store.resident("b", "gpu") == set(range(1, 7))


def test_a_mirror_of_what_is_there(make: Callable[..., BlockStore]) -> None:
    """Only what is missing is copied; without room, nothing is."""
    store = make(host=1)
    store.load("a", [1, 2], keep_host=False).wait(30)
    store.load("a", [3]).wait(30)
    assert store.mirror("a") == sum(store.model("a").block_bytes[block] for block in (1, 2))
    assert store.resident("a", "host") == {1, 2, 3}
    assert right(store, "a", "host")
    free = store.free_bytes("host")
    store.load("b", range(BLOCKS), keep_host=False).wait(30)
    with pytest.raises(CapacityError):
        store.mirror("b")
    assert store.free_bytes("host") == free
    assert store.evict("b", "gpu") > 0, "nothing is held"


class StoreMachine(RuleBasedStateMachine):
    """Loads, uses, evictions and failures in any order against a model of what must be resident."""

    models: dict[str, PackedModel]

    def __init__(self) -> None:
        super().__init__()
        size = pages(self.models["a"])
        config = StoreConfig(host_bytes=int(1.5 * size), device_bytes=int(1.3 * size), chunk_bytes=64 * 1024, readers=2)
        self.store = BlockStore(config)
        for model in self.models.values():
            self.store.add(model)
        self.there: dict[str, set[tuple[str, int]]] = {"host": set(), "gpu": set()}
        self.using: list[tuple[ExitStack, str, tuple[str, int]]] = []
        self.start = {tier: self.store.free_bytes(tier) for tier in ("host", "gpu")}

    def teardown(self) -> None:
        for stack, _, _ in self.using:
            stack.close()
        self.store.close()

    @rule(
        name=st.sampled_from("ab"),
        blocks=st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=BLOCKS, unique=True),
        to=st.sampled_from(["host", "gpu"]),
        keep_host=st.booleans(),
        fails_at=st.none() | st.integers(0, BLOCKS - 1),
    )
    def load(self, name: str, blocks: list[int], to: str, keep_host: bool, fails_at: int | None) -> None:
        failed = None
        with pytest.MonkeyPatch.context() as patch:
            if fails_at is not None:
                self.break_block(patch, name, fails_at)
            try:
                load = self.store.load(name, blocks, to=to, keep_host=keep_host)
            except CapacityError:
                return
            try:
                load.wait(30)
                landed = blocks
            except BlockError as error:
                landed = blocks[: blocks.index(error.block)]
                failed = error.block
        assert load.landed == landed
        assert failed in (None, fails_at)
        for key in [(name, block) for block in landed]:
            new = key not in self.there[to]
            self.there[to].add(key)
            if to == "gpu" and keep_host and new:
                self.there["host"].add(key)

    @staticmethod
    def break_block(patch: pytest.MonkeyPatch, name: str, block: int) -> None:
        preadv, bad = os.preadv, StoreMachine.models[name].path(block).stat().st_ino

        def failing(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            if os.fstat(descriptor).st_ino == bad:
                raise OSError(5, "Input/output error")
            return preadv(descriptor, buffers, offset, flags)

        patch.setattr(os, "preadv", failing)

    @precondition(lambda self: any(self.there.values()))
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        tier = data.draw(st.sampled_from([tier for tier in ("host", "gpu") if self.there[tier]]))
        key = data.draw(st.sampled_from(sorted(self.there[tier])))
        stack = ExitStack()
        stack.enter_context(self.store.using(key[0], [key[1]], tier))
        self.using.append((stack, tier, key))

    @precondition(lambda self: self.using)
    @rule()
    def stop_using(self) -> None:
        self.using.pop(0)[0].close()

    @rule(name=st.sampled_from("ab"), tier=st.sampled_from(["host", "gpu"]))
    def evict(self, name: str, tier: str) -> None:
        if any(used == tier and key[0] == name for _, used, key in self.using):
            with pytest.raises(BlockInUseError):
                self.store.evict(name, tier)
        else:
            self.store.evict(name, tier)
            self.there[tier] = {key for key in self.there[tier] if key[0] != name}

    @invariant()
    def what_should_be_there_is_and_is_right(self) -> None:
        for tier in ("host", "gpu"):
            found = {(name, block) for name in "ab" for block in self.store.resident(name, tier)}
            assert found == self.there[tier]
            assert all(right(self.store, name, tier) for name in "ab")
            used = sum(-(-self.models[name].block_bytes[block] // PAGE) * PAGE for name, block in found)
            assert self.store.free_bytes(tier) == self.start[tier] - used


def test_any_sequence_of_loads_uses_evictions_and_failures(two: dict[str, PackedModel]) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    StoreMachine.models = two
    run_state_machine_as_test(StoreMachine, settings=settings(max_examples=40, stateful_step_count=20, deadline=None))


class TestExtents:
    def test_neighbours_are_joined_again(self) -> None:
        extents = Extents(4 * PAGE)
        offsets = [extents.take(PAGE) for _ in range(4)]
        assert offsets == [0, PAGE, 2 * PAGE, 3 * PAGE]
        assert extents.take(1) is None
        for offset in (0, 2 * PAGE, PAGE):
            extents.give_back(offset)
        assert extents.take(3 * PAGE) == 0

    def test_the_smallest_hole_that_fits(self) -> None:
        extents = Extents(10 * PAGE)
        first, second, third, _ = (extents.take(size * PAGE) for size in (4, 1, 2, 3))
        extents.give_back(first)
        extents.give_back(third)
        assert extents.take(2 * PAGE) == third
        assert second == 4 * PAGE


def test_an_arena_in_memory_that_is_given() -> None:
    """Whole pages of it."""
    memory = torch.zeros(3 * PAGE + 5, dtype=torch.uint8)
    arena = Arena(3 * PAGE + 5, torch.device("cpu"), "an arena", memory)
    assert arena.extents.capacity == arena.bytes.numel() == 3 * PAGE
    arena.view(PAGE, 2)[:] = 7
    assert memory[PAGE : PAGE + 2].tolist() == [7, 7]
