"""Node starts on the authors' trace by the way the weights came: what figures 10 and 11 measure. Frames in, text out."""

from __future__ import annotations

from textwrap import fill

import pandas as pd

from lambdascale.core import UserError

BLOCK = "starts"
_MODELS = {"llama2_7b": "7B", "llama2_13b": "13B", "llama2_70b": "70B"}
_WAYS = ("own_load", "unicast", "multicast")
_WIDTH = 119


def by_multicast(table: pd.DataFrame, system: str, model: str) -> str:
    """«X of Y»: node starts from a source with more than one destination, of all; from the table of paper_trace, first seed."""
    rows = table[(table.system == system) & (table.model == model)]
    if rows.empty:
        raise UserError(f"no runs of {system}, {model} in the table of paper_trace")
    starts = {way: int(rows[f"starts_{way}"].iloc[0]) for way in _WAYS}
    return f"{starts['multicast']} of {sum(starts.values())}"


def text(table: pd.DataFrame) -> str:
    """A sentence to stand beside figures 10 and 11."""

    def listed(system: str) -> str:
        counts = [f"{by_multicast(table, system, model)} ({size})" for model, size in _MODELS.items()]
        return f"{', '.join(counts[:-1])} and {counts[-1]}"

    sentence = (
        f"This trace measures multicasts little: of λScale's node starts, {listed('lambdascale')} come from a source with more "
        f"than one destination; most others load a host copy of their own. As the authors ran it, it is "
        f"{listed('lambdascale_prototype')}, and FaaSNet {listed('faasnet_prototype')}."
    )
    return fill(sentence, _WIDTH) + "\n"
