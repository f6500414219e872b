"""The user's own videos on the user's own machine: how fast each stage is, and what bounds the whole.

In the pipeline decoding overlaps with encoding, so that the stages' busy times add up to more than the whole takes.
Each is therefore measured a second time with nothing beside it: decoding with nobody to wait for, encoding on frames
that are in memory. Runs go round all videos in turn, so that what disturbs the machine for a while disturbs all of
them.
"""

from __future__ import annotations

import dataclasses
import platform
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from keyreel.cli.bench_results import ALTERNATIVES, STAGES, Bench, Row, measured, summed
from keyreel.config import BenchConfig, EncodeConfig, Sampling, SelectConfig
from keyreel.decode.sampling import NoFrames
from keyreel.decode.source import Source
from keyreel.engine import Engine
from keyreel.errors import Failure, MissingExtra
from keyreel.runtime.stopwatch import Stopwatch
from keyreel.types import FrameBatch, Progress
from keyreel_kernels.cpu_search import usable_cores


def bench(
    engine: Engine,
    videos: Sequence[Source],
    *,
    sampling: Sampling | None = None,
    encode: EncodeConfig | None = None,
    select: SelectConfig | None = None,
    config: BenchConfig | None = None,
    progress: Progress | None = None,
    tell: Callable[[Failure], None] = lambda failure: None,
) -> Bench:
    """Measures how fast videos are summarised, without writing anything.

    Args:
        videos: read anew in each run; they stay open and belong to the caller.
        progress: called as progress("measuring", done, total), in measurements.
        tell: called with each video that fails, at once; the others go on.
    """
    config, own = config or BenchConfig(), _Videos(engine, sampling or Sampling(), encode, select)
    began = time.perf_counter()
    engine.warmup()
    rows: dict[int, list[Row]] = {number: [] for number in range(len(videos))}
    failed: list[Failure] = []
    warmup_seconds = peak = 0.0
    for run in range(config.runs + 1):
        for number in list(rows):
            source = videos[number]
            try:
                if run:
                    rows[number].append(own.measure(source, config.held_frames))
                else:
                    own.pipeline(source, own.sampling)
            except MissingExtra:
                raise  # it would be missing for every video
            except Exception as error:  # noqa: BLE001 - one video must not take the others with it
                del rows[number]
                failed.append(Failure.of(source.name, error))
                tell(failed[-1])
            if progress is not None:
                progress("measuring", run * len(videos) + number + 1.0, (config.runs + 1.0) * len(videos))
        if run == 0:
            warmup_seconds = time.perf_counter() - began
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sums = [summed(run_rows) for run_rows in zip(*rows.values(), strict=True)]
    return Bench(
        model=engine.bundle.name,
        model_sha256=engine.bundle.sha256,
        device=engine.backend.device,
        device_reason=engine.backend.reason,
        machine=f"{platform.machine()}, {platform.platform()}",
        cores=usable_cores(),
        config=own.config(),
        runs=config.runs,
        warmup_seconds=warmup_seconds,
        peak_memory_bytes=int(peak),
        videos=tuple(measured(videos[number].name, of_one) for number, of_one in rows.items()),
        total=measured("all", sums) if sums else None,
        failed=tuple(failed),
    )


class _Videos:
    """Measures one video at a time."""

    def __init__(
        self, engine: Engine, sampling: Sampling, encode: EncodeConfig | None, select: SelectConfig | None
    ) -> None:
        self.sampling, self.encode, self.select = sampling, encode or EncodeConfig(), select or SelectConfig()
        self._engine, self._arrays = engine, engine.backend.ops.arrays

    def config(self) -> dict[str, Any]:
        """The options that are in force."""
        sampling, encode, select = (dataclasses.asdict(part) for part in (self.sampling, self.encode, self.select))
        return {"sampling": sampling, "encode": encode, "select": select}

    def measure(self, source: Source, held_frames: int) -> Row:
        """All that is measured of one video, once."""
        row = self.pipeline(source, self.sampling) | self._alone(source, held_frames)
        for mode in ALTERNATIVES:
            if mode == "keyframes" != self.sampling.mode or (mode == "near" and self.sampling.mode == "fps"):
                with suppress(NoFrames):
                    found = self.pipeline(source, dataclasses.replace(self.sampling, mode=mode, times=()))
                    row |= {f"{mode} {name}": found[name] for name in ("frames", "seconds", "cpu")}
        return row

    def pipeline(self, source: Source, sampling: Sampling) -> Row:
        """The whole job, its stages overlapping."""
        source.forget()
        watch, whole, down = Stopwatch(), Stopwatch(), self._arrays.bytes_to_host
        with whole("pipeline"):
            summary = self._engine.summarize(
                source, sampling=sampling, encode=self.encode, select=self.select, watch=watch
            )
        busy = {stage: summary.timings_seconds[stage] for stage in STAGES}
        return {
            "video": summary.shots[-1].stop_seconds - sampling.start_seconds,
            "frames": len(summary.embedding),
            "bytes": self._arrays.bytes_to_host - down,
            "seconds": whole.seconds["pipeline"],
            "cpu": whole.cpu_seconds["pipeline"],
            **{f"busy {stage}": seconds for stage, seconds in busy.items()},
            # The decoder has come to its end by then: nothing is beside it.
            "alone select": watch.seconds["select"],
            "cpu select": watch.cpu_seconds["select"],
        }

    def _alone(self, source: Source, held_frames: int) -> Row:
        """Decoding without a consumer; encoding what was decoded."""
        source.forget()
        engine, image, size = self._engine, self._engine.bundle.image, self.encode.batch_size
        watch = Stopwatch(settle=self._arrays.synchronize)
        held: list[FrameBatch] = []
        frames = kept = 0
        with (
            watch("decode"),
            engine.backend.running(),
            engine.frames(source, self.sampling, transform=image, batch_size=size) as stream,
        ):
            for batch in stream:
                frames += len(batch)
                if kept < held_frames:
                    held.append(batch)
                    kept += len(batch)
        engine.encode_frames(held, self.encode, watch=watch)
        row = {"read": float(stream.packets_read), "fed": float(stream.packets_fed)}
        for stage in ("decode", "encode", "fuse"):
            scale = 1.0 if stage == "decode" else frames / kept
            row |= {f"alone {stage}": watch.seconds[stage] * scale, f"cpu {stage}": watch.cpu_seconds[stage] * scale}
        return row
