"""A tier of a block store: its arena, the place of each block in it, and the blocks that are complete or in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lambdascale.checkpoints import PackedModel
from lambdascale.core import CapacityError
from lambdascale.core.checks import require
from lambdascale.inference.arena import Arena

StoreTier = Literal["host", "gpu"]
Key = tuple[str, int]  # model and block


@dataclass
class Residency:
    """One tier of a store, with its memory. Not thread-safe: the store's lock guards it. ``name`` is the tier's, for messages."""

    name: StoreTier
    arena: Arena
    offsets: dict[Key, int] = field(default_factory=dict)
    complete: set[Key] = field(default_factory=set)
    uses: dict[Key, int] = field(default_factory=dict)
    # Where each block was last: those of a model that are missing fit where they were, and not in any order anywhere, since
    # blocks differ in size. Bounded: at most every block of every model.
    _homes: dict[Key, int] = field(default_factory=dict)

    def take(self, model: PackedModel, key: Key) -> None:
        """Reserve memory for a block. CapacityError without room, UserError if it has memory already."""
        size = model.block_bytes[key[1]]
        require(key not in self.offsets, f"block {key[1]} of {key[0]} is being loaded already")
        offset = self.arena.extents.take(size, self._homes.get(key))
        if offset is None:
            free = self.arena.extents.free_bytes
            why = f"{free} bytes are free" + (", in pieces too small" if free >= size else "")
            raise CapacityError(f"no room for block {key[1]} of {key[0]} ({size} bytes) in {self.name} memory: {why}")
        self.offsets[key] = self._homes[key] = offset

    def in_order(self, keys: Sequence[Key]) -> list[Key]:
        """Return keys in the order in which to take memory: no new block gets what one that comes again had."""
        return sorted(keys, key=lambda key: key not in self._homes)

    def take_all(self, model: PackedModel, keys: Sequence[Key]) -> None:
        """Reserve memory for all of these blocks or, with an error as ``take``, for none."""
        taken: list[Key] = []
        try:
            for key in self.in_order(keys):
                self.take(model, key)
                taken.append(key)
        except ValueError:
            for key in taken:
                self.drop(key)
            raise

    def drop(self, key: Key) -> None:
        """Free a block's memory."""
        self.complete.discard(key)
        self.arena.extents.give_back(self.offsets.pop(key))

    def use(self, key: Key) -> None:
        """Count one more use of a block, which stays in its place while it has any."""
        self.uses[key] = self.uses.get(key, 0) + 1

    def release(self, key: Key) -> None:
        """Undo one use."""
        self.uses[key] -= 1
        if not self.uses[key]:
            del self.uses[key]
