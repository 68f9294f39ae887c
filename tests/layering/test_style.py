"""House rules that no linter knows: assertions without side effects, plain docstrings, reasons beside exceptions."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

import lambdascale

ROOT = Path(lambdascale.__file__).resolve().parent.parent
FILES = sorted(path for folder in ("lambdascale", "baselines", "scripts") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
# Functions and methods that change something: with python -O an assertion does not call them.
FUNCTIONS = {"next", "heappop", "heappush", "heapreplace", "setattr", "delattr", "exec"}
METHODS = {
    *("append", "appendleft", "extend", "extendleft", "insert", "pop", "popleft", "popitem", "remove", "discard", "clear"),
    *("add", "update", "setdefault", "put", "put_nowait", "get_nowait", "send", "recv", "acquire", "release", "set", "wait"),
    *("write", "close", "start", "stop", "submit", "cancel", "unlink"),
}
QUESTIONS = {"Whether", "Who", "Whom", "Whose", "What", "Which", "How", "When", "Where", "Why"}
# Words that lean on what stands before them: neither a thing nor a verb.
LEANING = {
    *("After", "Also", "Although", "Always", "And", "As", "At", "Because", "Before", "Both", "But", "By", "Either", "Even"),
    *("For", "From", "Here", "However", "If", "In", "Into", "It", "Its", "Like", "Neither", "Never", "Nor", "Not", "Of", "On"),
    *("Once", "Only", "Or", "Over", "Since", "So", "Such", "Than", "That", "Then", "There", "These", "They", "This", "Those"),
    *("Though", "To", "Under", "Unless", "Until", "Up", "Whatever", "Whenever", "Wherever", "Whichever", "While", "Whoever"),
    *("With", "Without"),
}


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


def unplain(source: str) -> list[int]:
    """Lines of docstrings that begin with a question word, or with one that leans on what stands before."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return [node.body[0].lineno for node in nodes if first_word(ast.get_docstring(node) or "") in QUESTIONS | LEANING]


def first_word(text: str) -> str:
    """Letters that a text begins with."""
    found = re.match(r"[A-Za-z]*", text)
    return found.group() if found else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_assertions_change_nothing(path: Path) -> None:
    assert not side_effects(path.read_text()), "python -O leaves these out"


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_begin_with_the_thing_or_the_verb(path: Path) -> None:
    lines = unplain(path.read_text())
    assert not lines, f"docstrings that begin with a question word or lean on what stands before, at lines {lines}"


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


def test_other_beginnings_are_found() -> None:
    assert unplain('"""Number of nodes."""\ndef f():\n    """Whether it holds."""\nclass A:\n    """Also this."""') == [3, 5]


# -- plain English -------------------------------------------------------------------------------------------------------

PAGES = sorted({ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "results" / "LOG.md", *(ROOT / "docs").glob("*.md")})
OTHERS = sorted({*(ROOT / "baselines").rglob("*.md"), *(ROOT / "conf").rglob("*.yaml"), *(ROOT / "docs").rglob("*.py")})
# What docs/contributing.md calls riddles; it names them itself.
RIDDLES = re.compile(
    r"\bthere (?:is|are|was|were|may|will)\b|\b(?:is|are|be|was|were|not) there\b|\bto be had\b|\bgone\b|\bcannot be(?:[.:,;]|$)",
    re.IGNORECASE,
)


def prose(source: str) -> str:
    """Comments and strings of a module, docstrings among them."""
    comments = [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    nodes = ast.walk(ast.parse(source))
    return "\n".join([*comments, *(n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))])


@pytest.mark.parametrize("path", [*FILES, *TESTS, *PAGES, *OTHERS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_riddles(path: Path) -> None:
    text = prose(path.read_text()) if path.suffix == ".py" else path.read_text()
    found = [line.strip() for line in text.splitlines() if RIDDLES.search(line)]
    assert not found or path.name in ("contributing.md", "test_style.py"), "say it in plain English (docs/contributing.md)"


def test_riddles_are_found() -> None:
    assert RIDDLES.search(prose("def f():\n    'None if there is none.'"))
    assert RIDDLES.search(prose("x = 1  # the node is gone"))
    assert not RIDDLES.search(prose("raise ValueError('it cannot be read; the file lies there')"))


# -- reasons for silenced checks and tests left out ----------------------------------------------------------------------

EVERYWHERE = sorted({*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").rglob("*.py")})
_CHECKS = (r"type: ignore(?:\[[\w, -]+\])?", r"noqa(?:: [A-Z]+\d+(?:, ?[A-Z]+\d+)*)?", "pragma: no cover")
SILENCED = re.compile(rf"#\s*(?:{'|'.join(_CHECKS)})(?P<reason>.*)")
LEAVES_OUT = {"skip", "skipif", "xfail", "importorskip"}


def unexplained(source: str) -> list[int]:
    """Lines of comments that silence a check, and of calls and marks that leave a test out, without a reason beside them."""
    comments = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT]
    silenced = [(token.start[0], SILENCED.search(token.string)) for token in comments]
    found = [line for line, match in silenced if match and not re.search(r"\w{3}", match["reason"])]
    nodes = list(ast.walk(ast.parse(source)))
    explained = {id(node.func) for node in nodes if isinstance(node, ast.Call) and _explains(node)}
    found += [node.lineno for node in nodes if _leaves_out(node) and id(node) not in explained]
    return sorted(found)


def _leaves_out(node: ast.AST) -> bool:
    """True for pytest.skip, pytest.importorskip and the marks."""
    if not isinstance(node, ast.Attribute) or node.attr not in LEAVES_OUT:
        return False
    of = node.value
    return (isinstance(of, ast.Name) and of.id == "pytest") or (isinstance(of, ast.Attribute) and of.attr == "mark")


def _explains(call: ast.Call) -> bool:
    plain = isinstance(call.func, ast.Attribute) and call.func.attr == "skip" and bool(call.args)
    return plain or any(keyword.arg == "reason" for keyword in call.keywords)


@pytest.mark.parametrize("path", EVERYWHERE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_is_long(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= 400, f"{lines} lines: split it by subject"


@pytest.mark.parametrize("path", EVERYWHERE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_whatever_is_silenced_says_why(path: Path) -> None:
    lines = unexplained(path.read_text())
    assert not lines, f"a reason is missing beside what silences a check or leaves a test out, at lines {lines}"


@pytest.mark.parametrize(
    "line",
    [
        "x = f()  # type: ignore[misc]",
        "x = f()  # noqa: E501, B023",
        "if x:  # pragma: no cover\n    pass",
        "@pytest.mark.skip\ndef f(): ...",
        "@pytest.mark.xfail(strict=True)\ndef f(): ...",
        "pytest.importorskip('a')",
        "pytest.skip()",
    ],
)
def test_missing_reasons_are_found(line: str) -> None:
    assert unexplained(line) == [1]


def test_reasons_pass() -> None:
    assert not unexplained(
        "x = f()  # type: ignore[misc]  # missing from the stubs\n"
        "y = f()  # noqa: B023 (called at once)\n"
        "pytest.skip(str(error))\npytest.importorskip('a', reason='needs a')\n"
        "@pytest.mark.skipif(x, reason='needs x')\ndef f(): ...\nqueue.skip()"
    )


def test_every_option_has_a_help_text() -> None:
    """Options of scripts included: a bare ``--nodes NODES`` tells neither the meaning nor the default."""
    lacking = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                given = {keyword.arg for keyword in node.keywords}
                if not given & {"help", "version"}:
                    lacking.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not lacking
