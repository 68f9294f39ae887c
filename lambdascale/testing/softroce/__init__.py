"""A small virtual machine with RDMA devices (Soft-RoCE), for tests on machines that have none.

QEMU emulates a machine (KVM is not needed) whose root is this machine's file system, read-only below a layer in memory. Debian's
kernel has the module rdma_rxe, which turns ordinary network interfaces into RDMA devices: real verbs, but slow.
"""

from lambdascale.testing.softroce.machine import Machine, Outcome, Wire, run, start
from lambdascale.testing.softroce.packages import ensure_packages

__all__ = ["Machine", "Outcome", "Wire", "ensure_packages", "run", "start"]
