"""Tables and numbers from the raw events of a run. Watches runs, never influences them; drawing is in figures/."""

from lambdascale.metrics.compare import comparison, print_comparison
from lambdascale.metrics.files import read_table, whole, write_json, write_table, write_whole
from lambdascale.metrics.over_time import over_time
from lambdascale.metrics.recorder import Recorder
from lambdascale.metrics.sinks import FilesLogger, FinishedRun, RunLogger
from lambdascale.metrics.slo import Slo
from lambdascale.metrics.summary import summarise
from lambdascale.metrics.tables import events_table, gpu_usage, requests_table

__all__ = [
    "FilesLogger",
    "FinishedRun",
    "Recorder",
    "RunLogger",
    "Slo",
    "comparison",
    "events_table",
    "gpu_usage",
    "over_time",
    "print_comparison",
    "read_table",
    "requests_table",
    "summarise",
    "whole",
    "write_json",
    "write_table",
    "write_whole",
]
