"""The front end: OpenAI's completions and chat completions over HTTP, and the state of the cluster.

It knows requests, tokens and sinks; where a request is served is the control plane's business.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Send

from lambdascale.core import UserError
from lambdascale.inference.batch import Ticket
from lambdascale.inference.sampling import Sampling, usable_temperature
from lambdascale.live.serving.admission import Admission, Bounds, Refused
from lambdascale.live.serving.answering import Answering, Cluster, busy
from lambdascale.live.serving.exposition import Collector
from lambdascale.live.serving.guard import guarded
from lambdascale.live.serving.limits import Limits
from lambdascale.live.serving.openai_api import (
    Answer,
    ApiError,
    ChatBody,
    ChatForm,
    CommonBody,
    CompletionBody,
    CompletionForm,
    Form,
    check_neutral,
    decode,
    plain,
    prompts_of,
)
from lambdascale.live.serving.openapi import describe
from lambdascale.live.serving.options import HttpOptions
from lambdascale.live.serving.state import ClusterState
from lambdascale.live.serving.tally import Tally
from lambdascale.live.serving.text import Text

_DEFAULT_TOKENS = 16  # of /v1/completions, as OpenAI's
_TOKENIZERS = 2  # threads: further prompts wait, so that the nodes of this host keep their processors
_CLOSED_RETRY_S = 5
_json = msgspec.json.Encoder().encode
T = TypeVar("T")


class FrontEnd:
    """The HTTP application, ``app``. ``model`` is the name served; a sequence has ``slot_tokens`` tokens at most.

    The cluster gets ``window`` requests at a time (see admission). Each returns a reason, or "": ``closed`` why no request is
    taken, ``ill`` why none can be answered (/health), ``unready`` why none would be answered right now (/ready).
    """

    def __init__(
        self,
        *,
        model: str,
        text: Text,
        cluster: Cluster,
        state: ClusterState,
        options: HttpOptions,
        slot_tokens: int,
        window: int,
        closed: Callable[[], str],
        ill: Callable[[], str],
        unready: Callable[[], str],
    ) -> None:
        self._model = model
        self._text = text
        self._cluster = cluster
        self._state = state
        self._options = options
        self._slot_tokens = slot_tokens
        self._limits = Limits(slot_tokens=slot_tokens, longest_token=text.longest_token)
        self._closed = closed
        self._ill = ill
        self._unready = unready
        self._tokenizers = ThreadPoolExecutor(_TOKENIZERS, thread_name_prefix="tokenize")
        self._ids = itertools.count()
        self._created = int(time.time())
        bounds = Bounds(
            window=window,
            requests=options.queue_requests,
            tokens=options.waiting_tokens(slot_tokens),
            share=options.client_share,
        )
        self.admission = Admission(bounds, time.monotonic)
        self._registry = CollectorRegistry()
        self._registry.register(Collector(state))
        self.tally = Tally(self._registry, self.admission)
        self._description = describe(model, bool(options.api_keys))
        self.app: ASGIApp = guarded(self._routes(), options, self.tally)

    def _routes(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/completions", self._counted(self._completions), methods=["POST"]),
                Route("/v1/chat/completions", self._counted(self._chat), methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{model:path}", self._counted(self._one_model)),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._metrics),
                Route("/cluster", self._cluster_state),
                Route("/openapi.json", self._openapi),
            ],
            exception_handlers={HTTPException: self._no_route},
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
            raise self._unknown(http.path_params["model"])
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

    async def _openapi(self, http: HttpRequest) -> Response:
        return JSONResponse(self._description)

    async def _no_route(self, http: HttpRequest, error: Exception) -> Response:
        """Answer a request for a path or with a method that does not exist here."""
        assert isinstance(error, HTTPException), "it is registered for these"
        answer = ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}", reason="no_route")
        answer.headers |= dict(error.headers or {})
        self.tally.refused(answer.status, answer.reason)
        return answer.response()

    # -- answers -----------------------------------------------------------------------------------------------------

    def _counted(self, answer: Callable[[HttpRequest], Awaitable[Response]]) -> Callable[[HttpRequest], Awaitable[Response]]:
        """An endpoint whose errors become responses, which are counted."""

        async def endpoint(http: HttpRequest) -> Response:
            try:
                return await answer(http)
            except (ApiError, ClientDisconnect) as caught:
                error = caught if isinstance(caught, ApiError) else _client_left()
                self.tally.refused(error.status, error.reason)
                return error.response()

        return endpoint

    async def _completions(self, http: HttpRequest) -> Response:
        body = decode(await self._limits.body(http), CompletionBody)
        self._check(body)
        given = prompts_of(body.prompt)
        most = self._options.max_prompts
        if len(given) > most:
            raise ApiError(400, f"a request may have {most} prompts at most, not {len(given)}", param="prompt")
        self._look_for_room(http, len(given))
        prompts = [await self._tokens_of(p) if isinstance(p, str) else self._ids_of(p) for p in given]
        bound = _DEFAULT_TOKENS if body.limit is None else body.limit
        return await self._answer(http, body, prompts, bound, CompletionForm(self._model))

    def _look_for_room(self, http: HttpRequest, prompts: int) -> None:
        """Refuse what the queue has no room for before its prompts are cut into tokens. ApiError 429."""
        try:
            self.admission.check(http.scope["client_id"], prompts)
        except Refused as refused:
            raise busy(refused) from refused

    async def _tokens_of(self, text: str) -> list[int]:
        self._limits.check_text(text, "prompt")
        return await self._working(lambda: self._text.encode(text))

    async def _working(self, work: Callable[[], list[int]]) -> list[int]:
        """Run a function in a tokenizer's thread, while the event loop goes on."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizers, work)

    def _ids_of(self, prompt: list[int]) -> list[int]:
        if any(not 0 <= token < self._text.vocab for token in prompt):
            raise ApiError(400, f"token ids must be between 0 and {self._text.vocab - 1}", param="prompt")
        return prompt

    async def _chat(self, http: HttpRequest) -> Response:
        body = decode(await self._limits.body(http), ChatBody)
        self._check(body)
        self._look_for_room(http, 1)
        messages = [plain(message) for message in body.messages]
        prompt = await self._working(lambda: self._conversation(messages))
        room = max(1, self._slot_tokens - len(prompt))
        return await self._answer(http, body, [prompt], room if body.limit is None else body.limit, ChatForm(self._model))

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
            raise ApiError(503, closed, "server_error", reason="closed", retry_after_s=_CLOSED_RETRY_S)
        if body.model != self._model:
            raise self._unknown(body.model)
        check_neutral(body)

    def _unknown(self, model: str) -> ApiError:
        return ApiError(
            404, f"the model {model} does not exist; this server has {self._model}", param="model", reason="unknown_model"
        )

    async def _answer(self, http: HttpRequest, body: CommonBody, prompts: list[list[int]], bound: int, form: Form) -> Response:
        tickets = [self._ticket(body, prompt, bound) for prompt in prompts]
        answering = Answering(
            cluster=self._cluster,
            admission=self.admission,
            tally=self.tally,
            text=self._text,
            model=self._model,
            client=http.scope["client_id"],
            tickets=tickets,
            stops=body.stops,
            timeout_s=self._options.request_timeout_s,
        )
        try:
            if not body.stream:
                return Response(_json(form.whole(await _attended(http, answering.whole()))), media_type="application/json")
            events = _events(answering, form, body)
            first = await _attended(http, anext(events))  # an error before it has a status of its own
            return _EventStream(_rest(first, events), media_type="text/event-stream")
        except BaseException:
            answering.close()
            raise

    def _ticket(self, body: CommonBody, prompt: list[int], bound: int) -> Ticket:
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


