"""Quantises matrix products to 8 bits, which halves the time of a transformer's image tower on CPUs, or better.

Weights are quantised once, with a scale per column; activations at run time, with a scale per product and batch. So
there is no calibration, and a vector depends slightly on the rest of its batch. Convolutions stay in float32, since
onnxruntime took 1.1 to 6 times as long in 8 bits for RN50 and MobileCLIP2-S0; so do the other, small graphs.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import numpy as np

from keyreel.config import ImageTransform, Sampling
from keyreel.decode.source import Source
from keyreel.decode.stream import FrameStream
from keyreel.errors import ModelError, SourceError, import_extra
from keyreel.models import verify
from keyreel.types import U8

# Least cosine of a vector with the one in float32. Frames with a higher cosine count as one picture
# (`similarity_limit`), as a frame must with itself.
MIN_COSINE = 0.97
FRAMES = 16


def pictures(image: ImageTransform, video: Path | None, seed: int) -> U8:
    """Frames to measure the quantised tower on, [N, H, W, 3] uint8.

    They are evenly spread over a video, or by default shapes with the power spectrum of photographs.

    Raises:
        SourceError: the length of the video is unknown.
    """
    if video is None:  # every other frame is white noise, which no video shows
        return verify.sample_frames(image.height, image.width, count=2 * FRAMES, seed=seed)[::2]
    with Source(video) as source:
        seconds = source.probe().duration_seconds
        if seconds is None:
            raise SourceError(f"{source.name}: its length is unknown", hint="copy it into an .mp4 or .mkv file")
        sampling = Sampling("times", times=tuple(seconds * (np.arange(FRAMES) + 0.5) / FRAMES))
        with FrameStream(source, sampling, transform=image) as stream:
            return np.concatenate([batch.data for batch in stream])


def quantize_backbone(folder: Path, frames: U8, attention_input: str) -> dict[str, float]:
    """Quantises the products with constant matrices in a bundle's float32 backbone.

    Weights use 7 of the 8 bits: CPUs without VNNI add pairs of products in 16 bits, which would overflow.

    Args:
        folder: has the image graphs; it replaces backbone.onnx.
        frames: [N, H, W, 3] uint8, one batch, to measure on with stock pooling.
        attention_input: "frames" or "tokens".

    Returns:
        "int8_cosine", the lowest cosine of a vector with the one in float32, "int8_cosine_mean" and "int8_frames".

    Raises:
        ModelError: the backbone has no such products, or its vectors differ too much.
    """
    onnx = import_extra("onnx", extra="int8", purpose="quantising a model")
    import_extra("onnxruntime", extra="cpu", purpose="quantising a model")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = folder / "backbone.onnx"
    files = list(folder.glob(f"{source.name}*"))  # weights may lie beside the graph
    feeds: list[verify.Feeds] = [{"frames": frames}]
    ((expected, _, _),) = verify.run_chain(folder, feeds, attention_input, "fp32")
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        made = Path(aside) / source.name
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                quantize_dynamic(
                    str(source),
                    str(made),
                    op_types_to_quantize=["MatMul", "Gemm"],
                    per_channel=True,
                    reduce_range=True,
                    weight_type=QuantType.QInt8,
                    use_external_data_format=sum(file.stat().st_size for file in files) > verify.LARGEST_INSIDE_BYTES,
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
    ((found, _, _),) = verify.run_chain(folder, feeds, attention_input, "fp32")
    cosines = (found * expected).sum(axis=1)
    lowest = float(cosines.min())
    if not lowest >= MIN_COSINE:  # refuses NaN too
        hint = "export it with --precision fp32, or measure on your own frames with --verify-video"
        raise ModelError(f"in 8 bits vectors differ: cosine {lowest:.4f}, allowed >= {MIN_COSINE}", hint=hint)
    return {"int8_cosine": lowest, "int8_cosine_mean": float(cosines.mean()), "int8_frames": float(len(cosines))}
