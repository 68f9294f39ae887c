"""How bytes move between nodes: one interface, shaped after one-sided RDMA writes with immediate data.

A node registers memory once; peers write blocks straight to their final place in it, and the node hears of each complete
write with the number the writer attached. Small messages (hidden states, tokens) travel over the same connections. Knows no
plans and no models.
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
