"""Matrix products in 8 bits: for CPUs, where a transformer's image tower then takes half the time or less.

Weights are quantised once, a scale for each column; activations on the way, a scale for each product and batch: nothing
has to be calibrated, and a vector hangs a little on its neighbours in the batch. Convolutions stay in float32: in 8
bits, quantised on the way, onnxruntime took 1.1 to 6 times as long for RN50 and MobileCLIP2-S0. So do attention, fusion
and text, where next to no time is spent.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keyreel.config import ImageTransform, Sampling
from keyreel.decode.cpu import FrameStream
from keyreel.decode.source import Source
from keyreel.errors import ModelError, SourceError, import_extra
from keyreel.types import U8
from keyreel_export import verify
from keyreel_export.onnx import LARGEST_INSIDE_BYTES, contained

# Least cosine between a vector and the one in float32: two frames that are more alike than this are one picture to the
# selection of key-frames (`similarity_limit`), and a frame must be one picture with itself.
FLOOR = 0.97
FRAMES = 16


def pictures(image: ImageTransform, video: Path | None, seed: int) -> U8:
    """What the quantised tower is measured on: [N, H, W, 3] uint8.

    Args:
        image: what the tower takes.
        video: frames of this one, evenly spread; by default shapes with the power spectrum of photographs.
        seed: of the shapes.

    Raises:
        SourceError: the video cannot be decoded, or does not say how long it is.
    """
    if video is None:  # each other one is white noise, which no video shows
        return verify.sample_frames(image.height, image.width, count=2 * FRAMES, seed=seed)[::2]
    with Source(video) as source:
        seconds = source.probe().duration_seconds
        if seconds is None:
            raise SourceError(f"{source.name}: its length is not known", hint="copy it into an .mp4 or .mkv file")
        sampling = Sampling("times", times=tuple(seconds * (np.arange(FRAMES) + 0.5) / FRAMES))
        with FrameStream(source, sampling, transform=image) as stream:
            return np.concatenate([batch.data for batch in stream])


def quantize_backbone(folder: Path, frames: U8, patches: int) -> dict[str, float]:
    """Puts matrix products by constants of a bundle's float32 backbone into 8 bits.

    The weights get 7 of the 8 bits: without VNNI, CPUs add pairs of products in 16 bits, which would overflow, and the
    numbers in the manifest must hold there too.

    Args:
        folder: holds backbone.onnx, which is replaced, and fusion.onnx.
        frames: [N, H, W, 3] uint8, measured on in one batch, as activations share a scale with all that is in a batch.
        patches: P.

    Returns:
        "int8_cosine", the least one between a vector and the one in float32, "int8_cosine_mean" and "int8_frames".

    Raises:
        MissingExtra: onnx or onnxruntime is not installed.
        ModelError: there is nothing to quantise, it cannot be done, or a cosine is below FLOOR.
    """
    onnx = import_extra("onnx", extra="export", purpose="quantising a model")
    import_extra("onnxruntime", extra="cpu", purpose="quantising a model")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = folder / "backbone.onnx"
    files = list(folder.glob(f"{source.name}*"))  # weights may lie beside the graph
    expected = vectors(folder, frames, patches)
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        made = Path(aside) / source.name
        try:
            with contained():
                quantize_dynamic(
                    str(source),
                    str(made),
                    op_types_to_quantize=["MatMul", "Gemm"],
                    per_channel=True,
                    reduce_range=True,
                    weight_type=QuantType.QInt8,
                    use_external_data_format=sum(file.stat().st_size for file in files) > LARGEST_INSIDE_BYTES,
                )
        except Exception as error:
            raise ModelError(f"onnxruntime cannot quantise {source.name}: {error}") from error
        graph = onnx.load(str(made), load_external_data=False).graph
        if not any(node.op_type == "MatMulInteger" for node in graph.node):
            hint = "export it with --precision fp32; OpenVINO runs it in bf16 where the CPU can"
            raise ModelError("the image tower has no matrix product to quantise, only convolutions", hint=hint)
        for file in files:
            file.unlink()
        for file in Path(aside).iterdir():
            file.rename(folder / file.name)
    return agreement(vectors(folder, frames, patches), expected)


def vectors(folder: Path, frames: U8, patches: int) -> NDArray[np.float32]:
    """Frames through a bundle's backbone and fusion, with stock pooling: [N, D]."""
    (tokens,) = verify.run_graph(folder / "backbone.onnx", [{"frames": frames}], "fp32")
    feeds: verify.Feeds = {
        "tokens": tokens,
        "attention": np.full((len(tokens), patches), 1.0 / patches, np.float32),
        "strength": np.zeros((), np.float32),
    }
    found: NDArray[np.float32] = verify.run_graph(folder / "fusion.onnx", [feeds], "fp32")[0]
    return found


def agreement(found: NDArray[np.float32], expected: NDArray[np.float32]) -> dict[str, float]:
    """The cosines between vectors and those of float32, see `quantize_backbone`.

    Raises:
        ModelError: one is below FLOOR.
    """
    cosines = (found * expected).sum(axis=1)
    least = float(cosines.min())
    # Written so that a NaN, which compares false, is refused.
    if not least >= FLOOR:
        hint = "export it with --precision fp32, or measure on frames of your own with --verify-video"
        raise ModelError(f"in 8 bits vectors differ: cosine {least:.4f}, allowed >= {FLOOR}", hint=hint)
    return {"int8_cosine": least, "int8_cosine_mean": float(cosines.mean()), "int8_frames": float(len(cosines))}
