"""Models for live clusters."""

from __future__ import annotations

from pathlib import Path

import pytest

from lambdascale.checkpoints import pack
from lambdascale.checkpoints.synthetic import PRESETS, write_random


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, eight blocks of float32, 1.7 MB."""
    root = tmp_path_factory.mktemp("live")
    (root / "source").mkdir()
    write_random(PRESETS["tiny"], root / "source", seed=3)
    pack(root / "source", root / "tiny", 8)
    return root / "tiny"
