"""Modules that every agent needs and that take long to load: imported once by the process that local agents are forked from."""

import lambdascale.inference.store
import lambdascale.inference.warmup
import lambdascale.live.node.collective
import lambdascale.live.node.compute
import lambdascale.live.node.mover
import lambdascale.live.node.runners  # noqa: F401 (imported to be loaded)
