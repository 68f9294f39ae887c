"""A small virtual machine with RDMA devices (Soft-RoCE), for tests on machines that have none.

QEMU emulates a machine (no KVM needed) whose root is this machine's own file system, read-only below a layer in memory. The
kernel is Debian's, whose rdma_rxe module makes RDMA devices of ordinary network interfaces: real verbs, slowly.
"""

from lambdascale.testing.softroce.machine import Machine, Outcome, Wire, run, start
from lambdascale.testing.softroce.packages import ensure_packages

__all__ = ["Machine", "Outcome", "Wire", "ensure_packages", "run", "start"]
