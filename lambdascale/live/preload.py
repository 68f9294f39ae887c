"""What every agent needs and takes long to load: imported once by the process that local agents are forked from."""

import lambdascale.inference
import lambdascale.live.collective
import lambdascale.live.compute
import lambdascale.live.mover
import lambdascale.live.runners  # noqa: F401
