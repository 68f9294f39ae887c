"""MkDocs hooks: files of the repository outside docs/ that pages link to are part of the site.

Pages link to them as on a code host (``../results/LOG.md``), so that the Markdown reads well in both places.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).resolve().parent.parent
_OUTSIDE = ("CHANGELOG.md", "results/LOG.md", "results/figures/*.png", "baselines/*/README.md")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the files outside docs/ to the site, under their path in the repository."""
    for pattern in _OUTSIDE:
        for path in sorted(_ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(_ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links that leave docs/ at those files."""
    return markdown.replace("](../", "](")
