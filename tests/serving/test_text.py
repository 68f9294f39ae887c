"""The text of an answer while it grows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lambdascale.live.serving.text import Growing, Text

LETTERS = "abc €é"  # a token for each byte: parts of characters come alone, and in impossible orders
NO_TEXT = 256  # a special token
PICKS = st.lists(st.integers(0, 10), max_size=40)


def grown(text: Text, tokens: list[int], stops: list[str], pieces: list[int]) -> tuple[list[str], bool]:
    growing, shown, left = Growing(text, stops), [], list(tokens)
    for size in pieces:
        if len(left) > size:
            shown.append(growing.add(left[:size], last=False))
            left = left[size:]
    shown.append(growing.add(left, last=True))
    return shown, growing.stopped


@settings(deadline=None)
@given(PICKS, st.lists(st.sampled_from(["a", "b ", "ab", "aba", "€", "c"]), max_size=3), st.lists(st.integers(1, 3)))
def test_it_is_the_text_of_the_whole(text: Text, picks: list[int], stops: list[str], pieces: list[int]) -> None:
    """The text ends at the first stop string, however the tokens come."""
    alphabet = [*text.encode(LETTERS), NO_TEXT]
    tokens = [alphabet[pick % len(alphabet)] for pick in picks]
    whole = text.decode(tokens)
    ends = [at for at in (whole.find(stop) for stop in stops) if at >= 0]
    shown, stopped = grown(text, tokens, stops, pieces)
    assert "".join(shown) == (whole[: min(ends)] if ends else whole)
    assert stopped == bool(ends)


def test_other_threads_go_on_while_a_prompt_is_cut(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: the tokenizer's method for one text, which holds the interpreter's lock for all of it."""

    class BatchesOnly:
        def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> list[Any]:
            return [SimpleNamespace(ids=list(map(ord, each))) for each in texts]

    monkeypatch.setattr(text, "_tokenizer", BatchesOnly())
    assert text.encode("ab") == [97, 98]


def test_text_is_shown_as_soon_as_it_is_certain(text: Text) -> None:
    assert grown(text, text.encode("a€b"), [], [1, 1, 1, 1])[0] == ["a", "", "", "€", "b"]
    assert grown(text, text.encode("abab"), ["abc"], [1, 1, 1])[0] == ["", "", "ab", "ab"]


def test_a_token_costs_the_same_wherever_it_stands(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = Text.decode

    def counting(self: Text, tokens: Any) -> str:
        decoded.append(len(tokens))
        return decode(self, tokens)

    monkeypatch.setattr(Text, "decode", counting)
    growing = Growing(text, [])
    (letter,) = text.encode("a")
    for number in range(500):
        growing.add([NO_TEXT if number % 3 else letter], last=False)
    assert max(decoded) <= 4
