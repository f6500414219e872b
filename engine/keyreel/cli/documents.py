"""The JSON documents that commands print with --json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from keyreel.library.types import Added, Change, Finding, Record, Status
from keyreel.render.documents import Count, FailedVideo, Seconds
from keyreel.runtime.backend import Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Summaries:
    """`keyreel summarize --json` of several videos."""

    schema: Literal["keyreel.summaries/1"] = "keyreel.summaries/1"
    summaries: Sequence[Mapping[str, Any]]  # as in summary.json
    failed: Sequence[FailedVideo]


@dataclass(frozen=True, slots=True)
class IndexedVideo:
    """The result of one video."""

    video: str
    change: Change | Literal["removed"]
    video_id: str | None
    frames: Count | None  # None with --ray
    duration_seconds: Seconds | None
    seconds: Seconds  # how long it took

    @classmethod
    def of(cls, added: Added) -> IndexedVideo:
        record = added.record
        id, frames, duration = (record.id, record.frames, record.duration_seconds) if record else (None, None, None)
        return cls(added.path, change_of(added), id, frames, duration, added.seconds)


def change_of(added: Added) -> Change | Literal["removed"]:
    """The change of a video; "removed" if it was missing and its record is deleted."""
    return "removed" if added.change == "missing" and added.record is None else added.change


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """`keyreel index --json`, and the same of `keyreel library update` and `reindex`."""

    schema: Literal["keyreel.index/1"] = "keyreel.index/1"
    library: str
    videos: Sequence[IndexedVideo]
    failed: Sequence[FailedVideo]  # also folders without a video
    seconds: Seconds


@dataclass(frozen=True, slots=True)
class PlannedVideo:
    """What `index` would do with a video."""

    video: str
    change: Change | Literal["removed"]
    why: str
    duration_seconds: Seconds | None  # of a video to decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`keyreel index --dry-run --json`."""

    schema: Literal["keyreel.plan/1"] = "keyreel.plan/1"
    library: str
    model: str
    model_installed: bool
    videos: Sequence[PlannedVideo]
    failed: Sequence[FailedVideo]


@dataclass(frozen=True, slots=True)
class Video:
    """A video of a library."""

    video: str
    video_id: str
    status: Status
    error: str | None
    tags: tuple[str, ...]
    date: float | None  # seconds since 1970
    duration_seconds: Seconds | None
    frames: Count
    shots: Count
    scenes: Count
    size: Count  # bytes
    indexed_at: Seconds  # since 1970
    probe: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Videos:
    """`keyreel library list --json` and `keyreel library remove --json`."""

    schema: Literal["keyreel.videos/1"] = "keyreel.videos/1"
    library: str
    videos: Sequence[Video]

    @classmethod
    def of(cls, library: str, records: Sequence[Record]) -> Videos:
        videos = [
            Video(
                video=record.path,
                video_id=record.id,
                status=record.status,
                error=record.error,
                tags=record.tags,
                date=record.date,
                duration_seconds=record.duration_seconds,
                frames=record.frames,
                shots=len(record.shots),
                scenes=len(record.scenes),
                size=record.size,
                indexed_at=record.indexed_at,
                probe=record.probe,
            )
            for record in records
        ]
        return cls(library=library, videos=videos)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """`keyreel library stats --json`."""

    schema: Literal["keyreel.library/1"] = "keyreel.library/1"
    library: str
    videos: Count
    failed: Count
    frames: Count
    hours: Seconds  # of video, in hours
    bytes: Count | None
    model: str
    model_sha256: str
    width: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """`keyreel library export --json`."""

    schema: Literal["keyreel.export/1"] = "keyreel.export/1"
    library: str
    file: str
    vectors: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify:
    """`keyreel library verify --json`."""

    schema: Literal["keyreel.verify/1"] = "keyreel.verify/1"
    library: str
    findings: Sequence[Finding]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compact:
    """`keyreel library compact --json`."""

    schema: Literal["keyreel.compact/1"] = "keyreel.compact/1"
    library: str
    bytes: int  # freed; negative if the library grew


@dataclass(frozen=True, slots=True, kw_only=True)
class Upgrade:
    """`keyreel library upgrade --json`."""

    schema: Literal["keyreel.upgrade/1"] = "keyreel.upgrade/1"
    library: str
    videos: Count  # converted


@dataclass(frozen=True, slots=True, kw_only=True)
class Reshard:
    """`keyreel library reshard --json`."""

    schema: Literal["keyreel.reshard/1"] = "keyreel.reshard/1"
    library: str
    shards: Count
    videos: Count  # moved


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is installed, or can be."""

    name: str
    installed: bool
    recommended: bool
    download_bytes: Count
    width: Count | None  # length of a vector
    frames_a_second: Seconds | None  # an estimate for this machine's CPU
    languages: str
    licence: str
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """`keyreel models list --json`."""

    schema: Literal["keyreel.models/1"] = "keyreel.models/1"
    models: Sequence[Model]


@dataclass(frozen=True, slots=True)
class ModelCheck:
    """A checked model."""

    name: str
    pictures: Count  # encoded
    texts: Count  # encoded
    length_difference: float  # the largest difference of a vector's length from 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChecks:
    """`keyreel models verify --json`."""

    schema: Literal["keyreel.model-checks/1"] = "keyreel.model-checks/1"
    models: Sequence[ModelCheck]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedModel:
    """`keyreel export --json`."""

    schema: Literal["keyreel.exported-model/1"] = "keyreel.exported-model/1"
    folder: str
    manifest: Mapping[str, Any]  # the content of manifest.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Doctor:
    """`keyreel doctor --json`."""

    schema: Literal["keyreel.doctor/1"] = "keyreel.doctor/1"
    version: str
    probes: Sequence[Probe]


@dataclass(frozen=True, slots=True)
class BenchVideo:
    """Medians over the runs."""

    video: str
    video_seconds: Seconds
    frames: Count  # sampled
    seconds: Seconds  # from opening the file to the last of its outputs
    cpu_seconds: Seconds  # of all cores
    times_real_time: Seconds  # seconds of video a second
    # decode, which runs beside encode and fuse; select; render, all outputs; reel, one of them
    stage_seconds: Mapping[str, Seconds]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """`keyreel bench --json`."""

    schema: Literal["keyreel.bench/3"] = "keyreel.bench/3"
    model: str
    model_sha256: str
    device: str
    device_reason: str
    machine: str
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    runs: Count
    warmup_seconds: Seconds  # the first run over all videos, not counted
    peak_memory_bytes: Count  # of the process
    videos: Sequence[BenchVideo]
    failed: Sequence[FailedVideo]
