"""Reproducible choice of the next token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lambdascale.inference.sampling import Sampling

Tensor = torch.Tensor
# Spreads seeds and positions over the generator's 64-bit seeds (Knuth's multiplicative constants).
_SEED_STEP, _POSITION_STEP = 6364136223846793005, 1442695040888963407


def choose(
    logits: Tensor, rules: Sequence[Sampling], positions: Sequence[int], likeliest: Sequence[int] | None = None
) -> list[int]:
    """Return the next token of each row of ``logits`` [rows, vocabulary]; answers have ``positions`` tokens already.

    ``likeliest``: the token of the highest logit in each row, if it is known.
    """
    greedy: Sequence[int] = logits.argmax(dim=-1).tolist() if likeliest is None else likeliest
    return [
        token if rule.temperature == 0 else _draw(logits[row], rule, position)
        for row, (token, rule, position) in enumerate(zip(greedy, rules, positions, strict=True))
    ]


def _draw(logits: Tensor, rule: Sampling, position: int) -> int:
    probabilities = torch.softmax(logits.float() / rule.temperature, dim=-1).cpu()
    likely, tokens = probabilities.sort(descending=True, stable=True)
    # A token stays if those before it do not reach top_p yet; the first always does.
    kept = likely.cumsum(0) - likely < rule.top_p
    kept[0] = True
    seed = (rule.seed * _SEED_STEP + position * _POSITION_STEP) % (1 << 63)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(likely * kept, 1, generator=generator)
    return int(tokens[chosen])
