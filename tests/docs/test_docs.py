"""The documentation is true: its commands run and print what the pages say, its files and paths exist, its reference is current.

A fenced block in ``bash`` or ``python`` is run, all of a page in order and in one folder, in a copy of what a checkout offers.
What is not run says why in the line before: ``*Not run by the tests: REASON.*`` A comment ``<!-- live -->`` there marks what
starts a live cluster: a test of its own. A ``text`` block titled "Prints" shows lines of the output of the block before it, where
``...`` stands for anything. A block titled with a file's path is that file, or a part of it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from lambdascale.experiments.reference import reference, undocumented

ROOT = Path(__file__).resolve().parents[2]
GUIDE = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDE, *sorted((ROOT / "baselines").glob("*/README.md")), ROOT / "lambdascale/transport/README.md"]
WIDE = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "results/README.md", ROOT / "results/LOG.md"]
FENCE = re.compile(r"^(?P<indent>\s*)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]*)\")?\s*$")
REASON = re.compile(r"^\*Not run by the tests: .+\.\*$")
RUN = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
# Paths of the repository in a page's prose, and those of them that runs make or that stand for any.
PATH = re.compile(r"`((?:lambdascale|baselines|conf|docs|scripts|tests|results)/[\w./-]*\w/?)`")
MADE = re.compile(r"^(results/(raw|wandb|\.submitit)|docs/site)|NAME|EXPERIMENT|mine")
# How code makes threads and locks, and what it calls them.
THREAD = re.compile(r"""(?:Thread\([^"]*name=f?|thread_name_prefix=|ThreadPoolExecutor\([^"=]+, )"([\w-]+)""")
MAKES_THREADS = re.compile(r"\b(?:Thread|ThreadPoolExecutor)\((?=\S|\n)")
NAMES_THREADS = re.compile(r"""Thread\([^"]*?name=|thread_name_prefix=|ThreadPoolExecutor\([^"=]+, \"""")
LOCK = re.compile(r"(\w+) = threading\.(?:R?Lock|Condition)\(")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: ``before`` is the last line of prose before it, ``line`` where it begins."""

    page: str
    line: int
    language: str
    title: str
    text: str
    before: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_live(self) -> bool:
        """True for what starts node processes."""
        return self.before == "<!-- live -->"

    @property
    def is_run(self) -> bool:
        """True for commands that the tests run."""
        return self.language in RUN and not self.title and not REASON.match(self.before)


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    found: list[Block] = []
    lines = iter(enumerate(page.read_text().splitlines(), start=1))
    before = ""
    for number, line in lines:
        fence = FENCE.match(line)
        if fence is None:
            before = line.strip() or before
            continue
        body = []
        for _, inner in lines:
            if inner.strip() == "```":
                break
            body.append(inner.removeprefix(fence["indent"]))
        text = "\n".join(body)
        found.append(Block(page.relative_to(ROOT).as_posix(), number, fence["language"], fence["title"] or "", text, before))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def sandbox(folder: Path) -> dict[str, str]:
    """Make ``folder`` look like a checkout with its ``.venv`` (this interpreter's); the environment for commands in it."""
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "docs" / "examples", folder / "docs" / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "results" / "tables", folder / "results" / "tables")
    (folder / "scripts" / "_venv.sh").write_text("# The environment is the tests' own.\n")
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name, command in (("python", ""), ("lambdascale", "-m lambdascale.cli.main"), ("pytest", "-m pytest")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
        (tools / name).chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("LAMBDASCALE_", "PYTEST_"))}
    return inherited | {"PYTHONPATH": f"{ROOT}:{folder}", "PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def run(block: Block, folder: Path, environment: dict[str, str]) -> str:
    """Run a block; its output. Fails the test unless its exit status is 0."""
    done = subprocess.run(
        [*RUN[block.language], block.text], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{block}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def shows(output: str, line: str) -> bool:
    """True if a line of ``output`` is ``line``, whatever the white space; ``...`` stands for anything."""
    pattern = ".*".join(re.escape(" ".join(part.split())) for part in line.split("..."))
    return any(re.fullmatch(f"{pattern}|.* {pattern}|{pattern} .*", " ".join(found.split())) for found in output.splitlines())


def check_page(page: str, folder: Path, *, live: bool) -> None:
    """Run a page's commands in order, those that are live or the others, and compare what they print with what the page shows."""
    environment, output = sandbox(folder), ""
    for block in (block for block in BLOCKS if block.page == page):
        if block.is_run:
            output = run(block, folder, environment) if block.is_live == live else ""
        elif block.title == "Prints" and output:
            missing = [line for line in block.text.splitlines() if line.strip() and not shows(output, line)]
            assert not missing, f"{block} shows lines that the command does not print:\n" + "\n".join([*missing, "but:", output])


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.is_run}))
def test_commands_of_a_page(page: str, tmp_path: Path) -> None:
    check_page(page, tmp_path, live=False)


