"""«What we believe, and how sure we are»: a text whose every number is read from a table when it is made.

``results/beliefs.md.j2`` is the text, a Jinja template. Change its words there, a line for each bullet;
``scripts/tables.py`` fills in the numbers and writes the block of README.md. Functions of the template:

- ``p90(system, model)``, ``gpu(system, model)``: ratio of P90 TTFT, per cent of GPU time saved, with the interval of 95 %;
- ``mark(system, model, ...)``: † if a P90 TTFT of these models rests on set-ups of NCCL that were not measured;
- ``seeds(system, model)``: the ratio of P90 TTFT over seeds of the generator;
- ``under(system, model, setting, value)``: the ratio of P90 TTFT under another assumption;
- ``new_processes(system, model)``: the ratio of P90 TTFT if each allocation starts a process;
- ``removed(cause, system, model)``: the ratio of P90 TTFT in the runs explanations/CAUSE/10;
- ``changed(fate)``: results under other assumptions with that fate (holds, halved, undecided, reversed), of ``changed()``;
- ``step(system, model)``: P90 TTFT in seconds of a step of the attribution, on the authors' trace;
- ``with_memory(system, memory)``: the ratio of P90 TTFT with twelve models and so much host memory;
- ``on_gpus(model, link, sources)``: per cent by which pipelines lower P90 TTFT in bursts on GPUs, with the interval of pairs;
- ``live(executes, sources)``: times that serving after loading takes until all of a live burst are served, with the interval;
- ``count(verdict)``: rows of the comparison with the paper with that verdict, of ``count()`` rows;
- ``cell(table, column, key=value, ...)``: any number of any table; UserError unless the keys choose one row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

import jinja2
import pandas as pd

from lambdascale.core import UserError
from lambdascale.experiments.gpu_bursts import paired, ratio
from lambdascale.experiments.paper_table import gpu_title, p90_ratio, p90_title, without
from lambdascale.experiments.sensitivity import conclusions
from lambdascale.metrics.intervals import over_draws

TEMPLATE = "beliefs.md.j2"
BLOCK = "beliefs"
#: Longest text, in lines, that a reader may be asked to quote.
LINES = 25
_WIDTH = 119
_AUTHORS = "lambdascale.workload.ArrivalsTrace"
# Names that have numbers in them: of models, hardware, percentiles and the interval.
_NAMES_WITH_NUMBERS = re.compile(r"\b(?:7B|13B|70B|H\d00s?|P90|P50)\b|\b95 %")
_CODE = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", re.DOTALL)


class Tables(Mapping[str, pd.DataFrame]):
    """Tables of a folder by name, read when asked for; UserError for one that is missing."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __getitem__(self, name: str) -> pd.DataFrame:
        path = self._directory / f"{name}.csv"
        if not path.is_file():
            raise UserError(f"no table {name}.csv in {self._directory}, which {TEMPLATE} reads")
        return pd.read_csv(path)

    def __iter__(self) -> Any:
        return (path.stem for path in sorted(self._directory.glob("*.csv")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def render(template: str, tables: Mapping[str, pd.DataFrame]) -> str:
    """Fill in the template; UserError if it reads what the tables lack, has a number of its own, or is longer than ``LINES``."""
    own = re.findall(r"\d[\d.,]*", _NAMES_WITH_NUMBERS.sub("", _CODE.sub("", template)))
    if own:
        raise UserError(f"{TEMPLATE} has numbers that are in no table: {', '.join(own)}")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    try:
        text = environment.from_string(template).render(**_functions(tables))
    except jinja2.TemplateError as error:
        raise UserError(f"{TEMPLATE}: {error}") from error
    lines = [line for paragraph in text.splitlines() if paragraph.strip() for line in _wrapped(paragraph)]
    if len(lines) > LINES:
        raise UserError(f"{TEMPLATE} gives {len(lines)} lines; {LINES} are the most that a reader can quote")
    return "\n".join(lines) + "\n"


def _wrapped(paragraph: str) -> list[str]:
    """Lines of one paragraph, each a line of the template; continued lines of a bullet are indented."""
    return wrap(paragraph, _WIDTH, subsequent_indent="  " if paragraph.startswith("- ") else "", break_on_hyphens=False)


def _functions(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    def row(table: str, **keys: Any) -> Any:
        frame = tables[table]
        for key, value in keys.items():
            if key not in frame.columns:
                raise UserError(f"{TEMPLATE}: table {table} has no column {key}")
            column = frame[key]
            frame = frame[column.astype(str) == str(value)] if not isinstance(value, float) else frame[column == value]
        if len(frame) != 1:
            raise UserError(f"{TEMPLATE}: {len(frame)} rows of {table} with {keys}, not one")
        return frame.iloc[0]

    def cell(table: str, column: str, digits: int = 3, **keys: Any) -> str:
        value = row(table, **keys)[column]
        return f"{value:.{digits}g}" if isinstance(value, float) else str(value)

    def compared(what: str, model: str) -> str:
        found = row("paper_vs_ours", what=what, model=model)
        return f"{found.ours} ({found.interval})"

    def mark(system: str, *models: str) -> str:
        found = [row("paper_vs_ours", what=p90_title(system), model=model).setup for model in models]
        return "†" if any(isinstance(setup, str) and setup for setup in found) else ""

    def under(system: str, model: str, setting: str, value: str) -> str:
        found = row("sensitivity", run=f"sensitivity/{setting}/{value}", system=system, model=model)
        return _with_interval(found.p90_ratio, found.p90_low, found.p90_high)

    def new_processes(system: str, model: str) -> str:
        found = row("cold_start_ratios", pool="NewProcesses", kept_s=0.0, system=system, model=model)
        return _with_interval(found.p90_ratio, found.p90_low, found.p90_high)

    def removed(cause: str, system: str, model: str) -> str:
        rows = without(tables["explanations"], cause, "10")
        found = rows[(rows.system == system) & (rows.model == model)].iloc[0]
        return _with_interval(float(p90_ratio(model, system)(rows).median()), found.p90_low, found.p90_high)

    def seeds(system: str, model: str) -> str:
        found = row("intervals", workload="lambdascale.workload.BurstyWorkload", system=system, model=model)
        return _with_interval(found.p90_ratio, found.p90_low, found.p90_high)

    def on_gpus(model: str, link: str, sources: int, count: int = 200) -> str:
        """Return the per cent by which pipelines lower P90 on GPUs, of pairs of the present engine. No source: host memory."""
        runs = tables["gpu_bursts" if sources else "gpu_bursts_shared"]
        runs = runs[(runs.tier == ("gpu" if sources else "host")) & (runs.kv == "recompute") & (runs.output_tokens == 64)]
        runs = runs[(runs.model == model) & (runs.link == link) & (runs.sources == sources) & (runs["count"] == count)]
        runs = runs[~runs.measured_on.str.contains("before")]
        pairs = [each for _, each in paired(runs)]
        if not pairs:
            return "? % (0 pairs)"
        found = ratio(pd.concat(pairs))
        lower, (low, high) = 100 * (1 - found.value), (100 * (1 - found.high), 100 * (1 - found.low))
        return f"{lower:.0f} % " + (f"({low:.0f} to {high:.0f})" if found.known else f"({sum(map(len, pairs))} pairs)")

    def live(executes: str, sources: int) -> str:
        found = row("execute_while_load", executes=executes, sources=sources, backend="live-paced")
        return _with_interval(found.ratio, found.low, found.high)

    def with_memory(system: str, memory: str) -> str:
        runs = tables["beyond_host_memory"]
        runs = runs[runs.host_memory == memory]
        p90 = runs.pivot_table(index="seed", columns="system", values="ttft_p90_s")
        if not {system, "lambdascale"} <= {*p90.columns}:
            raise UserError(f"{TEMPLATE}: no rows of beyond_host_memory for {system}, {memory}")
        found = over_draws((p90[system] / p90.lambdascale).dropna().tolist())
        return _with_interval(found.value, found.low, found.high)

    def count(verdict: str | None = None) -> int:
        verdicts = tables["paper_vs_ours"].verdict
        return len(verdicts) if verdict is None else int((verdicts == verdict).sum())

    def changed(fate: str | None = None) -> int:
        fates = conclusions(tables["sensitivity"]).verdict
        return len(fates) if fate is None else int((fates == fate).sum())

    return {
        "changed": changed,
        "cell": cell,
        "count": count,
        "mark": mark,
        "under": under,
        "new_processes": new_processes,
        "removed": removed,
        "on_gpus": on_gpus,
        "live": live,
        "with_memory": with_memory,
        "step": lambda system, model: cell("attribution", "ttft_p90_s", trace=_AUTHORS, system=system, model=model),
        "seeds": seeds,
        "p90": lambda system, model: compared(p90_title(system), model),
        "gpu": lambda system, model: compared(gpu_title(system), model),
    }


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.3g} (no interval)" if low != low else f"{value:.3g} ({low:.3g} to {high:.3g})"
