"""Token counts for requests that come without them: fixed, or drawn from lognormals fitted to public traces."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lambdascale.core.checks import require
from lambdascale.workload.columns import Ints
from lambdascale.workload.shaping import ShapedWorkload


@dataclass(frozen=True)
class Lognormal:
    """Distribution of a token count: lognormal with ``mu`` and ``sigma`` of its logarithm, rounded, from 1 to ``cap``."""

    mu: float
    sigma: float
    cap: int

    def draw(self, count: int, rng: np.random.Generator) -> Ints:
        """Draw ``count`` independent token counts."""
        drawn = np.exp(np.minimum(rng.normal(self.mu, self.sigma, count), math.log(self.cap)))
        return np.maximum(np.rint(drawn), 1).astype(np.int64)


#: (prompt, output) fitted to the Azure 2023 conversation trace, capped at its longest, and to BurstGPT (traces' statistics).
#: Prompt and output are drawn independently: their rank correlation in the traces is 0.07.
FITTED: dict[str, tuple[Lognormal, Lognormal]] = {
    "azure": (Lognormal(6.63, 0.985, 14_050), Lognormal(5.02, 0.859, 1_000)),
    "burstgpt": (Lognormal(4.57, 1.64, 6_142), Lognormal(3.02, 1.79, 7_315)),
}


@dataclass(frozen=True, kw_only=True)
class LengthsMixin(ShapedWorkload):
    """Adds ``lengths``: "fixed" gives every request ``prompt_tokens`` and ``output_tokens``, other values draw from FITTED."""

    lengths: Literal["fixed", "azure", "burstgpt"] = "fixed"
    prompt_tokens: int = 128
    output_tokens: int = 64

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        for name in ("prompt_tokens", "output_tokens"):
            value = getattr(self, name)
            require(1 <= value < 10**9, f"{type(self).__name__}.{name} must be at least 1 and below 1e9, not {value!r}")

    def _draw_lengths(self, count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
        if self.lengths == "fixed":
            return np.full(count, self.prompt_tokens, dtype=np.int64), np.full(count, self.output_tokens, dtype=np.int64)
        prompt, output = FITTED[self.lengths]
        prompt_rng, output_rng = rng.spawn(2)
        return prompt.draw(count, prompt_rng), output.draw(count, output_rng)
