"""Every key of every configuration with values of every type and size: a run that is right, or one line and status 2.

Each example changes one key of one composed configuration. The default suite draws a fixed sample; to try all of them, or fresh
ones: ``LAMBDASCALE_FUZZ=all`` or ``HYPOTHESIS_PROFILE=explore LAMBDASCALE_FUZZ=5000``, see docs/contributing.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from itertools import islice, product
from math import inf, isfinite, nan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from lambdascale.experiments.build import build
from lambdascale.experiments.compose import compose, names
from lambdascale.experiments.runner import run
from tests.fuzz.outcome import ends_well

BURST = ("workload=burst", "workload.count=5", "max_events=20000")
TRACES = {
    "azure": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n",
    "burstgpt": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n",
    "mooncake": '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46]}\n',
    "timed_trace": '{"timestamp": 0.5, "input_length": 6955, "output_length": 52}\n',
    "arrivals": "0.0\n0.36\n",
    "rate_series": "0.5\n0\n",
}
SHORT = {"bursty": ("workload.duration_s=20",), "constant": ("workload.duration_s=20",)}
BASES: dict[str, tuple[str, ...]] = {
    **{f"system={name}": (*BURST, f"system={name}") for name in names("system")},
    **{f"workload={name}": ("max_events=20000", f"workload={name}", *SHORT.get(name, ())) for name in (*TRACES, *SHORT)},
    **{f"cluster={name}": (*BURST, f"cluster={name}", "model=llama2_7b") for name in ("testbed2",)},
    "cluster=desk": (*BURST, "cluster=desk", "model=smollm2"),
    "cluster=measured/two_cores": (*BURST, "cluster=measured/two_cores", "model=smollm2"),
    "backend=live": ("backend=live", "transport=rdma", *BURST),
    "logger=wandb": (*BURST, "logger=wandb"),
}
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        100,
        10**6,
        0.01,
        0.5,
        -0.5,
        1e-14,
        1e-300,
        1e17,
        1e300,
        nan,
        inf,
        -inf,
        2**63,
        10**30,
        10**9,
    ),
    *(
        "",
        "x",
        "nan",
        "-5GB/s",
        "5GB/s",
        "1MB/s",
        "64GiB",
        "1e400GB",
        "zeile\nzwei\u2028drei \u00fc\U0001f600",
        "\x1b[2J\u202e\x00x",
        "x" * 3000,
        "../..",
        "null",
    ),
    *([], [1], [-1], [[0, 0.0]], [[0, 1], [0, 1]], [None], ["x"], [[]], {}, {"x": 1}, {"_target_": "nowhere.Nothing"}),
)
NUMBERS = st.integers() | st.floats() | st.integers(0, 1000) | st.floats(0, 1000)


@cache
def composed(base: str, folder: Path) -> DictConfig:
    """Configuration of a base; its trace is made in ``folder``."""
    trace = next((content for name, content in TRACES.items() if base == f"workload={name}"), None)
    if trace is None:
        return compose(BASES[base])
    path = folder / base.replace("=", "_")
    path.write_text(trace)
    return compose([*BASES[base], f"workload.path={path}"])


def keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Keys of a configuration, those of mappings included, as dotted paths."""
    for key, value in node.items():
        path = f"{prefix}{key}"
        yield path
        if isinstance(value, dict):
            yield from keys(value, f"{path}.")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


@cache
def points(folder: Path) -> list[tuple[str, str]]:
    """A base and a key of it; keys that several bases share, with the same value, stand once."""
    found: dict[str, tuple[str, str]] = {}
    for base in BASES:
        config = composed(base, folder)
        for key in keys(OmegaConf.to_container(config, resolve=False)):
            target = OmegaConf.select(config, f"{key.rpartition('.')[0]}._target_") if "." in key else ""
            found.setdefault(f"{key} {target} {OmegaConf.select(config, key)!r}", (base, key))
    return list(found.values())


def check(base: str, key: str, value: Any, folder: Path) -> int:
    """Run the configuration ``base`` with ``key`` set to ``value``."""

    def command() -> int:
        config = composed(base, folder).copy()
        OmegaConf.update(config, "results", results)
        OmegaConf.update(config, key, value, merge=False)
        if base == "backend=live" or key.startswith("logger") or base == "logger=wandb":
            build(config)  # a cluster of processes, a logger that reports to a server: built, and not run
            return 0
        summary = run(config).summary
        counts = summary["requests"]
        assert counts["completed"] + counts["failed"] == counts["submitted"]
        assert all(isfinite(number) for number in (summary["gpu_seconds"], summary["cost_usd"], summary["simulated_s"]))
        return 0

    with TemporaryDirectory() as results:
        before = Path.cwd()
        os.chdir(results)
        try:
            return ends_well(command, f"{' '.join(BASES[base])} {key}={value!r:.200}")
        finally:
            os.chdir(before)


EXAMPLES = os.environ.get("LAMBDASCALE_FUZZ", "80")
_PARTS = 64 if EXAMPLES == "all" else 1  # of all cases, for processes that share them


@pytest.mark.skipif(EXAMPLES == "all", reason="test_all_of_them tries every one")
@settings(max_examples=int(EXAMPLES) if EXAMPLES.isdigit() else 1, deadline=None)
@given(data=st.data())
def test_a_changed_key(folder: Path, data: st.DataObject) -> None:
    base, key = data.draw(st.sampled_from(points(folder)))
    check(base, key, data.draw(st.sampled_from(VALUES) | NUMBERS | st.text(max_size=20)), folder)


@pytest.mark.skipif(EXAMPLES != "all", reason="takes ten minutes on two cores: LAMBDASCALE_FUZZ=all")
@pytest.mark.parametrize("part", range(_PARTS))
def test_all_of_them(folder: Path, part: int) -> None:
    failures = []
    for (base, key), value in islice(product(points(folder), VALUES), part, None, _PARTS):
        try:
            check(base, key, value, folder)
        except AssertionError as error:
            failures.append(str(error))
            print(error)
    assert not failures, f"{len(failures)} failures"


def test_the_sample_is_of_all_configurations(folder: Path) -> None:
    reached = {base for base, _ in points(folder)}
    assert reached == set(BASES)


def test_a_fault_of_ours_is_noticed() -> None:
    with pytest.raises(AssertionError, match="status 1"):
        ends_well(lambda: int("x"), "a fault of ours")


@pytest.mark.parametrize(
    "overrides",
    [
        (*BURST, "replay=NAME"),
        (*BURST, "out=NAME"),
        (*BURST, "results=NAME"),
        (*BURST, "backend=live", "backend.checkpoint=NAME"),
        *((f"workload={name}", "workload.path=NAME") for name in ("run", "azure", "rate_series", "servegen", "functions_2019")),
    ],
    ids=lambda overrides: overrides[-1] if overrides[0] in BURST else overrides[0],
)
def test_a_name_longer_than_files_may_have(overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = tuple(text.replace("NAME", "x" * 300) for text in overrides)
    assert ends_well(lambda: run(compose(overrides)).reused, overrides) == 2
