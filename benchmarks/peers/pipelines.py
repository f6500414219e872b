"""From a video to one vector for each second of it: the plain way, and keyreel."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Vectors = Callable[[], Any]  # () -> [T, D] float32, unit length


def naive(path: Path, times: Sequence[float], model: str, folder: Path) -> Vectors:
    """PyAV, Pillow and open_clip in fp32, one picture at a time: what its README shows, in a loop."""
    import torch
    from PIL import Image

    from benchmarks.peers.decoders import _shown
    from keyreel_export import pretrained
    from keyreel_export.torchvision_cpu import import_open_clip

    import_open_clip()
    from open_clip.transform import PreprocessCfg, image_transform_v2

    torch.manual_seed(0)  # what the bundle's weights were drawn with
    clip = pretrained.load_model(pretrained.resolve(model, random_weights=True))
    preprocess = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)

    def vector(picture: Image.Image) -> Any:
        with torch.no_grad():
            return clip.encode_image(preprocess(picture)[None], normalize=True)[0].numpy()

    def run() -> Any:
        import av

        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            return np.stack([vector(frame.to_image()) for frame in _shown(container.decode(video=0), times)])

    return run


def summary(path: Path, times: Sequence[float], model: str, folder: Path) -> Callable[[], Any]:
    """An Engine's whole summary: vectors, key-frames, shots."""
    from keyreel import Engine, Sampling

    engine = Engine.from_pretrained(folder, device="cpu")
    return lambda: engine.summarize(path, sampling=Sampling(mode="times", times=tuple(times)))


def keyreel(
    path: Path, times: Sequence[float], model: str, folder: Path, *, runtime: str | None = None, **sampling: Any
) -> Vectors:
    """An Engine's embed_video; `sampling` takes the place of the times where it is given."""
    from keyreel import Engine, Sampling

    if runtime is not None:
        os.environ["KEYREEL_CPU_RUNTIME"] = runtime
    engine = Engine.from_pretrained(folder, device="cpu")
    wanted = Sampling(**(sampling or {"mode": "times", "times": tuple(times)}))
    return lambda: engine.embed_video(path, sampling=wanted).vectors
