"""Chat templates and special tokens: the same prompts as transformers makes, and one line where it would raise."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lambdascale.checkpoints import pack
from lambdascale.checkpoints.synthetic import PRESETS, write_random
from lambdascale.core import UserError
from lambdascale.live.serving.text import Text
from tests.serving.harness import Running

MESSAGES = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "Zürich €1\nnext"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "More?"},
]
SAME = {
    "plain": "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m['content'] }}{{ eos_token }}\n{% endfor %}",
    "generation prompt": "{% if add_generation_prompt %}<assistant>{% else %}none{% endif %}",
    "trimmed blocks": "{% for m in messages %}\n    {% if m.role == 'user' %}\n {{ m.content }}\n  {% endif %}\n{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "generation tag": "{% for m in messages %}{% generation %}{{ m.role }}{% if 1 %}!{% endif %}{% endgeneration %}{% endfor %}",
    "tojson": "{{ messages | tojson }}",
    "tojson indented": "{{ messages[1] | tojson(indent=2) }}{{ messages[0] | tojson(sort_keys=true, separators=(',', ':')) }}",
    "tojson ascii": "{{ messages[1].content | tojson(ensure_ascii=true) }}",
    "variables that are none": "{% if tools is none and documents is none %}no tools{% endif %}{{ tools is defined }}",
    "variables that are not defined": "{{ enable_thinking is defined }}{{ xml_tools }}{{ bos_token is defined }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "dict": "{{ dict(a=1).items() | list }}",
    "macro": "{% macro say(m) %}[{{ m.role | upper }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "string methods": "{{ messages[0].content.split('&')[0].strip() }}{{ messages[0].content.startswith('Be') }}",
    "last message": "{{ messages[-1].content }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "day": "{{ strftime_now('%Y-%m') }}",
}


def model(folder: Path, template: Any = None, config: dict[str, Any] | None = None, **files: Any) -> Path:
    """A tiny model's folder, with a template in tokenizer_config.json, and more files."""
    write_random(PRESETS["tiny"], folder, 0, "F32")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    given = {"tokenizer_class": "PreTrainedTokenizerFast"} | (config or {})
    write(folder, "tokenizer_config.json", given if template is None else {**given, "chat_template": template})
    for name, content in files.items():
        write(folder, f"{name}.json", content)
    return folder


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    return path


def test_packing_keeps_all_files(folder: Path, tmp_path: Path) -> None:
    write(model(folder, special_tokens_map={"bos_token": "<b>"}), "additional_chat_templates/default.jinja", NAMES)
    pack(folder, tmp_path / "packed", 2)
    assert Text(tmp_path / "packed").chat(MESSAGES) == "<b>||False"


def theirs(folder: Path) -> str:
    return str(AutoTokenizer.from_pretrained(folder).apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize("name", SAME)
def test_a_template_renders_as_in_transformers(name: str, folder: Path) -> None:
    model(folder, SAME[name], {"eos_token": "<end>", "unk_token": {"__type": "AddedToken", "content": "<unk>"}})
    assert Text(folder).chat(MESSAGES) == theirs(folder)


class TestWhereTemplatesStand:
    def test_a_list_of_named_ones(self, folder: Path) -> None:
        model(folder, [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages[0].role }}"}])
        assert Text(folder).chat(MESSAGES) == theirs(folder) == "system"

    def test_a_file_comes_before_the_configuration(self, folder: Path) -> None:
        write(model(folder, "config"), "chat_template.jinja", "file")
        assert Text(folder).chat(MESSAGES) == theirs(folder) == "file"

    def test_additional_ones(self, folder: Path) -> None:
        write(model(folder, "config"), "chat_template.jinja", "file")
        write(folder, "additional_chat_templates/tool_use.jinja", "tools")
        assert Text(folder).chat(MESSAGES) == theirs(folder) == "file"

    def test_none(self, folder: Path) -> None:
        assert Text(model(folder)).chat(MESSAGES[-1:]) == "user: More?\nassistant:"

    @pytest.mark.parametrize(
        ("template", "says"),
        [
            ([{"name": "rag", "template": ""}, {"name": "tool_use", "template": ""}], "of its templates .rag, tool_use. none"),
            ([{"name": "default"}], "not usable: 'template'"),
            ({"default": 3}, "it must be text, not 3"),
            ("{% for m in messages %}", "not usable: Unexpected end of template"),
            ("{% include 'other' %}{% nonsense %}", "unknown tag"),
        ],
    )
    def test_unusable_ones(self, template: Any, says: str, folder: Path) -> None:
        with pytest.raises(UserError, match=says) as error:
            Text(model(folder, template))
        assert "\n" not in str(error.value)


REFUSING = {
    "{{ raise_exception('roles must\nalternate') }}": "refuses the messages: roles must alternate",
    "{{ 'a' + 1 }}": "can only concatenate str",
    "{{ messages[9].content }}": "has no element 9",
    "{{ ''.__class__.__mro__ }}": "is unsafe|unsafe",
    "{% for i in range(10 ** 9) %}{% endfor %}": "Range too big",
    "{{ messages.append(1) }}": "unsafe",
    "{{ '\\ud800' }}": "surrogates not allowed",
    "{{ messages | tojson(indent=messages) }}": "refuses the messages: ",
    "{% include 'other' %}": "no loader",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "recursion",
}


@pytest.mark.parametrize("template", REFUSING)
def test_a_template_that_breaks_is_one_line(template: str, folder: Path) -> None:
    """A model's template may raise anything, and reaches nothing outside its sandbox."""
    with pytest.raises(UserError, match=REFUSING[template]) as error:
        Text(model(folder, template)).chat(MESSAGES)
    assert "\n" not in str(error.value)


def test_over_http_it_is_status_400(folder: Path) -> None:
    model(folder, "{{ raise_exception('roles must alternate') }}")
    server = Running(Text(folder))
    try:
        with server.client() as client:
            answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES})
    finally:
        server.close()
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "the model's chat template refuses the messages: roles must alternate"
    assert answer.json()["error"]["param"] == "messages"


