"""A store under any sequence of loads, uses, evictions and failures."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lambdascale.checkpoints import PackedModel
from lambdascale.core import CapacityError
from lambdascale.inference import BlockError, BlockInUseError, BlockStore, StoreConfig
from tests.store.stores import BLOCKS, PAGE, pages, right


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
