"""The prompts of one HTTP request on their way to answers: queue, cluster, tokens, text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from lambdascale.core import Failure, Request
from lambdascale.inference.batch import Ticket
from lambdascale.live.controller.answers import Sink
from lambdascale.live.serving.admission import Admission, Place, Refused
from lambdascale.live.serving.openai_api import Answer, ApiError
from lambdascale.live.serving.reasons import Unanswered
from lambdascale.live.serving.tally import Tally
from lambdascale.live.serving.text import Growing, Text


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
    """The next tokens of prompt ``index``, or the reason why it failed."""

    index: int
    tokens: Sequence[int] = ()
    finished: bool = False
    failure: Failure | None = None


class NoAnswer(ApiError):
    """The error for a prompt that was accepted and has no whole answer."""

    def __init__(self, status: int, message: str, why: Unanswered) -> None:
        super().__init__(status, message, "server_error", reason=why)
        self.why = why


class _Waiting:
    """A sink that hands the pieces of a prompt to the event loop."""

    def __init__(self, index: int, deliver: Callable[[Piece], None]) -> None:
        self._index = index
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()

    def tokens(self, tokens: Sequence[int], finished: bool) -> None:
        """See Sink."""
        self._put(Piece(self._index, tokens, finished))

    def failed(self, failure: Failure) -> None:
        """See Sink."""
        self._put(Piece(self._index, failure=failure))

    def _put(self, piece: Piece) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(self._deliver, piece)


@dataclass
class _Part:
    """A prompt: ``due`` is when its next token must have come; ``offered``: the cluster has it, and has not ended it."""

    ticket: Ticket
    answer: Answer
    text: Growing
    due: float
    offered: bool = False


class Answering:
    """Takes the prompts of a body into the queue when it is made, and yields their answers; ``close()`` gives up what is left.

    ``timeout_s``: see HttpOptions.request_timeout_s. ApiError 429 if the queue has no room.
    """

    def __init__(
        self,
        *,
        cluster: Cluster,
        admission: Admission,
        tally: Tally,
        text: Text,
        model: str,
        client: str,
        tickets: Sequence[Ticket],
        stops: Sequence[str],
        timeout_s: float,
    ) -> None:
        self._cluster = cluster
        self._admission = admission
        self._tally = tally
        self._model = model
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._arrived = cluster.now()
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        due = self._loop.time() + timeout_s
        self._open = {
            index: _Part(ticket, Answer(index, ticket.prompt_tokens), Growing(text, stops), due)
            for index, ticket in enumerate(tickets)
        }
        wanted = [
            (part.ticket.prompt_tokens + part.ticket.max_tokens, partial(self._offer, index))
            for index, part in self._open.items()
        ]
        self._places: dict[int, Place] = dict(zip(self._open, enter(admission, client, wanted), strict=True))

    def _offer(self, index: int) -> None:
        """Give a prompt to the cluster: it has a place in the window."""
        part = self._open[index]
        part.offered = True
        ticket = part.ticket
        request = Request(ticket.request_id, self._arrived, self._model, ticket.prompt_tokens, ticket.max_tokens)
        self._cluster.offer(request, ticket, _Waiting(index, self._deliver))

    def _deliver(self, piece: Piece) -> None:
        """Take a piece. With the last, the place goes to the next at once: a client that reads slowly does not hold it."""
        self._pieces.put_nowait(piece)
        part = self._open.get(piece.index)
        if part is not None and (piece.finished or piece.failure is not None):
            part.offered = False
            self._admission.leave(self._places[piece.index])

    async def stream(self) -> AsyncIterator[tuple[str, Answer]]:
        """Yield, for every piece of an answer, its new text and its state by then.

        NoAnswer if the cluster gives a prompt up, or a token does not come in time. The rest is given up then, and when the
        iteration is closed.
        """
        try:
            while self._open:
                piece = await self._next()
                part = self._open.get(piece.index)
                if part is not None:
                    yield self._take(part, piece)
        except NoAnswer as error:
            self.close(error.why)
            raise
        finally:
            self.close()

    async def whole(self) -> list[Answer]:
        """Return complete answers, in the order of their prompts. Errors: see ``stream``."""
        last: dict[int, Answer] = {}
        async for _, answer in self.stream():
            last[answer.index] = answer
        return [last[index] for index in sorted(last)]

    async def _next(self) -> Piece:
        if not self._pieces.empty():
            await asyncio.sleep(0)  # neither this nor what is done with a piece waits: the event loop has others to serve
            return self._pieces.get_nowait()
        try:
            async with asyncio.timeout_at(min(part.due for part in self._open.values())):
                return await self._pieces.get()
        except TimeoutError as error:
            message = f"the request was given up: no token came for {self._timeout_s:g} s"
            raise NoAnswer(504, message, "deadline") from error

    def _take(self, part: _Part, piece: Piece) -> tuple[str, Answer]:
        """Add a piece to its answer; NoAnswer if it is the reason for having none."""
        if piece.failure is not None:
            raise NoAnswer(503, piece.failure.text, piece.failure.reason)
        answer, stops = part.answer, part.ticket.stop_tokens
        part.due = self._loop.time() + self._timeout_s
        answer.completion_tokens += len(piece.tokens)
        new = part.text.add(piece.tokens, last=piece.finished)
        answer.text += new
        if part.text.stopped or piece.finished:
            ended = part.text.stopped or (bool(piece.tokens) and piece.tokens[-1] in stops)
            answer.reason = "stop" if ended else "length"
            self._end(answer.index)
        return new, replace(answer)

    def close(self, reason: Unanswered = "client_left") -> None:
        """Give up all prompts that have no whole answer yet: those that wait first, so that none of them is started now."""
        if self._open:
            self._tally.failed(reason, len(self._open))
        for index in sorted(self._open, key=lambda index: self._open[index].offered):
            self._end(index)

    def _end(self, index: int) -> None:
        part = self._open.pop(index)
        if part.offered:
            self._cluster.abort(part.ticket.request_id)
        self._admission.leave(self._places[index])


def enter(admission: Admission, client: str, wanted: Sequence[tuple[int, Callable[[], None]]]) -> list[Place]:
    """Enter the queue; ApiError 429 if it has no room."""
    try:
        return admission.enter(client, wanted)
    except Refused as refused:
        raise busy(refused) from refused


def busy(refused: Refused) -> ApiError:
    """Return the error for a request that finds the queue full."""
    return ApiError(429, str(refused), "rate_limit_error", reason=refused.reason, retry_after_s=refused.retry_after_s)
