"""A tokenizer, and servers that are closed at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lambdascale.live.serving.text import Text
from tests.live.harness import pack_tiny
from tests.serving.harness import Running


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text(pack_tiny(tmp_path_factory.mktemp("http")))


@pytest.fixture
def start(text: Text) -> Iterator[Callable[..., Running]]:
    """Start a server with options."""
    running: list[Running] = []

    def begin(**options: Any) -> Running:
        running.append(Running(text, **options))
        return running[-1]

    yield begin
    for each in running:
        each.close()


@pytest.fixture(scope="module")
def shared(text: Text) -> Iterator[Running]:
    """One server for many short tests."""
    running = Running(text)
    yield running
    running.close()


@pytest.fixture(scope="module")
def hasty(text: Text) -> Iterator[Running]:
    """One that gives requests half a second to come whole."""
    running = Running(text, receive_timeout_s=0.5)
    yield running
    running.close()
