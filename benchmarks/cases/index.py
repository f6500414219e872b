"""Bringing videos into a library: thousands of tiny clips, and real ones, with the built-in model.

`keyreel summarize` makes the vectors and key-frames and keeps nothing: what `keyreel` takes beyond it is previews,
thumbnails and commits. `keyreel again` is a second run, which finds every video unchanged. `frames`, `hours`,
`library_mib` and `media_mib` are rows, length of video, and sizes of the library and of the videos. On Ray the videos
are indexed by two processes of a Ray that is started for the run; CPU-seconds are those of the driver alone.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import tiny
from benchmarks.measure import Folders, Measurement, Params, Prepare, Skipped

REAL = ("natural", "animation", "format", "broken")  # folders of real clips
SUMMARIZE, AGAIN, RAY = "keyreel summarize", "keyreel again", "keyreel on Ray, 2 workers"
_MOST_SECONDS = 3 * 3600.0


def measurements(quick: bool, folders: Folders) -> list[Measurement]:
    def one(params: Params, systems: Sequence[str], rank: int) -> Measurement:
        return Measurement("index", params, tuple(systems), runs=1, rank=rank, most_seconds=_MOST_SECONDS)

    if quick:
        return [one({"of": "tiny clips", "videos": 20}, [name for name in SYSTEMS if name != RAY], 0)]
    return [
        one({"of": "real clips"}, [name for name in SYSTEMS if name != RAY], 0),
        one({"of": "tiny clips", "videos": 1_000}, list(SYSTEMS), 1),
        one({"of": "tiny clips", "videos": 10_000}, ("keyreel", AGAIN), 2),
    ]


def videos(params: Params, folders: Folders) -> list[Path]:
    if "videos" in params:
        return tiny.clips(folders.content, params["videos"])
    if folders.media is None:
        raise Skipped("the folder of real clips is not here (--media)")
    return sorted(path for name in REAL for path in (folders.media / name).iterdir() if path.is_file())


def ready(params: Params, folders: Folders) -> None:
    videos(params, folders)


def _place(params: Params, folders: Folders, system: str, run: int = 0) -> Path:
    name = f"{params['of']} {params.get('videos', '')} {system} {run}"
    return folders.content / "libraries" / name.replace(" ", "-").replace(",", "")


def _summarize(params: Params, folders: Folders) -> Callable[[], Any]:
    from keyreel import Engine, KeyreelError

    engine, given = Engine.from_pretrained(), videos(params, folders)

    def run() -> None:
        for video in given:
            try:
                engine.summarize(video)
            except KeyreelError:
                continue  # some of the real clips are broken on purpose

    return run


def _fresh(system: str, make: Callable[[Path], Callable[[Sequence[Path]], Any]]) -> Prepare:
    """A library that was not there before, in each run another one."""

    def prepare(params: Params, folders: Folders) -> Callable[[], Any]:
        given, runs = videos(params, folders), itertools.count()

        def run() -> Path:
            place = _place(params, folders, system, next(runs))
            shutil.rmtree(place, ignore_errors=True)
            make(place)(given)
            return place

        return run

    return prepare


def _library(workers: int) -> Callable[[Path], Callable[[Sequence[Path]], Any]]:
    def make(place: Path) -> Callable[[Sequence[Path]], Any]:
        from keyreel import Engine, Library
        from keyreel.config import IndexConfig

        def add(given: Sequence[Path]) -> None:
            with Engine.from_pretrained() as engine, Library(place, engine) as library:
                library.add(given, IndexConfig(workers=workers))

        return add

    return make


def _ray(place: Path) -> Callable[[Sequence[Path]], Any]:
    import ray  # noqa: F401 - so that it counts as not installed where it is not

    from keyreel.cluster.ray import index
    from keyreel.config import IndexConfig

    return lambda given: index(given, place, IndexConfig(workers=2))


def _again(params: Params, folders: Folders) -> Callable[[], Any]:
    place, given = _place(params, folders, "keyreel"), videos(params, folders)
    if not place.is_dir():
        raise Skipped("there is no library of a first run")
    add = _library(1)(place)

    def run() -> Path:
        add(given)
        return place

    return run


SYSTEMS: dict[str, Prepare] = {
    SUMMARIZE: _summarize,
    "keyreel": _fresh("keyreel", _library(1)),
    "keyreel, 2 workers": _fresh("keyreel, 2 workers", _library(2)),
    RAY: _fresh(RAY, _ray),
    AGAIN: _again,
}


def check(system: str, params: Params, folders: Folders, result: Any) -> dict[str, float]:
    from keyreel import Library

    given = videos(params, folders)
    sizes = {"videos": float(len(given)), "media_mib": sum(path.stat().st_size for path in given) / 2**20}
    if result is None:
        return sizes
    with Library(result) as library:
        stats = library.stats()
    found = {"frames": float(stats.frames), "hours": stats.hours, "failed_videos": float(stats.failed)}
    return {**sizes, **found, "library_mib": _bytes(result) / 2**20}


def _bytes(folder: Path) -> int:
    return sum((Path(at) / name).stat().st_size for at, _, names in os.walk(folder) for name in names)
