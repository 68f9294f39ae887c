"""Printable forms of texts that come from clients and other machines."""

from __future__ import annotations

_LONGEST = 600  # characters of a message


def one_line(text: str, longest: int = _LONGEST) -> str:
    """Return ``text`` as one line of printable characters: other characters could control a terminal or fake further lines.

    A very long text is cut in the middle.
    """
    if len(text) > 4 * longest:
        text = f"{text[: 2 * longest]} … {text[-2 * longest :]}"
    line = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return line if len(line) <= longest else f"{line[: longest // 2]} … {line[-(longest // 2) :]}"