@pytest.mark.live
@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.is_run and block.is_live}))
def test_live_commands_of_a_page(page: str, tmp_path: Path) -> None:
    check_page(page, tmp_path, live=True)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.title and b.title != "Prints"], ids=str)
def test_files_that_pages_show(block: Block) -> None:
    assert block.text.strip() in (ROOT / block.title).read_text(), f"{block} differs from {block.title}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_in_prose_exist(page: Path) -> None:
    named = {path for path in PATH.findall(page.read_text()) if not MADE.search(path)}
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", WIDE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_are_short(page: Path) -> None:
    """120 columns at most; tables, links alone on their line, and output of commands may be longer."""
    shown, long = False, []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        fence = FENCE.match(line)
        shown = not shown and bool(fence) and fence["title"] == "Prints" if fence else shown
        if len(line) > 120 and not shown and not line.lstrip().startswith(("|", "!", "[", "- [")):
            long.append(number)
    assert not long


@pytest.mark.parametrize("page", [ROOT / "README.md", *GUIDE], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """The README's too, which mkdocs does not see."""
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()) if "://" not in target]
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_rows_about_other_harnesses_are_those_of_the_documentation() -> None:
    """The README has a choice of them, word for word."""
    shown = (ROOT / "README.md").read_text().split("## Beside other harnesses")[1].split("## ")[0]
    rows = [line.replace("](docs/", "](") for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) > 8
    assert not set(rows) - set((ROOT / "docs/exchange.md").read_text().splitlines())


def test_every_thread_and_lock_is_described() -> None:
    """Threads stand on the architecture page by their names, locks by their files."""
    page, lacking = (ROOT / "docs" / "architecture.md").read_text(), []
    for path in (path for part in ("live", "transport", "inference") for path in (ROOT / "lambdascale" / part).rglob("*.py")):
        code, file = path.read_text(), path.relative_to(ROOT).as_posix()
        lacking += [f"{file}: {name}" for name in THREAD.findall(code) if f"`{name}" not in page and f"-{name}" not in page]
        lacking += [f"{file}: a thread without a name"] * (len(MAKES_THREADS.findall(code)) - len(NAMES_THREADS.findall(code)))
        lacking += [f"{file}: {lock}" for lock in LOCK.findall(code) if f"`{lock}`" not in page]
    assert not lacking


def test_the_reference_is_current() -> None:
    assert (ROOT / "docs" / "reference.md").read_text() == reference(), "python scripts/reference.py writes it"


def test_every_key_has_a_meaning() -> None:
    assert undocumented() == []
    assert not re.findall(r"^.*\|  \|$", reference(), re.MULTILINE), "of elements of lists, too"


def test_keys_of_a_part_are_not_those_of_a_list() -> None:
    """An element of a list has keys with []; an optional part has its own: cluster.start.process_s is set as it stands."""
    keys = re.findall(r"^\| `([\w.\[\]]+)` \|", reference(), re.MULTILINE)
    listed = {key.partition("[]")[0] for key in keys if "[]" in key}
    assert listed == {"cluster.overrides", "cluster.compute.measured"}
    assert "cluster.start.process_s" in keys


def test_the_site_builds(tmp_path: Path) -> None:
    """The build gives no warning, and its pages load nothing from elsewhere."""
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(GUIDE)
    for page in pages:
        assert not re.findall(r"""<(?:script|link|img)[^>]+(?:src|href)=["']?(https?:[^"'> ]+)""", page.read_text()), page
