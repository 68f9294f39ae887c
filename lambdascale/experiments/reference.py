"""The reference of all configuration keys, as Markdown.

Keys and defaults are those of conf/*.yaml and of the classes their ``_target_`` names; meanings are the comments behind the keys
in conf/, and the classes' docstrings.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from textwrap import fill
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from lambdascale.experiments.compose import conf_dir
from lambdascale.experiments.schema import RunConfig

# Groups of conf/ in the order of the page: their place in the configuration, and how one is chosen.
_GROUPS = {
    "system": "system",
    "autoscaler": "system.autoscaler",
    "batching": "system.batching",
    "memory": "system.memory",
    "model": "model",
    "cluster": "cluster",
    "workload": "workload",
    "backend": "backend",
    "pool": "backend.pool",
    "logger": "logger",
}
_HEAD = """# Configuration keys

<!-- written by scripts/reference.py: change comments in conf/ and docstrings, not this page -->

A key is set on the command line as `KEY=VALUE`, in an experiment's YAML, or in a file of a group. The default is that
of `python scripts/run.py` without arguments; for a class that is not part of it, that of the first YAML file that
names it. Sizes take units (`512GiB`, `26GB`), rates too (`400Gb/s`, `5GB/s`); times are seconds. A misspelt key or an
impossible value ends the command with one line and status 2.
"""
# Columns of a line of prose.
_WIDTH = 119
# Comments that say where a value is from, not what the key means.
_SOURCE = re.compile(r"(reference|assumption|datasheet|measured|contained|no |\d)")
_KEY = re.compile(r"^(?P<indent>\s*)(?P<key>\w+):(?P<value>[^#]*)(?:#\s*(?P<comment>.*))?$")


@dataclass
class _Section:
    """A class that configures something, the key it is under, and its values and comments in conf/."""

    cls: type
    place: str
    values: dict[str, Any]
    comments: dict[str, str] = field(default_factory=dict)
    choices: list[str] = field(default_factory=list)


def reference() -> str:
    """The whole page."""
    sections = _sections()
    parts = [_HEAD, "## A run\n", _choices("experiment", "experiment"), _root_table()]
    for group, place in _GROUPS.items():
        parts += [f"## {group}\n", _choices(group, place)]
        parts += _class_tables(section for section in sections.values() if _group_of(section.place) == place)
    return "\n".join(parts)


def undocumented() -> list[str]:
    """Keys for which neither a comment in conf/ nor a docstring says what they mean."""
    missing = [f"{s.place}.{f.name}" for s in _sections().values() for f in _fields(s.cls) if not _meaning(s, f.name)]
    comments = _comments(conf_dir() / "run.yaml")
    return missing + [f.name for f in dataclasses.fields(RunConfig) if f.name not in _GROUPS and f.name not in comments]


def _group_of(place: str) -> str:
    """The longest group's place that ``place`` lies in."""
    return max((p for p in _GROUPS.values() if place == p or place.startswith(f"{p}.")), key=len)


def _sections() -> dict[type, _Section]:
    """Every class that some choice of some group names, in the order of the page."""
    sections: dict[type, _Section] = {}
    for group, place in _GROUPS.items():
        for choice in _choice_names(group):
            path = conf_dir() / group / f"{choice}.yaml"
            comments = _comments(path)
            for key, node in _targets(OmegaConf.load(path), ""):
                _note(sections, f"{place}{key}", node, comments, key).choices.append(choice)
    return sections


def _note(sections: dict[type, _Section], place: str, node: DictConfig, comments: Mapping[str, str], key: str) -> _Section:
    """Enter a node of a file. Values are those of the first choice that has the class; comments may come from any choice."""
    values = OmegaConf.to_container(node, resolve=False)
    assert isinstance(values, dict), "a node with a _target_ is a mapping"
    cls = get_class(values["_target_"])
    section = sections.setdefault(cls, _Section(cls, place, {str(name): value for name, value in values.items()}))
    for name in values:
        comment = comments.get(f"{key}.{name!s}".lstrip("."))
        if comment:
            section.comments.setdefault(str(name), comment)
    return section


def _targets(node: Any, place: str) -> Iterator[tuple[str, DictConfig]]:
    """Every mapping with a ``_target_`` at or below ``node``, with its key."""
    if not isinstance(node, DictConfig):
        return
    if "_target_" in node:
        yield place, node
    for name in node:
        yield from _targets(node._get_node(name), f"{place}.{name!s}")


def _comments(path: Path) -> dict[str, str]:
    """The comment behind each key of a YAML file (keys of nested mappings joined by dots)."""
    found: dict[str, str] = {}
    open_keys: list[tuple[int, str]] = []
    for line in path.read_text().splitlines():
        match = _KEY.match(line)
        if match is None:
            continue
        indent = len(match["indent"])
        open_keys = [(column, key) for column, key in open_keys if column < indent] + [(indent, match["key"])]
        if match["comment"]:
            found[".".join(key for _, key in open_keys)] = match["comment"].strip()
    return found


def _choice_names(group: str) -> list[str]:
    """Choices of a group, that of conf/run.yaml first."""
    names = sorted(p.relative_to(conf_dir() / group).with_suffix("").as_posix() for p in (conf_dir() / group).rglob("*.yaml"))
    chosen = OmegaConf.load(conf_dir() / "run.yaml").defaults
    first = [str(entry[group]) for entry in chosen if isinstance(entry, DictConfig) and group in entry]
    usual = first or ["queue", "continuous", "host_lru"]
    return [name for name in names if name in usual] + [name for name in names if name not in usual]


