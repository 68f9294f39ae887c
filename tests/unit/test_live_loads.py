"""A node's loads, with a store that does everything at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest

from lambdascale.core.commands import LoadBlocks
from lambdascale.core.events import AnyEvent, BlockArrived, CommandFailed
from lambdascale.inference.loading import Load
from lambdascale.inference.store import BlockStore
from lambdascale.live.node.loads import Links, Loads
from lambdascale.live.node.reports import Reports


class InstantStore:
    """Blocks land before ``load`` returns, as those may that are in memory already."""

    landing_tier = "gpu"

    def __init__(self, blocks: int) -> None:
        self.block_bytes = [1] * blocks
        self.steps: list[str] = []

    def model(self, name: str) -> InstantStore:
        return self

    def awaited(self, name: str, block: int) -> bool:
        return False

    def evict(self, name: str, tier: str) -> None:
        self.steps.append(f"evict from {tier}")

    def load(
        self, name: str, blocks: Iterable[int], *, to: str = "gpu", keep_host: bool = True, on_block: Callable[[str, int], None]
    ) -> Load:
        load = Load(name, list(blocks))
        self.steps.append(f"load to {to}")
        for block in load.blocks:
            load.landed.append(block)
            on_block(name, block)
        load.end(None)
        return load


@pytest.mark.parametrize("blocks", [1, 4])
def test_a_load_in_two_steps_whose_blocks_land_at_once(blocks: int) -> None:
    store, events, jobs = InstantStore(blocks), list[AnyEvent](), deque[Callable[[], Any]]()
    reports = Reports(5, events.append)
    loads = Loads(cast(BlockStore, store), reports, jobs.append, links=Links(), preloaded=False)
    loads.load(LoadBlocks(7, "m", 5, tuple(range(blocks)), (1,) * blocks, "ssd", "sequential"))
    assert not events  # nothing is on the device before all is in host memory
    while jobs:
        jobs.popleft()()
    assert store.steps == ["load to host", "load to gpu", "evict from host"]
    assert events == [BlockArrived(0.0, 7, 5, "m", block) for block in range(blocks)]


def test_a_load_that_cannot_be_is_told_of() -> None:
    store, events = InstantStore(2), list[AnyEvent]()
    loads = Loads(cast(BlockStore, store), Reports(5, events.append), lambda job: job(), links=Links(), preloaded=False)
    loads.load(LoadBlocks(7, "m", 5, (0, 1), (1, 1), "remote", "pipelined"))
    (failed,) = events
    assert isinstance(failed, CommandFailed)
    assert (failed.command, failed.transfer_id) == ("LoadBlocks", 7)
    assert store.steps == []


def test_a_block_is_told_of_once_until_its_model_leaves() -> None:
    events = list[AnyEvent]()
    reports = Reports(5, events.append)
    for number in (1, 2):
        reports.arrived(number, "m", 3)
    reports.arrived(2, "other", 3)
    reports.forget("m")
    reports.arrived(4, "m", 3)
    assert [event.transfer_id for event in events if isinstance(event, BlockArrived)] == [1, 2, 4]
