"""Simulate five systems on a bursty trace, print a table and draw two figures: the Python part of scripts/quickstart."""

import sys
from pathlib import Path

from rich.console import Console

from lambdascale.cli.guard import run_guarded
from lambdascale.cli.parser import Parser
from lambdascale.core import UserError
from lambdascale.experiments.collect import gpu_rows, request_rows
from lambdascale.experiments.compose import compose
from lambdascale.experiments.pairs import run_rows
from lambdascale.experiments.runner import run
from lambdascale.figures.registry import render
from lambdascale.metrics import comparison, print_comparison
from lambdascale.metrics.intervals import paired

SYSTEMS = ("lambdascale", "faasnet", "nccl_broadcast", "serverlessllm", "ideal")


def main() -> None:
    parser = Parser(prog="quickstart", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of all runs, as for scripts/run.py")
    given = parser.parse_args().overrides
    if fixed := [each for each in given if each.partition("=")[0].lstrip("+~") in ("experiment", "system", "out")]:
        raise UserError(f"{fixed[0]}: the quickstart compares its five systems; scripts/run.py runs others")
    overrides = ["experiment=quickstart", *given]
    results = [run(compose([*overrides, f"system={system}"]), group="quickstart") for system in SYSTEMS]
    console = Console(width=None if sys.stdout.isatty() else 130)
    title = f"quickstart with {' '.join(given)}" if given else "30-minute bursty trace, Llama-2 13B, 12 nodes"
    print_comparison(console, comparison([result.summary for result in results]), title)
    folders = [result.folder for result in results]
    for system, folder in zip(SYSTEMS[1:], folders[1:], strict=True):
        console.print(f"{system} / λScale, 95 %: {_ratios(folders[0], folder)}", highlight=False)
    out = folders[0].parent / "figures"
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
