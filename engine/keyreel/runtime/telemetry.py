"""Spans and histograms with opentelemetry-api, if installed.

The application chooses the exporter; the API alone does nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

NAME = "keyreel"
P = ParamSpec("P")
R = TypeVar("R")


def span(name: str, **attributes: str | int | float) -> AbstractContextManager[Any]:
    """A span around a block; records exceptions."""
    api = _api()
    return nullcontext() if api is None else _open(api, name, attributes)


def traced(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A span around each call of a function."""

    def decorate(work: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(work)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with span(name):
                return work(*args, **kwargs)

        return run

    return decorate


def record_stages(seconds: Mapping[str, float]) -> None:
    """Records the seconds of each stage of a job in the histogram `keyreel.stage.duration`."""
    api = _api()
    if api is None:
        return
    histogram = _histogram(api)
    for stage, spent in seconds.items():
        histogram.record(spent, {"stage": stage})


@contextmanager
def _open(api: Any, name: str, attributes: Mapping[str, str | int | float]) -> Iterator[Any]:
    with api.trace.get_tracer(NAME).start_as_current_span(name, attributes=dict(attributes)) as opened:
        yield opened


@functools.cache
def _api() -> Any:
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
