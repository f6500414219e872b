"""`keyreel bench`: figures against a clock that is told how fast to run, counts against the files themselves."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import jsonschema
import numpy as np
import pytest
from test_engine_cuda import backend_on

import keyreel
from keyreel.cli.bench import bench
from keyreel.cli.bench_results import bench_schema, measured, summed
from keyreel.config import BenchConfig, EncodeConfig, ImageTransform, Sampling, SelectConfig
from keyreel.decode.sampling import NoFrames
from keyreel.decode.source import Source
from keyreel.errors import CorruptStream, Failure
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.stopwatch import Stopwatch
from keyreel.types import FrameBatch
from keyreel_kernels.cuda import Cuda

FPS, SECONDS = 10, 4
BATCH = 4


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two clips of four seconds, a key frame each second, and one that is no video."""
    folder = tmp_path_factory.mktemp("clips")
    for name in ("a", "b"):
        with av.open(str(folder / f"{name}.mp4"), "w") as output:
            stream = output.add_stream("libx264", rate=FPS, options={"g": str(FPS), "keyint_min": str(FPS)})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for n in range(SECONDS * FPS):
                picture = np.full((48, 64, 3), (200, 4 * n, 30), np.uint8)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            output.mux(stream.encode(None))
    (folder / "c.mp4").write_bytes(b"no video")
    return [folder / f"{name}.mp4" for name in ("a", "b", "c")]


