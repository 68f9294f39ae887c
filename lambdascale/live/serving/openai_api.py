"""OpenAI's requests, answers and errors as values: the contents of HTTP bodies. Nothing here waits or serves."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct
from starlette.responses import JSONResponse, Response

from lambdascale.live.serving.reasons import Reason

_LONGEST_STOP = 1024
Tokens = Annotated[int, Meta(ge=1, description="Longest answer, in tokens.")]
Stop = Annotated[str, Meta(min_length=1, max_length=_LONGEST_STOP)]
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
_NAMED = re.compile(r"at `\$\.(\w+)|field `([^`]*)`")


def _only(*values: Any) -> Meta:
    """Describe a parameter of which this server has these values alone, the ones that change nothing."""
    return Meta(extra_json_schema={"enum": list(values)})


class StreamOptions(Struct, forbid_unknown_fields=True):
    """Options of a streamed answer. ``continuous_usage_stats``, vLLM's: usage in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class CommonBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields of both kinds of request. Names and defaults are OpenAI's; ``ignore_eos`` is vLLM's.

    A field that is not here is refused by its name.
    """

    model: str
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: Annotated[str, Meta(description="A label of the client's own; it has no effect on answers.")] | None = None
    # Other implementations' parameters, of which this one has the value that changes nothing: see ``check_neutral``.
    n: Annotated[int | None, _only(1, None)] = None
    min_tokens: Annotated[int | None, _only(0, None)] = None
    frequency_penalty: Annotated[float | None, _only(0, None)] = None
    presence_penalty: Annotated[float | None, _only(0, None)] = None
    repetition_penalty: Annotated[float | None, _only(1, None)] = None
    top_k: Annotated[int | None, _only(-1, 0, None)] = None
    min_p: Annotated[float | None, _only(0, None)] = None
    logit_bias: Annotated[dict[str, float] | None, _only({}, None)] = None

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def limit(self) -> int | None:
        """Longest answer asked for. ApiError if two different ones are."""
        given = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(given) > 1:
            raise ApiError(400, "max_tokens and max_completion_tokens must not differ", param="max_tokens")
        return given.pop() if given else None


class CompletionBody(CommonBody, kw_only=True, forbid_unknown_fields=True):
    """/v1/completions."""

    prompt: str | list[int | str | list[int]]
    echo: Annotated[bool, _only(False)] = False
    suffix: Annotated[str | None, _only("", None)] = None
    best_of: Annotated[int | None, _only(1, None)] = None
    logprobs: Annotated[bool | int | None, _only(False, None)] = None


class ContentPart(Struct, forbid_unknown_fields=True):
    """A part of a message."""

    type: Annotated[str, _only("text")]
    text: str = ""


class ChatMessage(Struct, forbid_unknown_fields=True):
    """A message of a conversation. Fields of the type None are those that clients repeat from an answer."""

    role: str
    content: str | list[ContentPart] | None = None
    name: None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class ChatBody(CommonBody, kw_only=True, forbid_unknown_fields=True):
    """/v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    logprobs: Annotated[bool | None, _only(False, None)] = None
    top_logprobs: Annotated[int | None, _only(0, None)] = None


# Values that change nothing. ``is`` tells false from 0, which asks for log probabilities.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "min_tokens": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
}


def check_neutral(body: CommonBody) -> None:
    """Refuse, by name, parameters that ask for something this server does not do. ApiError 400."""
    for name, allowed in _NEUTRAL.items():
        value = getattr(body, name, None)
        if value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            continue
        choices = " or ".join("{}" if one == {} else msgspec.json.encode(one).decode() for one in allowed)
        raise ApiError(400, f"{name} must be {choices}, not {value}: this server supports no other", param=name)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")


class ApiError(Exception):
    """An error in OpenAI's form. ``reason``: its code, and its name in the metrics; ``retry_after_s``: when to ask again."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        *,
        reason: Reason = "bad_request",
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason: Reason = reason
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": reason}}

    def response(self) -> Response:
        """Return the error as an HTTP response."""
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


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

    def chunk(self, new: str, answer: Answer, first: bool, usage: bool) -> dict[str, Any]:
        """Return the chunk for a piece of an answer, with the ``usage`` so far if asked for."""
        counted = {"usage": usage_of([answer])} if usage else {}
        return {**self._head, "object": self.object_chunk, "choices": [self._part(new, answer, first)], **counted}

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
        named = _NAMED.search(str(error))
        raise ApiError(400, _readable(str(error)), param=(named[1] or named[2]) if named else None) from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
    except ValueError as error:  # UnicodeDecodeError among them
        raise ApiError(400, f"the body is not JSON: {error}") from error


def _readable(message: str) -> str:
    """Return msgspec's error, the most frequent one in plainer words."""
    unknown = re.match(r"Object contains unknown field `([^`]*)`", message)
    return f"{unknown[1]} is not supported by this server: {message}" if unknown else message


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
