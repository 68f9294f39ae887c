"""Service-level objectives: targets for each request, and how much of a run's load met them.

Definitions are those of the benchmark harnesses (vLLM's ``--goodput``, AIPerf, GuideLLM): a request is good if it completed
and met all its targets. A failed request is a miss. Attainment is a share of the requests submitted; goodput counts good
requests, and their output tokens, per second of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lambdascale.core import UserError

# Metric of a target -> column of requests.parquet. The names are those of vLLM's benchmark.
_COLUMNS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s"}
_EVERY_MODEL = "default"

Targets = Mapping[str, float]


@dataclass(frozen=True)
class Slo:
    """Targets by model: metric (ttft, tpot or e2el) -> at most so many seconds. ``default`` is for models not listed."""

    models: Mapping[str, Targets]

    @classmethod
    def parse(cls, setting: str | Mapping[str, str], models: tuple[str, ...]) -> Slo:
        """Read ``"ttft:1000 tpot:100"`` (milliseconds), or such texts by model; UserError for what is no target or no model."""
        texts = {_EVERY_MODEL: setting} if isinstance(setting, str) else setting
        if not isinstance(texts, Mapping):
            raise UserError(f'slo={setting!r} is no list of targets; write slo="ttft:1000 tpot:100", in milliseconds')
        for name in texts:
            if name != _EVERY_MODEL and name not in models:
                raise UserError(
                    f"slo names the model {name!r}; this run has {', '.join(models)}, and {_EVERY_MODEL} for all others"
                )
        return cls({str(name): _targets(text) for name, text in texts.items()})

    def good(self, requests: pd.DataFrame) -> pd.Series[bool]:
        """True for each row of requests.parquet that completed and met its targets; without a second token, TPOT is met."""
        good = requests.status == "ok"
        for name, rows in requests.groupby("model"):
            for metric, limit_s in self._of(str(name)).items():
                good[rows.index] &= ~(rows[_COLUMNS[metric]] > limit_s)
        return good

    def _of(self, model: str) -> Targets:
        return self.models.get(model, self.models.get(_EVERY_MODEL, {}))

    def text(self) -> str:
        """The targets in one line, in milliseconds: ``ttft:1000 tpot:100``, by model where they differ."""
        lines = {
            name: " ".join(f"{metric}:{limit_s * 1000:g}" for metric, limit_s in targets.items())
            for name, targets in self.models.items()
        }
        if list(lines) == [_EVERY_MODEL]:
            return lines[_EVERY_MODEL]
        return ", ".join(f"{name} {line}" for name, line in lines.items())


def _targets(text: object) -> dict[str, float]:
    if not isinstance(text, str) or not text.split():
        raise UserError(f'slo={text!r} is no list of targets; write slo="ttft:1000 tpot:100", in milliseconds')
    targets: dict[str, float] = {}
    for part in text.split():
        metric, _, limit = part.partition(":")
        if metric not in _COLUMNS:
            raise UserError(f"slo has a target {part!r}; it must be one of {', '.join(_COLUMNS)}, a colon and milliseconds")
        if metric in targets:
            raise UserError(f"slo has two targets for {metric}")
        try:
            limit_ms = float(limit)
        except ValueError:
            limit_ms = math.nan
        if not 0 < limit_ms < math.inf:
            raise UserError(f"slo has a target {part!r}; {limit!r} must be a positive number of milliseconds")
        targets[metric] = limit_ms / 1000
    return targets


def attainment(
    requests: pd.DataFrame, slo: Slo, *, duration_s: float, gpu_seconds: float, usd_per_gpu_hour: float
) -> dict[str, Any]:
    """Part ``slo`` of summary.json: the share of good requests, goodput, and what a good request cost.

    ``duration_s``: from the first arrival to the last end of a request. Values per good request are None without one.
    """
    good = slo.good(requests)
    count, tokens = int(good.sum()), float(requests.output_tokens[good].sum())
    return {
        "targets_ms": slo.text(),
        "met": count,
        "attainment_percent": 100 * count / len(requests) if len(requests) else None,
        "goodput_requests_per_s": count / duration_s if duration_s else None,
        "goodput_tokens_per_s": tokens / duration_s if duration_s else None,
        "gpu_seconds_per_request": gpu_seconds / count if count else None,
        "usd_per_request": gpu_seconds / 3600 * usd_per_gpu_hour / count if count else None,
    }
