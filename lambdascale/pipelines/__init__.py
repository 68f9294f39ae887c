"""Execution pipelines: pure functions from block arrivals to the nodes that serve together, and the round they can start in.

They know nothing of bytes, requests' contents, clocks or the cluster behind the node ids.
"""

from lambdascale.pipelines.base import PipelineBuilder
from lambdascale.pipelines.builder import ComplementaryPipelines, FixedLengths, NoPipelines, divide, validate_pipeline
from lambdascale.pipelines.costs import IN_ROUNDS, Costs
from lambdascale.pipelines.switch import spread_requests

__all__ = [
    "IN_ROUNDS",
    "ComplementaryPipelines",
    "Costs",
    "FixedLengths",
    "NoPipelines",
    "PipelineBuilder",
    "divide",
    "spread_requests",
    "validate_pipeline",
]
