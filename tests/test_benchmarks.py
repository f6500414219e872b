"""The benchmark suite: its content, its rows, its report. What it measures is not tested: that is its own job."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from benchmarks import charts, content, library_report, measure, report, run, suite, tiny, worker
from benchmarks.cases import NAMES, decode, library, search
from benchmarks.content import Clip
from benchmarks.measure import Folders, Measurement
from benchmarks.peers import clusterers, searchers
from benchmarks.rows import Results

KEYS = {"case", "params", "system", "metric", "median", "p25", "p75", "runs", "unit", "commit", "environment"}


# --- content ----------------------------------------------------------------------------------------------------------


def planes(wanted: Clip, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.stack([frame.to_ndarray() for _, frame in zip(range(count), content.frames(wanted), strict=False)])


def test_pictures_come_from_the_seed() -> None:
    small = Clip(height=90, seconds=1)
    first = planes(small, 12)
    np.testing.assert_array_equal(first, planes(small, 12))
    assert (first != planes(Clip(height=90, seconds=1, seed=2), 12)).mean() > 0.5


def test_pictures_move_and_change_scene() -> None:
    seen = planes(Clip(height=90, seconds=5), content.SCENE_FRAMES + 3)[:, :90].astype(np.float64)
    change = np.abs(np.diff(seen, axis=0)).mean((1, 2))
    assert change.argmax() == content.SCENE_FRAMES - 1
    assert change.max() > 3 * np.median(change)
    # More than the grain alone, whose mean change is below 1 level.
    assert np.median(change) > 2
    # Detail at all sizes: neighbours differ, and so do pixels far apart.
    assert np.abs(np.diff(seen[0], axis=1)).mean() > 3
    assert seen[0].std() > 15


@pytest.mark.parametrize(
    ("codec", "gop"), [("h264", 12), ("h264", 250), ("hevc", 20), ("vp9", 15), ("av1", 20), ("mpeg2", 12)]
)
def test_clips_are_what_their_names_say(codec: str, gop: int, tmp_path: Path) -> None:
    wanted = Clip(codec, gop, 144, 2)
    path = content.clip(tmp_path, wanted)
    assert [file.name for file in tmp_path.iterdir()] == [wanted.name]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.codec.canonical_name == content.FFMPEG_NAMES.get(codec, codec)
        assert (stream.width, stream.height, stream.average_rate) == (256, 144, 30)
        packets = [packet for packet in container.demux(stream) if packet.size]
        ticks = sorted(packet.pts for packet in packets)
        keys = [ticks.index(packet.pts) for packet in packets if packet.is_keyframe]
    # FFmpeg's encoder of MPEG-2 makes a key frame of the last one when B pictures would wait for more.
    assert [key for key in keys if codec != "mpeg2" or key < 59] == list(range(0, 60, gop))
    # Not trivially compressible: natural video takes some hundredths of a bit for a pixel.
    assert path.stat().st_size * 8 / (60 * 144 * 256) > 0.03
    made = path.stat().st_mtime_ns
    assert content.clip(tmp_path, wanted).stat().st_mtime_ns == made


def test_clips_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    wanted = Clip(height=144, seconds=1)
    first, second = (content.clip(tmp_path / name, wanted).read_bytes() for name in "ab")
    assert first == second


def test_a_long_clip_is_a_short_one_over_and_over(tmp_path: Path) -> None:
    once, thrice = (content.clip(tmp_path, Clip(height=144, seconds=1, gop=15, repeats=n)) for n in (1, 3))
    with av.open(str(once)) as short, av.open(str(thrice)) as long:
        expected = [frame.to_ndarray() for frame in short.decode(video=0)]
        found = list(long.decode(video=0))
    assert len(found) == 3 * len(expected)
    np.testing.assert_allclose([frame.time for frame in found], np.arange(90) / 30, atol=1e-6)
    for number, frame in enumerate(found):
        np.testing.assert_array_equal(frame.to_ndarray(), expected[number % 30])


def test_tiny_clips_differ_and_come_from_their_numbers(tmp_path: Path) -> None:
    few, more = tiny.clips(tmp_path / "a", 3), tiny.clips(tmp_path / "b", 5)
    assert [path.read_bytes() for path in few] == [path.read_bytes() for path in more[:3]]
    assert len({path.read_bytes() for path in more}) == 5
    with av.open(str(few[0])) as container:
        pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)
    assert pictures.shape == (10, 90, 160, 3)
    # One cut, in the middle, and movement before and after it.
    change = np.abs(np.diff(pictures, axis=0)).mean((1, 2, 3))
    assert change.argmax() == 4
    assert np.delete(change, 4).min() > 0.5


def test_every_case_asks_for_what_it_has() -> None:
    assert sorted(NAMES) == sorted(file.stem for file in Path(decode.__file__).parent.glob("[a-z]*.py"))
    folders = Folders(Path("nowhere"), Path("nowhere"))
    for name in NAMES:
        module = importlib.import_module(f"benchmarks.cases.{name}")
        full, quick = (module.measurements(way, folders) for way in (False, True))
        assert 0 < len(quick) < len(full) or len(quick) == len(full) == 1
        for one in (*full, *quick):
            assert one.case == name
            assert set(one.systems) <= set(module.SYSTEMS)
            assert json.loads(json.dumps(one.params)) == one.params
    made = run.clips_of(NAMES, quick=False)
    assert {clip.codec for clip in made} == {"h264", "hevc", "vp9", "av1", "mpeg2"}
    assert {12, 60, 250} <= {clip.gop for clip in made if clip.codec == "h264"}
    assert {360, 720, 1080, 2160} <= {clip.height for clip in made}


# --- what is checked beside time --------------------------------------------------------------------------------------


def test_wrong_frames_are_counted(tmp_path: Path) -> None:
    path = content.clip(tmp_path, Clip(height=144, seconds=2, gop=30))
    known = decode.reference(path, tmp_path)
    np.testing.assert_allclose(known["seconds"], np.arange(60) / 30, atol=1e-6)
    with av.open(str(path)) as container:
        options: dict[str, Any] = {"width": decode.SIZE, "height": decode.SIZE, "format": "rgb24"}
        pictures = np.stack([f.reformat(**options).to_ndarray() for f in container.decode(video=0)])
    wanted = np.array([0, 7, 29, 30, 45, 59])
    right = pictures[wanted]
    assert decode.wrong_frames(right, wanted, known["luma"]) == 0
    assert decode.wrong_frames(right[:4], wanted, known["luma"]) == 2
    assert decode.wrong_frames(pictures[wanted - [0, 1, 0, 1, 0, 1]], wanted, known["luma"]) == 3
    # Another matrix and range are not another frame.
    dull = (16 + right[..., ::-1] * (219 / 255)).astype(np.uint8)
    assert decode.wrong_frames(dull, wanted, known["luma"]) == 0


def test_frames_shown_at_times() -> None:
    np.testing.assert_array_equal(decode.shown([0, 0.5, 0.74, 3.0], np.array([0.1, 0.5, 0.75])), [0, 1, 1, 2])
    assert decode.times_of({"fps": 2}, np.array([0.0, 0.9, 1.6])) == [0.0, 0.5, 1.0, 1.5]


def test_peers_do_what_they_are_said_to(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((300, 32), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = vectors[[5, 250]] + 0.01
    best = np.argsort(-(vectors.astype(np.float64) @ queries.T), axis=0)[:4].T
    for make in (searchers.numpy, searchers.keyreel, searchers.keyreel_scan):
        np.testing.assert_array_equal(make(vectors, queries, 4, tmp_path)(), best)
    means = np.eye(4, 32, dtype=np.float32)
    x = np.repeat(means, 25, axis=0) + 0.05 * random.standard_normal((100, 32), np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    labels = clusterers.scikit_learn(x, 4, n_init=1)()
    for own in (clusterers.keyreel(x, 4)(), labels):
        assert [len(set(own[n : n + 25])) for n in range(0, 100, 25)] == [1] * 4
        assert len(set(own)) == 4


@pytest.mark.parametrize("system", ["keyreel", "keyreel videos", "numpy", "lancedb flat"])
def test_searches_of_a_library_find_the_row_that_the_query_is_near(system: str, library_of_rows: Folders) -> None:
    params = {"rows": 2 * library.ROWS_A_VIDEO}
    found = library.check(system, params, library_of_rows, library.SYSTEMS[system](params, library_of_rows)())
    assert found["recall"] == 1
    assert found["queries"] == 200
    assert 0 < found["p50_seconds"] <= found["p99_seconds"]
    assert ("commit_seconds" in found) == (system == "keyreel")


@pytest.fixture(scope="module")
def library_of_rows(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    pytest.importorskip("lancedb", reason="libraries need lancedb")
    folders = Folders(tmp_path_factory.mktemp("content"), Path("nowhere"))
    library.ready({"rows": 2 * library.ROWS_A_VIDEO}, folders)
    kept = np.load(library.place({"rows": 1000}, folders) / "best.npz")
    vectors = np.concatenate([library.vectors_of(0), library.vectors_of(1)])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    scores = kept["queries"] @ vectors.T
    np.testing.assert_array_equal(scores.argmax(1), kept["best"])
    np.testing.assert_allclose(scores.max(1), kept["score"], atol=1e-3)
    return folders


def test_a_search_that_needs_more_memory_than_there_is_is_skipped(tmp_path: Path) -> None:
    with pytest.raises(measure.Skipped, match=r"it needs .* MiB of memory, .* are free"):
        search.ready({"rows": 10**9, "width": 512}, Folders(tmp_path, tmp_path))


# --- rows -------------------------------------------------------------------------------------------------------------


def test_spread_is_median_and_quartiles() -> None:
    assert measure.spread([4.0, 1.0, 2.0, 3.0, 10.0]) == {"median": 3.0, "p25": 2.0, "p75": 4.0, "runs": 5}


def test_short_runs_are_repeated_and_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []

    def work() -> None:
        calls.append(1)
        now[0] += 0.03

    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(worker, "cpu_seconds", lambda: 2 * now[0])
    timed = worker.Timed(work)
    timed.first()
    calls.clear()
    assert timed.again() == pytest.approx({"cpu_seconds": 0.06, "wall_seconds": 0.03})
    assert len(calls) == 7


def test_cpu_seconds_count_threads_and_memory_its_peak() -> None:
    import hashlib
    from concurrent.futures import ThreadPoolExecutor

    before, peak = worker.cpu_seconds(), worker.peak_mib()
    block = bytearray(64 << 20)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: hashlib.sha256(block).digest(), range(4)))
    assert worker.cpu_seconds() - before > 0.05
    assert worker.peak_mib() >= max(peak, 64)


@pytest.fixture
def broken_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One decoder library is not installed, one raises, one takes the process along, one says nothing any more."""
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "decord.py").write_text("raise ModuleNotFoundError(\"No module named 'decord'\", name='decord')")
    (shadow / "cv2.py").write_text("raise RuntimeError('no such driver')")
    (shadow / "torchvision.py").write_text("import os; os._exit(7)")
    monkeypatch.setenv("PYTHONPATH", str(shadow))


