"""A tiny model, and nodes that move its blocks one job at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from lambdascale.checkpoints import PackedModel
from tests.unit.node_doubles import Network, Node, pack_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return pack_tiny(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def make(network: Network, model: PackedModel) -> Iterator[Callable[..., Node]]:
    with ExitStack() as stack:

        def build(number: int = 5, **options: Any) -> Node:
            node = Node(network, number, model, **{"lands": "gpu"} | options)
            stack.callback(node.close)
            return node

        yield build