class Clock:
    """Wall and processor time, which pass as they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.cpu = 100.0
        monkeypatch.setattr("keyreel.runtime.stopwatch.time.perf_counter", lambda: self.wall)
        monkeypatch.setattr("keyreel.runtime.stopwatch.time.process_time", lambda: self.cpu)

    def passes(self, wall: float, cpu: float = 0.0) -> None:
        self.wall += wall
        self.cpu += cpu


def test_a_stage_ends_when_the_device_has_come_to_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watch = Stopwatch(settle=lambda: clock.passes(2.0, 0.5))
    for _ in range(3):
        with watch("encode"):
            clock.passes(1.0, 0.25)
        clock.passes(50.0, 50.0)
    with watch("fuse"):
        pass
    assert watch.seconds == {"encode": 9.0, "fuse": 2.0}
    assert watch.cpu_seconds == {"encode": 2.25, "fuse": 0.5}


class Pretend:
    """An engine whose stages take the time they are told to; `slower` is added to each run of the pipeline."""

    def __init__(self, clock: Clock, slower: list[float]) -> None:
        self._clock, self._slower, self.order = clock, slower, []
        self._runs: dict[str, int] = {}
        self.bundle = SimpleNamespace(name="pretend", sha256="0" * 64, image=ImageTransform(8, 8))
        self.arrays = SimpleNamespace(bytes_to_host=0, synchronize=lambda: clock.passes(0.125))
        self.backend = SimpleNamespace(
            device="cpu", reason="asked for", ops=SimpleNamespace(arrays=self.arrays), running=contextlib.nullcontext
        )

    def warmup(self) -> None:
        self._clock.passes(1000.0, 1000.0)

    def summarize(self, source: Source, *, sampling: Sampling, watch: Stopwatch, **_: Any) -> Any:
        self.order.append((source.name, sampling.mode))
        run = self._runs[source.name] = self._runs.get(source.name, -1) + (sampling.mode == "fps")
        few = sampling.mode == "keyframes"
        self._clock.passes((2.0 if few else 6.0) + (0.0 if few else float(self._slower[run])), 3.0 if few else 9.0)
        with watch("select"):
            self._clock.passes(2.0, 1.0)
        self.arrays.bytes_to_host += 10
        return SimpleNamespace(
            timings_seconds={"decode": 5.0, "encode": 2.5, "fuse": 0.5, "select": watch.seconds["select"]},
            shots=[SimpleNamespace(stop_seconds=30.0)],
            embedding=range(4 if few else 40),
        )

    @contextlib.contextmanager
    def frames(self, source: Source, sampling: Sampling, **_: Any) -> Iterator[Any]:
        def batches() -> Iterator[FrameBatch]:
            for _ in range(10):
                self._clock.passes(0.3, 0.7)
                yield FrameBatch(np.zeros((BATCH, 8, 8, 3), np.uint8), np.zeros(BATCH), np.zeros(BATCH, np.int64))

        class Frames:
            packets_read, packets_fed = 900, 300
            __iter__ = staticmethod(batches)

        yield Frames()

    def encode_frames(self, held: list[FrameBatch], encode: EncodeConfig, *, watch: Stopwatch) -> None:
        self.held = sum(len(batch) for batch in held)
        with watch("encode"):
            self._clock.passes(1.0, 2.0)
        with watch("fuse"):
            self._clock.passes(0.5)


def test_figures_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Pretend(Clock(monkeypatch), [7.0, 0.0, 4.0, 1.0, 2.0])
    told: list[tuple[float, float | None]] = []
    found = bench(
        engine,  # type: ignore[arg-type]
        [Source("a"), Source("b")],
        sampling=Sampling(start_seconds=10.0),
        config=BenchConfig(runs=4, held_frames=18),
        progress=lambda stage, done, total: told.append((done, total)),
    )
    # The first run warms up and counts for nothing else; after it the videos take turns.
    one = [("fps", "near", "keyframes")] * 2
    turns = [(name, mode) for name, modes in zip("ab", one, strict=True) for mode in modes]
    assert engine.order == [("a", "fps"), ("b", "fps"), *turns * 4]
    assert told[-1] == (10.0, 10.0)
    assert found.warmup_seconds == 1000 + 2 * (6 + 7 + 2)
    video = found.videos[0]
    # Runs of 8, 12, 9 and 10 seconds; between two runs percentiles are interpolated.
    assert dataclasses.astuple(video.seconds) == (9.5, 8.75, 10.5)
    assert dataclasses.astuple(video.cpu_seconds) == (10.0, 10.0, 10.0)
    assert video.video_seconds == 20.0
    assert video.speed.median == pytest.approx(np.median([20 / 8, 20 / 12, 20 / 9, 20 / 10]))
    assert (video.frames, video.packets_read, video.packets_fed, video.bytes_to_host) == (40, 900, 300, 10)
    decode, encode, fuse, select = video.stages
    assert decode.busy_share == pytest.approx(5 / 9.5)
    # With what the device still had to do; the encoder saw 20 of 40 frames.
    assert engine.held == 20
    alone = [stage.alone_seconds.median for stage in video.stages]
    assert alone == pytest.approx([3.125, 2 * 1.125, 2 * 0.625, 2.0])
    assert [stage.alone_cpu_seconds.median for stage in video.stages] == pytest.approx([7.0, 4.0, 0.0, 1.0])
    assert [stage.cpu_share for stage in video.stages] == pytest.approx([7 / 12, 4 / 12, 0, 1 / 12])
    assert (decode.frames_per_second, decode.speed) == pytest.approx((40 / 3.125, 20 / 3.125))
    assert (encode.name, fuse.name, select.busy_seconds.median) == ("encode", "fuse", 2.0)
    assert (video.bound_by, video.bound_share) == ("decode", pytest.approx(5 / 9.5))
    near, keys = video.alternatives
    assert (near.sampling, near.frames, keys.sampling, keys.frames) == ("near", 40, "keyframes", 4)
    assert keys.times_as_fast == pytest.approx(9.5 / 4)
    # Both videos one after the other: sums of each run, not of medians.
    assert found.total is not None
    assert dataclasses.astuple(found.total.seconds) == (19.0, 17.5, 21.0)
    assert (found.total.frames, found.total.packets_fed, found.total.video_seconds) == (80, 600, 40.0)
    jsonschema.validate(found.document(), bench_schema())


@pytest.mark.parametrize(("error", "hidden"), [(NoFrames("no key frame"), True), (ValueError("a bug"), False)])
def test_only_a_window_without_such_frames_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, error: ValueError, hidden: bool
) -> None:
    class Fails(Pretend):
        def summarize(self, source: Source, *, sampling: Sampling, **rest: Any) -> Any:
            if sampling.mode == "keyframes":
                raise error
            return super().summarize(source, sampling=sampling, **rest)

    engine: Any = Fails(Clock(monkeypatch), [1.0, 1.0])
    found = bench(engine, [Source("a")], config=BenchConfig(runs=1))
    assert [other.sampling for video in found.videos for other in video.alternatives] == (["near"] if hidden else [])
    assert [failure.error.args[0] for failure in found.failed] == ([] if hidden else ["ValueError: a bug"])


def row(**changed: float) -> dict[str, float]:
    stages = {f"{kind} {stage}": 1.0 for kind in ("busy", "alone", "cpu") for stage in ("encode", "fuse", "select")}
    stages |= {"busy decode": 1.0, "alone decode": 1.0, "cpu decode": 1.0}
    counts = {"video": 60.0, "frames": 10.0, "read": 100.0, "fed": 50.0, "bytes": 0.0}
    return {**counts, "seconds": 10.0, "cpu": 12.0, **stages, **{k.replace("_", " "): v for k, v in changed.items()}}


@pytest.mark.parametrize(
    ("busy", "bound", "share"),
    [
        ((9.0, 1.0, 0.5, 1.0), "decode", 0.9),
        ((5.0, 4.0, 3.0, 1.0), "encode", 0.7),  # together they leave the decoder waiting
        ((5.0, 3.0, 4.0, 1.0), "fuse", 0.7),
        ((2.0, 1.0, 1.0, 5.0), "select", 0.5),
    ],
)
def test_what_bounds(busy: tuple[float, ...], bound: str, share: float) -> None:
    keys = ("busy_decode", "busy_encode", "busy_fuse", "busy_select")
    found = measured("x", [row(**dict(zip(keys, busy, strict=True)))])
    assert (found.bound_by, found.bound_share) == (bound, pytest.approx(share))


def test_an_alternative_that_one_video_does_not_have_is_not_in_the_total() -> None:
    rows = [row(keyframes_frames=2.0, keyframes_seconds=5.0, keyframes_cpu=1.0), row()]
    assert measured("x", rows[:1]).alternatives[0].times_as_fast == 2.0
    total = measured("all", [summed(rows)])
    assert total.alternatives == ()
    assert (total.frames, total.seconds.median) == (20, 20.0)


def test_on_real_files(clips: list[Path], cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are those of the file, what comes down from the device is counted, and the broken file is told of."""
    told: list[Failure] = []
    sampling, select = Sampling(fps=5), SelectConfig(keyframes=2)
    monkeypatch.setattr(keyreel.Engine, "warmup", lambda self: None)  # it chooses a number, long on emulated kernels
    with keyreel.Engine(Bundle.find("builtin"), backend_on(cuda)) as engine:
        sources, config = [Source(clips[2]), Source(clips[0])], BenchConfig(runs=1, held_frames=1)
        found = bench(engine, sources, sampling=sampling, select=select, config=config, tell=told.append)
        before = cuda.bytes_to_host
        engine.summarize(clips[0], sampling=sampling, select=select)
        assert found.videos[0].bytes_to_host == cuda.bytes_to_host - before > 0
    (video,) = found.videos
    assert (video.video, video.frames, video.packets_read) == (str(clips[0]), SECONDS * 5, SECONDS * FPS)
    assert 0 < video.packets_fed <= video.packets_read
    assert video.video_seconds == pytest.approx(SECONDS)
    assert video.alternatives[-1].frames == SECONDS  # a key frame each second
    assert found.failed == tuple(told)
    assert isinstance(told[0].error, CorruptStream)
    document = json.loads(json.dumps(found.document()))
    jsonschema.validate(document, bench_schema())
    assert document["failed"][0]["exit_code"] == 3
    for spoil in (
        lambda d: d.pop("cores"),
        lambda d: d["videos"][0]["stages"][0].update(more=1),
        lambda d: d["videos"][0]["seconds"].update(median="fast"),
        lambda d: d["failed"][0].pop("error"),
        lambda d: d.update(schema="keyreel.bench/2"),
        lambda d: d["total"].update(frames=1.5),
    ):
        spoiled = copy.deepcopy(document)
        spoil(spoiled)
        assert not jsonschema.Draft202012Validator(bench_schema()).is_valid(spoiled)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "keyreel", "bench", *map(str, arguments)]
    environment = {**os.environ, "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


def test_the_command_for_programs(clips: list[Path]) -> None:
    done = run(clips[0].parent, "--runs", 1, "--fps", 1, "--json")
    assert done.returncode == 8, done.stderr
    document = json.loads(done.stdout)
    jsonschema.validate(document, bench_schema())
    assert [Path(video["video"]) for video in document["videos"]] == clips[:2]
    assert document["total"]["frames"] == 2 * SECONDS
    assert document["config"]["sampling"]["fps"] == 1.0
    assert [Path(failure["video"]) for failure in document["failed"]] == clips[2:]
    assert str(clips[2]) in done.stderr
    assert run(clips[2], "--json").returncode == 3


def test_the_command_for_people(clips: list[Path]) -> None:
    done = run(clips[0], "--runs", 1, "--sampling", "keyframes")
    assert (done.returncode, done.stderr) == (0, "")
    first, *_ = done.stdout.splitlines()
    assert first.startswith(f"{clips[0]}: 4.0 s of video, {SECONDS} frames sampled; {SECONDS * FPS} packets read, ")
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert {"decode", "encode", "fuse", "select", "pipeline"} <= set(rows)
    # The last two figures of a row are frames a second and seconds of video a second: one frame a second was taken.
    assert max(map(len, done.stdout.splitlines()[1:7])) <= 80  # the table, on a terminal of 80 columns
    assert float(rows["pipeline"][-1]) == pytest.approx(float(rows["pipeline"][-2]), abs=0.11)
    assert "--sampling" not in done.stdout  # nothing cheaper was measured, so nothing is claimed
    assert run(clips[0], "--runs", 0).returncode == 2