@pytest.mark.usefixtures("broken_peers")
def test_a_run_appends_a_row_for_each_metric_of_each_system(tmp_path: Path) -> None:
    wanted = Clip("h264", 30, 144, 2)
    systems = ("keyreel", "pyav", "decord", "opencv", "torchcodec")
    measurement = Measurement("decode", decode.params_of(wanted), systems, runs=2)
    output = tmp_path / "out" / "rows.jsonl"
    returned = run.run([measurement], Folders(tmp_path, tmp_path), output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows == returned
    found = {(row["system"], row["metric"]): row for row in rows}
    assert len(found) == len(rows)
    for row in rows:
        assert row.keys() - {"skipped", "failed"} == KEYS
        assert row["params"] == measurement.params
        assert row["unit"] == measure.UNITS[row["metric"]]
        assert row["environment"]["versions"]["numpy"] == np.__version__
    for system in ("keyreel", "pyav"):
        assert found[system, "frames"]["median"] == 2
        assert found[system, "wrong_frames"]["median"] == 0
        assert found[system, "cpu_seconds"]["runs"] == 2
        assert 0 < found[system, "cpu_seconds"]["p25"] <= found[system, "cpu_seconds"]["median"]
        assert found[system, "peak_mib"]["median"] > 20
    assert found["keyreel", "packets_read"]["median"] == 60
    assert 2 <= found["keyreel", "packets_fed"]["median"] < 60
    assert found["decord", "cpu_seconds"]["median"] is None
    assert found["decord", "cpu_seconds"]["skipped"] == "not installed: No module named 'decord'"
    assert found["opencv", "cpu_seconds"]["failed"].startswith("RuntimeError: no such driver")
    assert found["torchcodec", "cpu_seconds"]["failed"] == "its process ended with code 7"


def test_what_no_system_can_have_is_said_of_all(tmp_path: Path) -> None:
    measurement = Measurement("decode", {"clip": "natural/gone.mp4", "fps": 1}, ("keyreel", "pyav"), runs=1)
    rows = measure.measure(measurement, Folders(tmp_path, tmp_path))
    assert [row["system"] for row in rows] == ["keyreel", "pyav"]
    assert {row["skipped"] for row in rows} == {"natural/gone.mp4 is not in the folder of real clips (--media)"}


def test_a_hanging_system_is_ended(tmp_path: Path) -> None:
    measurement = Measurement("decode", {"clip": "gone", "fps": 1}, ("keyreel",), most_seconds=0.0)
    (row,) = measure.measure(measurement, Folders(tmp_path, tmp_path))
    assert row["failed"] == "no answer within 0 s"


def test_unknown_cases_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(["--only", "decode,deocde"])
    assert "there is no case deocde; there are decode, preprocess" in capsys.readouterr().err


# --- report -----------------------------------------------------------------------------------------------------------


def synthetic(case: str, params: dict[str, Any], system: str, /, **medians: float | None) -> list[dict[str, Any]]:
    rows = []
    for metric, median in medians.items():
        value = {"median": median, "p25": median and 0.9 * median, "p75": median and 1.1 * median, "runs": 3}
        machine = {"cpu": "A CPU", "cores": 2, "date": "2026-01-02", "system": "Linux", "python": "3", "versions": {}}
        head = {"case": case, "params": params, "system": system, "metric": metric}
        rows.append({**head, **value, "unit": measure.UNITS[metric], "commit": "abc1234", "environment": machine})
    return rows


@pytest.fixture
def results(tmp_path: Path) -> Results:
    clip = {"codec": "h264", "gop": 250, "height": 1080, "fps": 1, "seconds": 30}
    fine = {**clip, "gop": 60}
    end = {**clip, "model": "ViT-B-32"}
    of = {"of": "length", "fps": 1.0, "videos": 1}
    scenes = {"data": "scenes", "frames": 3000, "clusters": 32}
    absent = synthetic("decode", clip, "decord", cpu_seconds=None)
    rows = [
        {"case": "keyframes", "way": "of another kind"},
        *synthetic("decode", clip, "keyreel", cpu_seconds=9.0),
        *synthetic("decode", clip, "keyreel", cpu_seconds=2.0, wall_seconds=1.25, packets_fed=300, packets_read=900),
        *synthetic("decode", clip, "pyav", cpu_seconds=5.0, wrong_frames=0),
        *synthetic("decode", clip, "opencv", cpu_seconds=4.0, wrong_frames=3),
        *[{**row, "skipped": "not installed: decord"} for row in absent],
        *synthetic("decode", fine, "keyreel", cpu_seconds=2.5),
        *synthetic("decode", fine, "pyav", cpu_seconds=5.0),
        *synthetic("encode", {"model": "RN50", "images": 16}, "keyreel", cpu_seconds=1.0),
        *synthetic("encode", {"model": "RN50", "images": 16}, "keyreel attention", cpu_seconds=0.1),
        *synthetic("encode", {"model": "RN50", "images": 16}, "openvino bf16", cpu_seconds=0.8),
        *synthetic("select", scenes, "keyreel", cpu_seconds=0.01, objective=0.5),
        *synthetic("select", scenes, "scikit-learn n_init=1", cpu_seconds=0.125, objective=0.49),
        *synthetic("search", {"rows": 1000, "width": 8, "queries": 1}, search.SCAN, wall_seconds=0.08, recall=1.0),
        *synthetic("search", {"rows": 1000, "width": 8, "queries": 1}, "keyreel", wall_seconds=0.22, recall=1.0),
        *synthetic("search", {"rows": 1000, "width": 8, "queries": 1}, search.FLOOR, wall_seconds=0.2),
        *synthetic("end_to_end", end, "pyav + PIL + open_clip", cpu_seconds=30.0),
        *synthetic("end_to_end", end, "keyreel", cpu_seconds=10.0),
        *synthetic("end_to_end", end, "keyreel keyframes", cpu_seconds=1.0),
        *synthetic("end_to_end", end, "keyreel summary", cpu_seconds=20.0, select_seconds=0.5),
        *synthetic("scaling", {**of, "seconds": 30}, "keyreel", cpu_seconds=1.5, peak_mib=200.0),
        *synthetic("scaling", {**of, "seconds": 120}, "keyreel", cpu_seconds=6.25, peak_mib=201.0),
    ]
    (tmp_path / "suite.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Results(tmp_path)


def test_targets_stand_beside_what_was_measured(results: Results) -> None:
    found = {target.what: (target.bound, target.measured, target.met) for target in suite.targets(results)}
    decoding = "decode, 1080p H.264, GOP {}, 1 fps: {} / keyreel"
    best = "best of torchcodec, decord, OpenCV (opencv)"
    end = "end to end, 1080p H.264, GOP 250, 1 fps, ViT-B/32: plain / keyreel"
    kmeans = "k-means, scenes, 3,000 x 512, K = 32: scikit-learn n_init=1 / keyreel (objective 0.4900 / 0.5000)"
    expected = {
        decoding.format(250, "full decode"): (1.6, 2.5, True),
        decoding.format(250, best): (1.5, 2.0, True),
        decoding.format(60, "full decode"): (2.5, 2.0, False),
        "decode, geometric mean over 2 clips: full decode / keyreel": (3.0, 5**0.5, False),
        "encode, RN50: rate of keyreel / of the best other (openvino bf16)": (0.95, 0.8, False),
        "encode, RN50: time that spatial attention adds": (0.15, 0.1, True),
        kmeans: (10.0, 12.5, True),
        "search, 1,000 x 512: keyreel / one pass over memory": (1.15, 1.1, True),
        "search, 1,000 x 512: keyreel / keyreel in 8 bits, recall 1.000": (2.0, 2.75, True),
        "automatic number of key-frames in a summary, GOP 250": (0.05, 0.025, True),
        end: (2.75, 3.0, True),
        f"{end} keyframes": (20.0, 30.0, True),
    }
    assert found.keys() == expected.keys()
    for what, (bound, value, met) in expected.items():
        assert found[what][:2] == pytest.approx((bound, value)), what
        assert found[what][2] is met, what
    text = suite.targets_table(results)
    assert f"| {decoding.format(60, 'full decode')} | >= 2.5x | 2x | no |" in text
    assert "| encode, RN50: time that spatial attention adds | <= 15 % | 10 % | yes |" in text


def test_tables_hold_the_newest_medians(results: Results) -> None:
    (first, _) = results.groups("decode")
    lines = suite.group_table("decode", first).splitlines()
    assert lines[0] == "|  | cpu seconds | wall seconds | wrong frames | pyav takes |"
    assert lines[2:] == [
        "| **keyreel** | 2.00 (1.80 to 2.20) | 1.25 (1.12 to 1.38) |  | 2.50x |",
        "| opencv | 4.00 (3.60 to 4.40) |  | 3 | 1.25x |",
        "| pyav | 5.00 (4.50 to 5.50) |  | 0 | 1.00x |",
        "| decord | skipped: not installed: decord |  |  |  |",
    ]
    assert suite.planner_table(results).splitlines()[2:] == ["| h264, 1080p | 250 | 900 | 33 % | 2.00 | 5.00 | 2.50x |"]
    text = report.tables(results)
    assert "A CPU, 2 cores" in text
    for line in lines:
        assert line in text
    for line in ("| 30 | keyreel | 1.50 (1.35 to 1.65) |  | 200 |  |", "![scaling length](charts/scaling_length.svg)"):
        assert line in text


def test_a_later_row_takes_the_place_of_a_failure(tmp_path: Path) -> None:
    failed = [{**row, "failed": "why"} for row in synthetic("select", {"frames": 3}, "numpy", cpu_seconds=None)]
    rows = [*failed, *synthetic("select", {"frames": 3}, "numpy", cpu_seconds=3.0)]
    for order, expected in ((rows, (3.0, {})), (rows[::-1], (None, {"numpy": "failed: why"}))):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
        (group,) = Results(tmp_path).groups("select")
        assert (group.median("numpy"), group.absent) == expected


def test_charts_are_xml_and_hold_the_numbers(results: Results) -> None:
    drawn = suite.charts(results)
    assert set(drawn) == {"decode.svg", "end_to_end.svg", "encode.svg", "search.svg", "scaling_length.svg"}
    said = {}
    for name, text in drawn.items():
        root = ElementTree.fromstring(text)
        said[name] = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert "prefers-color-scheme:dark" in text
        # Nothing is drawn outside.
        for one in root.iter("{http://www.w3.org/2000/svg}rect"):
            reach = float(one.get("x", "0")) + float(one.get("width", "0"))
            assert 0 < reach <= charts.WIDTH
    assert {"2.00 s", "5.00 s", "4.00 s  3 wrong frames", "2.50 s", "opencv"} <= set(said["decode.svg"])
    assert {"30.0 s", "10.0 s", "1.00 s"} <= set(said["end_to_end.svg"])
    assert "keyreel summary" not in said["end_to_end.svg"]
    assert {"1.50", "6.25", "200", "201", "30", "120"} <= set(said["scaling_length.svg"])


def test_bars_are_as_long_as_their_values() -> None:
    text = charts.bars("<a & b>", [("one", [charts.Bar("x", 4.0, own=True), charts.Bar("y", 1.0)])], "s")
    root = ElementTree.fromstring(text)
    svg = "{http://www.w3.org/2000/svg}"
    long = {one.get("class"): float(one.get("width", "0")) for one in root.iter(f"{svg}rect")}
    assert long["own"] == pytest.approx(4 * long["other"], rel=0.01)
    assert root.findtext(f"{svg}text") == "<a & b>"


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "0"), (0.00123456, "0.00123"), (0.5, "0.500"), (12.345, "12.3"), (1234.5, "1,234")]
)
def test_numbers_have_three_digits(value: float, expected: str) -> None:
    assert charts.number(value) == expected


