"""What the commands of a library print with --json, and the JSON Schemas of it."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence

from keyreel.errors import Failure
from keyreel.library.types import Added, Change, Finding, LibraryStats, Record, Status
from keyreel.render.documents import FailedVideo
from keyreel.render.sidecars import COUNT, DRAFT, FAILED, SECONDS, TEXT, TEXT_OR_NULL, Json, list_of, object_of, plain

INDEX, VIDEOS, STATS, VERIFY, COMPACT = (
    f"keyreel.{name}/1" for name in ("index", "videos", "library", "verify", "compact")
)
SECONDS_OR_NULL: Json = {"type": ["number", "null"], "minimum": 0}
DATE_OR_NULL: Json = {"type": ["number", "null"]}
COUNT_OR_NULL: Json = {"type": ["integer", "null"], "minimum": 0}


def change_of(added: Added) -> str:
    """What became of a video: as the library says, but "removed" where what was missing is no longer recorded."""
    return "removed" if added.change == "missing" and added.record is None else added.change


def index_document(library: str, found: Sequence[Added], failed: Sequence[Failure], seconds: float) -> Json:
    """What `keyreel index` and `keyreel library update` did, `keyreel.index/1`.

    Args:
        failed: with what is no video at all, such as a folder without any.
    """
    videos = [
        {
            "video": added.path,
            "change": change_of(added),
            "video_id": added.record.id if added.record else None,
            "frames": added.record.frames if added.record else None,
            "duration_seconds": added.record.duration_seconds if added.record else None,
            "seconds": added.seconds,
        }
        for added in found
    ]
    whole = {"schema": INDEX, "library": library, "videos": videos, "seconds": seconds}
    return whole | {"failed": [plain(FailedVideo.of(failure)) for failure in failed]}


def index_schema() -> Json:
    """JSON Schema (draft 2020-12) of `keyreel index --json`; the number of frames is not known of what Ray indexed."""
    video = {"video": TEXT, "change": {"enum": [*typing.get_args(Change), "removed"]}, "video_id": TEXT_OR_NULL}
    video |= {"frames": COUNT_OR_NULL, "duration_seconds": SECONDS_OR_NULL, "seconds": SECONDS}
    return _schema(INDEX, {"library": TEXT, "videos": list_of(object_of(video)), "seconds": SECONDS, "failed": FAILED})


def videos_document(library: str, records: Sequence[Record]) -> Json:
    """The videos of a library, `keyreel.videos/1`."""
    videos = [
        {
            "video": record.path,
            "video_id": record.id,
            "status": record.status,
            "error": record.error,
            "tags": list(record.tags),
            "date": record.date,
            "duration_seconds": record.duration_seconds,
            "frames": record.frames,
            "shots": len(record.shots),
            "size": record.size,
            "indexed_at": record.indexed_at,
            "probe": plain(record.probe),
        }
        for record in records
    ]
    return {"schema": VIDEOS, "library": library, "videos": videos}


def videos_schema() -> Json:
    """JSON Schema of `keyreel library list --json` and `remove --json`; dates are seconds since 1970."""
    video = {"video": TEXT, "video_id": TEXT, "status": {"enum": list(typing.get_args(Status))}, "error": TEXT_OR_NULL}
    video |= {"tags": list_of(TEXT), "date": DATE_OR_NULL, "duration_seconds": SECONDS_OR_NULL, "frames": COUNT}
    video |= {"shots": COUNT, "size": COUNT, "indexed_at": SECONDS, "probe": {"type": "object"}}
    return _schema(VIDEOS, {"library": TEXT, "videos": list_of(object_of(video))})


def stats_document(library: str, stats: LibraryStats) -> Json:
    """The sizes of a library, `keyreel.library/1`."""
    return {"schema": STATS, "library": library, **dataclasses.asdict(stats)}


def stats_schema() -> Json:
    """JSON Schema of `keyreel library stats --json`."""
    numbers = dict.fromkeys(("videos", "failed", "frames", "width"), COUNT)
    properties = {"library": TEXT, **numbers, "hours": SECONDS, "bytes": COUNT_OR_NULL}
    return _schema(STATS, properties | {"model": TEXT, "model_sha256": TEXT})


def verify_document(library: str, findings: Sequence[Finding]) -> Json:
    """What is wrong with a library, `keyreel.verify/1`."""
    found = [{**dataclasses.asdict(finding), "videos": list(finding.videos)} for finding in findings]
    return {"schema": VERIFY, "library": library, "findings": found}


def verify_schema() -> Json:
    """JSON Schema of `keyreel library verify --json`."""
    finding = {"kind": TEXT, "what": TEXT, "videos": list_of(TEXT), "repaired": {"type": "boolean"}}
    return _schema(VERIFY, {"library": TEXT, "findings": list_of(object_of(finding))})


def compact_document(library: str, given_back: int) -> Json:
    """What `compact` gave back, `keyreel.compact/1`."""
    return {"schema": COMPACT, "library": library, "bytes": given_back}


def compact_schema() -> Json:
    """JSON Schema of `keyreel library compact --json`; negative where putting together took more than it gave."""
    return _schema(COMPACT, {"library": TEXT, "bytes": {"type": "integer"}})


def _schema(name: str, properties: Json) -> Json:
    return {"$schema": DRAFT, "title": name, **object_of({"schema": {"const": name}, **properties})}
