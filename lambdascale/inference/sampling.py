"""Reproducible choice of the next token: greedy, or by temperature and nucleus (top-p)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lambdascale.core.checks import check_types, require

Tensor = torch.Tensor
# A smaller temperature overflows when logits are divided by it; vLLM's bound.
LOWEST_TEMPERATURE = 0.01
_SEEDS = range(-(1 << 63), 1 << 63)


def usable_temperature(temperature: float) -> float:
    """Return ``temperature``, or 0.01 for one between 0 and that, as vLLM does. 0 stays greedy."""
    return LOWEST_TEMPERATURE if 0 < temperature < LOWEST_TEMPERATURE else temperature


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """``temperature`` 0 is greedy, others are at least 0.01. ``top_p`` keeps the likeliest tokens that together reach it.

    The draw for a token depends on ``seed`` (64 bits) and the token's position in the answer only: it is the same on whatever
    node and in whatever batch it is made, also after a request has moved. UserError for values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate."""
        check_types(self, any_size=("seed",))
        require(self.temperature >= 0, f"temperature must not be negative, not {self.temperature}")
        usable = math.isfinite(self.temperature) and usable_temperature(self.temperature) == self.temperature
        require(usable, f"temperature must be 0 or between {LOWEST_TEMPERATURE} and 1e308, not {self.temperature}")
        require(self.seed in _SEEDS, f"seed must be between {_SEEDS[0]} and {_SEEDS[-1]}, not {self.seed}")
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}")


GREEDY = Sampling()
# Spreads seeds and positions over the generator's 64-bit seeds (Knuth's multiplicative constants).
_SEED_STEP, _POSITION_STEP = 6364136223846793005, 1442695040888963407


def choose(logits: Tensor, rules: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """Return the next token of each row of ``logits`` [rows, vocabulary]; answers have ``positions`` tokens already."""
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
