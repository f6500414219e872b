from __future__ import annotations

import copy
import dataclasses
import json
import re
import sys

import jsonschema
import numpy as np
import pytest
from render_clips import make_summary, write_clip

from keyreel.decode.source import Source
from keyreel.errors import MissingExtra
from keyreel.render.sidecars import (
    search_document,
    search_schema,
    summary_document,
    summary_schema,
    webvtt,
    write_edl,
    write_json,
    write_otio,
)
from keyreel.types import SearchHit, Shot

SPANS = (Shot(1.0, 2.5), Shot(3.2, 4.0))


@pytest.fixture
def summary(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", [n / 25 for n in range(150)], size=(32, 48), sound=None)
    with Source(clip) as source:
        yield make_summary(source, keyframes=3, shots=[2.0])


def validator(schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_summary_has_the_stated_shape(summary, tmp_path):
    document = summary_document(summary, files=["a", "b", "c"], reel=("reel.mp4", SPANS), render_seconds=0.25)
    write_json(document, tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == document
    validator(summary_schema()).validate(document)
    assert list(document) == [
        *("schema", "video", "model", "device", "config", "keyframes", "shots", "reel", "warnings", "timings_seconds"),
    ]
    assert document["schema"] == "keyreel.summary/1"
    assert document["video"] == {
        "path": summary.video.path,
        "duration_seconds": summary.video.duration_seconds,
        "width": 48,
        "height": 32,
        "codec": "h264",
        "rotation_degrees": 0,
        "frames_sampled": len(summary.embedding),
    }
    keyframe = summary.keyframes[1]
    wanted = {name: getattr(keyframe, name) for name in ("pts_seconds", "frame_index", "cluster", "weight", "score")}
    assert document["keyframes"][1] == {**wanted, "quality": 0.75, "file": "b"}
    assert document["shots"][0] == {"start_seconds": 0.0, "stop_seconds": 2.0}
    assert document["reel"]["spans"][1] == {"start_seconds": 3.2, "stop_seconds": 4.0}
    assert document["timings_seconds"]["render"] == 0.25
    assert document["timings_seconds"]["total"] == pytest.approx(1.95)
    assert document["config"]["span"] == [1, 2]


def test_keyframes_come_in_time_order_with_their_files(summary):
    turned = dataclasses.replace(summary, keyframes=summary.keyframes[::-1])
    document = summary_document(turned, files=["c", "b", "a"])
    assert [row["file"] for row in document["keyframes"]] == ["a", "b", "c"]
    assert document["reel"] is None
    validator(summary_schema()).validate(document)


def test_numbers_of_numpy_become_json(summary):
    config = {"a": np.float32(0.5), "b": np.int64(3), "c": (np.bool_(True), None), "d": {"e": summary.source.path}}
    document = summary_document(dataclasses.replace(summary, config=config))
    assert document["config"] == {"a": 0.5, "b": 3, "c": [True, None], "d": {"e": str(summary.source.path)}}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(summary, bad):
    keyframe = dataclasses.replace(summary.keyframes[0], score=bad)
    with pytest.raises(ValueError):
        summary_document(dataclasses.replace(summary, keyframes=(keyframe,)))
    with pytest.raises(ValueError):
        search_document("x", [SearchHit("a", 0, 1, 0.5, bad)])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.pop("video"),
        lambda d: d.update(schema="keyreel.summary/2"),
        lambda d: d.update(more=1),
        lambda d: d["keyframes"].clear(),
        lambda d: d["keyframes"][0].pop("file"),
        lambda d: d["keyframes"][0].update(weight=3),
        lambda d: d["keyframes"][0].update(frame_index=1.5),
        lambda d: d["video"].update(rotation_degrees=45),
        lambda d: d["video"].update(duration_seconds="long"),
        lambda d: d["timings_seconds"].pop("render"),
        lambda d: d["shots"][0].update(start_seconds=-1),
        lambda d: d["reel"].pop("spans"),
    ],
)
def test_schema_refuses_wrong_summaries(summary, spoil):
    document = copy.deepcopy(summary_document(summary, files=["a", "b", "c"], reel=("reel.mp4", SPANS)))
    spoil(document)
    assert not validator(summary_schema()).is_valid(document)


def test_search_results_best_first():
    hits = [SearchHit("a.mp4", 0.0, 2.0, 1.0, 0.2), SearchHit("b.mp4", 5.0, 7.0, 6.0, np.float32(0.5), "p.jpg")]
    document = search_document("a red bus", hits)
    validator(search_schema()).validate(document)
    assert document["schema"] == "keyreel.search/1"
    assert document["query"] == "a red bus"
    assert document["hits"][0] == {
        "video": "b.mp4",
        "start_seconds": 5.0,
        "stop_seconds": 7.0,
        "pts_seconds": 6.0,
        "score": 0.5,
        "preview": "p.jpg",
    }
    validator(search_schema()).validate(search_document("", []))
    document["hits"][1]["score"] = "high"
    assert not validator(search_schema()).is_valid(document)


def test_webvtt_cues():
    text = webvtt([(0, 0, 160, 90), (160, 0, 160, 90), (320, 0, 160, 90)], 5.0, 12.5, "thumbs.jpg")
    assert text == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:05.000\nthumbs.jpg#xywh=0,0,160,90\n\n"
        "00:00:05.000 --> 00:00:10.000\nthumbs.jpg#xywh=160,0,160,90\n\n"
        "00:00:10.000 --> 00:00:12.500\nthumbs.jpg#xywh=320,0,160,90\n"
    )


@pytest.mark.parametrize(
    ("fps", "rate"), [(25.0, 25.0), (29.969, 30000 / 1001), (23.976, 24000 / 1001), (12.5, 12.5), (None, 25.0)]
)
def test_otio_clips_are_the_spans(summary, tmp_path, fps, rate):
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
    assert timeline.duration().to_seconds() == pytest.approx(2.3, abs=2 / rate)


@pytest.mark.parametrize("fps", [25.0, 29.97, 12.5, None])
def test_edl_reads_back(summary, tmp_path, fps):
    otio = pytest.importorskip("opentimelineio")
    pytest.importorskip("otio_cmx3600_adapter")
    video = dataclasses.replace(summary.video, average_fps=fps, path="nasty\n002  AX V C name.mp4")
    write_edl(video, "file:///clip.mp4", SPANS, tmp_path / "reel.edl")
    text = (tmp_path / "reel.edl").read_text()
    assert len(re.findall(r"^\d{3}  ", text, re.M)) == 2
    rate = {25.0: 25, 29.97: 30000 / 1001, 12.5: 24000 / 1001, None: 25}[fps]
    timeline = otio.adapters.read_from_string(text, adapter_name="cmx_3600", rate=rate)
    (track,) = timeline.tracks
    # Drop-frame and 23.976 timecodes count whole frames: their seconds are those of the frame numbers.
    for clip, span in zip(track, SPANS, strict=True):
        assert clip.source_range.start_time.to_seconds() == pytest.approx(span.start_seconds, abs=0.06)
        assert clip.source_range.duration.to_seconds() == pytest.approx(span.duration_seconds, abs=0.06)


def test_missing_otio_says_how_to_install(summary, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentimelineio", None)
    with pytest.raises(MissingExtra, match=r"keyreel\[otio\]"):
        write_otio(summary.video, "x", SPANS, tmp_path / "reel.otio")
    with pytest.raises(MissingExtra, match=r"keyreel\[otio\]"):
        write_edl(summary.video, "x", SPANS, tmp_path / "reel.edl")
    assert not list(tmp_path.glob("reel.*"))
