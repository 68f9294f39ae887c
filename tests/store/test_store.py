"""The block store: what lands is right, what fails leaves no trace, what is in use stays."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lambdascale.checkpoints import PackedModel
from lambdascale.core import CapacityError, UserError
from lambdascale.inference import BlockError, BlockInUseError, BlockStore, StoreConfig
from tests.store.stores import BLOCKS, PAGE, PART, packed, pages, right


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