def _condition(problem: str) -> Response:
    return JSONResponse({"status": "unavailable", "reason": problem}, 503) if problem else JSONResponse({"status": "ok"})


class _EventStream(StreamingResponse):
    """Server-sent events; whatever ends the response, the events are closed at once."""

    body_iterator: AsyncIterator[bytes]

    async def stream_response(self, send: Send) -> None:
        """Send the whole response."""
        async with aclosing(self.body_iterator):  # type: ignore[type-var]  # it is a generator, whose type starlette widens
            await super().stream_response(send)


async def _rest(first: bytes, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async with aclosing(events):  # type: ignore[type-var]  # a generator
        yield first
        async for event in events:
            yield event


async def _events(answering: Answering, form: Form, body: CommonBody) -> AsyncIterator[bytes]:
    """Server-sent events. An error after the first is an event too, as OpenAI's clients expect."""
    options = body.stream_options
    stats = options is not None and options.continuous_usage_stats
    answers: dict[int, Answer] = {}
    try:
        async with aclosing(answering.stream()) as pieces:  # type: ignore[type-var]  # a generator
            async for new, answer in pieces:
                first = answer.index not in answers
                answers[answer.index] = answer
                yield b"data: " + _json(form.chunk(new, answer, first, stats)) + b"\n\n"
    except ApiError as error:
        if not answers:
            raise
        yield b"data: " + _json(error.body) + b"\n\n"
        return
    if options is not None and options.include_usage:
        yield b"data: " + _json(form.usage(list(answers.values()))) + b"\n\n"
    yield b"data: [DONE]\n\n"


async def _attended(http: HttpRequest, work: Awaitable[T]) -> T:
    """Return the result of ``work``, which is cancelled when the client hangs up: then ApiError 499, which nobody reads."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise _client_left()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(http: HttpRequest) -> None:
    """Wait until the client hangs up."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _client_left() -> ApiError:
    return ApiError(499, "the client has hung up", reason="client_left")
