"""Special tokens of a model, from all files of its folder that may name them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from lambdascale.checkpoints.documents import read_document
from lambdascale.core import UserError
from lambdascale.core.checks import shown

# Transformers' names for them; a template may use any.
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def document(path: Path) -> dict[str, Any]:
    """JSON object in a file; empty without the file."""
    return read_document(path) if path.is_file() else {}


def named_tokens(directory: Path) -> dict[str, str]:
    """Special tokens by name, those that have one: tokenizer_config.json's, and special_tokens_map.json's.

    As transformers has it, the second file is the older form: it counts for names that the first lacks, and for all of its own
    where the first has no ``added_tokens_decoder``.
    """
    config = document(directory / "tokenizer_config.json")
    older = document(directory / "special_tokens_map.json")
    both = {**older, **config} if "added_tokens_decoder" in config else {**config, **older}
    where = directory / "tokenizer_config.json or special_tokens_map.json"
    found = {name: _text(both.get(name), f"{where}: {name}") for name in _NAMES}
    return {name: token for name, token in found.items() if token is not None}


def _text(value: Any, where: str) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where} must be text, not {shown(value)}")
    return value


def add_missing(tokenizer: Tokenizer, directory: Path) -> None:
    """Give the tokenizer the tokens that added_tokens.json or ``added_tokens_decoder`` have and tokenizer.json lacks.

    UserError if one cannot get the id that it has there.
    """
    for number, token, special in sorted(_added(directory), key=lambda each: each[0]):
        if tokenizer.token_to_id(token) is None:
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=not special)])
        found = tokenizer.token_to_id(token)
        if found != number:
            raise UserError(
                f"{directory}: the token {shown(token)} has the id {number} in one file, and {found} in tokenizer.json"
            )


def _added(directory: Path) -> list[tuple[int, str, bool]]:
    """Id and text of added tokens, and True for special ones."""
    decoder = document(directory / "tokenizer_config.json").get("added_tokens_decoder")
    if decoder is not None:
        return [_entry(key, value, directory) for key, value in _object(decoder, directory).items()]
    special = set(named_tokens(directory).values())
    older = document(directory / "added_tokens.json")
    if not all(type(number) is int and number >= 0 for number in older.values()):
        raise UserError(f"{directory / 'added_tokens.json'} must map tokens to their ids")
    return [(number, token, token in special) for token, number in older.items()]


def _object(value: Any, directory: Path) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{directory / 'tokenizer_config.json'}: added_tokens_decoder must be an object, not {shown(value)}")
    return value


def _entry(key: str, value: Any, directory: Path) -> tuple[int, str, bool]:
    content = value.get("content") if isinstance(value, dict) else None
    if not key.isascii() or not key.isdigit() or len(key) > 9 or not isinstance(content, str):
        raise UserError(f"{directory / 'tokenizer_config.json'}: added_tokens_decoder has no token at {shown(key)}")
    return int(key), content, bool(value.get("special", False))


def end_tokens(tokenizer: Tokenizer, directory: Path) -> frozenset[int]:
    """Tokens that end an answer: eos_token_id of config.json and generation_config.json, one or a list, and ``eos_token``."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        value = document(directory / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(each) is int and each >= 0 for each in ids):
            raise UserError(f"{directory / name}: eos_token_id must be token ids, not {shown(value)}")
        found |= set(ids)
    eos = named_tokens(directory).get("eos_token")
    token = None if eos is None else tokenizer.token_to_id(eos)
    return frozenset(found if token is None else found | {token})
