"""Stages that nobody uses any more: kept for the same blocks in the same memory, dropped where memory is short."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lambdascale.checkpoints import block_layouts
from lambdascale.checkpoints.architecture import parse_architecture
from lambdascale.checkpoints.synthetic import PRESETS
from lambdascale.inference import BlockWeights, Segment, StageBatch, TransformerStage
from lambdascale.inference.kept import ROOM_BYTES, KeptStages

CPU = torch.device("cpu")
ARCHITECTURE = parse_architecture(dict(PRESETS["tiny"]))
KV_BYTES = 1 << 20


def new_stage() -> TransformerStage:
    layout = block_layouts(ARCHITECTURE, "F32", 2)[0]
    weights = BlockWeights(layout, torch.zeros(layout.size_bytes, dtype=torch.uint8))
    return TransformerStage(ARCHITECTURE, [weights], 2, 8, replays=True)


def kept_in(free_bytes: float, most: int = 4) -> KeptStages:
    return KeptStages(most, lambda device: int(free_bytes))


def use(
    kept: KeptStages, key: str, make: Callable[[], TransformerStage] = new_stage, *, replayed: bool = True
) -> TransformerStage:
    with kept.borrowed(key, make, KV_BYTES, CPU) as stage:
        assert not stage.kv.both.any(), "KV is cleared"
        if replayed:
            stage.run(StageBatch((Segment(0, 0, 1),), 1, (0,)), torch.tensor([3]))
            stage.kv.both.fill_(1.0)
    return stage


def test_the_same_blocks_in_the_same_memory_have_the_same_stage() -> None:
    kept = kept_in(1e12)
    first = use(kept, "a")
    assert use(kept, "a") is first
    assert use(kept, "b") is not first
    assert use(kept, "a") is first, "b does not displace it"
    assert first.recordings == 1, "nothing is recorded twice"


def test_two_users_have_two_stages() -> None:
    kept = kept_in(1e12)
    first = use(kept, "a")
    with kept.borrowed("a", new_stage, KV_BYTES, CPU) as one, kept.borrowed("a", new_stage, KV_BYTES, CPU) as other:
        assert one is first is not other


def test_the_newest_are_kept() -> None:
    kept = kept_in(1e12, most=2)
    a, b, c = (use(kept, key) for key in "abc")
    assert len(kept) == 2
    assert use(kept, "c") is c
    assert use(kept, "b") is b
    assert use(kept, "a") is not a


@pytest.mark.parametrize(("free", "number"), [(ROOM_BYTES, 1), (ROOM_BYTES - 1, 0)])
def test_iterations_of_others_have_room(free: int, number: int) -> None:
    kept = kept_in(free)
    use(kept, "a")
    assert len(kept) == number


@pytest.mark.parametrize(("free", "number"), [(ROOM_BYTES + KV_BYTES, 2), (ROOM_BYTES + KV_BYTES - 1, 1)])
def test_a_new_stage_has_room_beside_those_kept(free: int, number: int) -> None:
    """Room for its KV, too: otherwise all others go first."""
    kept = kept_in(free)
    use(kept, "a")
    use(kept, "b")
    assert len(kept) == number


def test_a_stage_without_recordings_is_not_kept() -> None:
    kept = kept_in(1e12)
    use(kept, "a", replayed=False)
    assert len(kept) == 0


def test_a_stage_that_failed_is_not_kept() -> None:
    kept = kept_in(1e12)

    def failing() -> None:
        with kept.borrowed("a", new_stage, KV_BYTES, CPU) as stage:
            stage.run(StageBatch((Segment(0, 0, 1),), 1, (0,)), torch.tensor([3]))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert len(kept) == 0
