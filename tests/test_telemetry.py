"""Spans and histograms, read back through OpenTelemetry's own SDK; and nothing where it is not installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from encoded_clips import encode

import keyreel
from keyreel.runtime import telemetry

pytest.importorskip("opentelemetry.sdk", reason="needs opentelemetry-sdk")

from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

pytestmark = pytest.mark.full


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[InMemorySpanExporter, InMemoryMetricReader]]:
    """An application that has set OpenTelemetry up; taken down again, which its API has no way for."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracing, metering = TracerProvider(shutdown_on_exit=False), MeterProvider([reader], shutdown_on_exit=False)
    tracing.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", tracing.get_tracer)
    monkeypatch.setattr(metrics, "get_meter", metering.get_meter)
    telemetry._histogram.cache_clear()
    yield exporter, reader
    telemetry._histogram.cache_clear()
    tracing.shutdown()
    metering.shutdown()


def test_a_summary_leaves_its_stages(seen: tuple[InMemorySpanExporter, InMemoryMetricReader], tmp_path: Path) -> None:
    exporter, reader = seen
    clip = encode(tmp_path / "a", codec="libx264", container="mp4", frames=50)
    with keyreel.Engine.from_pretrained(device="cpu", threads=1) as engine:
        summary = engine.summarize(clip)
        engine.encode_text("a cat")
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"keyreel.summarize", "keyreel.encode", "keyreel.select", "keyreel.encode_text"}
    whole = spans["keyreel.summarize"]
    for name in ("keyreel.encode", "keyreel.select"):
        part = spans[name]
        assert part.parent is not None
        assert part.parent.span_id == whole.context.span_id
        assert whole.start_time <= part.start_time <= part.end_time <= whole.end_time
    assert spans["keyreel.encode"].end_time <= spans["keyreel.select"].start_time
    data = reader.get_metrics_data()
    assert data is not None
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    assert (metric.name, metric.unit) == ("keyreel.stage.duration", "s")
    points = {point.attributes["stage"]: point for point in metric.data.data_points}
    assert {name: (point.count, point.sum) for name, point in points.items()} == {
        name: (1, pytest.approx(seconds)) for name, seconds in summary.timings_seconds.items()
    }


def test_an_error_is_written_into_the_span(seen: tuple[InMemorySpanExporter, InMemoryMetricReader]) -> None:
    with pytest.raises(KeyError), telemetry.span("work", size=3):
        raise KeyError("gone")
    (span,) = seen[0].get_finished_spans()
    assert (span.name, dict(span.attributes or {}), span.status.is_ok) == ("work", {"size": 3}, False)
    assert span.events[0].attributes["exception.type"] == "KeyError"


def test_without_the_package_there_is_nothing_to_pay() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from keyreel.runtime import telemetry\n"
        "@telemetry.span('a')\n"
        "def double(number): return 2 * number\n"
        "with telemetry.span('b', size=1): telemetry.record_stages({'c': 1.0})\n"
        "print(double(21), telemetry._api())"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["42", "None"]


def test_importing_keyreel_does_not_import_it() -> None:
    code = "import sys, keyreel; print('opentelemetry' in sys.modules, 'fastapi' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
