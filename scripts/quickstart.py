"""The Python part of scripts/quickstart: five systems on a bursty trace, one table, two figures."""

import sys
from pathlib import Path

from rich.console import Console

from lambdascale.cli.guard import run_guarded
from lambdascale.experiments.collect import gpu_rows, request_rows
from lambdascale.experiments.compose import compose
from lambdascale.experiments.pairs import run_rows
from lambdascale.experiments.runner import run
from lambdascale.figures.registry import render
from lambdascale.metrics import comparison, print_comparison
from lambdascale.metrics.intervals import paired

SYSTEMS = ("lambdascale", "faasnet", "nccl_broadcast", "serverlessllm", "ideal")


def main() -> None:
    overrides = ["experiment=quickstart", *sys.argv[1:]]
    results = [run(compose([*overrides, f"system={system}"]), group="quickstart") for system in SYSTEMS]
    console = Console(width=None if sys.stdout.isatty() else 130)
    print_comparison(console, comparison([result.summary for result in results]), "30-minute bursty trace, Llama-2 13B, 12 nodes")
    folders = [result.folder for result in results]
    for system, folder in zip(SYSTEMS[1:], folders[1:], strict=True):
        console.print(f"{system} / λScale, 95 %: {_ratios(folders[0], folder)}", highlight=False)
    out = Path("results/raw/quickstart/figures")
    figures = render("fig10_ttft", request_rows(folders), out) + render("fig11_gpus", gpu_rows(folders), out)
    for result in results:
        console.print(f"{'reused' if result.reused else 'wrote '} {result.folder}", highlight=False, soft_wrap=True)
    for path in figures:
        console.print(f"drew   {path}", highlight=False, soft_wrap=True)


def _ratios(ours: Path, theirs: Path) -> str:
    """Ratios of a pair of runs of the same requests, with their intervals."""
    found = paired([(run_rows(ours), run_rows(theirs))])
    return ", ".join(
        f"{what} {ratio.value:.3g} ({ratio.low:.3g} to {ratio.high:.3g})"
        for what, ratio in (("P90 TTFT", found.p90), ("GPU-s", found.gpu))
    )


if __name__ == "__main__":
    sys.exit(run_guarded(main))
