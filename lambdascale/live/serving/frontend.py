"""The front end: OpenAI's completions and chat completions over HTTP, and the state of the cluster.

It knows requests, tokens and sinks; where a request is served is the control plane's business.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from prometheus_client import CollectorRegistry, Counter, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lambdascale.core import Request, UserError
from lambdascale.inference.batch import Ticket
from lambdascale.inference.sampling import Sampling, usable_temperature
from lambdascale.live.controller.answers import Sink
from lambdascale.live.serving.exposition import Collector
from lambdascale.live.serving.limits import MOST_PROMPTS, Limits
from lambdascale.live.serving.openai_api import (
    Answer,
    ApiError,
    ChatBody,
    ChatForm,
    CommonBody,
    CompletionBody,
    CompletionForm,
    Form,
    decode,
    plain,
    prompts_of,
)
from lambdascale.live.serving.state import ClusterState
from lambdascale.live.serving.text import Growing, Text

_DEFAULT_TOKENS = 16  # of /v1/completions, as OpenAI's
_TOKENIZERS = 2  # threads: further prompts wait, so that the nodes of this host keep their processors
_json = msgspec.json.Encoder().encode


class Cluster(Protocol):
    """The part of a backend that the front end uses."""

    def now(self) -> float:
        """Seconds of the run."""
        ...

    def offer(self, request: Request, ticket: Ticket, sink: Sink) -> None:
        """Take a request. ``sink`` hears its answer, or the reason for having none."""
        ...

    def abort(self, request_id: int) -> None:
        """End a request whose client has hung up."""
        ...


@dataclass(frozen=True)
class Piece:
    """The next tokens of an answer, or the reason why it failed."""

    tokens: Sequence[int] = ()
    finished: bool = False
    failure: str | None = None


class _Waiting:
    """A sink that hands pieces to a coroutine."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Piece] = asyncio.Queue()

    def tokens(self, tokens: Sequence[int], finished: bool) -> None:
        """See Sink."""
        self._put(Piece(tokens, finished))

    def failed(self, reason: str) -> None:
        """See Sink."""
        self._put(Piece(failure=reason))

    def _put(self, piece: Piece) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(self.queue.put_nowait, piece)


