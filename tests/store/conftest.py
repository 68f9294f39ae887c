"""Two packed models, and stores that know both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from lambdascale.checkpoints import PackedModel
from lambdascale.inference import BlockStore, StoreConfig
from tests.store.stores import packed, pages


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PackedModel]:
    root = tmp_path_factory.mktemp("packed")
    return {name: packed(root, name, seed) for seed, name in enumerate("ab")}


@pytest.fixture
def make(two: dict[str, PackedModel]) -> Iterator[Callable[..., BlockStore]]:
    """A store that knows both models; the arenas hold ``host`` and ``gpu`` models."""
    with ExitStack() as stack:

        def build(host: float = 2, gpu: float = 2, **changes: object) -> BlockStore:
            size = pages(two["a"])
            sizes = {"host_bytes": int(host * size), "device_bytes": int(gpu * size), "chunk_bytes": 64 * 1024}
            config = StoreConfig(**sizes | changes)
            store = stack.enter_context(BlockStore(config))
            for model in two.values():
                store.add(model)
            return store

        yield build
