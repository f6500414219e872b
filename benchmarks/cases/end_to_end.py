"""From a file to one vector a second: PyAV + Pillow + open_clip one picture at a time, and keyreel.

`cosine` is the least between the vector of a frame and the one that the plain way gives for the same time. Systems in
int8 run the bundle that `keyreel export --precision int8` makes, the others the one that it makes by default.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases.decode import NEAR_SECONDS, params_of, path_of, reference, times_of
from benchmarks.cases.encode import folder_of
from benchmarks.content import Clip
from benchmarks.measure import Folders, Measurement, Params, Prepare
from benchmarks.peers import pipelines
from benchmarks.worker import cpu_seconds

NAIVE = "pyav + PIL + open_clip"
SUMMARY = "keyreel summary"
_MODEL = "ViT-B-32"
_OTHER_FRAMES = ("near", "keyframes")


def clips(*, quick: bool) -> list[Clip]:
    return [Clip("h264", 60, 360, 4)] if quick else [Clip("h264", gop, 1080, 30) for gop in (250, 60)]


def measurements(quick: bool, folders: Folders) -> list[Measurement]:
    return [
        Measurement(
            "end_to_end",
            {**params_of(one), "model": _MODEL},
            tuple(SYSTEMS),
            runs=3,
            seconds=2 if quick else 40,
        )
        for one in clips(quick=quick)
    ]


def _vectors(params: Params, folders: Folders) -> Path:
    return folders.content / f"vectors-{params['model']}-{path_of(params, folders).name}.npy"


def ready(params: Params, folders: Folders) -> None:
    if not _vectors(params, folders).exists():
        np.save(_vectors(params, folders), _system(pipelines.naive)(params, folders)())


def _system(make: Callable[..., pipelines.Vectors], *, precision: str = "fp32", **options: Any) -> Prepare:
    def prepare(params: Params, folders: Folders) -> Callable[[], Any]:
        path = path_of(params, folders)
        times = times_of(params, reference(path, folders.content)["seconds"])
        return make(path, times, params["model"], folder_of(params["model"], folders, precision=precision), **options)

    return prepare


_NEAR = {"mode": "near", "fps": 1.0, "tolerance_seconds": NEAR_SECONDS}
SYSTEMS: dict[str, Prepare] = {
    NAIVE: _system(pipelines.naive),
    "keyreel onnxruntime": _system(pipelines.keyreel, runtime="onnxruntime"),
    "keyreel": _system(pipelines.keyreel),
    "keyreel near": _system(pipelines.keyreel, **_NEAR),
    "keyreel keyframes": _system(pipelines.keyreel, mode="keyframes"),
    "keyreel int8": _system(pipelines.keyreel, precision="int8"),
    "keyreel int8 keyframes": _system(pipelines.keyreel, precision="int8", mode="keyframes"),
    SUMMARY: _system(pipelines.summary),
}


def check(system: str, params: Params, folders: Folders, result: Any) -> dict[str, float]:
    if system == SUMMARY:
        return {"keyframes": len(result.keyframes), "select_seconds": _select_seconds(result)}
    if system.endswith(_OTHER_FRAMES):
        return {"frames": len(result)}
    expected = np.load(_vectors(params, folders))
    return {"frames": len(result), "cosine": float((result * expected).sum(1).min())}


def _select_seconds(summary: Any) -> float:
    """CPU-seconds of choosing the key-frames, with their number, alone; median of five."""
    from keyreel import SelectConfig
    from keyreel.select import select_keyframes
    from keyreel_kernels import ops_for

    seconds = []
    for _ in range(5):
        began = cpu_seconds()
        duration = summary.shots[-1].stop_seconds
        select_keyframes(summary.embedding, SelectConfig(), ops_for("cpu"), duration_seconds=duration)
        seconds.append(cpu_seconds() - began)
    return float(np.median(seconds))
