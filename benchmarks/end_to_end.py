"""From a file to one vector a second, beside PyAV + Pillow + open_clip one picture at a time.

`cosine` is the least between the vector of a frame and the one of the plain way for the same time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks._common import Row, System, compare, parser_of, run
from benchmarks.clips import Clip, clip
from benchmarks.decode import KEYFRAMES, NEAR, reference, times_of
from benchmarks.encode import bundle, models

PLAIN = "pyav + PIL + open_clip"
SUMMARY = "keyreel summary"


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


def check(expected: Any, vectors: Any) -> dict[str, float]:
    same = {} if expected is None else {"cosine": float((vectors * expected).sum(1).min())}
    return {"frames": len(vectors), **same}


def figures(found: Any) -> dict[str, float]:
    """`select_seconds` is wall time, as the summary itself says."""
    return {"keyframes": len(found.keyframes), "select_seconds": found.timings_seconds["select"]}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    (model,) = models(quick=options.quick)[:1]
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


if __name__ == "__main__":
    raise SystemExit(run(parser_of(__doc__), measure))
