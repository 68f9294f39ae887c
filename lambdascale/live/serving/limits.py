"""Bounds on what one HTTP request may bring, so that no request keeps the server from its other work."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request as HttpRequest

from lambdascale.live.serving.openai_api import ApiError

MOST_PROMPTS = 128
_ESCAPED_BYTES = 6  # a character of a JSON string takes as many when it is written as \uXXXX
_LONG_NUMBER = 20  # digits
DROPPED_BYTES = 64 << 20
_HEAD_BYTES = 64 << 10  # for everything in a body that is not a prompt


@dataclass(frozen=True, kw_only=True)
class Limits:
    """A sequence has ``slot_tokens`` tokens at most, and a token ``longest_token`` characters: no prompt can use more text."""

    slot_tokens: int
    longest_token: int

    @property
    def characters(self) -> int:
        """Characters of a prompt. A longer text has too many tokens, whatever it says; vLLM refuses it likewise."""
        return self.slot_tokens * self.longest_token

    @property
    def body_bytes(self) -> int:
        """Bytes of a body: the longest prompt with every character escaped, and 64 KiB."""
        return _HEAD_BYTES + _ESCAPED_BYTES * self.characters

    def check_text(self, text: str, param: str) -> None:
        """Refuse a text that cannot fit, before it is cut into tokens. ApiError 400."""
        if len(text) > self.characters:
            raise ApiError(
                400,
                f"this server's maximum context length is {self.slot_tokens} tokens, which hold {self.characters} characters "
                f"at most; the request has {len(text)}",
                param=param,
            )

    async def body(self, http: HttpRequest) -> bytes:
        """Read a request's body. ApiError 413 if it is longer than allowed; no more than that is kept at any time.

        What is too long is read on for a while and dropped: most clients look for a response when they have sent all. Those that
        ask before they send (``Expect: 100-continue``) get it at once.
        """
        declared = http.headers.get("content-length", "")
        too_long = declared.isdecimal() and (len(declared) >= _LONG_NUMBER or int(declared) > self.body_bytes)
        if too_long and "expect" in http.headers:
            raise self._too_long()
        parts, size = [], 0
        async for part in http.stream():
            size += len(part)
            too_long = too_long or size > self.body_bytes
            if not too_long:
                parts.append(part)
            elif size > self.body_bytes + DROPPED_BYTES:
                break
        if too_long:
            raise self._too_long()
        return b"".join(parts)

    def _too_long(self) -> ApiError:
        return ApiError(
            413,
            f"a body has {self.body_bytes} bytes at most here: {_ESCAPED_BYTES} for each of the {self.characters} characters "
            f"that {self.slot_tokens} tokens can hold, and {_HEAD_BYTES} more",
        )
