"""Heads and rows of trace files, and their requests."""

from __future__ import annotations

from collections.abc import Callable

from lambdascale.core import TracedRequest
from lambdascale.workload import ShapedWorkload

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
Write = Callable[..., str]


def read(workload: ShapedWorkload, *models: str) -> list[TracedRequest]:
    return list(workload.requests(models=models or ("m",), seed=0))


def azure_row(time: str, prompt: object = 10, output: object = 5) -> str:
    return f"{time},{prompt},{output}\n"