NAMES = "{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}"


class TestSpecialTokens:
    @pytest.mark.parametrize(
        ("config", "older"),
        [
            ({"bos_token": "<b>", "eos_token": "<e>"}, None),
            ({"bos_token": "<b>"}, {"bos_token": "<older>", "eos_token": {"content": "<e>"}}),
            ({"bos_token": None, "eos_token": "<e>"}, None),
            ({}, {"bos_token": "<b>", "pad_token": "<p>"}),
        ],
    )
    def test_names_are_those_of_transformers(self, config: dict[str, Any], older: dict[str, Any] | None, folder: Path) -> None:
        model(folder, NAMES, config, **({} if older is None else {"special_tokens_map": older}))
        assert Text(folder).chat(MESSAGES) == theirs(folder)

    def test_with_a_decoder_the_older_file_only_adds(self, folder: Path) -> None:
        config = {"bos_token": "<b>", "added_tokens_decoder": {}}
        model(folder, NAMES, config, special_tokens_map={"bos_token": "<older>", "eos_token": "<e>"})
        assert Text(folder).chat(MESSAGES) == "<b>|<e>|False"

    def test_ends_of_answers(self, folder: Path) -> None:
        """All of them: one id, a list of ids, a token by its text."""
        model(folder, config={"eos_token": "A"}, generation_config={"eos_token_id": [7, 9]})
        config = json.loads((folder / "config.json").read_text())
        write(folder, "config.json", {**config, "eos_token_id": 5})
        text = Text(folder)
        assert text.stop_tokens == {5, 7, 9, *text.encode("A")}

    @pytest.mark.parametrize("older", [True, False], ids=["added_tokens.json", "added_tokens_decoder"])
    def test_tokens_that_tokenizer_json_lacks(self, older: bool, folder: Path) -> None:
        number = Text(model(folder)).vocab
        if older:
            write(folder, "added_tokens.json", {"<|call|>": number})
            write(folder, "special_tokens_map.json", {"eos_token": "<|call|>"})
        else:
            decoder = {str(number): {"content": "<|call|>", "special": True}}
            write(folder, "tokenizer_config.json", {"eos_token": "<|call|>", "added_tokens_decoder": decoder})
        text = Text(folder)
        assert text.encode("<|call|>", special=False) == [number]
        assert text.decode([number]) == ""
        assert number in text.stop_tokens

    @pytest.mark.parametrize(
        ("files", "says"),
        [
            ({"added_tokens": {"<|call|>": 12}}, "has the id 12 in one file"),
            ({"added_tokens": {"<|call|>": "x"}}, "must map tokens to their ids"),
            ({"tokenizer_config": {"added_tokens_decoder": []}}, "must be an object"),
            ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "a"}}}}, "no token at"),
            ({"special_tokens_map": {"bos_token": 3}}, "bos_token must be text"),
            ({"generation_config": {"eos_token_id": "</s>"}}, "eos_token_id must be token ids"),
        ],
    )
    def test_damaged_files(self, files: dict[str, Any], says: str, folder: Path) -> None:
        with pytest.raises(UserError, match=says):
            Text(model(folder, **files))


def test_the_day_is_todays(folder: Path) -> None:
    days = {datetime.now().strftime("%d %b")}
    found = Text(model(folder, "{{ strftime_now('%d %b') }}")).chat(MESSAGES)
    assert found in days | {datetime.now().strftime("%d %b")}
