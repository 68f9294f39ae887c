"""Vocabulary of the package: requests, events, commands, plans, specs, errors, units. Frozen values; no I/O, no policy."""

from lambdascale.core.errors import CapacityError, IncompleteRunError, PlanError, TraceError, UserError
from lambdascale.core.failures import FAILURE_REASONS, Failure, FailureReason
from lambdascale.core.plan import FormRule, MulticastPlan, NodeId, PipelinePlan, Send, Stage, SwitchRule
from lambdascale.core.process_start import ProcessStart
from lambdascale.core.request import Request, TracedRequest, traced
from lambdascale.core.specs import BlockSpec, ClusterSpec, ComputeSpec, ComputeTable, GpuSpec, ModelSpec, NodeOverride, NodeSpec
from lambdascale.core.units import parse_rate, parse_size

__all__ = [
    "FAILURE_REASONS",
    "BlockSpec",
    "CapacityError",
    "ClusterSpec",
    "ComputeSpec",
    "ComputeTable",
    "Failure",
    "FailureReason",
    "FormRule",
    "GpuSpec",
    "IncompleteRunError",
    "ModelSpec",
    "MulticastPlan",
    "NodeId",
    "NodeOverride",
    "NodeSpec",
    "PipelinePlan",
    "PlanError",
    "ProcessStart",
    "Request",
    "Send",
    "Stage",
    "SwitchRule",
    "TraceError",
    "TracedRequest",
    "UserError",
    "parse_rate",
    "parse_size",
    "traced",
]
