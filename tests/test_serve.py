"""The service as its callers see it: a process of its own, and what is sent to it over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from encoded_clips import encode
from fastapi import FastAPI
from PIL import Image
from served import Served, served, until
from starlette.requests import Request

from keyreel import Engine, Library, __version__
from keyreel.config import ServeConfig
from keyreel.decode.source import Source
from keyreel.errors import LibraryError, RenderError
from keyreel.library.types import Filter, LibraryHit
from keyreel.serve import _listen, app, router, run, uploads, workers
from keyreel.serve.files import Roots, safe_name
from keyreel.serve.models import video_detail
from keyreel.serve.security import ApiError, redact_paths
from keyreel.serve.service import Service
from keyreel.types import Combined, Example

UPLOAD_BYTES = 300_000


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_pretrained(device="cpu", threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """videos/: three clips, a picture, links that lead out; outside/: what nobody may see."""
    place = tmp_path_factory.mktemp("serve").resolve()
    for folder in ("videos/more", "outside"):
        (place / folder).mkdir(parents=True)
    for number, name in enumerate(("a", "b", "more/c")):
        encode(place / "videos" / name, codec="libx264", container="mp4", seed=number, frames=50 + 25 * number)
    encode(place / "outside" / "secret", codec="libx264", container="mp4", seed=9)
    (place / "videos" / "link.mp4").symlink_to(place / "outside" / "secret.mp4")
    (place / "videos" / "folder").symlink_to(place / "outside")
    (place / "videos" / "loop.mp4").symlink_to(place / "videos" / "loop.mp4")
    (place / "videos" / "broken.mp4").write_bytes(b"this is no video" * 100)
    return place


@pytest.fixture(scope="module")
def service(place: Path) -> Iterator[Served]:
    options = {"roots": [str(place / "videos")], "upload_bytes": UPLOAD_BYTES}
    with served(place / "library", **options) as running:
        jobs = running.index(*(place / "videos" / name for name in ("a.mp4", "b.mp4", "more/c.mp4")))
        assert [job["state"] for job in jobs] == ["done"] * 3
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="module")
def library(service: Served, place: Path, engine: Engine) -> Iterator[Library]:
    """The same library, asked directly."""
    with Library(place / "library", engine) as library:
        yield library


def ids(service: Served) -> dict[str, str]:
    return {video["name"]: video["id"] for video in service.http.get("/api/v1/videos").json()["videos"]}


SPAN = ("video_id", "start_seconds", "stop_seconds", "pts_seconds", "keyframe_seconds", "folded")


def same(answer: httpx.Response, expected: list[LibraryHit]) -> int:
    """The answer has the library's hits; their number."""
    assert answer.status_code == 200, answer.text
    hits = answer.json()["hits"]
    assert [[hit[name] for name in SPAN] for hit in hits] == [[getattr(hit, name) for name in SPAN] for hit in expected]
    np.testing.assert_allclose([hit["score"] for hit in hits], [hit.score for hit in expected], atol=1e-5)
    return len(hits)


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def connect(service: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(service.address.rpartition(":")[2])), timeout=20)


def error(answer: httpx.Response) -> dict[str, Any]:
    found = answer.json()["error"]
    assert set(found) == {"kind", "message", "hint"}
    assert found["kind"]
    assert found["message"]
    return dict(found)


def test_a_search_answers_what_the_library_does(service: Served, library: Library) -> None:
    expected = library.search("a cat", k=4)
    answer = service.http.get("/api/v1/search", params={"q": "a cat", "k": 4})
    same(answer, expected)
    assert [hit["video"] for hit in answer.json()["hits"]] == [Path(hit.video).name for hit in expected]
    for hit, own in zip(answer.json()["hits"], expected, strict=True):
        picture = service.http.get(hit["preview"])
        assert picture.headers["content-type"] == "image/jpeg"
        assert picture.content == library.preview(own.video_id, own.pts_seconds)
        assert (hit["answered_by"], hit["region"]) == (own.answered_by, own.region and list(own.region))


def test_filters_are_the_librarys(service: Served, library: Library, place: Path) -> None:
    one = ids(service)["b.mp4"]
    cases: list[tuple[dict[str, Any], Filter]] = [
        ({"video": one}, Filter(videos=(one,))),
        ({"path": "*/more/*"}, Filter(path="*/more/*")),
        ({"start": 0.5, "stop": 1.5}, Filter(start_seconds=0.5, stop_seconds=1.5)),
        ({"min_duration": 2.5}, Filter(min_duration_seconds=2.5)),
        ({"after": "2001-02-03"}, Filter(after=981_158_400.0)),
        ({"before": "2001-02-03T00:00:00+01:00"}, Filter(before=981_154_800.0)),
        ({"tag": "none"}, Filter(tags=("none",))),
    ]
    seen = []
    for given_filter, where in cases:
        answer = service.http.get("/api/v1/search", params={"q": "a dog", "k": 9, **given_filter})
        seen.append(same(answer, library.search("a dog", k=9, where=where)))
        listed = service.http.get("/api/v1/videos", params=given_filter).json()
        assert [video["id"] for video in listed["videos"]] == [record.id for record in library.list(where)]
    assert min(seen[:4]) > 0
    assert seen[4:] == [0, 0, 0]  # the clips do not say when they were recorded
    moments = service.http.get(f"/api/v1/videos/{one}/moments", params={"q": "a dog", "k": 9})
    same(moments, library.search("a dog", k=9, where=Filter(videos=(one,))))


def test_a_damaged_video_is_named_and_the_others_are_searched(library: Library, engine: Engine, tmp_path: Path) -> None:
    shutil.copytree(library.uri, tmp_path / "library")
    with Library(tmp_path / "library", engine) as damaged:
        lost = damaged.list()[0]
        where = f"generation = '{lost.generation}' AND row = 0 AND kind = 'scene'"
        damaged._tables.table("vectors").update(where=where, values={"pts_seconds": 0.125})
        made = app(damaged, ServeConfig(folder=str(tmp_path / "state")))
        found = asyncio.run(_ask(made, "/api/v1/search?q=a+dog&k=9"))
        assert found.json()["left_out"] == [Path(lost.path).name]
        others = tuple(record.id for record in library.list() if record.id != lost.id)
        same(found, library.search("a dog", k=9, where=Filter(videos=others)))
        assert asyncio.run(_ask(made, "/readyz")).json()["left_out"] == 1


