"""The simulated cluster: event kernel, fair-share links, storage, compute-time model, and the backend that joins them.

It carries out what the control plane commands and decides nothing itself.
"""

from lambdascale.sim.backend import SimBackend, SimConfig
from lambdascale.sim.options import TransferOptions
from lambdascale.sim.processes import NewProcesses, WarmPool

__all__ = ["NewProcesses", "SimBackend", "SimConfig", "TransferOptions", "WarmPool"]
