"""Chat templates as transformers has them: where they stand, what they may call, and the variables they are rendered with.

A template is part of the model, so code of somebody else: it runs in a sandbox, and may raise anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lambdascale.core import UserError
from lambdascale.core.checks import shown
from lambdascale.core.text import one_line

# The template of a model that comes without one.
_PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
# The template's name that is used unless a request has tools, which this server does not take.
_DEFAULT = "default"


class _Generation(Extension):
    """The tags ``generation`` and ``endgeneration``, which mark the assistant's words for training: their inside is rendered."""

    tags = {"generation"}  # noqa: RUF012  (as the base class has it)

    def parse(self, parser: Parser) -> Node:
        """Return a call of ``_inside`` with what stands between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


class ChatTemplate:
    """The template of the model in ``directory``; ``config`` is its tokenizer_config.json. UserError if it is not usable.

    ``tokens``: special tokens by name (bos_token, ...), which templates may use.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any], tokens: Mapping[str, str]) -> None:
        self._tokens = dict(tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(_source(directory, config))
        except Exception as error:  # it may be no text, and compiling it may raise anything
            raise UserError(f"the chat template of {directory} is not usable: {_line(error)}") from None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return a conversation as text, up to where the assistant's answer begins. UserError if the template refuses it."""
        try:
            text = self._template.render(
                messages=list(messages), tools=None, documents=None, add_generation_prompt=True, **self._tokens
            )
            text.encode()  # it may have made halves of characters
            return text
        except Exception as error:  # it may raise anything
            raise UserError(f"the model's chat template refuses the messages: {_line(error)}") from error


def _source(directory: Path, config: Mapping[str, Any]) -> str:
    """Text of the template: of the files beside the tokenizer, otherwise of its configuration. ValueError without a default."""
    written = {file.stem: file.read_text() for file in sorted(directory.glob("additional_chat_templates/*.jinja"))}
    single = directory / "chat_template.jinja"
    if single.is_file():
        written[_DEFAULT] = single.read_text()
    given = written or config.get("chat_template") or _PLAIN
    if isinstance(given, list):
        given = {each["name"]: each["template"] for each in given}
    if isinstance(given, Mapping):
        if _DEFAULT not in given:
            raise ValueError(f"of its templates ({', '.join(map(str, given))}) none is named {_DEFAULT}")
        given = given[_DEFAULT]
    if not isinstance(given, str):
        raise ValueError(f"it must be text, not {shown(given)}")
    return given


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without HTML's escapes, in which jinja's own differs."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _line(error: Exception) -> str:
    return one_line(f"{error or type(error).__name__}")
