"""Multicast planners: pure functions from (sources, destinations, blocks) to rounds of sends.

They know nothing of bytes, links, clocks or the system they serve.
"""

from lambdascale.multicast.base import MulticastPlanner
from lambdascale.multicast.binomial import BinomialPipeline, check_counts
from lambdascale.multicast.grouping import chunk_blocks, injection_orders, near_equal_groups, orders_between
from lambdascale.multicast.repair import plan_from_holdings
from lambdascale.multicast.validate import arrival_rounds, completion_rounds, validate_plan

__all__ = [
    "BinomialPipeline",
    "MulticastPlanner",
    "arrival_rounds",
    "check_counts",
    "chunk_blocks",
    "completion_rounds",
    "injection_orders",
    "near_equal_groups",
    "orders_between",
    "plan_from_holdings",
    "validate_plan",
]
