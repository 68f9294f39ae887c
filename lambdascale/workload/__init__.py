"""Workloads: readers of request traces and generators. Everything yields :class:`lambdascale.core.TracedRequest`."""

from lambdascale.workload.base import LoadedTrace, Provenance, Workload
from lambdascale.workload.functions import AzureFunctions2019, AzureFunctions2021
from lambdascale.workload.generators import Burst, BurstyWorkload, ConstantRate
from lambdascale.workload.limits import bounded
from lambdascale.workload.rate_series import RateSeriesWorkload
from lambdascale.workload.readers import ArrivalsTrace, AzureTrace, BurstGptTrace, MooncakeTrace, TimedTrace
from lambdascale.workload.recorded import RecordedRun
from lambdascale.workload.servegen import ServeGenClients
from lambdascale.workload.shaping import ShapedWorkload
from lambdascale.workload.stats import Spike, TraceStats, spikes, trace_stats

__all__ = [
    "ArrivalsTrace",
    "AzureFunctions2019",
    "AzureFunctions2021",
    "AzureTrace",
    "Burst",
    "BurstGptTrace",
    "BurstyWorkload",
    "ConstantRate",
    "LoadedTrace",
    "MooncakeTrace",
    "Provenance",
    "RateSeriesWorkload",
    "RecordedRun",
    "ServeGenClients",
    "ShapedWorkload",
    "Spike",
    "TimedTrace",
    "TraceStats",
    "Workload",
    "bounded",
    "spikes",
    "trace_stats",
]
