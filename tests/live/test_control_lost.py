"""The controller of ``lambdascale serve`` is killed or stopped: its nodes end within two seconds, and it starts new ones."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest

from tests.live.harness import PATIENCE_S, wait_for
from tests.live.servers import Server, launched, serving

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


def listen(server: Server, begun: set[object] | None = None) -> str:
    """An answer as it comes; from its first piece to its end it is in ``begun``."""
    text, mine, begun = "", object(), set() if begun is None else begun
    for chunk in server.client.completions.create(model="tiny", prompt="life", max_tokens=200, temperature=0, stream=True):
        begun.add(mine)
        text += chunk.choices[0].text
    begun.discard(mine)
    return text


def signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


def stop_within(server: Server, nodes: list[int], begun: set[object]) -> None:
    """Stop nodes and controller while answers have begun; a moment in which none has is passed over."""
    while True:
        wait_for(lambda: bool(begun))
        signal_all(nodes, signal.SIGSTOP)
        time.sleep(0.3)  # what they had sent is received; the controller is more patient
        if begun:
            break
        signal_all(nodes, signal.SIGCONT)
    server.process.send_signal(signal.SIGSTOP)


def last_error(request: Callable[[Server], str], server: Server) -> Exception:
    """Send a request again and again, so that one is under way whenever the server is lost; return the error that ends it."""
    while True:
        try:
            request(server)
        except (openai.OpenAIError, httpx.TransportError) as error:
            return error


def test_a_killed_controller_leaves_nothing(tiny: Path) -> None:
    """Connections of clients are reset, streams too; processes end, and a new one serves at the same port."""
    # The server is inside: without it, whatever failed, the clients of the pool end.
    with ThreadPoolExecutor(64) as pool, serving(tiny, "--nodes", "3", "--spares", "1") as server:
        everything = server.children()
        asked = [[pool.submit(last_error, each, server) for _ in range(32)] for each in (ask, listen)]
        wait_for(lambda: bool(server.cluster()["requests"]["running"]))
        server.process.kill()
        wait_for(lambda: not left(everything))
        for of_kind in asked:
            errors = [each.result(PATIENCE_S) for each in of_kind]
            for error in errors:
                assert isinstance(error, openai.APIConnectionError | httpx.TransportError)
                assert not isinstance(error, openai.APITimeoutError | httpx.TimeoutException)
            assert not all(isinstance(error.__cause__, httpx.ConnectError) for error in errors), "some were under way"
        server.process.wait(PATIENCE_S)
        assert not [name for name in os.listdir("/dev/shm") if name.startswith(("lambdascale", "torch_", "psm_", "gloo"))]
    with serving(tiny, "--nodes", "2", port=server.port) as again:
        assert ask(again)


def test_a_stopped_controller_replaces_its_nodes(tiny: Path) -> None:
    """Nodes end while it is stopped; once it goes on, new ones finish the answers that were under way."""
    with ThreadPoolExecutor(1) as pool, serving(tiny, "--nodes", "2", "--spares", "1") as server:
        whole, nodes = ask(server), server.nodes()[:2]
        over = threading.Event()

        def ask_on() -> set[str]:
            answers = set()
            while not over.is_set():
                answers.add(ask(server))
            return answers

        asking = pool.submit(ask_on)
        wait_for(lambda: bool(server.cluster()["requests"]["running"]))
        stop_until_they_left(server, nodes)
        over.set()
        assert asking.result(PATIENCE_S) == {whole}
        wait_for(lambda: all(node["alive"] for node in server.cluster()["nodes"]))
        assert server.cluster()["requests"]["failed"] == 0


@pytest.mark.parametrize("killed", [False, True], ids=["they end", "they are killed"])
def test_a_stopped_controller_that_may_not_replace_its_nodes(tiny: Path, killed: bool) -> None:
    """Open streams get an error with the reason once it goes on, and so does whoever waits or comes later."""
    many, begun = 64, set[object]()
    with ThreadPoolExecutor(many) as pool, serving(tiny, "--nodes", "2", "--restarts", "0") as server:
        nodes = server.nodes()[:2]
        listening = [pool.submit(last_error, partial(listen, begun=begun), server) for _ in range(many)]
        stop_within(server, nodes, begun)
        signal_all(nodes, signal.SIGKILL if killed else signal.SIGCONT)  # these complete what is in their batches
        stop_until_they_left(server, nodes)
        errors = [each.result(PATIENCE_S) for each in listening]
        for error in errors:
            assert isinstance(error, openai.APIError)
            assert error.code in ("no_node", "closed"), error
        assert not killed or not all(isinstance(error, openai.APIStatusError) for error in errors), "some streams were open"
        with pytest.raises(openai.InternalServerError, match="no node is alive"):
            ask(server)


def test_a_short_pause_of_the_controller_costs_nothing(tiny: Path) -> None:
    """Nodes wait for it."""
    with serving(tiny, "--nodes", "2") as server:
        nodes = server.nodes()
        for _ in range(3):
            server.process.send_signal(signal.SIGSTOP)
            time.sleep(0.4)
            server.process.send_signal(signal.SIGCONT)
            assert ask(server)
        assert left(nodes) == nodes
        assert server.cluster()["node_restarts"] == 0


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
    with launched(tiny, "--nodes", "2") as server:
        wait_for(lambda: len(server.nodes()) >= 1)
        everything = server.children()
        os.kill(server.nodes()[0] if hit == "a node" else server.process.pid, number)
        _, errors = server.process.communicate(timeout=PATIENCE_S)
        own = [line for line in errors.splitlines() if not line.endswith("the controller has ended, leaving")]
        assert (server.process.returncode, own) == (status, says)
        wait_for(lambda: not left(everything))