def test_queries_and_conditions_are_the_librarys(service: Served, library: Library) -> None:
    id, other = ids(service)["a.mp4"], ids(service)["b.mp4"]
    picture = np.random.default_rng(3).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    texts = {"also": ["snow", "a hill"], "without": "a room"}
    frames = {"more": [f"{id}@0.5", f"{other}@1"], "less": f"{other}@0"}
    more, less = [Example(id, 0.5), Example(other, 1.0)], [Example(other, 0.0)]
    cases: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
        ({}, [], []),
        (texts, ["snow", "a hill"], ["a room"]),
        (frames, more, less),
        (texts | frames, ["snow", "a hill", *more], ["a room", *less]),
    ]
    bodies: list[tuple[Any, dict[str, Any]]] = [
        ("a dog", {"method": "GET"}),
        (picture, {"method": "POST", "files": {"file": ("p.png", png(picture))}}),
        (Example(id, 1.0), {"method": "POST", "json": {"like": {"video_id": id, "seconds": 1.0}}}),
    ]
    for query, body in bodies:
        text = {"q": query} if isinstance(query, str) else {}
        for conditions, also, without in cases:
            answer = service.http.request(url="/api/v1/search", params={"k": 9, **text, **conditions}, **body)
            same(answer, library.search(Combined(query, also=also, without=without), k=9))
            for hit in answer.json()["hits"]:  # chances are of texts
                assert 0 < hit["chance"] < 1 if text or "also" in conditions else hit["chance"] is None
    unknown: list[tuple[dict[str, Any], list[str]]] = [
        ({"q": "a dog"}, []),
        ({"q": "zzzz qqqq"}, ["zzzz", "qqqq"]),
        ({"q": "a zwyxq dog"}, ["zwyxq"]),
        ({"q": "a dog", "also": ["zwyxq", "snow"], "without": "zwyxq"}, ["zwyxq"]),
    ]
    for asked, words in unknown:
        assert service.http.get("/api/v1/search", params=asked).json()["unknown_words"] == words
    answer = service.http.request(url="/api/v1/search", params={"also": ["zwyxq", "snow"]}, **bodies[1][1])
    assert answer.json()["unknown_words"] == ["zwyxq"]
    answer = service.http.get("/api/v1/search", params={"q": "zzzz qqqq"})
    assert {hit["chance"] for hit in answer.json()["hits"]} == {0}
    for wrong in ({"more": "b.mp4@1"}, {"less": f"{id}@-1"}, {"more": f"{id}@nan"}, {"also": ["a"] * 9}):
        assert service.http.get("/api/v1/search", params={"q": "a dog", **wrong}).status_code == 422
    gone = service.http.get("/api/v1/search", params={"q": "a dog", "more": f"{'0' * 32}@1"})
    assert (gone.status_code, error(gone)["kind"]) == (404, "not_found")


