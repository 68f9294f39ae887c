"""The comparison with the paper as Markdown, and blocks of text in documents. Frames in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import Any

import pandas as pd

from lambdascale.core import UserError

# Columns of the notes below the table.
_WIDTH = 119
#: Between the entries of a cell about several causes.
SEPARATOR = " | "
# Values beside which no interval is shown: of runs in which nothing is drawn, and of one that is never idle long enough.
_NO_INTERVAL = ("exact", "none")
_ALL = "All that was tried, for rows with more than one cause:"
_MARK = "†: NCCL's set-up is measured for 2 to 8 ranks; broadcasts of this row have up to 12, of which a single sample is known."


def markdown(table: pd.DataFrame) -> str:
    """Format the comparison as Markdown, with the cause whose removal leaves least of each difference.

    Ranges over seeds are in brackets, reasons are numbered notes below; † marks rows with a ``setup``. A second table has
    everything that was tried.
    """
    table = table.fillna("")
    heads = ["figure", "what", "model", "paper", "ours", "95 %", "error", "closest without no.", "so"]
    lines, all_tried = [_line(heads), "|" + "---|" * len(heads)], []
    notes: dict[str, int] = {}
    for row in table.itertuples():
        spread = f" ({row.range_over_seeds!s})" if row.range_over_seeds else ""
        unit = f" {row.unit!s}" if row.unit else ""
        numbers = [notes.setdefault(why, len(notes) + 1) for why in parts(row.why)]
        tried = _tried_cells(row, numbers, unit)
        closest = tried[int(str(row.closest))] if tried else ", ".join(str(number) for number in numbers)
        error = f"({row.error!s})" if row.verdict == "coincidence" else row.error
        ours = f"{row.ours}{unit}{'†' if row.setup else ''}{spread}"
        lines.append(
            _line([row.figure, row.what, row.model, f"{row.paper}{unit}", ours, row.interval, error, closest, row.verdict])
        )
        if len(tried) > 1:
            all_tried.append(_line([row.figure, row.what, row.model, "; ".join(tried)]))
    numbered = [fill(f"{number}. {note}", _WIDTH, subsequent_indent="   ") for note, number in notes.items()]
    mark = [fill(_MARK, _WIDTH), ""] if (table.setup != "").any() else []
    heads = ["figure", "what", "model", "without cause no.: ours (95 %), what is left"]
    second = ["", _ALL, "", _line(heads), "|---|---|---|---|", *all_tried] if all_tried else []
    return "\n".join([*lines, "", *mark, *numbered, *second]) + "\n"


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _tried_cells(row: Any, numbers: Sequence[int], unit: str) -> list[str]:
    """Format what each cause of a row leaves, in the order in which they were tried."""
    found = zip(numbers, parts(row.without), parts(row.interval_without), parts(row.error_without), strict=False)
    return [
        f"{number}: {value}{unit}{'' if interval in _NO_INTERVAL else f' ({interval})'}, {left}"
        for number, value, interval, left in found
    ]


def parts(joined: object) -> list[str]:
    """Entries of a cell about several causes, in their order."""
    return str(joined).split(SEPARATOR) if joined else []


def with_block(text: str, name: str, block: str) -> str:
    """Replace the text between the comments ``<!-- NAME -->`` and ``<!-- end NAME -->`` by ``block``; UserError without them."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise UserError(f"the document lacks the comments {begin} and {end}")
    return f"{head}{begin}\n{block}{end}{tail}"
