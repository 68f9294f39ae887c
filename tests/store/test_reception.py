"""Blocks that arrive from other nodes: reserved, verified, landed, given up; and whose checksums are compared."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from lambdascale.core import CapacityError, UserError
from lambdascale.inference import BlockError, BlockInUseError, BlockStore
from lambdascale.inference.reception import BlockState
from lambdascale.inference.verification import is_verified
from tests.store.stores import BLOCKS, right


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
        """The block ends on the device, unchanged, with no memory left reserved."""
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
        """The block has arrived by one transfer, and the sender of another still writes it."""
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
    """A mirror copies what is missing and no more; nothing without room."""
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