def test_how_well_each_frame_of_a_video_fits(
    service: Served, library: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    id = ids(service)["c.mp4"]
    answer = service.http.get(f"/api/v1/videos/{id}/moments", params={"q": "a dog"}).json()
    times, scores = library.scores("a dog", id)
    np.testing.assert_allclose(answer["curve"], np.c_[times, scores], atol=1e-3)
    assert max(score for _, score in answer["curve"]) == pytest.approx(answer["hits"][0]["score"], abs=1e-5)
    monkeypatch.setattr("keyreel.serve.service.CURVE_POINTS", 3)
    made = app(library, ServeConfig(folder=str(tmp_path)))
    few = asyncio.run(_ask(made, f"/api/v1/videos/{id}/moments?q=a+dog")).json()["curve"]
    assert len(few) == 3
    assert max(score for _, score in few) == max(score for _, score in answer["curve"])
    assert service.http.get(f"/api/v1/videos/{'0' * 32}/moments", params={"q": "a dog"}).status_code == 404


def test_a_video_in_full(service: Served, library: Library, place: Path) -> None:
    id = ids(service)["c.mp4"]
    video = service.http.get(f"/api/v1/videos/{id}").json()
    record, previews, extras = library.record(id), library.previews(id), library.extras(id)
    assert (video["name"], video["status"], video["frames"]) == ("c.mp4", "ok", record.frames)
    assert (video["width"], video["height"], video["duration_seconds"]) == (96, 64, pytest.approx(4.0, abs=0.05))
    assert [tuple(shot) for shot in video["shots"]] == list(record.shots)
    assert [tuple(scene) for scene in video["scenes"]] == list(record.scenes)
    assert record.scenes
    assert [frame["pts_seconds"] for frame in video["keyframes"]] == [preview.pts_seconds for preview in previews]
    for frame, preview in zip(video["keyframes"], previews, strict=True):
        np.testing.assert_allclose(frame["attention"], preview.attention, atol=1e-6)
        assert len(frame["attention"]) == video["grid"][0] * video["grid"][1]
        assert service.http.get(frame["preview"]).content == preview.jpeg
    sprite = Image.open(io.BytesIO(service.http.get(video["sprite"]["image"]).content))
    width, height = video["sprite"]["tile"]
    assert sprite.width == video["sprite"]["columns"] * width
    assert sprite.height % height == 0
    track = service.http.get(video["sprite"]["vtt"])
    assert track.headers["content-type"].startswith("text/vtt")
    assert track.text == extras.vtt
    assert service.http.get(video["file"]).content == (place / "videos/more/c.mp4").read_bytes()
    page = service.http.get("/api/v1/videos", params={"offset": 1, "limit": 1}).json()
    assert (page["total"], [one["name"] for one in page["videos"]]) == (3, ["b.mp4"])
    assert str(place) not in str(video)  # where things lie is nobody's business


def test_health_is_measured_not_said(service: Served, place: Path) -> None:
    assert service.http.get("/healthz").json() == {"status": "ok"}
    ready = service.http.get("/readyz").json()
    assert (ready["status"], ready["model"], ready["device"]) == ("ready", "builtin", "cpu")

    class Broken:
        uri = str(place / "nowhere")
        engine = None

    answer = asyncio.run(_ask(app(Broken(), ServeConfig(folder=str(place / "state"))), "/readyz"))  # type: ignore[arg-type]
    assert answer.status_code == 503
    assert "no engine" in error(answer)["message"]
    Broken.uri = "s3://bucket/library"
    with pytest.raises(LibraryError, match="is not a folder"):
        app(Broken(), ServeConfig())  # type: ignore[arg-type]


def test_counters_for_prometheus(service: Served) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def count() -> dict[str, float]:
        answer = service.http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        return {
            " ".join((sample.name, *sample.labels.values())): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }

    before = count()
    service.http.get("/api/v1/search", params={"q": "x"})
    service.http.get("/api/v1/search")
    after = count()
    for status in (200, 422):
        name = f"keyreel_requests_total GET /api/v1/search {status}"
        assert after[name] - before.get(name, 0) == 1
    assert after["keyreel_jobs queued"] == after["keyreel_jobs running"] == 0
    assert after["keyreel_jobs_ended_total done"] >= 3


@pytest.mark.parametrize(
    ("ranges", "status", "part"),
    [
        ({}, 200, slice(None)),
        ({"Range": "bytes=0-99"}, 206, slice(0, 100)),
        ({"Range": "bytes=-57"}, 206, slice(-57, None)),
        ({"Range": "bytes=0-9", "If-Range": '"another"'}, 200, slice(None)),
        ({"Range": "bytes=999999999-"}, 416, slice(0, 0)),
    ],
)
def test_ranges(service: Served, place: Path, ranges: dict[str, str], status: int, part: slice) -> None:
    whole = (place / "videos/a.mp4").read_bytes()
    address = f"/api/v1/videos/{ids(service)['a.mp4']}/file"
    answer, head = service.http.get(address, headers=ranges), service.http.head(address, headers=ranges)
    assert answer.status_code == head.status_code == status
    start, stop, _ = part.indices(len(whole))
    expected = {200: None, 206: f"bytes {start}-{stop - 1}/{len(whole)}", 416: f"bytes */{len(whole)}"}
    assert answer.headers.get("content-range") == expected[status]
    if status < 400:
        assert answer.content == whole[part]
        assert (answer.headers["accept-ranges"], answer.headers["content-type"]) == ("bytes", "video/mp4")
        assert (head.content, head.headers["content-length"]) == (b"", str(len(answer.content)))


def test_a_reader_who_leaves_takes_no_descriptor_along(service: Served) -> None:
    """Each answer holds the video open until it ends, however it ends."""
    address = f"/api/v1/videos/{ids(service)['a.mp4']}/file"
    folder = Path(f"/proc/{service.process.pid}/fd")

    def is_open(entry: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return str(entry.readlink()).endswith("a.mp4")
        return False

    for _ in range(20):
        with connect(service) as raw:
            raw.sendall(f"GET {address} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            raw.recv(64)
    until(lambda: not any(map(is_open, list(folder.iterdir()))))


def test_a_video_that_became_a_link_is_not_given_out(service: Served, place: Path) -> None:
    path = encode(place / "videos" / "later", codec="libx264", container="mp4", seed=31, frames=30)
    (job,) = service.index(path)
    address = f"/api/v1/videos/{job['video']}"
    try:
        assert service.http.get(f"{address}/file").status_code == 200
        path.unlink()
        assert service.http.get(f"{address}/file").status_code == 404
        path.symlink_to(place / "outside" / "secret.mp4")
        answer = service.http.get(f"{address}/file")
        assert (answer.status_code, error(answer)["kind"]) == (403, "path")
        assert service.http.get(address).json()["file"] is None
    finally:
        path.unlink()
        assert service.http.delete(address).status_code == 204


def test_no_path_leaves_the_allowed_folders(service: Served, place: Path) -> None:
    secret = place / "outside" / "secret.mp4"
    for path, status in (
        (str(secret), 403),
        (str(secret.with_name("not there")), 403),  # whether it exists is not told
        ("../outside/secret.mp4", 403),
        ("more/../../outside/secret.mp4", 403),
        ("link.mp4", 403),
        ("folder/secret.mp4", 403),
        ("/etc/passwd", 403),
        (f"{place}/videosX/a.mp4", 403),
        (".", 403),
        ("..", 403),
        ("more", 422),
        ("loop.mp4", 422),
        ("not there.mp4", 404),
        ("http://127.0.0.1:1/a.mp4", 422),
        (f"file://{secret}", 422),
        ("concat:a.mp4|b.mp4", 404),
        ("a\0.mp4", 422),
        ("x" * 4000, 404),
        ("\ud800.mp4", 422),
        ("", 422),
    ):
        body = json.dumps({"path": path}).encode("ascii")
        answer = service.http.post("/api/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, (path, answer.text)
        error(answer)
    for address in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/../etc/passwd"):
        with connect(service) as raw:
            raw.sendall(f"GET {address} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            assert raw.recv(64).startswith(b"HTTP/1.1 404"), address


def test_hostile_queries_are_refused(service: Served) -> None:
    id = ids(service)["a.mp4"]
    for address in (
        "search?q=x&k=100000000000000000000000",
        "search?q=x&k=101",
        "search?q=x&k=0",
        "search?q=x&k=-1",
        "search?q=x&k=nan",
        "search?q=",
        "search?q=%20%20",
        "search",
        f"search?q={'x' * 1001}",
        "search?q=x&start=nan",
        "search?q=x&stop=inf",
        "search?q=x&start=-1",
        "search?q=x&min_duration=1e400",
        "search?q=x&after=yesterday",
        "search?q=x&after=99999999999999999999",
        "search?q=x&video=nobody",
        "search?q=x&video=*",
        f"videos/{id}/moments?q=x&k=100000",
        "videos?offset=-1",
        "videos?limit=100000000",
        "videos/*",
        "videos/nobody",
        "videos/%2Fetc%2Fpasswd",
        f"videos/{id}/previews/nan.jpg",
        f"videos/{id}/previews/-1.jpg",
        f"videos/{id}/previews/x.jpg",
        f"videos/{id}/nothing",
        "jobs/nobody",
        "nothing",
    ):
        answer = service.http.get(f"/api/v1/{address}")
        assert 400 <= answer.status_code < 500, (address, answer.text)
        error(answer)
    # Bytes that are no UTF-8 are a text like any other.
    assert service.http.get("/api/v1/search?q=%ff%fe%00").status_code == 200
    # A path is no name here: DELETE with a glob must not clear the library.
    assert service.http.delete("/api/v1/videos/*").status_code == 404
    assert service.http.delete("/api/v1/videos").status_code == 405
    assert len(ids(service)) == 3


def test_hostile_bodies_are_refused(service: Served, place: Path) -> None:
    large, bomb = io.BytesIO(), io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(large, "PNG")  # more than we allow
    Image.new("1", (20_000, 10_000)).save(bomb, "PNG")  # more than Pillow opens
    assert len(bomb.getvalue()) < 200_000
    multipart = {"Content-Type": "multipart/form-data; boundary=x"}
    plain = {"Content-Type": "application/json"}
    start = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
    cases: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
        ("search", {"files": {"file": ("large.png", large.getvalue())}}, (413,)),
        ("search", {"files": {"file": ("bomb.png", bomb.getvalue())}}, (413,)),
        ("search", {"files": {"file": ("a.png", b"no picture")}}, (422,)),
        ("search", {"files": {"file": ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>")}}, (422,)),
        ("search", {"files": {"other": ("a.png", b"")}}, (422,)),
        ("search", {"json": {"like": {"video_id": "nobody", "seconds": 0}}}, (404,)),
        ("search", {"content": b'{"like": {"video_id": "\\ud800", "seconds": 0}}', "headers": plain}, (422,)),
        ("search", {"content": b'{"like": {"video_id": "a", "seconds": NaN}}', "headers": plain}, (422,)),
        ("search", {"content": b'{"like": {"video_id": "a", "seconds": 1e999}}', "headers": plain}, (422,)),
        ("search", {"content": b"[" * 60_000, "headers": plain}, (422,)),
        ("search", {"content": b"\xff\xfe", "headers": plain}, (422,)),
        ("search", {"content": b" " * 70_000, "headers": plain}, (413,)),
        ("search", {"json": [1, 2]}, (422,)),
        ("search", {"json": {"like": {}, "more": 1}}, (422,)),
        ("search", {}, (422,)),
        ("jobs", {"json": {"path": 5}}, (422,)),
        ("jobs", {"json": {"path": "a.mp4", "force": True}}, (422,)),
        ("jobs", {"content": b"", "headers": multipart}, (400, 422)),
        ("jobs", {"content": b"--x--\r\n", "headers": multipart}, (400, 422)),
        ("jobs", {"content": b"--y\r\n\r\n", "headers": multipart}, (400,)),
        ("jobs", {"content": start + b"half a video", "headers": multipart}, (400,)),
        ("jobs", {"content": start[:-2] + b"Bad header\r\n\r\n\r\n--x--", "headers": multipart}, (400,)),
        ("jobs", {"content": b"a", "headers": {"Content-Type": "multipart/form-data"}}, (400, 415)),
        ("jobs", {"files": {"file": ("a.mp4", b"x" * (UPLOAD_BYTES + 1))}}, (413,)),
    ]
    for route, body, allowed in cases:
        answer = service.http.post(f"/api/v1/{route}", **body)
        assert answer.status_code in allowed, (route, str(body)[:80], answer.status_code, answer.text)
        error(answer)
    assert list((place / "library/serve/uploads").iterdir()) == []
    assert all(job["state"] == "done" for job in service.http.get("/api/v1/jobs").json()["jobs"])


@pytest.mark.full
def test_nothing_in_the_openapi_document_leads_to_an_error_of_the_server(service: Served) -> None:
    """Schemathesis makes up requests, valid ones and others, for each route of the document."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable

    schema = schemathesis.openapi.from_url(f"{service.address}/openapi.json")
    before = ids(service)
    asked: list[tuple[str, int]] = []
    for found in schema.get_all_operations():
        operation = found.ok()
        modes = schemathesis.GenerationMode
        for mode in (modes.POSITIVE, modes.NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=int(os.environ.get("KEYREEL_REQUESTS", "4")),
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def run(case: Any) -> None:
                if case.method == "DELETE" and case.path_parameters.get("id") in before.values():
                    return
                answer = case.call()
                asked.append((f"{case.method} {case.operation.path}", answer.status_code))
                assert answer.status_code < 500, (case.as_curl_command(), answer.text)

            with contextlib.suppress(*([Unsatisfiable] if mode == modes.NEGATIVE else [])):  # nothing to be wrong with
                run()
    assert {name for name, _ in asked} >= {"GET /api/v1/search", "POST /api/v1/jobs", "GET /api/v1/videos/{id}"}
    assert {200, 404, 422} <= {status for _, status in asked}
    for job in service.http.get("/api/v1/jobs").json()["jobs"]:  # some made-up uploads are videos
        service.wait(job["id"], "done", "failed", "cancelled")
    for video in service.http.get("/api/v1/videos", params={"limit": 1000}).json()["videos"]:
        if video["id"] not in before.values():
            assert service.http.delete(f"/api/v1/videos/{video['id']}").status_code == 204
    assert ids(service) == before


def test_an_upload_becomes_a_video_and_goes_with_it(service: Served, place: Path, library: Library) -> None:
    clip = encode(place / "upload", codec="libx264", container="mp4", seed=77, frames=40)
    answer = service.http.post("/api/v1/jobs", files={"file": ("../../ev\u00eel name?.mp4", clip.read_bytes())})
    assert answer.status_code == 202, answer.text
    job = service.wait(answer.json()["id"], "done", "failed")
    assert (job["state"], job["name"], job["progress"]) == ("done", "ev\u00eel name_.mp4", 1.0)
    assert set(job) == {"id", "state", "progress", "name", "video", "created", "error"}
    uploads = place / "library/serve/uploads"
    assert [path.relative_to(uploads).as_posix() for path in uploads.rglob("*.mp4")] == [f"{job['id']}/{job['name']}"]
    video = service.http.get(f"/api/v1/videos/{job['video']}").json()
    assert service.http.get(video["file"]).content == clip.read_bytes()
    assert library.record(job["video"]).path == str(uploads / job["id"] / job["name"])
    assert service.http.delete(f"/api/v1/videos/{job['video']}").status_code == 204
    assert list(uploads.iterdir()) == []
    assert job["video"] not in ids(service).values()


def test_an_upload_that_is_no_video_leaves_nothing(service: Served, place: Path) -> None:
    answer = service.http.post("/api/v1/jobs", files={"file": ("a.mp4", b"this is no video" * 100)})
    job = service.wait(answer.json()["id"], "done", "failed")
    assert job["state"] == "failed"
    assert job["error"]["kind"] == "source"
    assert list((place / "library/serve/uploads").iterdir()) == []
    assert sorted(ids(service)) == ["a.mp4", "b.mp4", "c.mp4"]
    # A file of the user's that is none stays, and the library says what is wrong with it.
    (job,) = service.index(place / "videos" / "broken.mp4")
    assert job["state"] == "failed"
    (video,) = [one for one in service.http.get("/api/v1/videos").json()["videos"] if one["status"] == "failed"]
    assert video["name"] == "broken.mp4"
    assert video["error"]
    detail = service.http.get(f"/api/v1/videos/{video['id']}").json()
    assert (detail["keyframes"], detail["sprite"], detail["file"]) == ([], None, None)
    for said in (job["error"]["message"], video["error"], detail["error"]):
        assert said.startswith("broken.mp4: ")
        assert str(place) not in said
    # Not the file either: any file under the folders could be read else, once it was given as a video.
    for part in ("sprite.jpg", "thumbs.vtt", "previews/0.0.jpg", "file"):
        assert service.http.get(f"/api/v1/videos/{video['id']}/{part}").status_code == 404
    assert service.http.delete(f"/api/v1/videos/{video['id']}").status_code == 204
    assert (place / "videos" / "broken.mp4").exists()


def test_an_upload_that_stands_still_is_ended(library: Library, tmp_path: Path) -> None:
    made = app(library, ServeConfig(folder=str(tmp_path), timeout_seconds=0.2))

    async def body() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\nhalf'
        await asyncio.sleep(20)

    async def run() -> httpx.Response:
        async with made.router.lifespan_context(made):
            headers = {"Content-Type": "multipart/form-data; boundary=x"}
            return await _ask(made, "/api/v1/jobs", method="POST", content=body(), headers=headers)

    answer = asyncio.run(run())
    assert (answer.status_code, error(answer)["kind"]) == (408, "timeout")
    assert list((tmp_path / "uploads").iterdir()) == []


def test_an_upload_that_is_cut_off_leaves_nothing(service: Served, place: Path) -> None:
    uploads = place / "library/serve/uploads"
    with connect(service) as raw:
        head = "POST /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 200000\r\n"
        raw.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode())
        raw.sendall(b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n' + b"v" * 100_000)
        until(lambda: len(list(uploads.glob("*.part"))) == 1)
    until(lambda: not list(uploads.iterdir()))


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("/etc/passwd", "passwd"),
        ("C:\\videos\\clip.mp4", "clip.mp4"),
        (".hidden", "hidden"),
        ("..", "video"),
        ("", "video"),
        ("a\nb\0c;rm -rf $HOME.mkv", "a_b_c_rm -rf _HOME.mkv"),
        ("x" * 300 + ".mp4", "x" * 120 + ".mp4"),
        ("é" * 300, "é" * 60),
    ],
)
def test_names_of_uploads(name: str, safe: str) -> None:
    assert safe_name(name) == safe


def test_a_browser_is_kept_from_doing_more_than_meant(service: Served) -> None:
    page = service.http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http:" not in policy
    for address in ("/", "/healthz", "/api/v1/videos", "/api/v1/nothing", "/nothing", "/static/nothing"):
        headers = service.http.get(address).headers
        assert headers["x-content-type-options"] == "nosniff", address
        assert headers["x-frame-options"] == "DENY", address
        assert "default-src 'none'" in headers["content-security-policy"], address
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers
    # A name that someone else points at this machine; a page of another site.
    answer = service.http.get("/api/v1/videos", headers={"Host": "evil.example"})
    assert (answer.status_code, error(answer)["kind"]) == (403, "host")
    for origin in ("http://evil.example", "null", "http://[", "", f"{service.address}.evil.example"):
        answer = service.http.post("/api/v1/jobs", json={"path": "a.mp4"}, headers={"Origin": origin})
        assert (answer.status_code, error(answer)["kind"]) == (403, "origin")
    own = service.http.post("/api/v1/search", json={}, headers={"Origin": service.address})
    assert own.status_code == 422


def test_a_token_is_asked_for(library: Library, tmp_path: Path) -> None:
    token = "a long enough token"
    made = app(library, ServeConfig(token=token, folder=str(tmp_path)))
    right = {"Authorization": f"Bearer {token}".encode()}
    cookie = {"Cookie": "keyreel_token=a%20long%20enough%20token"}
    cases: list[tuple[str, str, dict[str, Any], int]] = [
        ("GET", "/healthz", {}, 200),
        ("GET", "/", {}, 200),
        ("GET", "/static/page.css", {}, 200),
        *(("GET", address, {}, 401) for address in ("/readyz", "/metrics", "/openapi.json", "/api/v1/videos")),
        ("GET", "/api/v1/videos", {"Authorization": "Bearer wrong"}, 401),
        ("GET", "/api/v1/videos", {"Authorization": b"Basic " + token.encode()}, 401),
        ("GET", "/api/v1/videos", {"Authorization": b"Bearer \xff\xff"}, 401),
        ("GET", "/api/v1/videos", right, 200),
        ("GET", "/api/v1/videos", cookie, 200),
        ("GET", "/api/v1/videos", {"Cookie": "keyreel_token=wrong"}, 401),
        ("POST", "/api/v1/search", cookie, 401),  # a cookie alone changes nothing
        ("POST", "/api/v1/search", right, 422),
    ]
    for method, address, headers, status in cases:
        answer = asyncio.run(_ask(made, address, method=method, headers=headers))
        assert answer.status_code == status, (method, address, headers, answer.text)
    assert answer.headers.get("www-authenticate") is None
    assert asyncio.run(_ask(made, "/readyz")).headers["www-authenticate"] == "Bearer"
    assert token not in repr(ServeConfig(token=token))
    for bad in ("short", "not ascii but long é", "with a\nline break"):
        with pytest.raises(ValueError, match="token"):
            ServeConfig(token=bad)


class Gated:
    """A library whose searches wait for leave, and that remembers what it was asked."""

    def __init__(self, library: Library) -> None:
        self.uri, self.engine, self._library = library.uri, library.engine, library
        self.asked: list[list[Any]] = []
        self.open = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def search_many(self, queries: Any, **options: Any) -> Any:
        self.asked.append(list(queries))
        assert self.open.wait(20)
        if "unlucky" in queries:
            raise LibraryError("bad luck")
        return self._library.search_many(queries, **options)

    def search(self, query: Any, **options: Any) -> Any:
        return self.search_many([query], **options)[0]


@pytest.fixture
def gated(library: Library) -> Iterator[Gated]:
    gated = Gated(library)
    yield gated
    gated.open.set()


STRANGER: dict[str, Any] = {"headers": {"Host": "films.example.com"}}


async def _ask(made: FastAPI, address: str, *, method: str = "GET", **more: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(made), base_url="http://localhost") as client:
        return await client.request(method, address, **more)


def test_queries_that_come_together_share_a_pass(gated: Gated, library: Library, tmp_path: Path) -> None:
    made = app(gated, ServeConfig(folder=str(tmp_path)))  # type: ignore[arg-type]
    texts = ["a red car", "a dog", "the sea", "night", "a face", "unlucky", "a red car"]

    async def run() -> list[httpx.Response]:
        first = asyncio.create_task(_ask(made, "/api/v1/search?q=first"))
        await asyncio.to_thread(until, lambda: len(gated.asked) == 1)
        rest = [asyncio.create_task(_ask(made, f"/api/v1/search?q={text}")) for text in texts]
        other = asyncio.create_task(_ask(made, "/api/v1/search?q=first&k=2"))
        await asyncio.sleep(0.3)
        assert len(gated.asked) == 1  # one pass at a time
        gated.open.set()
        return [await task for task in (*rest, other, first)]

    answers = asyncio.run(run())
    assert gated.asked[:2] == [["first"], texts]
    assert sorted(gated.asked[2:]) == sorted([*([text] for text in texts), ["first"]])  # one spoiled it: each alone
    for text, answer in zip(texts, answers, strict=False):
        if text == "unlucky":
            assert (answer.status_code, error(answer)["message"]) == (503, "bad luck")
            continue
        expected = library.search(text)
        same(answer, expected)
    assert len(answers[-2].json()["hits"]) == 2


def test_who_comes_when_the_queue_is_full_is_told_when_to_come_back(
    gated: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "MAX_WAITING", 2)
    config = ServeConfig(folder=str(tmp_path), threads=1)
    made = app(gated, config)  # type: ignore[arg-type]

    async def run() -> tuple[list[int], httpx.Response, httpx.Response]:
        text = asyncio.create_task(_ask(made, "/api/v1/search?q=0"))
        await asyncio.to_thread(until, lambda: len(gated.asked) == 1)
        waiting = [asyncio.create_task(_ask(made, f"/api/v1/search?q={n}")) for n in range(2)]
        await asyncio.sleep(0.1)
        refused = await _ask(made, "/api/v1/search?q=late")
        body = {"json": {"like": {"video_id": gated.list()[0].id, "seconds": 0.0}}}
        frames = [asyncio.create_task(_ask(made, "/api/v1/search", method="POST", **body)) for _ in range(3)]
        await asyncio.to_thread(until, lambda: len(gated.asked) == 2)
        refused_frame = await _ask(made, "/api/v1/search", method="POST", **body)
        assert (await _ask(made, "/healthz")).status_code == 200
        gated.open.set()
        return [(await task).status_code for task in (text, *waiting, *frames)], refused, refused_frame

    statuses, *refused = asyncio.run(run())
    assert statuses == [200] * 6
    for answer in refused:
        assert (answer.status_code, error(answer)["kind"]) == (429, "busy")
        assert int(answer.headers["retry-after"]) >= 1


def test_what_takes_too_long_is_given_up(gated: Gated, tmp_path: Path) -> None:
    made = app(gated, ServeConfig(folder=str(tmp_path), timeout_seconds=0.3))  # type: ignore[arg-type]

    async def run() -> tuple[httpx.Response, httpx.Response]:
        late = await _ask(made, "/api/v1/search?q=slow")
        gated.open.set()
        return late, await _ask(made, "/api/v1/search?q=quick")

    late, after = asyncio.run(run())
    assert (late.status_code, error(late)["kind"]) == (504, "timeout")
    assert after.status_code == 200


def test_nobody_works_for_a_caller_who_left(gated: Gated, tmp_path: Path) -> None:
    """As a page that searches while one types: all but the last request are given up."""
    made = app(gated, ServeConfig(folder=str(tmp_path)))  # type: ignore[arg-type]

    async def run() -> None:
        first = asyncio.create_task(_ask(made, "/api/v1/search?q=first"))
        await asyncio.to_thread(until, lambda: len(gated.asked) == 1)
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None: ...

        query = {"query_string": b"q=left", "path": "/api/v1/search", "raw_path": b"/api/v1/search", "method": "GET"}
        scope = {"type": "http", "headers": [(b"host", b"localhost")], "root_path": "", "scheme": "http", **query}
        left = asyncio.create_task(made(scope, receive, send))
        stays = asyncio.create_task(_ask(made, "/api/v1/search?q=stays"))
        await asyncio.sleep(0.2)
        gone.set()
        await asyncio.wait_for(left, 5)
        gated.open.set()
        assert (await first).status_code == (await stays).status_code == 200

    asyncio.run(run())
    assert gated.asked == [["first"], ["stays"]]


@pytest.mark.parametrize("swapped", ["file", "folder"])
def test_a_link_in_a_files_place_is_not_followed(
    engine: Engine, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swapped: str
) -> None:
    """What was checked is what is indexed, whatever is put in its place meanwhile."""
    inside, outside = tmp_path / "inside" / "own", tmp_path / "outside"
    for folder, name in ((inside, "a.mp4"), (outside, "c.mp4")):
        folder.mkdir(parents=True)
        source = next((place / "videos").rglob(name))
        (folder / "film.mp4").write_bytes(source.read_bytes())
    length = av_seconds(inside / "film.mp4")
    assert length != av_seconds(outside / "film.mp4")
    real = Roots.open

    def swap(self: Roots, path: Path) -> Any:
        opened = real(self, path)
        if swapped == "file":
            path.rename(tmp_path / "moved.mp4")
            path.symlink_to(outside / "film.mp4")
        else:
            inside.rename(tmp_path / "moved")
            inside.symlink_to(outside)
        return opened

    monkeypatch.setattr(Roots, "open", swap)
    config = ServeConfig(folder=str(tmp_path / "state"), roots=(str(tmp_path / "inside"),))
    with Library(tmp_path / "library", engine) as fresh:
        service = Service(fresh, config)
        try:
            service.jobs.start()
            job = service.jobs.submit(service.roots.find("own/film.mp4"))
            until(lambda: service.jobs.get(job.id).state in ("done", "failed"))
            assert service.jobs.get(job.id).state == "done"
            [record] = fresh.list()
            assert record.path == str(inside / "film.mp4")
            assert record.duration_seconds == pytest.approx(length, abs=0.05)
            assert list((tmp_path / "state").glob("open-*")) == []
        finally:
            service.close()


def av_seconds(path: Path) -> float:
    with Source(path) as source:
        return source.probe().duration_seconds or 0.0


def test_three_lines_put_it_into_ones_own_application(library: Library, tmp_path: Path, service: Served) -> None:
    config = ServeConfig(folder=str(tmp_path))
    own = FastAPI()
    own.include_router(router(library, config), prefix="/video")
    own.get("/")(lambda: "mine")

    async def run() -> None:
        async with own.router.lifespan_context(own):
            assert (await _ask(own, "/")).json() == "mine"
            answer = await _ask(own, "/video/api/v1/search?q=a cat")
            same(answer, library.search("a cat"))
            preview = await _ask(own, answer.json()["hits"][0]["preview"])
            assert Image.open(io.BytesIO(preview.content)).format == "JPEG"
            assert "static/page.js" in (await _ask(own, "/video/")).text
            assert (await _ask(own, "/video/api/v1/videos/nobody")).json()["error"]["kind"] == "not_found"
            assert (await _ask(own, "/video/api/v1/search?q=a cat", **STRANGER)).status_code == 403

    asyncio.run(run())
    for hosts, status in ((("films.example.com",), 200), (("*",), 200), (("other.example.com",), 403)):
        other = FastAPI()
        other.include_router(router(library, ServeConfig(folder=str(tmp_path), hosts=hosts)))
        assert asyncio.run(_ask(other, "/api/v1/search?q=a cat", **STRANGER)).status_code == status


def test_what_keeps_it_from_starting_is_said(library: Library, tmp_path: Path) -> None:
    """And nobody is told that it listens."""
    told, before = list[str](), signal.getsignal(signal.SIGTERM)
    config = ServeConfig(port=0, folder=str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RenderError, match=f":{port}: cannot listen there: .*in use"):
            run(library, ServeConfig(port=port, folder=str(tmp_path)), listening=told.append)
    with pytest.raises(RenderError, match="cannot listen there"):
        run(library, ServeConfig(host="nowhere.invalid", port=0, folder=str(tmp_path)), listening=told.append)
    first = Service(library, config)
    first.jobs.start()
    try:
        with pytest.raises(LibraryError, match="another server works here"):
            run(library, config, listening=told.append)
    finally:
        first.close()
    assert told == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"host": "127.0.0.1"}, "127.0.0.1"),
        ({"host": "127.0.0.2"}, "127.0.0.2"),
        ({"host": "::1"}, "[::1]"),
        ({"host": "localhost"}, "localhost"),
        ({"hosts": ("Video.Example",)}, "video.example"),
    ],
)
def test_only_its_own_names_are_answered(library: Library, tmp_path: Path, config: dict[str, Any], name: str) -> None:
    made = app(library, ServeConfig(**config, folder=str(tmp_path)))
    evil = ("evil.example", "127.0.0.1.evil.example:8000", *(["localhost"] if "hosts" in config else []))
    for given, status in ((f"{name}:8000", 200), (name.upper(), 200), *((one, 403) for one in evil)):
        answer = asyncio.run(_ask(made, "/api/v1/videos", headers={"Host": given}))
        assert answer.status_code == status, given
    # No redirect to a path with or without a slash, which would lead to the host that was given.
    for address in ("/api/v1/jobs/", "/static/page.js/", "/healthz/"):
        answer = asyncio.run(_ask(made, address, headers={"Host": "evil.example"}))
        assert (answer.status_code, "location" in answer.headers) == (404, False)


def test_a_job_that_outlived_its_folder_is_refused(library: Library, place: Path, tmp_path: Path) -> None:
    """The queue is older than the options of this start; and a link may have been put in the file's place."""
    service = Service(library, ServeConfig(folder=str(tmp_path), roots=(str(place / "videos"),)))
    for path in (place / "outside" / "secret.mp4", place / "videos" / "link.mp4"):
        with pytest.raises(ApiError, match="not under a folder"):
            service._add(path, lambda *_: None, lambda: False)
    assert not [record for record in library.list() if record.path.endswith(("secret.mp4", "link.mp4"))]
    service.close()


def test_a_video_indexed_again_while_it_is_looked_at(library: Library) -> None:
    """Key-frames that the older extras do not know are left out."""
    record = library.list()[0]
    first, *others = library.previews(record.id)
    later = (dataclasses.replace(first, pts_seconds=first.pts_seconds + 0.01), *others)
    found = video_detail(record, library.extras(record.id), later, "", playable=False)
    assert [frame.pts_seconds for frame in found.keyframes] == [preview.pts_seconds for preview in others]


def test_a_path_is_no_id(service: Served, library: Library) -> None:
    path = library.list()[0].path
    for id in (path, os.path.relpath(path), "../x", "", "A" * 32, "0" * 33):
        answer = service.http.get("/api/v1/search", params={"q": "x", "video": id})
        assert (answer.status_code, error(answer)["message"]) == (404, "there is no such video")


def test_messages_tell_no_folders() -> None:
    assert redact_paths("/a b/c/d.mp4: damaged, see /a b/c/d.mp4", "/a b/c/d.mp4") == "d.mp4: damaged, see d.mp4"
    assert redact_paths("/a/library: full", "/x/y", "/a/library") == "library: full"
    assert redact_paths("/a\\udcff/d.mp4: bad", "file:///a%FF/d.mp4") == "d.mp4: bad"
    assert redact_paths("/a\udcff/d.mp4: bad", "file:///a%FF/d.mp4") == "d.mp4: bad"
    assert redact_paths("1/2 of it", "/d.mp4", "", "s3://bucket/library") == "1/2 of it"


def test_a_file_that_nobody_takes_is_closed(tmp_path: Path) -> None:
    """As where the caller leaves between the opening and the answer; a warning would fail the test."""
    (tmp_path / "a.mp4").write_bytes(b"a")
    opened = Roots([tmp_path]).open(tmp_path / "a.mp4")
    number = opened.fileno()
    del opened
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(number)


# --- connections ----------------------------------------------------------------------------------------------------


def test_answers_do_not_wait_for_acknowledgements() -> None:
    with _listen(ServeConfig(port=0)) as listener, socket.create_connection(listener.getsockname()[:2]):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_header_that_does_not_come_ends_the_connection(tmp_path: Path) -> None:
    with served(tmp_path / "library", timeout_seconds=1.0) as service:

        def drip(connection: socket.socket, data: bytes) -> None:
            for letter in data:
                connection.sendall(bytes([letter]))
                time.sleep(0.05)

        whole = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with connect(service) as silent, connect(service) as dripping, connect(service) as kept:
            kept.sendall(whole)
            assert kept.recv(4096).startswith(b"HTTP/1.1 200")
            began = time.monotonic()
            with pytest.raises(OSError):  # the other side has closed it
                drip(dripping, whole[:-2] + b"X: " + b"a" * 900)
            assert time.monotonic() - began < 20
            with contextlib.suppress(ConnectionError):
                assert silent.recv(1) == b""
            assert service.http.get("/healthz").status_code == 200


def test_a_body_that_drips_is_given_up() -> None:
    """Bytes that keep coming, each well within the longest silence, but too few of them."""

    async def body(pause: float, size: int) -> int:
        async def receive() -> dict[str, Any]:
            await asyncio.sleep(pause)
            return {"type": "http.request", "body": b"x" * size, "more_body": next(left) > 0}

        left = iter(range(40, -1, -1))
        request = Request({"type": "http", "method": "POST", "headers": []}, receive)
        return sum([len(chunk) async for chunk in uploads._body(request, 1 << 20, 0.3)])

    with pytest.raises(ApiError) as caught:
        asyncio.run(body(0.02, 1))
    assert caught.value.status == 408
    assert asyncio.run(body(0.02, 4096)) == 41 * 4096


def test_silent_connections_do_not_keep_others_out(tmp_path: Path) -> None:
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as opened:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, allowed[1]))  # the service inherits it
        try:
            service = opened.enter_context(served(tmp_path / "library", timeout_seconds=20.0))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, allowed)
        for _ in range(300):
            opened.enter_context(connect(service))
        with httpx.Client(base_url=service.address, timeout=15, trust_env=False) as fresh:
            assert fresh.get("/healthz").status_code == 200


def test_the_openapi_document_is_sound(service: Served) -> None:
    """Every reference leads somewhere, every schema is one, and every operation has an answer and a name of its own."""
    document = service.http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")

    references = re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(document))
    assert len(references) == json.dumps(document).count('"$ref"') > 10
    assert set(references) <= set(document["components"]["schemas"])
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    operations = [one for methods in document["paths"].values() for one in methods.values()]
    names = [one["operationId"] for one in operations]
    assert len(set(names)) == len(names)
    assert {"search", "search_picture", "playable_file"} <= set(names)
    assert document["info"]["version"] == __version__
    assert all(one["description"].startswith(one["summary"]) for one in operations)
    for path, methods in document["paths"].items():
        for one in methods.values():
            assert any(code.startswith("2") for code in one["responses"])
            declared = {given["name"] for given in one.get("parameters", ()) if given["in"] == "path"}
            assert declared == set(re.findall(r"{(\w+)}", path))