def test_without_rows_there_is_no_section(tmp_path: Path) -> None:
    empty = Results(tmp_path)
    assert (report.speed(empty), report.files(empty), suite.charts(empty), suite.targets(empty)) == ("", {}, {}, [])
    readme = (report.ROOT / "README.md").read_text("utf-8")
    assert "speed" not in report.SECTIONS
    blank = report.filled(readme.replace("<!-- speed -->", "<!-- speed -->\nold"), empty)
    assert "old\n" not in blank.partition("<!-- speed -->")[2].partition("<!-- /speed -->")[0]


def test_what_a_million_hours_take_is_computed_from_the_rows(tmp_path: Path) -> None:
    clip, tiny_clips = {"height": 1080, "gop": 250, "seconds": 30}, {"of": "tiny clips", "videos": 100}
    rows = [
        *synthetic("end_to_end", clip, "keyreel summary", cpu_seconds=15.0),
        *synthetic("index", tiny_clips, "keyreel", cpu_seconds=14.0, wall_seconds=20.0, videos=100, library_mib=2.0),
        *synthetic("index", tiny_clips, "keyreel summarize", cpu_seconds=4.0, wall_seconds=5.0, videos=100),
        *synthetic("index", tiny_clips, "keyreel again", cpu_seconds=0.2, wall_seconds=0.3, videos=100),
        *synthetic("index", {"of": "real clips"}, "keyreel", cpu_seconds=9.0, library_mib=10.0, hours=0.25),
        *synthetic("library", {"rows": 1000}, "keyreel", p50_seconds=0.001, p99_seconds=0.002, commit_seconds=0.05),
        *synthetic("library", {"rows": 1000}, "numpy", p50_seconds=0.003, p99_seconds=0.004, recall=0.5),
        *synthetic("kills", {"of": "adding"}, "keyreel", kills=200, lost_videos=0, findings=0),
        *synthetic("drain", {"clients": 4}, "keyreel serve", accepted=7, lost_jobs=0),
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = Results(tmp_path)
    assert library_report.Scale.of(results) == library_report.Scale(0.5, 0.1, 0.05, 0.002, 40.0)
    text = " ".join(library_report.section(results).split())
    # 6,000,000 videos of 600 s at 0.5 CPU-seconds a second, and 0.1 each: 300.1 s a video.
    for said in ("6,000,000 videos", "500,167 core-hours", "10.9 machines", "38.1 TiB", "3.60 billion rows"):
        assert said in text
    assert "6,002 cores" in text  # 300.1 / 0.05
    assert "3.47 days" in text  # 6,000,000 commits of 50 ms
    assert "| 100 tiny clips | keyreel | 5.00 | 200 | 140 | 2.00 MiB, 20.5 KiB a video |" in text
    assert "| numpy | 3.00 / 4.00, recall 0.500 |" in text
    assert "200 times at random points of adding: 0 committed videos lost" in text
    assert "7 jobs had been accepted, 0 were lost" in text
    assert library_report.section(Results(tmp_path / "none")) == ""


def test_with_rows_the_readme_must_have_a_place(results: Results) -> None:
    readme = (report.ROOT / "README.md").read_text("utf-8").replace("<!-- speed -->", "").replace("<!-- /speed -->", "")
    with pytest.raises(ValueError, match="0 places for speed"):
        report.filled(readme, results)
    text = report.filled(readme + "\n<!-- speed -->\n<!-- /speed -->\n", results)
    assert suite.targets_table(results) in text
    assert "![decode](benchmarks/charts/decode.svg)" in text
    assert report.filled(text, results) == text


def test_nothing_of_a_peer_is_imported_ahead() -> None:
    """So that a peer that is not installed keeps nobody else from running."""
    heavy = {"torch", "cv2", "decord", "torchcodec", "faiss", "usearch", "lancedb", "openvino", "sklearn", "open_clip"}
    modules = ", ".join(f"benchmarks.cases.{name}" for name in NAMES)
    code = f"import sys, benchmarks.run, benchmarks.report, {modules}; print({heavy} & sys.modules.keys() or 'none')"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True, check=True).stdout == "none\n"
