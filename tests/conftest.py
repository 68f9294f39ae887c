"""Settings of the whole suite.

Properties draw the same examples every time, so that a commit is judged by what it changed. Looking for new failures is a
run of its own: ``HYPOTHESIS_PROFILE=explore scripts/test tests/property`` draws fresh ones, and what it finds becomes an
``@example`` of the property. The profile ``mutation`` (scripts/mutation.py) stops at the first failing example, since making it
small takes longer than a mutant is given.

torch's threads wait asleep: by default they spin, and on a busy machine that makes the suite fifty times slower.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import Phase, settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

settings.register_profile("steady", derandomize=True, database=None)
settings.register_profile("explore", derandomize=False)
settings.register_profile("mutation", derandomize=True, database=None, phases=(Phase.explicit, Phase.generate))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

# Files that take longest, longest first: two workers (.ci/run) begin with these, so that neither is left with one at the end.
LONGEST = (
    "conf/test_configurations.py",
    "docs/test_docs.py",
    "unit/test_figures.py",
    "inference/test_real_model.py",
    "inference/test_token_exactness.py",
    "property/test_multicast_binomial.py",
    "unit/test_studies.py",
    "runs/test_runs.py",
    "runs/test_launchers.py",
)


# Marks of tests that CI runs apart from the others, in files that it finds by this text.
APART = {mark: f"pytest.mark.{mark}" for mark in ("live", "rdma")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first; the others, and the tests of each file, in their order.

    UsageError for a file whose tests CI would not find.
    """
    marked = {(item.path, mark) for item in items for mark in APART if item.get_closest_marker(mark)}
    hidden = sorted(str(path) for path, mark in marked if APART[mark] not in path.read_text())
    if hidden:
        raise pytest.UsageError(f"write pytest.mark.live or pytest.mark.rdma out, so that .ci/run finds {', '.join(hidden)}")
    folder = Path(__file__).parent
    ranks = {folder / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
