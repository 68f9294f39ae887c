"""Rules of the choice of the next token: greedy, or by temperature and nucleus (top-p). ``choosing`` applies them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lambdascale.core.checks import check_types, require

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
