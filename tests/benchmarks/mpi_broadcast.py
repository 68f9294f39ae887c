"""One rank of an OpenMPI broadcast of argv[1] bytes; rank 0 prints the seconds until the last has them. Started by mpirun."""

import sys
import time

import numpy as np
from mpi4py import MPI

world = MPI.COMM_WORLD
data = np.ones(int(sys.argv[1]), dtype=np.uint8)
world.Barrier()
began = time.perf_counter()
world.Bcast(data, root=0)
world.Barrier()
if world.Get_rank() == 0:
    print(time.perf_counter() - began)