def _choices(group: str, place: str) -> str:
    """A table of a group's choices, each with the first sentence of its file."""
    how = f"{group}={{choice}}" if "." not in place else f"{group}@{place}={{choice}}"
    rows = [
        f"| `{how.format(choice=name)}` | {_cell(_first_sentence(conf_dir() / group / f'{name}.yaml'))} |"
        for name in _choice_names(group)
    ]
    return "\n".join(["| choice | what it is |", "|---|---|", *rows, ""])


def _first_sentence(path: Path) -> str:
    """The first sentence of a file's head comment; its commands are indented."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    head = [line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("#"), lines)]
    return re.split(r"(?<=\.)\s", " ".join(line for line in head if not line.startswith("  ")), maxsplit=1)[0].rstrip(":")


def _root_table() -> str:
    """The keys of conf/run.yaml that are no groups."""
    comments, hints = _comments(conf_dir() / "run.yaml"), typing.get_type_hints(RunConfig)
    defaults = OmegaConf.to_container(OmegaConf.load(conf_dir() / "run.yaml"), resolve=False)
    assert isinstance(defaults, dict), "run.yaml is a mapping"
    rows = [
        _row(f.name, hints[f.name], defaults.get(f.name), comments.get(f.name, ""))
        for f in dataclasses.fields(RunConfig)
        if f.name not in _GROUPS
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(cls) if f.init and f.name != "kind"] if dataclasses.is_dataclass(cls) else []


def _class_tables(sections: Iterable[_Section]) -> Iterator[str]:
    """A table for each class, once: before it those of the classes it inherits from, after it those of what its lists hold."""
    shown: set[type] = set()
    for section in sections:
        for cls in [c for c in reversed(section.cls.__mro__) if dataclasses.is_dataclass(c)]:
            if cls not in shown:
                shown.add(cls)
                yield _class_table(section, cls)
        for name, hint in typing.get_type_hints(section.cls).items():
            for element in typing.get_args(hint) if typing.get_origin(hint) is tuple else ():
                if isinstance(element, type) and dataclasses.is_dataclass(element) and element not in shown:
                    shown.add(element)
                    yield _class_table(_Section(element, f"{section.place}.{name}[]", {}), element)


def _class_table(section: _Section, cls: type) -> str:
    """A class: its key, what it is, and the fields it defines itself."""
    name = f"{cls.__module__}.{cls.__name__}" if cls.__module__.startswith("baselines") else cls.__name__
    hints = typing.get_type_hints(cls)
    rows = [
        _row(f"{section.place}.{f.name}", hints[f.name], section.values.get(f.name, _default(f)), _meaning(section, f.name))
        for f in _fields(cls)
        if f.name in cls.__annotations__
    ]
    table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else []
    where = f"in {', '.join(dict.fromkeys(section.choices))}" if section.choices else "for each element"
    chosen = f" At `{section.place}` {where}." if cls is section.cls else ""
    return "\n".join([f"### {name}\n", fill(_summary(cls) + chosen, _WIDTH), "", *table])


def _summary(cls: type) -> str:
    """The first sentence of a docstring, and the classes whose keys are its keys, too."""
    text = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=\.)\s", text, maxsplit=1)[0]
    bases = [c.__name__ for c in cls.__mro__[1:] if dataclasses.is_dataclass(c)]
    return " ".join([sentence.replace("``", "`"), *(f"Also the keys of {base}." for base in bases)])


def _default(f: dataclasses.Field[Any]) -> Any:
    """The default of a field that no YAML file sets."""
    if f.default is not dataclasses.MISSING:
        return f.default
    if f.name in ("autoscaler", "batching", "memory"):
        return _choice_names(f.name)[0]
    return "set by its own keys" if f.default_factory is not dataclasses.MISSING else "required"


def _meaning(section: _Section, name: str) -> str:
    """Return the meaning of a key: the comment in conf/; if that only names the value's source, the docstring before it."""
    comment, described = section.comments.get(name, ""), _of_docstring(section.cls, name)
    if f"{section.place}.{name}" in _GROUPS.values() or isinstance(section.values.get(name), Mapping):
        return comment or "a part: its keys are below"
    return f"{described} Default: {comment}" if described and _SOURCE.match(comment) else comment or described


def _of_docstring(cls: type, name: str) -> str:
    """Return what a class' docstring (or a base's) says of a field: the sentences that begin with it, else those that name it."""
    text = " ".join(" ".join(c.__doc__ or "" for c in cls.__mro__ if dataclasses.is_dataclass(c)).split())
    named = [s for s in re.split(r"(?<=[.!])\s+(?=[A-Z`])", text) if f"``{name}``" in s]
    own = [sentence.removeprefix(f"``{name}``:").strip() for sentence in named if sentence.startswith(f"``{name}``")]
    return " ".join(own or named).replace("``", "`")


def _row(key: str, kind: Any, default: Any, meaning: str) -> str:
    return f"| `{key}` | {_cell(f'`{_type(kind)}`')} | {_cell(_shown(default))} | {_cell(meaning)} |"


def _type(kind: Any) -> str:
    """A field's type as its annotation has it, aliases resolved."""
    text = kind.__name__ if isinstance(kind, type) else str(kind)
    return re.sub(r"(typing|lambdascale)\.(\w+\.)*", "", text)


def _shown(value: Any) -> str:
    """A default as one writes it in YAML."""
    if isinstance(value, Mapping) and "_target_" in value:
        return f"`{str(value['_target_']).rsplit('.', 1)[-1]}`"
    text = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    return f"`{text}`" if text and text != "required" else text or '`""`'


def _cell(text: str) -> str:
    """Text for a cell of a table: a bar would end it."""
    return text.replace("|", "\\|")
