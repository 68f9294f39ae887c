"""``lambdascale serve`` as its users see it: the openai client, a scale-out under load, a signal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.live.harness import PATIENCE_S, wait_for
from tests.live.servers import COMMAND, Server, free_port, serving

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Server]:
    with serving(tiny, "--nodes", "3", "--link", "1MB/s", "--keep-alive", "1") as running:
        yield running


def test_models(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").id == "tiny"


def test_completion(server: Server) -> None:
    answer = server.client.completions.create(model="tiny", prompt="hello", max_tokens=7, temperature=0)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (5, 5 + answer.usage.completion_tokens)
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_a_stream_says_the_same(server: Server) -> None:
    common: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 40, "seed": 5, "temperature": 0.8}
    whole = server.client.completions.create(**common)
    chunks = list(server.client.completions.create(**common, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason


def test_chat(server: Server) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    common: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 9, "temperature": 0}
    whole = server.client.chat.completions.create(**common)
    stream = server.client.chat.completions.create(**common, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content


def test_stop_strings_and_several_prompts(server: Server) -> None:
    common: dict[str, Any] = {"model": "tiny", "max_tokens": 30, "temperature": 0}
    plain = server.client.completions.create(**common, prompt="q").choices[0].text
    cut = plain[len(plain) // 2 :][:2]
    stopped = server.client.completions.create(**common, prompt="q", stop=[cut]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (plain[: plain.index(cut)], "stop")
    both = server.client.completions.create(**common, prompt=["q", "r"])
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == plain
    ids = server.client.completions.create(**common, prompt=[113 % 257])
    assert ids.choices[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "other", "prompt": "a"}, 404, "does not exist"),
        ({"model": "tiny"}, 400, "prompt"),
        ({"model": "tiny", "prompt": []}, 400, "prompt"),
        ({"model": "tiny", "prompt": ""}, 400, "no tokens"),
        ({"model": "tiny", "prompt": [1, "a"]}, 400, "prompt"),
        ({"model": "tiny", "prompt": [9999]}, 400, "token ids"),
        ({"model": "tiny", "prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"model": "tiny", "prompt": "a", "max_tokens": 256}, 400, "256"),
        ({"model": "tiny", "prompt": "a", "temperature": -1}, 400, "temperature"),
        ({"model": "tiny", "prompt": "a", "n": 2}, 400, "n must be 1"),
        ({"model": "tiny", "prompt": "a", "logprobs": 3}, 400, "logprobs"),
        ({"model": "tiny", "prompt": "a", "seed": "x"}, 400, "seed"),
        ({"model": "tiny", "prompt": "a", "seed": 1 << 64}, 400, "9223372036854775807"),
        ({"model": "tiny", "prompt": "a" * 20_000_000}, 413, "bytes at most"),
    ],
)
def test_mistakes(server: Server, body: dict[str, Any], status: int, says: str) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=PATIENCE_S)
    assert caught.value.code == status
    assert says in json.loads(caught.value.read())["error"]["message"]


def test_the_smallest_temperature(server: Server) -> None:
    """A node answers, and no logit overflows."""
    answer = server.client.completions.create(model="tiny", prompt="a", max_tokens=5, temperature=1e-300)
    assert answer.usage is not None
    assert server.cluster()["requests"]["restarts"] == 0


def test_it_grows_under_load_and_shrinks_again(server: Server) -> None:
    """More nodes serve while requests come; afterwards one is left."""

    def ask(number: int) -> str:
        answer = server.client.completions.create(model="tiny", prompt=f"{number}", max_tokens=200, temperature=0)
        return answer.choices[0].text

    with ThreadPoolExecutor(80) as pool:
        answers = list(pool.map(ask, range(80)))
    assert answers[:10] == [ask(number) for number in range(10)], "the same alone and in a crowd"
    state = server.cluster()
    assert state["scale_outs"] >= 2
    assert state["requests"]["failed"] == 0
    wait_for(lambda: len(server.cluster()["replicas"]) == 1)
    metrics = server.get("/metrics").decode()
    assert f"lambdascale_requests_finished_total {state['requests']['finished']}" in metrics or "lambdascale_ttft" in metrics


def test_a_client_that_hangs_up_is_forgotten(server: Server) -> None:
    stream = server.client.completions.create(model="tiny", prompt="z", max_tokens=200, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: not server.cluster()["requests"]["running"])


def test_a_killed_node_under_a_stream(server: Server) -> None:
    """The stream goes on, with the tokens it would have had."""
    common: dict[str, Any] = {"model": "tiny", "prompt": "stream", "max_tokens": 200, "temperature": 0}
    whole = server.client.completions.create(**common).choices[0].text
    nodes = server.nodes()
    for _ in range(10):  # a fast node may be done before it is killed
        serves = server.cluster()["replicas"][0]["node"]
        text, killed = "", False
        for chunk in server.client.completions.create(**common, stream=True):
            text += chunk.choices[0].text
            if not killed and len(text) > 20:
                killed = True
                os.kill(nodes[serves], signal.SIGKILL)
        assert text == whole
        wait_for(lambda: all(node["alive"] for node in server.cluster()["nodes"]))
        if server.cluster()["requests"]["restarts"]:
            break
        (nodes[serves],) = set(server.nodes()) - set(nodes)
    assert server.cluster()["requests"]["restarts"] >= 1
    wait_for(lambda: server.cluster()["node_restarts"] >= 1)
    assert [node["alive"] for node in server.cluster()["nodes"]] == [True] * 3
    assert server.client.completions.create(**common).choices[0].text == whole


def test_a_signal_ends_everything(tiny: Path) -> None:
    """Open streams are told; no process and no port is left. The server is its own: the others' tests may come later."""
    with serving(tiny, "--nodes", "3", "--link", "1MB/s", "--keep-alive", "1") as server:
        stream = server.client.completions.create(model="tiny", prompt="end", max_tokens=230, temperature=0, stream=True)
        parts = iter(stream)
        next(parts)
        children = server.children()
        assert len(children) >= 3
        assert server.process.stderr is not None
        assert server.process.stderr.readline().startswith("ready: tiny on 3 nodes at http://127.0.0.1")
        assert server.stop() == 0
        with suppress(openai.APIError):  # an error, or an end: but no silence
            list(parts)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
        with socket.create_server(("127.0.0.1", server.port)):
            pass


def test_a_damaged_shard_ends_it_with_one_line(tiny: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(tiny, tmp_path / "damaged"))
    shard = max(damaged.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    command = [*COMMAND, "--no-view", "--port", str(free_port()), "--model", str(damaged), "--nodes", "2", "--slot-tokens", "256"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert shard.name in done.stderr
