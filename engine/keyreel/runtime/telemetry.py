"""Spans and histograms with opentelemetry-api, in an application that has imported it.

The application chooses the exporter; the API alone does nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

NAME = "keyreel"


@contextmanager
def span(name: str, **attributes: str | int | float) -> Iterator[None]:
    """A span around a block or, as a decorator, around each call of a function; records exceptions."""
    if (api := _api()) is None:
        yield
        return
    with api.trace.get_tracer(NAME).start_as_current_span(name, attributes=attributes):
        yield


def record_stages(seconds: Mapping[str, float]) -> None:
    """Records the seconds of each stage of a job in the histogram `keyreel.stage.duration`."""
    if (api := _api()) is None:
        return
    histogram = _histogram(api)
    for stage, spent in seconds.items():
        histogram.record(spent, {"stage": stage})


def _api() -> Any:
    if sys.modules.get("opentelemetry") is None:  # no exporter is set up, and the import takes time
        return None
    try:
        import opentelemetry.metrics
        import opentelemetry.trace
    except ModuleNotFoundError:
        return None
    return opentelemetry


@functools.cache
def _histogram(api: Any) -> Any:
    return api.metrics.get_meter(NAME).create_histogram(
        "keyreel.stage.duration", unit="s", description="Time at work on a stage of one video"
    )
