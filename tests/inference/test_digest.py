"""The digest of a block: the same from pieces of any size, and different for every damage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lambdascale.checkpoints.checksums import FIRST, GOLDEN, SECOND, Checksums
from lambdascale.core import UserError
from lambdascale.inference.digest import block_digest, part_digests

PART = 64
_MASK = (1 << 64) - 1


def flat(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def mixed(value: int) -> int:
    value &= _MASK
    value = (value ^ (value >> 30)) * FIRST & _MASK
    value = (value ^ (value >> 27)) * SECOND & _MASK
    return value ^ (value >> 31)


def plain(part: bytes) -> int:
    """The definition, word by word."""
    padded = part + bytes(-len(part) % 8)
    words = [int.from_bytes(padded[at : at + 8], "little") for at in range(0, len(padded), 8)]
    total = sum(mixed(word + (place + 1) * GOLDEN) for place, word in enumerate(words))
    return mixed(total + len(part) * GOLDEN)


@given(data=st.binary(max_size=300))
def test_it_is_what_is_defined(data: bytes) -> None:
    wanted = [plain(data[at : at + PART]) for at in range(0, len(data), PART)]
    assert part_digests(flat(data), PART).tolist() == wanted
    together = sum(mixed(digest + place * GOLDEN) for place, digest in enumerate(wanted, start=1))
    assert block_digest(flat(data), PART) == mixed(together + len(wanted) * GOLDEN)


@given(data=st.binary(min_size=1, max_size=300), cuts=st.lists(st.integers(0, 300), max_size=6))
def test_pieces_of_any_size(data: bytes, cuts: list[int]) -> None:
    checksums, begin = Checksums(PART), 0
    for cut in [*sorted(cuts), len(data)]:
        checksums.update(data[begin:cut])
        begin = max(begin, cut)
    assert [int(digest, 16) for digest in checksums.digests] == part_digests(flat(data), PART).tolist()


def test_every_flipped_bit_is_found_in_its_part_alone() -> None:
    data = np.random.default_rng(1).bytes(3 * PART - 5)
    whole = part_digests(flat(data), PART)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        found = part_digests(flat(bytes(damaged)), PART)
        assert [one == two for one, two in zip(found, whole, strict=True)] == [bit // 8 // PART != part for part in range(3)]


def test_exchanged_words_parts_and_lengths_are_found() -> None:
    data = np.random.default_rng(2).bytes(2 * PART)
    known = {block_digest(flat(data), PART)}
    for other in (data[8:16] + data[:8] + data[16:], data[PART:] + data[:PART], data + bytes(1), data[:-1], bytes(2 * PART)):
        known.add(block_digest(flat(other), PART))
    assert len(known) == 6
    assert block_digest(flat(bytes(8)), PART) != block_digest(flat(bytes(7)), PART)


def test_two_flips_of_the_highest_bit_do_not_cancel() -> None:
    """The flips would cancel in a plain sum of products."""
    data = np.random.default_rng(3).integers(0, 1 << 63, 8, dtype=np.uint64)
    damaged = data.copy()
    damaged[[2, 5]] ^= np.uint64(1 << 63)
    assert block_digest(flat(data.tobytes()), PART) != block_digest(flat(damaged.tobytes()), PART)


@pytest.mark.parametrize("data", [torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8)])
def test_other_tensors_are_refused(data: torch.Tensor) -> None:
    with pytest.raises(UserError, match="flat uint8"):
        block_digest(data)
