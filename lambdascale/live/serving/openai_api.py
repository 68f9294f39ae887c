"""OpenAI's requests, answers and errors as values: the contents of HTTP bodies. Nothing here waits or serves."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct
from starlette.responses import JSONResponse, Response


class StreamOptions(Struct):
    """Options of a streamed answer."""

    include_usage: bool = False


class CommonBody(Struct, kw_only=True):
    """Fields of both kinds of request. Names and defaults are OpenAI's; ``ignore_eos`` is vLLM's."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    logprobs: bool | int | None = None
    best_of: int | None = None

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class CompletionBody(CommonBody, kw_only=True):
    """/v1/completions."""

    prompt: str | list[int | str | list[int]]
    echo: bool = False


class ContentPart(Struct):
    """A part of a message."""

    type: str
    text: str = ""


class ChatMessage(Struct):
    """A message of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None


class ChatBody(CommonBody, kw_only=True):
    """/v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None


class ApiError(Exception):
    """An error in OpenAI's form."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": None}}

    def response(self) -> Response:
        """Return the error as an HTTP response."""
        return JSONResponse(self.body, status_code=self.status)


@dataclass
class Answer:
    """The answer to one prompt, as far as it has come."""

    index: int
    prompt_tokens: int
    completion_tokens: int = 0
    text: str = ""
    reason: Literal["stop", "length"] | None = None


class Form:
    """The way in which answers are written."""

    prefix = ""
    object_whole = ""
    object_chunk = ""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return complete answers."""
        return {
            **self._head,
            "object": self.object_whole,
            "choices": [self._choice(answer) for answer in answers],
            "usage": usage_of(answers),
        }

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the last chunk of a stream that was asked for the usage."""
        return {**self._head, "object": self.object_chunk, "choices": [], "usage": usage_of(answers)}

    def chunks(self, new: str, answer: Answer, first: bool) -> list[dict[str, Any]]:
        """Return the chunks for a piece of an answer."""
        return [{**self._head, "object": self.object_chunk, "choices": [self._part(new, answer, first)]}]

    def _choice(self, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def _part(self, new: str, answer: Answer, first: bool) -> dict[str, Any]:
        raise NotImplementedError


class CompletionForm(Form):
    """Answers of /v1/completions."""

    prefix, object_whole, object_chunk = "cmpl", "text_completion", "text_completion"

    def _choice(self, answer: Answer) -> dict[str, Any]:
        return {"index": answer.index, "text": answer.text, "finish_reason": answer.reason, "logprobs": None}

    def _part(self, new: str, answer: Answer, first: bool) -> dict[str, Any]:
        return {"index": answer.index, "text": new, "finish_reason": answer.reason, "logprobs": None}


class ChatForm(Form):
    """Answers of /v1/chat/completions."""

    prefix, object_whole, object_chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text}
        return {"index": answer.index, "message": message, "finish_reason": answer.reason, "logprobs": None}

    def _part(self, new: str, answer: Answer, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant", "content": new} if first else {"content": new}
        return {"index": answer.index, "delta": delta, "finish_reason": answer.reason, "logprobs": None}


def usage_of(answers: Sequence[Answer]) -> dict[str, int]:
    """Count the tokens of all answers."""
    prompt = sum(answer.prompt_tokens for answer in answers)
    completion = sum(answer.completion_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


_Body = TypeVar("_Body", bound=CommonBody)


def decode(data: bytes, body: type[_Body]) -> _Body:
    """Decode a body. ApiError if it is not JSON of this form."""
    try:
        return msgspec.json.decode(data, type=body)
    except msgspec.MsgspecError as error:
        raise ApiError(400, str(error)) from error


def prompts_of(prompt: str | list[Any]) -> list[Any]:
    """Return the prompts, each a text or token ids. ApiError for a mixture."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(part) for part in prompt}
    if len(kinds) != 1:
        raise ApiError(400, "prompt must be a text, token ids, or a list of either", param="prompt")
    return [prompt] if kinds == {int} else list(prompt)


def plain(message: ChatMessage) -> dict[str, str]:
    """Return a message as chat templates take it. ApiError for parts that are no text."""
    content = message.content
    if isinstance(content, list):
        if any(part.type != "text" for part in content):
            raise ApiError(400, "only text is understood", param="messages")
        content = "".join(part.text for part in content)
    return {"role": message.role, "content": content or ""}
