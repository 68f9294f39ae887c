"""Bounds on what one HTTP request may bring, so that no request keeps the server from its other work."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request as HttpRequest

from lambdascale.live.serving.openai_api import ApiError

_ESCAPED_BYTES = 6  # bytes of a JSON string's character that is written as \uXXXX
_LONG_NUMBER = 20  # digits
DROPPED_BYTES = 64 << 20
BODIES_BYTES = 256 << 20  # of all bodies that are being received
_HEAD_BYTES = 64 << 10  # for everything in a body that is not a prompt


@dataclass(kw_only=True)
class Limits:
    """A sequence has ``slot_tokens`` tokens at most, and a token ``longest_token`` characters: no prompt can use more text.

    ``held``: bytes of bodies that are being received.
    """

    slot_tokens: int
    longest_token: int
    held: int = 0

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
        ask before they send (``Expect: 100-continue``) get it at once. ApiError 503 while too many bodies are being received,
        415 for one that is compressed.
        """
        if http.headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "a body must not be compressed: Content-Encoding is not supported", reason="compressed_body")
        declared = http.headers.get("content-length", "")
        too_long = declared.isdecimal() and (len(declared) >= _LONG_NUMBER or int(declared) > self.body_bytes)
        if too_long and "expect" in http.headers:
            raise self._too_long()
        parts: list[bytes] = []
        size = kept = 0
        try:
            async for part in http.stream():
                size += len(part)
                too_long = too_long or size > self.body_bytes
                if not too_long:
                    parts.append(part)
                    kept += len(part)
                    self.held += len(part)
                    self._check_held()
                elif size > self.body_bytes + DROPPED_BYTES:
                    break
        finally:
            self.held -= kept
        if too_long:
            raise self._too_long()
        return b"".join(parts)

    def _check_held(self) -> None:
        if self.held > max(BODIES_BYTES, self.body_bytes):
            message = "the server is receiving too many requests at a time"
            raise ApiError(503, message, "server_error", reason="bodies", retry_after_s=1)

    def _too_long(self) -> ApiError:
        return ApiError(
            413,
            f"a body has {self.body_bytes} bytes at most here: {_ESCAPED_BYTES} for each of the {self.characters} characters "
            f"that {self.slot_tokens} tokens can hold, and {_HEAD_BYTES} more",
            reason="body_too_large",
        )
