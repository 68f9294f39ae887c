"""Transports, which move bytes between nodes: one interface, modelled on one-sided RDMA writes with immediate data.

A node registers memory once; peers write blocks directly to their final place in it, and the node is notified of each complete
write with the number that the writer attached. Small messages (hidden states, tokens) travel over the same connections. This
package knows nothing of plans and models.
"""

from lambdascale.transport.base import Endpoint, Handlers, Memory, TransportError
from lambdascale.transport.cuda import DeviceMemory, gpu_of
from lambdascale.transport.cuda_ipc import CudaIpcEndpoint
from lambdascale.transport.pacing import TokenBucket
from lambdascale.transport.shm import ShmEndpoint
from lambdascale.transport.tcp import TcpEndpoint

__all__ = [
    "CudaIpcEndpoint",
    "DeviceMemory",
    "Endpoint",
    "Handlers",
    "Memory",
    "ShmEndpoint",
    "TcpEndpoint",
    "TokenBucket",
    "TransportError",
    "gpu_of",
]
