"""``lambdascale serve`` in processes of its own, for tests; whatever becomes of a test, none of them is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import openai

from tests.live.harness import PATIENCE_S, wait_for

COMMAND = [str(Path(sys.executable).with_name("lambdascale")), "serve"]


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    port: int

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE_S) as answer:
            data: bytes = answer.read()
            return data

    def cluster(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.get("/cluster"))
        return state

    def stop(self) -> int:
        """Interrupt it; return its status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE_S)

    def children(self) -> list[int]:
        """All processes of the server's session besides itself."""
        done = subprocess.run(["ps", "-o", "pid=", "-s", str(self.process.pid)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in done.stdout.split() if int(pid) != self.process.pid]

    def nodes(self) -> list[int]:
        """The processes of the nodes, oldest first: forked by a child of the server, the process they are forked from."""
        found = []
        for pid in self.children():
            with suppress(OSError):  # it has ended
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) != self.process.pid and b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append((int(fields[19]), pid))  # by the time of start: numbers of processes begin anew some time
        return [pid for _, pid in sorted(found)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def launched(model: Path, *options: str, port: int | None = None) -> Iterator[Server]:
    """Launch a server, and end whatever is left of it afterwards."""
    port = port or free_port()
    command = [*COMMAND, "--model", str(model), "--port", str(port), "--no-view", "--slot-tokens", "256", *options]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
    pipe: dict[str, Any] = {"text": True, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, preexec_fn=heard, **pipe) as process:
        server = Server(process, port)
        try:
            yield server
        finally:
            server.client.close()
            process.kill()
            for pid in server.children():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextmanager
def serving(model: Path, *options: str, port: int | None = None) -> Iterator[Server]:
    """Launch a server, and wait until it is ready. Afterwards, interrupt it if it still runs: it ends with status 0."""
    with launched(model, *options, port=port) as server:

        def ready() -> bool:
            try:
                return bool(server.get("/ready"))
            except OSError:
                assert server.process.poll() is None, server.process.stderr.read() if server.process.stderr else ""
                return False

        wait_for(ready)
        yield server
        if server.process.poll() is None:
            assert server.stop() == 0
