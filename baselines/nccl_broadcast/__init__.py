"""NCCL broadcast: a communicator per scale-out, then a ring."""

from baselines.nccl_broadcast.planner import Chain

__all__ = ["Chain"]
