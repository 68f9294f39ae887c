"""The controller of ``lambdascale serve`` is killed or stopped: its nodes end within two seconds, and it starts new ones."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests.live.harness import PATIENCE_S, wait_for
from tests.live.test_serve import Server, launch, start, stop

pytestmark = pytest.mark.live


def left(pids: list[int]) -> list[int]:
    """The processes that still run; one that nobody has reaped yet has ended."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.append(pid)
    return found


def stop_until_they_left(server: Server, nodes: list[int]) -> None:
    """Stop the controller, and let it go on once these nodes have ended."""
    server.process.send_signal(signal.SIGSTOP)
    try:
        wait_for(lambda: not left(nodes))
    finally:
        server.process.send_signal(signal.SIGCONT)


def ask(server: Server) -> str:
    return server.client.completions.create(model="tiny", prompt="life", max_tokens=200, temperature=0).choices[0].text


def listen(server: Server) -> str:
    """An answer as it comes."""
    stream = server.client.completions.create(model="tiny", prompt="life", max_tokens=200, temperature=0, stream=True)
    return "".join(chunk.choices[0].text for chunk in stream)


def test_a_killed_controller_leaves_nothing(tiny: Path) -> None:
    """Connections of clients are reset, streams too; processes end, and a new one serves at the same port."""
    server = start(tiny, "--nodes", "3", "--spares", "1")
    everything = server.children()
    with ThreadPoolExecutor(64) as pool:
        asked = [[pool.submit(each, server) for _ in range(32)] for each in (ask, listen)]
        wait_for(lambda: bool(server.cluster()["requests"]["running"]))
        server.process.kill()
        wait_for(lambda: not left(everything))
        errors = [[each.exception(PATIENCE_S) for each in kind] for kind in asked]
    assert all(any(of_kind) for of_kind in errors)
    for error in (*errors[0], *errors[1]):
        assert error is None or isinstance(error, openai.APIConnectionError | httpx.TransportError)
        assert not isinstance(error, openai.APITimeoutError | httpx.TimeoutException)
    server.process.wait(PATIENCE_S)
    if server.process.stderr is not None:
        server.process.stderr.close()
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(("lambdascale", "torch_", "psm_", "gloo"))]
    server.client.close()
    again = start(tiny, "--nodes", "2", port=server.port)
    assert ask(again)
    again.client.close()
    assert stop(again) == 0


def test_a_stopped_controller_replaces_its_nodes(tiny: Path) -> None:
    """Nodes end while it is stopped; once it goes on, new ones finish the answers that were under way."""
    server = start(tiny, "--nodes", "2", "--spares", "1")
    whole, nodes = ask(server), server.nodes()[:2]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, server)
        wait_for(lambda: bool(server.cluster()["requests"]["running"]))
        stop_until_they_left(server, nodes)
        assert waiting.result(PATIENCE_S) == whole
    wait_for(lambda: all(node["alive"] for node in server.cluster()["nodes"]))
    assert server.cluster()["requests"]["failed"] == 0
    server.client.close()
    assert stop(server) == 0


def test_a_stopped_controller_that_may_not_replace_its_nodes(tiny: Path) -> None:
    """Open streams get an error with the reason once it goes on, and so does whoever comes later."""
    server = start(tiny, "--nodes", "2", "--restarts", "0")
    nodes = server.nodes()[:2]
    many = 160  # nodes go on with their batches meanwhile, and may complete those
    with ThreadPoolExecutor(many) as pool:
        listening = [pool.submit(listen, server) for _ in range(many)]
        wait_for(lambda: bool(server.cluster()["requests"]["running"]))
        stop_until_they_left(server, nodes)
        errors = [each.exception(PATIENCE_S) for each in listening]
    assert any(errors)
    for error in filter(None, errors):
        assert isinstance(error, openai.APIError)
        assert error.code in ("no_node", "closed"), error
    with pytest.raises(openai.InternalServerError, match="no node is alive"):
        ask(server)
    server.client.close()
    assert stop(server) == 0


def test_a_short_pause_of_the_controller_costs_nothing(tiny: Path) -> None:
    """Nodes wait for it."""
    server = start(tiny, "--nodes", "2")
    nodes = server.nodes()
    for _ in range(3):
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(0.4)
        server.process.send_signal(signal.SIGCONT)
        assert ask(server)
    assert left(nodes) == nodes
    assert server.cluster()["node_restarts"] == 0
    server.client.close()
    assert stop(server) == 0


@pytest.mark.parametrize(
    ("hit", "number", "status", "says"),
    [
        ("a node", signal.SIGKILL, 2, ["error: the cluster did not start: node 0: it was killed (SIGKILL)"]),
        ("the controller", signal.SIGINT, 130, ["interrupted"]),
        ("the controller", signal.SIGTERM, 128 + signal.SIGTERM, ["terminated"]),
    ],
    ids=["a node is killed", "Ctrl-C", "SIGTERM"],
)
def test_a_start_that_ends_early(tiny: Path, hit: str, number: int, status: int, says: list[str]) -> None:
    """One line says why, and nothing is left."""
    server = launch(tiny, "--nodes", "2")
    wait_for(lambda: len(server.nodes()) >= 1)
    everything = server.children()
    os.kill(server.nodes()[0] if hit == "a node" else server.process.pid, number)
    _, errors = server.process.communicate(timeout=PATIENCE_S)
    own = [line for line in errors.splitlines() if not line.endswith("the controller has ended, leaving")]
    assert (server.process.returncode, own) == (status, says)
    wait_for(lambda: not left(everything))