class FrontEnd:
    """The HTTP application, ``app``. ``model`` is the name served; a sequence has ``slot_tokens`` tokens at most.

    Each returns a reason, or "": ``closed`` why no request is taken, ``ill`` why none can be answered (/health), ``unready`` why
    none would be answered right now (/ready).
    """

    def __init__(
        self,
        *,
        model: str,
        text: Text,
        cluster: Cluster,
        state: ClusterState,
        slot_tokens: int,
        closed: Callable[[], str],
        ill: Callable[[], str],
        unready: Callable[[], str],
    ) -> None:
        self._model = model
        self._text = text
        self._cluster = cluster
        self._state = state
        self._slot_tokens = slot_tokens
        self._limits = Limits(slot_tokens=slot_tokens, longest_token=text.longest_token)
        self._closed = closed
        self._ill = ill
        self._unready = unready
        self._tokenizers = ThreadPoolExecutor(_TOKENIZERS, thread_name_prefix="tokenize")
        self._ids = itertools.count()
        self._created = int(time.time())
        self._registry = CollectorRegistry()
        self._registry.register(Collector(state))
        self._refusals = Counter(
            "lambdascale_refusals", "requests answered with an error, by HTTP status", ["status"], registry=self._registry
        )
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self._counted(self._completions), methods=["POST"]),
                Route("/v1/chat/completions", self._counted(self._chat), methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{model:path}", self._one_model),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._metrics),
                Route("/cluster", self._cluster_state),
            ]
        )

    # -- what is not an answer ---------------------------------------------------------------------------------------

    async def _health(self, http: HttpRequest) -> Response:
        return _condition(self._ill())

    async def _ready(self, http: HttpRequest) -> Response:
        return _condition(self._ill() or self._unready())

    async def _models(self, http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _one_model(self, http: HttpRequest) -> Response:
        if http.path_params["model"] != self._model:
            return self._unknown(http.path_params["model"]).response()
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "lambdascale",
            "max_model_len": self._slot_tokens,
        }

    async def _metrics(self, http: HttpRequest) -> Response:
        return Response(generate_latest(self._registry), media_type="text/plain; version=0.0.4")

    async def _cluster_state(self, http: HttpRequest) -> Response:
        return JSONResponse(self._state.snapshot())

    # -- answers -----------------------------------------------------------------------------------------------------

    def _counted(self, answer: Callable[[HttpRequest], Awaitable[Response]]) -> Callable[[HttpRequest], Awaitable[Response]]:
        """An endpoint whose errors become responses, which are counted."""

        async def endpoint(http: HttpRequest) -> Response:
            try:
                return await answer(http)
            except ApiError as error:
                self._refusals.labels(str(error.status)).inc()
                return error.response()

        return endpoint

    async def _completions(self, http: HttpRequest) -> Response:
        body = decode(await self._limits.body(http), CompletionBody)
        self._check(body)
        if body.echo:
            raise ApiError(400, "echo is not supported", param="echo")
        given = prompts_of(body.prompt)
        if len(given) > MOST_PROMPTS:
            raise ApiError(400, f"a request may have {MOST_PROMPTS} prompts at most, not {len(given)}", param="prompt")
        prompts = [await self._tokens_of(p) if isinstance(p, str) else self._ids_of(p) for p in given]
        bound = _DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        return await self._answer(http, body, prompts, bound, CompletionForm(self._model))

    async def _tokens_of(self, text: str) -> list[int]:
        self._limits.check_text(text, "prompt")
        return await self._working(lambda: self._text.encode(text))

    async def _working(self, work: Callable[[], list[int]]) -> list[int]:
        """Have a tokenizer's thread do it: the event loop goes on."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizers, work)

    def _ids_of(self, prompt: list[int]) -> list[int]:
        if any(not 0 <= token < self._text.vocab for token in prompt):
            raise ApiError(400, f"token ids must be between 0 and {self._text.vocab - 1}", param="prompt")
        return prompt

    async def _chat(self, http: HttpRequest) -> Response:
        body = decode(await self._limits.body(http), ChatBody)
        self._check(body)
        if not body.messages:
            raise ApiError(400, "messages must not be empty", param="messages")
        messages = [plain(message) for message in body.messages]
        prompt = await self._working(lambda: self._conversation(messages))
        bound = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        room = max(1, self._slot_tokens - len(prompt))
        return await self._answer(http, body, [prompt], room if bound is None else bound, ChatForm(self._model))

    def _conversation(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation; in a tokenizer's thread."""
        try:
            text = self._text.chat(messages)
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from error
        self._limits.check_text(text, "messages")
        return self._text.encode(text, special=False)

    def _check(self, body: CommonBody) -> None:
        closed = self._closed()
        if closed:
            raise ApiError(503, closed, kind="server_error")
        if body.model != self._model:
            raise self._unknown(body.model)
        for name, value in (("n", body.n), ("best_of", body.best_of)):
            if value not in (None, 1):
                raise ApiError(400, f"{name} must be 1, not {value}", param=name)
        if body.logprobs:
            raise ApiError(400, "logprobs are not supported", param="logprobs")
        if len(body.stops) > 4:
            raise ApiError(400, "at most 4 stop strings are allowed", param="stop")

    def _unknown(self, model: str) -> ApiError:
        return ApiError(404, f"the model {model} does not exist; this server has {self._model}", param="model")

    async def _answer(self, http: HttpRequest, body: CommonBody, prompts: list[list[int]], bound: int, form: Form) -> Response:
        tickets = [self._ticket(body, prompt, bound) for prompt in prompts]
        streams = [self._stream(ticket, body.stops, index) for index, ticket in enumerate(tickets)]
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(self._events(streams, form, usage), media_type="text/event-stream")
        answers = await asyncio.gather(*(self._whole(http, stream) for stream in streams))
        return Response(_json(form.whole(answers)), media_type="application/json")

    def _ticket(self, body: CommonBody, prompt: list[int], bound: int) -> Ticket:
        if bound < 1:
            raise ApiError(400, f"max_tokens must be at least 1, not {bound}", param="max_tokens")
        if not prompt:
            raise ApiError(400, "the prompt has no tokens", param="prompt")
        if len(prompt) + bound > self._slot_tokens:
            raise ApiError(
                400,
                f"this server's maximum context length is {self._slot_tokens} tokens, the request has {len(prompt)} in the "
                f"prompt and asks for {bound}",
            )
        try:
            sampling = Sampling(
                temperature=1.0 if body.temperature is None else usable_temperature(float(body.temperature)),
                top_p=1.0 if body.top_p is None else float(body.top_p),
                seed=secrets.randbits(31) if body.seed is None else body.seed,
            )
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        ends = frozenset[int]() if body.ignore_eos else self._text.stop_tokens
        return Ticket(next(self._ids), list(prompt), len(prompt), bound, sampling, ends)

    async def _stream(self, ticket: Ticket, stops: Sequence[str], index: int) -> AsyncIterator[tuple[str, Answer]]:
        """Yield the answer's text as it comes, with its state so far. ApiError if the cluster gives it up."""
        waiting, text = _Waiting(), Growing(self._text, stops)
        answer = Answer(index, ticket.prompt_tokens)
        request = Request(ticket.request_id, self._cluster.now(), self._model, ticket.prompt_tokens, ticket.max_tokens)
        self._cluster.offer(request, ticket, waiting)
        try:
            while answer.reason is None:
                piece = await waiting.queue.get()
                if piece.failure is not None:
                    raise ApiError(503, piece.failure, kind="server_error")
                answer.completion_tokens += len(piece.tokens)
                new = text.add(piece.tokens, last=piece.finished)
                answer.text += new
                ended = bool(piece.tokens) and piece.tokens[-1] in ticket.stop_tokens
                if text.stopped or piece.finished:
                    answer.reason = "stop" if text.stopped or ended else "length"
                if new or answer.reason is not None:
                    yield new, answer
        finally:
            if answer.reason is None or text.stopped:
                self._cluster.abort(ticket.request_id)

    async def _whole(self, http: HttpRequest, stream: AsyncIterator[tuple[str, Answer]]) -> Answer:
        """Return all of it; given up when the client hangs up."""
        collecting = asyncio.ensure_future(_last(stream))
        while True:
            done, _ = await asyncio.wait({collecting}, timeout=1.0)
            if done:
                return collecting.result()
            if await http.is_disconnected():
                collecting.cancel()
                raise ApiError(499, "the client has hung up")

    async def _events(self, streams: list[AsyncIterator[tuple[str, Answer]]], form: Form, usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events. An error after the first byte is an event too, as OpenAI's clients expect."""
        answers: dict[int, Answer] = {}
        try:
            async for new, answer in _merged(streams):
                first = answer.index not in answers
                answers[answer.index] = answer
                for chunk in form.chunks(new, answer, first):
                    yield b"data: " + _json(chunk) + b"\n\n"
        except ApiError as error:
            yield b"data: " + _json(error.body) + b"\n\n"
            return
        if usage:
            yield b"data: " + _json(form.usage(list(answers.values()))) + b"\n\n"
        yield b"data: [DONE]\n\n"


def _condition(problem: str) -> Response:
    return JSONResponse({"status": "unavailable", "reason": problem}, 503) if problem else JSONResponse({"status": "ok"})


async def _last(stream: AsyncIterator[tuple[str, Answer]]) -> Answer:
    last = None
    async for _, answer in stream:
        last = answer
    assert last is not None, "a stream yields at least its end"
    return last


async def _merged(streams: list[AsyncIterator[tuple[str, Answer]]]) -> AsyncIterator[tuple[str, Answer]]:
    """Items of several streams as they come."""
    if len(streams) == 1:
        async for only in streams[0]:
            yield only
        return
    queue: asyncio.Queue[tuple[str, Answer] | ApiError | None] = asyncio.Queue()

    async def pump(stream: AsyncIterator[tuple[str, Answer]]) -> None:
        try:
            async for item in stream:
                await queue.put(item)
            await queue.put(None)
        except ApiError as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(pump(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, ApiError):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
