"""Greedy answers, checked in one pass: much shorter than letting the reference generate them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def is_greedy(model: torch.nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> bool:
    """Return True if ``generate`` without sampling would answer so: each token is the most likely one after all before it."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.inference_mode():
        logits = model(ids).logits[0]
    return bool((logits[len(prompt) - 1 : -1].argmax(-1) == ids[0, len(prompt) :]).all())
