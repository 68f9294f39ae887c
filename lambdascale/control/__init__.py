"""The control plane: every decision of λScale and of its baselines, once, for the simulated and the live cluster.

It turns events into commands. It must not know what carries them out: no clock, no I/O, no global randomness, no torch.
"""

from lambdascale.control.assembly import build_system
from lambdascale.control.autoscaler import Autoscaler, AutoscalingPolicy, PlannedAutoscaler, TurnAutoscaler
from lambdascale.control.batching import BatchedRequest, BatchLimits, BatchScheduler, Iteration
from lambdascale.control.loop import Backend, Observer, ServingSystem, drive
from lambdascale.control.plane import ControlPlane
from lambdascale.control.system import SystemConfig

__all__ = [
    "Autoscaler",
    "AutoscalingPolicy",
    "Backend",
    "BatchLimits",
    "BatchScheduler",
    "BatchedRequest",
    "ControlPlane",
    "Iteration",
    "Observer",
    "PlannedAutoscaler",
    "ServingSystem",
    "SystemConfig",
    "TurnAutoscaler",
    "build_system",
    "drive",
]
