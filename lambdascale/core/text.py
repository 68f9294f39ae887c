"""Texts of strangers and of other machines, made fit to be printed."""

from __future__ import annotations

_LONGEST = 600  # characters of a message


def one_line(text: str, longest: int = _LONGEST) -> str:
    """Return ``text`` as one line of printable characters: a terminal obeys the others, and lines can be made up with them.

    Of a very long one, whatever value made it so, the beginning and the end are kept.
    """
    if len(text) > 4 * longest:
        text = f"{text[: 2 * longest]} … {text[-2 * longest :]}"
    line = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return line if len(line) <= longest else f"{line[: longest // 2]} … {line[-(longest // 2) :]}"
