"""Models for live clusters."""

from __future__ import annotations

from pathlib import Path

import pytest

from .harness import pack_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_tiny(tmp_path_factory.mktemp("live"))
