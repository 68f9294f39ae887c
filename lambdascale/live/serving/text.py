"""Text to tokens and back: a packed model's tokenizer and chat template, and the text of an answer while it grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lambdascale.core import UserError
from lambdascale.live.serving.chat import ChatTemplate
from lambdascale.live.serving.special_tokens import add_missing, document, end_tokens, named_tokens

_INCOMPLETE = "\ufffd"  # what a decoder shows for bytes that are no whole character yet


class Text:
    """A model's tokenizer. UserError if its directory has none."""

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{directory} has no tokenizer.json: it cannot be served as text")
        self._tokenizer = _tokenizer(path)
        add_missing(self._tokenizer, directory)
        self._template = ChatTemplate(directory, document(directory / "tokenizer_config.json"), named_tokens(directory))
        self.stop_tokens = end_tokens(self._tokenizer, directory)

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return int(self._tokenizer.get_vocab_size())

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, as the vocabulary spells it: at least as many as it stands for."""
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of a text, with the ``special`` ones that a model's prompts begin with.

        Takes some tenths of a second for the longest texts, in which other threads go on: of the tokenizer's methods, only those
        for batches release the interpreter's lock.
        """
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)
        return list(encoding.ids)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return a conversation as text, up to where the assistant's answer begins. UserError if the template refuses it."""
        return self._template.render(messages)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


class Growing:
    """The text of an answer as its tokens come: the part that can be shown now, and whether a stop string has come.

    Text is held back while it may be the beginning of a stop string or half a character. A token costs as much at the end of a
    long answer as at its beginning: it is decoded behind the few tokens before it, which decide about spaces between them.
    """

    def __init__(self, text: Text, stops: Sequence[str]) -> None:
        self._text = text
        self._stops = tuple(stops)
        self._tokens: list[int] = []
        self._context: list[int] = []  # the last tokens whose text is known
        self._fresh: list[int] = []  # the tokens behind them
        self._known = 0  # characters
        self._held = ""
        self.stopped = False

    def add(self, tokens: Sequence[int], *, last: bool) -> str:
        """Take tokens and return the new text that is certain. Nothing more comes after a stop string."""
        if self.stopped:
            return ""
        self._tokens += tokens
        self._fresh += tokens
        self._held += self._text.decode(self._tokens)[self._known :] if last else self._decoded()
        ends = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if ends:
            self.stopped = True
            certain = min(ends)
        else:
            certain = len(self._held) if last else len(self._held) - self._begun()
        new, self._held = self._held[:certain], self._held[certain:]
        return new

    def _decoded(self) -> str:
        """Return the text of the fresh tokens, "" while they end with half a character."""
        known = self._text.decode(self._context)
        now = self._text.decode([*self._context, *self._fresh])
        if now == known:
            self._fresh = []  # without text, such as special ones: nothing depends on them
        if now.endswith(_INCOMPLETE) or len(now) <= len(known):
            return ""
        self._context, self._fresh = self._fresh, []
        self._known += len(now) - len(known)
        return now[len(known) :]

    def _begun(self) -> int:
        """Number of characters at the end of the held text that may be the beginning of a stop string."""
        return max(
            (
                length
                for stop in self._stops
                for length in range(min(len(stop) - 1, len(self._held)), 0, -1)
                if self._held.endswith(stop[:length])
            ),
            default=0,
        )


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's errors are of type Exception, and panics not even of that
        raise UserError(f"{path} is not a tokenizer that this version of tokenizers can read: {error}") from None
