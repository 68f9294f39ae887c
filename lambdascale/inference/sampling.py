"""Choosing the next token: greedy, or by temperature and nucleus, reproducibly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lambdascale.core.checks import check_types, require

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """``temperature`` 0 is greedy. ``top_p`` keeps the most likely tokens that together reach this probability.

    The draw for a token depends on ``seed`` and the token's position in the answer only: it is the same on whatever node and in
    whatever batch it is made, also after a request has moved.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self)
        require(self.temperature >= 0, f"temperature must not be negative, not {self.temperature}")
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}")


GREEDY = Sampling()
# Spreads seeds and positions over the generator's 64-bit seeds (Knuth's multiplicative constants).
_SEED_STEP, _POSITION_STEP = 6364136223846793005, 1442695040888963407


def choose(logits: Tensor, rules: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """The next token of each row of ``logits`` [rows, vocabulary]; ``positions``: how many tokens each answer has already."""
    greedy: list[int] = logits.argmax(dim=-1).tolist()
    return [
        token if rule.temperature == 0 else _draw(row, rule, position)
        for token, row, rule, position in zip(greedy, logits, rules, positions, strict=True)
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
