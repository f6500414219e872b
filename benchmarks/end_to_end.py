"""From a file to one vector a second, beside PyAV + Pillow + open_clip one picture at a time; and memory by length.

    python -m benchmarks.end_to_end [--quick] [-o FILE]

`cosine` is the least between the vector of a frame and the one of the plain way for the same time. Case "memory": peak
memory of a whole job with the built-in model (decode, encode, select, render), in a process of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks._common import Absent, Row, System, compare, parser_of, rows_of, run
from benchmarks.clips import Clip, clip
from benchmarks.decode import KEYFRAMES, NEAR, reference, times_of
from benchmarks.encode import BUILTIN, bundle

PLAIN = "pyav + PIL + open_clip"
SUMMARY = "keyreel summary"
_LONG = "long/long_1080p_lowbitrate.mp4"


def keyreel(path: Path, model: str, content: Path, sampling: Row, precision: str = "fp32") -> peers.Run:
    """An Engine's vectors."""
    from keyreel import Engine, Sampling

    engine = Engine.from_pretrained(bundle(model, content, precision=precision), device="cpu")
    return lambda: engine.embed_video(path, sampling=Sampling(**sampling)).vectors


def summary(path: Path, model: str, content: Path, sampling: Row) -> peers.Run:
    """An Engine's whole summary: vectors, key-frames, shots."""
    from keyreel import Engine, Sampling

    engine = Engine.from_pretrained(bundle(model, content), device="cpu")
    return lambda: engine.summarize(path, sampling=Sampling(**sampling))


def whole_job(path: Path, stop_seconds: float | None) -> peers.Run:
    """What `keyreel summarize` does."""
    make = summary(path, BUILTIN, Path(), {"stop_seconds": stop_seconds})

    def job() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            found = make()
            found.save(Path(folder) / "out")
        return found

    return job


def check(expected: Any, vectors: Any) -> dict[str, float]:
    same = {} if expected is None else {"cosine": float((vectors * expected).sum(1).min())}
    return {"frames": len(vectors), **same}


def figures(found: Any) -> dict[str, float]:
    """`select_seconds` is wall time, as the summary itself says."""
    seconds = found.shots[-1].stop_seconds
    own = {"keyframes": len(found.keyframes), "select_seconds": found.timings_seconds["select"]}
    return {**own, "video_seconds": seconds}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    model = BUILTIN if options.quick else "ViT-B-32"
    clips = [Clip("h264", 60, 360, 4)] if options.quick else [Clip("h264", gop, 1080, 30) for gop in (250, 60)]
    for wanted in clips:
        path = clip(options.content, wanted)
        times = times_of(reference(path, options.content))
        about, exact = (path, model, options.content), {"mode": "times", "times": tuple(times)}
        expected = None if options.quick else peers.plain(path, times, model)()
        systems = [
            System("keyreel", partial(keyreel, *about, exact), partial(check, expected)),
            System("keyreel near", partial(keyreel, *about, NEAR), partial(check, None)),
            System("keyreel keyframes", partial(keyreel, *about, KEYFRAMES), partial(check, None)),
            System(SUMMARY, partial(summary, *about, exact), figures),
        ]
        if not options.quick:
            systems += [
                System(PLAIN, partial(peers.plain, path, times, model), partial(check, expected)),
                System("keyreel int8", partial(keyreel, *about, exact, "int8"), partial(check, expected)),
            ]
        params = {**wanted.params(), "model": model}
        yield from compare("end_to_end", params, systems, runs=3, seconds=40, limit_seconds=1200)
    long = options.media / _LONG
    for seconds in (30.0,) if options.quick else (30.0, None):
        params = {"clip": _LONG, "seconds": seconds}
        if long.exists():
            yield from compare(
                "memory", params, [System("keyreel", partial(whole_job, long, seconds), figures)], runs=1
            )
        else:
            yield from rows_of("memory", params, "keyreel", Absent(f"{_LONG} is not in --media"))


if __name__ == "__main__":
    raise SystemExit(run(parser_of(__doc__), measure))
