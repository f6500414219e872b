"""What `keyreel bench` finds: runs brought together, and the document that tells of them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from keyreel.config import SamplingMode
from keyreel.errors import Failure, KeyreelError
from keyreel.render.documents import FailedVideo
from keyreel.render.sidecars import DRAFT, FAILED, Json, plain

BENCH = "keyreel.bench/1"
STAGES = ("decode", "encode", "fuse", "select")
ALTERNATIVES: tuple[SamplingMode, ...] = ("near", "keyframes")  # measured beside the sampling that was asked for

Row: TypeAlias = dict[str, float]  # one run of one video, or the sum over all videos


@dataclass(frozen=True, slots=True)
class Spread:
    """What the runs gave."""

    median: float
    p25: float
    p75: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, middle, high = (float(v) for v in np.percentile(values, [25, 50, 75]))
        return cls(middle, low, high)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the pipeline."""

    name: (
        str  # decode (read, decode, convert), encode (the image tower), fuse (up to vectors), select (key-frames, cuts)
    )
    busy_seconds: Spread  # at work inside the pipeline, beside the other stages
    busy_share: float  # of the pipeline's time; the shares of stages that overlap add up to more than 1
    alone_seconds: Spread  # with nothing beside it
    alone_cpu_seconds: Spread  # the same, of all cores together
    cpu_share: float  # of the stages' alone_cpu_seconds
    frames_per_second: float  # alone
    speed: float  # alone: seconds of video a second, or hours of video an hour


@dataclass(frozen=True, slots=True)
class Alternative:
    """The same pipeline with other frames."""

    sampling: str  # what `--sampling` takes
    frames: int
    seconds: Spread
    cpu_seconds: Spread
    times_as_fast: float  # medians compared


@dataclass(frozen=True, slots=True)
class Measured:
    """One video, or all of them one after the other."""

    video: str
    video_seconds: float
    frames: int  # sampled
    packets_read: int
    packets_fed: int  # to the decoder, for the sampled frames; `select` decodes some more around cuts
    seconds: Spread  # the pipeline, from opening the file to the summary
    cpu_seconds: Spread
    speed: Spread  # seconds of video a second, or hours of video an hour
    stages: tuple[Stage, ...]
    bound_by: str  # the stage that is at work most of the time; encode and fuse count together, the larger is named
    bound_share: float  # of the pipeline's time
    alternatives: tuple[Alternative, ...]
    bytes_to_host: int  # what left the device; 0 on a CPU


@dataclass(frozen=True, slots=True)
class Bench:
    """All that was measured."""

    model: str
    model_sha256: str
    device: str
    device_reason: str
    machine: str
    cores: int  # that this process may use
    config: dict[str, Any]
    runs: int
    warmup_seconds: float  # not part of any other figure: opening, compiling, and one run over all videos
    peak_memory_bytes: int  # of the whole process after that run, before frames were held to be measured with
    videos: tuple[Measured, ...]
    total: Measured | None  # None where every video failed
    failed: tuple[Failure, ...]

    def document(self) -> Json:
        """As `keyreel bench --json` prints it, `keyreel.bench/1`."""
        document = plain(dataclasses.asdict(dataclasses.replace(self, failed=())))
        return {"schema": BENCH, **document, "failed": [plain(FailedVideo.of(failure)) for failure in self.failed]}


def summed(rows: Sequence[Row]) -> Row:
    """The sums over several videos of what all of them have."""
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: sum(row[name] for row in rows) for name in shared}


def measured(name: str, rows: Sequence[Row]) -> Measured:
    """The runs of one video, or of all videos, brought together."""

    def spread(key: str) -> Spread:
        return Spread.of([row[key] for row in rows])

    last, seconds, frames = rows[-1], spread("seconds"), rows[-1]["frames"]
    cpu = sum(spread(f"cpu {stage}").median for stage in STAGES)
    stages = {}
    for stage in STAGES:
        busy, alone, own = spread(f"busy {stage}"), spread(f"alone {stage}"), spread(f"cpu {stage}")
        stages[stage] = Stage(
            name=stage,
            busy_seconds=busy,
            busy_share=busy.median / seconds.median,
            alone_seconds=alone,
            alone_cpu_seconds=own,
            cpu_share=own.median / cpu,
            frames_per_second=frames / alone.median,
            speed=last["video"] / alone.median,
        )
    # Encoding and fusing take turns in one thread, and either of them may be the larger part.
    share = {stage: found.busy_share for stage, found in stages.items()}
    turns = max(("encode", "fuse"), key=share.__getitem__)
    lines = {"decode": share["decode"], turns: share["encode"] + share["fuse"], "select": share["select"]}
    bound = max(lines, key=lines.__getitem__)
    return Measured(
        video=name,
        video_seconds=last["video"],
        frames=int(frames),
        packets_read=int(last["read"]),
        packets_fed=int(last["fed"]),
        seconds=seconds,
        cpu_seconds=spread("cpu"),
        speed=Spread.of([row["video"] / row["seconds"] for row in rows]),
        stages=tuple(stages.values()),
        bound_by=bound,
        bound_share=lines[bound],
        alternatives=tuple(
            Alternative(
                sampling=mode,
                frames=int(last[f"{mode} frames"]),
                seconds=(other := spread(f"{mode} seconds")),
                cpu_seconds=spread(f"{mode} cpu"),
                times_as_fast=seconds.median / other.median,
            )
            for mode in ALTERNATIVES
            if all(f"{mode} seconds" in row for row in rows)
        ),
        bytes_to_host=int(last["bytes"]),
    )


def bench_schema() -> Json:
    """JSON Schema (draft 2020-12) of what `keyreel bench --json` prints, made from the fields of `Bench`."""
    whole = _schema_of(Bench)
    whole["properties"] = {"schema": {"const": BENCH}, **whole["properties"], "failed": FAILED}
    return {"$schema": DRAFT, "title": BENCH, **whole, "required": list(whole["properties"])}


def _schema_of(kind: Any) -> Json:
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        properties = {field.name: _schema_of(hints[field.name]) for field in dataclasses.fields(kind)}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    if typing.get_origin(kind) is tuple:
        return {"type": "array", "items": _schema_of(typing.get_args(kind)[0])}
    if typing.get_origin(kind) is types.UnionType:
        return {"anyOf": [_schema_of(part) for part in typing.get_args(kind)]}
    if typing.get_origin(kind) is dict or kind is KeyreelError:
        return {"type": "object"}
    numbers = {float: "number", int: "integer"}
    if kind in numbers:
        return {"type": numbers[kind], "minimum": 0}
    return {"type": {str: "string", types.NoneType: "null"}[kind]}
