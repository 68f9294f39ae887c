"""The receive protocol of blocks that other nodes write into a store: expected, arrived and verified, usable, given up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from enum import Enum

import torch

from lambdascale.checkpoints import PackedModel
from lambdascale.core.checks import require
from lambdascale.inference.residency import Key, Residency

Tensor = torch.Tensor
# (model, block, the bytes that arrived, their hash if a transport has computed it): raises BlockError unless they are the block.
Check = Callable[[PackedModel, int, Tensor, int | None], None]


class BlockState(Enum):
    """Progress of one block of a reception; the comment says what keeps its memory in place meanwhile."""

    EXPECTED = "expected"  # its memory is reserved: others may write to it
    PRESENT = "present"  # complete and verified where blocks land, but not yet on the device: in use there
    USABLE = "usable"  # complete on the device: an ordinary resident block
    GIVEN_UP = "given up"  # nobody writes it any more for this reception


class Reception:
    """The blocks of one model that a transfer brings to this node, from ``BlockStore.expect`` to ``close``. Thread-safe.

    ``offsets`` are the places, in the landing arena, of the blocks that others are to write. The other blocks of the reception
    are resident already, where blocks land or on the device: nobody needs to write them, but ``arrived`` must be called for
    them too to make them usable.
    """

    def __init__(
        self, receptions: Receptions, model: PackedModel, offsets: dict[int, int], states: dict[int, BlockState]
    ) -> None:
        self.offsets: Mapping[int, int] = offsets
        self._receptions = receptions
        self._model = model
        self._states = states

    def state(self, block: int) -> BlockState:
        """Return the state of a block of this reception."""
        return self._states[block]

    @property
    def resident(self) -> tuple[int, ...]:
        """Blocks that nobody needs to write, in the order of ``expect``."""
        return tuple(block for block in self._states if block not in self.offsets)

    def arrived(self, block: int, xxh3_64: int | None = None) -> None:
        """Make a block usable that has arrived in full. The caller waits while it is verified and copied to the device.

        ``xxh3_64``: hash of the bytes, if a transport has computed it. BlockError if the bytes are damaged; the block is then
        still expected. CapacityError if the device has no room; the block is then present.
        """
        if self._states[block] is BlockState.EXPECTED:
            self._receptions.land(self._model, block, xxh3_64)
            self._move(block, BlockState.PRESENT)
        if self._states[block] is BlockState.PRESENT:
            self._receptions.lift(self._model.name, block)
            self._move(block, BlockState.USABLE)

    def give_up(self, blocks: Iterable[int]) -> None:
        """Stop expecting these blocks, which nobody writes any more; free the memory that no other reception needs."""
        for block in blocks:
            if self._states[block] is not BlockState.USABLE:
                self._move(block, BlockState.GIVEN_UP)

    def close(self) -> None:
        """Give up every block that is not usable."""
        self.give_up(self._states)

    def _move(self, block: int, state: BlockState) -> None:
        """Change a block's state; the new state's hold on the memory is taken before the old one's is released."""
        key = (self._model.name, block)
        with self._receptions.lock:
            before, self._states[block] = self._states[block], state
            if state is BlockState.PRESENT:
                self._receptions.landing.use(key)
            if before is BlockState.EXPECTED:
                self._receptions.unexpect(key)
            elif before is BlockState.PRESENT:
                self._receptions.landing.release(key)


class Receptions:
    """A store's receptions. ``landing`` is the tier that others write to, ``device`` the tier where blocks become usable.

    ``lock`` is the store's: it guards both tiers and ``_expected``, the number of receptions that expect each block. A block has
    memory in ``landing`` as long as that number is positive. ``lift(model, block)`` copies a landed block to the device and
    waits.
    """

    def __init__(
        self, lock: threading.RLock, landing: Residency, device: Residency, check: Check, lift: Callable[[str, int], None]
    ) -> None:
        self.lock = lock
        self.landing = landing
        self.lift = lift
        self._device = device
        self._check = check
        self._expected: dict[Key, int] = {}

    def expect(self, model: PackedModel, blocks: Iterable[int]) -> Reception:
        """See ``BlockStore.expect``."""
        order = list(dict.fromkeys(blocks))
        with self.lock:
            states = {block: self._state_of((model.name, block)) for block in order}
            coming = [(model.name, block) for block, state in states.items() if state is BlockState.EXPECTED]
            self.landing.take_all(model, [key for key in coming if key not in self._expected])
            for key in coming:
                self._expected[key] = self._expected.get(key, 0) + 1
            for block, state in states.items():
                if state is BlockState.PRESENT:
                    self.landing.use((model.name, block))
            return Reception(self, model, {key[1]: self.landing.offsets[key] for key in coming}, states)

    def _state_of(self, key: Key) -> BlockState:
        if key in self._device.complete:
            return BlockState.USABLE
        return BlockState.PRESENT if key in self.landing.complete else BlockState.EXPECTED

    def expects(self, key: Key) -> bool:
        """True if memory is reserved for a block that others may write."""
        return key in self._expected

    def memory(self, model: PackedModel, block: int) -> Tensor:
        """Return the memory that is reserved for a block. UserError if it is not expected."""
        key = (model.name, block)
        require(key in self._expected, f"block {block} of {model.name} is not expected")
        return self.landing.arena.view(self.landing.offsets[key], model.block_bytes[block])

    def land(self, model: PackedModel, block: int, xxh3_64: int | None) -> None:
        """Verify an expected block, unless another reception has, and make it resident. BlockError if it is damaged."""
        key = (model.name, block)
        if key not in self.landing.complete:
            self._check(model, block, self.memory(model, block), xxh3_64)
            with self.lock:
                self.landing.complete.add(key)

    def unexpect(self, key: Key) -> None:
        """Undo one expectation; with the last, the memory of a block that has not arrived is freed."""
        with self.lock:
            self._expected[key] -= 1
            if not self._expected[key]:
                del self._expected[key]
                if key not in self.landing.complete:
                    self.landing.drop(key)
