"""House rules that no linter knows: assertions without side effects, docstrings that begin with the thing or the verb."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lambdascale

ROOT = Path(lambdascale.__file__).resolve().parent.parent
FILES = sorted(path for folder in ("lambdascale", "baselines", "scripts") for path in (ROOT / folder).rglob("*.py"))
# Functions and methods that change something: with python -O an assertion does not call them.
FUNCTIONS = {"next", "heappop", "heappush", "heapreplace", "setattr", "delattr", "exec"}
METHODS = {
    *("append", "appendleft", "extend", "extendleft", "insert", "pop", "popleft", "popitem", "remove", "discard", "clear"),
    *("add", "update", "setdefault", "put", "put_nowait", "get_nowait", "send", "recv", "acquire", "release", "set", "wait"),
    *("write", "close", "start", "stop", "submit", "cancel", "unlink"),
}
QUESTIONS = ("Whether ", "Who ", "Whom ", "Whose ", "What ", "Which ", "How ", "When ", "Where ", "Why ")
# Subpackages that still have docstrings of that kind; none may be added.
UNFINISHED: set[str] = set()


def side_effects(source: str) -> list[int]:
    """Lines of assertions whose condition changes something: an assignment, or a call of a changing method."""
    assertions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]
    return [assertion.lineno for assertion in assertions if any(_changes(part) for part in ast.walk(assertion.test))]


def _changes(part: ast.AST) -> bool:
    if isinstance(part, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
        return True
    called = part.func if isinstance(part, ast.Call) else None
    if isinstance(called, ast.Name):
        return called.id in FUNCTIONS
    return isinstance(called, ast.Attribute) and called.attr in METHODS


def questions(source: str) -> list[int]:
    """Lines of docstrings that begin with a question word."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return [node.body[0].lineno for node in nodes if (ast.get_docstring(node) or "").startswith(QUESTIONS)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_assertions_change_nothing(path: Path) -> None:
    assert not side_effects(path.read_text()), "python -O leaves these out"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_do_not_ask(path: Path) -> None:
    asking = questions(path.read_text())
    unfinished = not set(path.relative_to(ROOT).parts).isdisjoint(UNFINISHED)
    assert unfinished or not asking, f"docstrings that begin with a question word, at lines {asking}"


@pytest.mark.parametrize(
    "source",
    [
        "assert queue.popleft() is item",
        "assert (left := len(items)) > 0",
        "assert next(iterator) == 3",
        "assert not seen.add(3), 'twice'",
        "async def f():\n    assert await g()",
    ],
)
def test_side_effects_are_found(source: str) -> None:
    assert side_effects(source)


def test_pure_assertions_and_messages_pass() -> None:
    assert not side_effects("assert set(a) <= b.keys() and items.count(3) == 1, f'{items.pop()}'")


def test_questions_are_found() -> None:
    assert questions('"""Number of nodes."""\ndef f():\n    """Whether it holds."""\nclass A:\n    """What it is."""') == [3, 5]
