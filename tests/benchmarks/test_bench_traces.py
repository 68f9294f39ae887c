"""Ten minutes of a trace of a million requests: the whole file decoded once, and each window after that from its index."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from lambdascale.workload import AzureTrace

ROWS = 1_000_000
# The rate of the Azure 2024 conversation trace: 27.3 M requests in a week.
STEP_S = 7 * 24 * 3600 / 27_303_999


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "conv.csv"
    begin = datetime(2024, 5, 12, tzinfo=UTC)
    with path.open("w") as file:
        file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n")
        file.writelines(f"{begin + timedelta(seconds=i * STEP_S)},{100 + i % 4000},{1 + i % 700}\n" for i in range(ROWS))
    return path


def window(trace: Path, start_s: float) -> int:
    return len(AzureTrace(path=str(trace), start_s=start_s, duration_s=600.0).requests(models=["m"], seed=0))


@pytest.mark.parametrize("indexed", [False, True], ids=["first", "later"])
def test_ten_minutes(
    benchmark: BenchmarkFixture, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indexed: bool
) -> None:
    monkeypatch.setenv("LAMBDASCALE_CACHE", str(tmp_path))

    def forget() -> None:
        for path in tmp_path.rglob("*.parquet"):
            path.unlink()

    if indexed:
        window(trace, 0.0)
    found = benchmark.pedantic(window, (trace, 9000.0), rounds=3, setup=None if indexed else forget)
    assert found == pytest.approx(600 / STEP_S, abs=2)


def test_memory(trace: Path, tmp_path: Path, benchmark: BenchmarkFixture) -> None:
    """Peak of a process of its own, in MiB, while it makes the index and then while it reads a window from it."""
    code = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
from tests.benchmarks.test_bench_traces import window
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
window(Path({str(trace)!r}), 9000.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    peaks = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"LAMBDASCALE_CACHE": str(tmp_path)}, capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout) / 1024)
    benchmark.extra_info["MiB, first and later"] = peaks
    benchmark.pedantic(lambda: None)
