"""The way of requests through the server: queue, deadline, clients that leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serving.harness import Running, post, read_all, status_of, until

Start = Callable[..., Running]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "a", "max_tokens": 3} | fields


def raw(**fields: Any) -> bytes:
    return post(json.dumps(body(**fields)).encode())


class TestLeaving:
    """A client that disconnects frees its request at once, wherever it is."""

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("prompts", [1, 3])
    def test_before_the_first_token(self, start: Start, stream: bool, prompts: int) -> None:
        running = start()
        running.cluster.held = True
        with running.connect() as connection:
            connection.sendall(raw(stream=stream, prompt=["a"] * prompts))
            until(lambda: len(running.cluster.offered) == prompts)
        until(lambda: len(running.cluster.aborted) == prompts)
        until(lambda: running.front_end.admission.started == 0)
        assert running.metrics()['lambdascale_failures_total{reason="client_left"}'] == prompts

    def test_in_the_middle_of_a_stream(self, start: Start) -> None:
        running = start()
        running.cluster.held = True
        with running.connect() as connection:
            connection.sendall(raw(stream=True))
            until(lambda: len(running.cluster.offered) == 1)
            ((_, sink),) = running.cluster.offered.values()
            sink.tokens([65], False)
            assert status_of(connection.recv(65536)) == 200
        until(lambda: len(running.cluster.aborted) == 1)
        assert running.front_end.admission.started == 0

    def test_in_the_queue(self, start: Start) -> None:
        """The cluster never hears of it."""
        running = start(window=1)
        running.cluster.held = True
        with running.connect() as first, running.connect() as second:
            first.sendall(raw())
            until(lambda: len(running.cluster.offered) == 1)
            second.sendall(raw(prompt=["a", "b"]))
            until(lambda: running.front_end.admission.waiting == 2)
            second.close()
            until(lambda: running.front_end.admission.waiting == 0)
            running.cluster.answer(running.cluster.order[0].request_id)
            assert status_of(first.recv(65536)) == 200
        assert len(running.cluster.order) == 1

    def test_a_body_whose_prompts_are_in_queue_and_window(self, start: Start) -> None:
        """None of those that wait is started by the end of the others."""
        running = start(window=2)
        running.cluster.held = True
        with running.connect() as connection:
            connection.sendall(raw(prompt=["a"] * 6))
            until(lambda: running.front_end.admission.waiting == 4)
        until(lambda: running.front_end.admission.started == 0)
        assert len(running.cluster.order) == 2


class TestDeadline:
    def test_in_the_cluster(self, start: Start) -> None:
        running = start(request_timeout_s=0.2)
        running.cluster.held = True
        with running.client() as client:
            answer = client.post("/v1/completions", json=body(prompt=["a", "b"]))
        assert answer.status_code == 504
        assert answer.json()["error"]["message"] == "the request was given up: no token came for 0.2 s"
        assert len(running.cluster.aborted) == 2
        assert running.metrics()['lambdascale_failures_total{reason="deadline"}'] == 2

    def test_in_the_queue(self, start: Start) -> None:
        running = start(request_timeout_s=0.3, window=1)
        running.cluster.held = True
        with running.client() as client, ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda _: client.post("/v1/completions", json=body(stream=True)), range(2)))
        assert [answer.status_code for answer in answers] == [504, 504]
        assert running.front_end.admission.waiting == running.front_end.admission.started == 0

    def test_between_tokens(self, start: Start) -> None:
        """A stream that has begun ends with an event."""
        running = start(request_timeout_s=0.3)
        running.cluster.held = True
        with running.connect() as connection:
            connection.sendall(post(json.dumps(body(stream=True)).encode(), b"Connection: close"))
            until(lambda: len(running.cluster.offered) == 1)
            ((_, sink),) = running.cluster.offered.values()
            sink.tokens([65], False)
            answer = read_all(connection)
        assert status_of(answer) == 200
        assert b"no token came for 0.3 s" in answer


class TestFull:
    def test_too_many_wait(self, start: Start) -> None:
        """429 with an estimate, while those who wait are answered."""
        running = start(window=1, queue_requests=4, client_share=1.0)
        running.cluster.held = True
        with ThreadPoolExecutor(5) as pool, running.client() as client:
            asked = [pool.submit(client.post, "/v1/completions", json=body()) for _ in range(5)]
            until(lambda: running.front_end.admission.waiting == 4)
            refused = client.post("/v1/completions", json=body(stream=True))
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "10"
            assert refused.json()["error"]["message"] == "the server is busy: 4 requests wait, 4 may"
            running.cluster.held = False
            running.cluster.answer(running.cluster.order[0].request_id)
            assert [each.result().status_code for each in asked] == [200] * 5
        assert running.refusals(429, "queue_requests") == 1
        assert running.front_end.admission.started == 0

    def test_a_refused_prompt_is_not_cut_into_tokens(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        running = start(window=1, queue_requests=1)
        running.cluster.held = True
        with running.connect() as one, running.connect() as two, running.client() as client:
            one.sendall(raw())
            two.sendall(raw())
            until(lambda: running.front_end.admission.waiting == 1)
            monkeypatch.setattr(type(running.front_end._text), "encode", lambda *_, **__: pytest.fail("it is cut"))
            assert client.post("/v1/completions", json=body()).status_code == 429

    def test_the_tokens_of_those_that_wait(self, start: Start) -> None:
        running = start(window=1, queue_tokens=40, client_share=1.0)
        running.cluster.held = True
        with running.connect() as one, running.connect() as two, running.client() as client:
            for connection in (one, two):
                connection.sendall(raw(max_tokens=30))
            until(lambda: running.front_end.admission.waiting == 1)
            refused = client.post("/v1/completions", json=body(max_tokens=30))
            assert refused.status_code == 429
            assert "31 tokens wait, 40 may" in refused.json()["error"]["message"]
        assert running.refusals(429, "queue_tokens") == 1

    def test_one_client_among_others(self, start: Start) -> None:
        """Clients are told apart by their keys; one that has filled its share keeps no other out, nor waiting."""
        running = start(window=1, queue_requests=8, api_keys=("one", "two"))
        running.cluster.held = True
        headers = [{"Authorization": f"Bearer {key}"} for key in ("one", "two")]
        with ThreadPoolExecutor(8) as pool, running.client() as client:
            asked = [pool.submit(client.post, "/v1/completions", json=body(), headers=headers[0]) for _ in range(5)]
            until(lambda: running.front_end.admission.waiting == 4)
            refused = client.post("/v1/completions", json=body(), headers=headers[0])
            assert refused.status_code == 429
            assert "of this client" in refused.json()["error"]["message"]
            asked.append(pool.submit(client.post, "/v1/completions", json=body(prompt="two"), headers=headers[1]))
            until(lambda: running.front_end.admission.waiting == 5)
            for number in range(6):
                until(lambda number=number: len(running.cluster.order) == number + 1)  # type: ignore[misc]  # bound here
                running.cluster.answer(running.cluster.order[-1].request_id)
            assert [each.result().status_code for each in asked] == [200] * 6
        assert [ticket.prompt_tokens for ticket in running.cluster.order] == [1, 1, 3, 1, 1, 1]


class TestStreams:
    def test_every_token_has_its_event(self, start: Start) -> None:
        """A token that is half a character has an event, too, with an empty text."""
        running = start()
        with running.client() as client:
            asked = body(stream=True, max_tokens=5, stream_options={"include_usage": True, "continuous_usage_stats": True})
            lines = [line[6:] for line in client.post("/v1/completions", json=asked).text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        chunks = [json.loads(line) for line in lines]
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 5]
        assert [len(chunk["choices"]) for chunk in chunks] == [1] * 5 + [0]

    def test_several_prompts(self, start: Start) -> None:
        """The last event of a choice has its reason, and no other has."""
        running = start()
        with running.client() as client:
            answer = client.post("/v1/completions", json=body(stream=True, prompt=["a", "b", "c"]))
        chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
        for index in range(3):
            reasons = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["index"] == index]
            assert reasons == [None, None, "length"]
