"""JSON documents and their schemas, and the files for players and editing programs."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from render_clips import make_summary, write_clip

from keyreel import SearchHit, Shot, Summary
from keyreel.decode.source import Source
from keyreel.errors import Failure, SourceError
from keyreel.render.documents import (
    FoundVideo,
    ReelEntry,
    SearchDocument,
    SummaryDocument,
    schema_of,
    search_document,
    summary_document,
    to_json,
)
from keyreel.render.interchange import write_edl, write_otio
from keyreel.render.thumbnails import webvtt

SPANS = (Shot(1.0, 2.5), Shot(3.2, 4.0))


@pytest.fixture
def summary(tmp_path: Path) -> Iterator[Summary]:
    clip = write_clip(tmp_path / "clip.mp4", [n / 25 for n in range(150)], size=(32, 48), sound=None)
    with Source(clip) as source:
        yield make_summary(source, keyframes=3, shots=[2.0])


def validator(document: type) -> Any:
    schema = schema_of(document)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_summary(summary: Summary) -> None:
    config = {"a": np.float32(0.5), "b": np.int64(3), "c": (np.bool_(True), None), "d": {"e": Path("x")}}
    reel = ReelEntry("reel.mp4", SPANS, "encode", "asked for")
    seconds = {"render": 0.25, "total": 0.25}
    text = to_json(summary_document(dataclasses.replace(summary, config=config), ["a", "b", "c"], reel, seconds))
    document = json.loads(text)
    validator(SummaryDocument).validate(document)
    assert text.isascii()
    assert text.endswith("}\n")
    assert list(document) == [
        *("schema", "video", "model", "device", "config", "keyframes", "shots", "scenes"),
        *("reel", "warnings", "timings_seconds"),
    ]
    keyframe = summary.keyframes[1]
    wanted = {name: getattr(keyframe, name) for name in ("pts_seconds", "frame_index", "cluster", "weight", "score")}
    assert document["keyframes"][1] == {**wanted, "quality": 0.75, "file": "b"}
    assert [row["file"] for row in document["keyframes"]] == ["a", "b", "c"]
    assert document["shots"][0] == {"start_seconds": 0.0, "stop_seconds": 2.0}
    assert document["reel"]["spans"][1] == {"start_seconds": 3.2, "stop_seconds": 4.0}
    assert document["timings_seconds"]["render"] == 0.25
    assert document["timings_seconds"]["total"] == pytest.approx(1.95)
    assert document["config"] == {"a": 0.5, "b": 3, "c": [True, None], "d": {"e": "x"}}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.pop("video"),
        lambda d: d.update(schema="keyreel.summary/2"),
        lambda d: d.update(more=1),
        lambda d: d["keyframes"].clear(),
        lambda d: d["keyframes"][0].pop("file"),
        lambda d: d["keyframes"][0].update(weight=3),
        lambda d: d["video"].update(rotation_degrees=45),
    ],
)
def test_the_schema_refuses_wrong_summaries(summary: Summary, spoil: Callable[[Any], Any]) -> None:
    document = json.loads(to_json(summary_document(summary, ["a", "b", "c"], ReelEntry(None, SPANS, None, "no"), {})))
    validator(SummaryDocument).validate(document)
    spoil(document)
    assert not validator(SummaryDocument).is_valid(document)


def test_search_results_best_first() -> None:
    region = (0.25, 0.5, 0.25, 0.125)
    hits = [
        SearchHit("a.mp4", 0.0, 2.0, 1.0, 0.2),
        SearchHit("b.mp4", 5.0, 7.0, 6.0, np.float32(1.5), "p.jpg", "subject", region),
    ]
    failed = [Failure("c.mp4", SourceError("no", hint="try"))]
    document = json.loads(to_json(search_document("a red bus", hits, failed)))
    validator(SearchDocument).validate(document)
    assert list(document) == ["schema", "query", "also", "without", "hits", "failed", "unknown_words", "left_out"]
    assert [hit["video"] for hit in document["hits"]] == ["b.mp4", "a.mp4"]
    assert document["hits"][0] == {
        "video": "b.mp4",
        "start_seconds": 5.0,
        "stop_seconds": 7.0,
        "pts_seconds": 6.0,
        "score": 1.5,  # scaled, it is no cosine
        "preview": "p.jpg",
        "answered_by": "subject",
        "region": list(region),
        "chance": None,
    }
    assert (document["hits"][1]["answered_by"], document["hits"][1]["region"]) == ("scene", None)
    wrong = json.loads(to_json(search_document("a red bus", hits)))
    for spoil in ({"answered_by": "both"}, {"region": [0, 0, 1]}, {"region": [0, 0, 2, 1]}):
        assert not validator(SearchDocument).is_valid({**wrong, "hits": [{**wrong["hits"][0], **spoil}]})
    assert document["failed"] == [{"video": "c.mp4", "error": "no\nHint: try", "exit_code": 3}]
    found = search_document(
        "", [], videos=[FoundVideo("a", "1", 0.5)], also=["d"], without=["e"], unknown_words=["b"], left_out=["c"]
    )
    document = json.loads(to_json(found))
    validator(SearchDocument).validate(document)
    assert (document["videos"][0]["video_id"], document["also"], document["without"]) == ("1", ["d"], ["e"])
    assert (document["unknown_words"], document["left_out"]) == (["b"], ["c"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan")])
def test_numbers_that_are_not_finite_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError):
        to_json(search_document("x", [SearchHit("a", 0, 1, 0.5, bad)]))


def test_webvtt_cues() -> None:
    text = webvtt([(0, 0, 160, 90), (160, 0, 160, 90), (320, 0, 160, 90)], 5.0, 12.5, "thumbs.jpg")
    assert text == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:05.000\nthumbs.jpg#xywh=0,0,160,90\n\n"
        "00:00:05.000 --> 00:00:10.000\nthumbs.jpg#xywh=160,0,160,90\n\n"
        "00:00:10.000 --> 00:00:12.500\nthumbs.jpg#xywh=320,0,160,90\n"
    )


@pytest.mark.parametrize(
    ("fps", "rate"), [(25.0, 25.0), (29.969, 30000 / 1001), (23.976, 24000 / 1001), (12.5, 12.5), (None, 25.0)]
)
def test_otio_clips_are_the_spans(summary: Summary, tmp_path: Path, fps: float | None, rate: float) -> None:
    otio = pytest.importorskip("opentimelineio")
    video = dataclasses.replace(summary.video, average_fps=fps, has_audio=True)
    write_otio(video, "file:///clip.mp4", SPANS, tmp_path / "reel.otio")
    timeline = otio.adapters.read_from_file(str(tmp_path / "reel.otio"))
    assert [track.kind for track in timeline.tracks] == ["Video", "Audio"]
    for track in timeline.tracks:
        for clip, span in zip(track, SPANS, strict=True):
            assert clip.source_range.start_time.rate == pytest.approx(rate)
            assert clip.source_range.start_time.to_seconds() == pytest.approx(span.start_seconds, abs=0.51 / rate)
            assert clip.source_range.duration.to_seconds() == pytest.approx(span.duration_seconds, abs=1 / rate)
            assert clip.media_reference.target_url == "file:///clip.mp4"
            whole = clip.media_reference.available_range.duration.to_seconds()
            assert whole == pytest.approx(summary.video.duration_seconds, abs=1 / rate)


@pytest.mark.parametrize("fps", [25.0, 29.97, 12.5, None])
def test_edl_reads_back(summary: Summary, tmp_path: Path, fps: float | None) -> None:
    otio = pytest.importorskip("opentimelineio")
    pytest.importorskip("otio_cmx3600_adapter")
    video = dataclasses.replace(summary.video, average_fps=fps, path="nasty\n002  AX V C name.mp4")
    write_edl(video, "file:///clip.mp4", SPANS, tmp_path / "reel.edl")
    text = (tmp_path / "reel.edl").read_text()
    assert len(re.findall(r"^\d{3}  ", text, re.M)) == 2
    rate = {25.0: 25, 29.97: 30000 / 1001, 12.5: 24000 / 1001, None: 25}[fps]
    (track,) = otio.adapters.read_from_string(text, adapter_name="cmx_3600", rate=rate).tracks
    # Drop-frame and 23.976 timecodes count whole frames: their seconds are those of the frame numbers.
    for clip, span in zip(track, SPANS, strict=True):
        assert clip.source_range.start_time.to_seconds() == pytest.approx(span.start_seconds, abs=0.06)
        assert clip.source_range.duration.to_seconds() == pytest.approx(span.duration_seconds, abs=0.06)
