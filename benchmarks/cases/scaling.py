"""How cost grows: with the length of the video, the frames sampled, the number of videos, the number of clusters.

The built-in model on 360p clips, so that no part hides the others; `of` names what grows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.content import Clip, clip
from benchmarks.measure import Folders, Measurement, Params, Prepare
from benchmarks.peers import clusterers

_SECONDS = 30
_GROWS = {
    "length": [{"seconds": seconds, "fps": 1.0, "videos": 1} for seconds in (30, 120, 480, 960)],
    "rate": [{"seconds": 120, "fps": fps, "videos": 1} for fps in (0.25, 1.0, 4.0, 8.0)],
    "videos": [{"seconds": 30, "fps": 1.0, "videos": videos} for videos in (1, 4, 8)],
}
_CLUSTERS = (8, 32, 128)


def _grows(quick: bool) -> list[dict[str, Any]]:
    found = [{"of": name, **one} for name, some in _GROWS.items() for one in (some[:1] if quick else some)]
    return [{**one, "seconds": 4} for one in found] if quick else found


def clips(*, quick: bool) -> list[Clip]:
    return sorted({_clip(one) for one in _grows(quick)}, key=lambda one: one.repeats)


def _clip(params: Params) -> Clip:
    """A short clip, its packets over and over."""
    repeats = max(params["seconds"] // _SECONDS, 1)
    return Clip("h264", 60, 360, min(params["seconds"], _SECONDS), repeats=repeats)


def measurements(quick: bool, folders: Folders) -> list[Measurement]:
    found = [Measurement("scaling", one, ("keyreel",), runs=2, seconds=8, rank=2) for one in _grows(quick)]
    for count in _CLUSTERS[:1] if quick else _CLUSTERS:
        params = {"of": "clusters", "clusters": count, "frames": 300 if quick else 3_000}
        found.append(Measurement("scaling", params, tuple(SYSTEMS), runs=3, seconds=6, rank=2))
    return found


def ready(params: Params, folders: Folders) -> None:
    if params["of"] != "clusters":
        clip(folders.content, _clip(params))


def _keyreel(params: Params, folders: Folders) -> Callable[[], Any]:
    if params["of"] == "clusters":
        return clusterers.keyreel(_vectors(params), params["clusters"])
    from keyreel import Engine, Sampling

    engine = Engine.from_pretrained(device="cpu")
    path = clip(folders.content, _clip(params))
    sampling = Sampling(fps=params["fps"])
    return lambda: [engine.embed_video(path, sampling=sampling).vectors for _ in range(params["videos"])]


def _vectors(params: Params) -> Any:
    from benchmarks.gpu_cases.clustering import problem

    return problem(1, params["frames"], clusters=params["clusters"]).x[0]


SYSTEMS: dict[str, Prepare] = {
    "keyreel": _keyreel,
    "scikit-learn n_init=1": lambda params, folders: clusterers.scikit_learn(
        _vectors(params), params["clusters"], n_init=1
    ),
}


def check(system: str, params: Params, folders: Folders, result: Any) -> dict[str, float]:
    return {} if params["of"] == "clusters" else {"frames": float(sum(map(len, result)))}
