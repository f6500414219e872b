"""Runs a bundle's graphs on the CPU, and compares the results with references.

The references are in float32, also for graphs in half precision.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from keyreel.errors import ModelError, import_extra
from keyreel.runtime.plans import REFERENCE
from keyreel.types import U8

Feeds: TypeAlias = Mapping[str, NDArray[Any]]
Found: TypeAlias = tuple[NDArray[Any], ...]  # the outputs of a graph, in its order

BATCH_SIZES = (1, 3)
OUTPUTS = {
    "backbone": ("tokens",),
    "attention": ("attention",),
    "fusion": ("scene", "subject", "map"),
    "text": ("vectors",),
}
# A protobuf message has at most 2 GiB; larger weights go to a separate file, <name>.onnx.data.
LARGEST_INSIDE_BYTES = (1 << 31) - (64 << 20)

# The largest absolute difference: of tokens relative to their largest value, of maps relative to 1/P.
BOUNDS: Mapping[str, Mapping[str, float]] = {
    "fp32": {"backbone": 1e-4, "attention": 1e-3, "fusion": 1e-4, "identity": 1e-4, "text": 1e-5},
    "fp16": {"backbone": 3e-2, "attention": 5e-2, "fusion": 2e-2, "identity": 2e-2, "text": 2e-2},
}
MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999}  # of a vector and its reference


@dataclass(frozen=True, slots=True)
class Case:
    """A feed of a graph, and the expected results."""

    feeds: Feeds
    expected: Found


def sample_frames(height: int, width: int, *, count: int, seed: int) -> U8:
    """Makes [count, H, W, 3] uint8: alternately smooth shapes and white noise.

    The shapes have the power spectrum of photographs (amplitude ~ 1/frequency: Field, J. Opt. Soc. Am. A 4, 1987).
    """
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0 / max(height, width)
    frames = np.empty((count, height, width, 3), np.uint8)
    for index in range(count):
        noise = random.standard_normal((height, width, 3))
        if index % 2 == 0:
            noise = np.fft.irfft2(np.fft.rfft2(noise, axes=(0, 1)) / frequency[..., None], (height, width), axes=(0, 1))
        noise = noise / noise.std(axis=(0, 1))
        frames[index] = np.clip(128 + 55 * noise, 0, 255).astype(np.uint8)
    return frames


def run_graph(path: Path, feeds: list[Feeds], precision: str) -> list[Found]:
    """Runs an ONNX graph on the CPU.

    Raises:
        ModelError: onnxruntime cannot run the graph.
    """
    if precision == "fp16":
        return _run_in_process(path, feeds)
    runtime = import_extra("onnxruntime", extra="cpu", purpose="checking a model")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return [tuple(session.run(None, dict(feed))) for feed in feeds]
    except Exception as error:
        raise ModelError(f"onnxruntime cannot run {path.name}: {error}") from error


def run_chain(folder: Path, frames: list[Feeds], attention_input: str, precision: str) -> list[Found]:
    """Runs frames, as stills, through backbone, attention and fusion: scene, subject and map for each feed."""
    tokens = run_graph(folder / "backbone.onnx", frames, precision)
    seen: list[Feeds] = frames if attention_input == "frames" else [{"tokens": own} for (own,) in tokens]
    maps = run_graph(folder / "attention.onnx", seen, precision)
    fused: list[Feeds] = [
        {"tokens": own, "attention": attention, "change": np.zeros_like(attention)}
        for (own,), (attention,) in zip(tokens, maps, strict=True)
    ]
    return run_graph(folder / "fusion.onnx", fused, precision)


def _run_in_process(path: Path, feeds: list[Feeds]) -> list[Found]:
    runner = Path(__file__).with_name("half_runner.py")
    with tempfile.TemporaryDirectory() as folder:
        given, got = Path(folder) / "feeds.npz", Path(folder) / "out.npz"
        arrays = {f"{index}.{name}": array for index, feed in enumerate(feeds) for name, array in feed.items()}
        np.savez(given, allow_pickle=False, **arrays)
        # Without -P, tokenizers.py in this folder would hide the package tokenizers.
        command = [sys.executable, "-P", str(runner), str(path), str(given), str(got)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:] or [f"signal {-done.returncode}"]
            raise ModelError(f"onnxruntime cannot run {path.name}: {last[0]}")
        with np.load(got, allow_pickle=False) as file:
            count = len(file.files) // len(feeds)
            return [tuple(file[f"{index}.{number}"] for number in range(count)) for index in range(len(feeds))]


def write_reference(folder: Path, cases: Mapping[str, tuple[Case, Sequence[str]]]) -> None:
    """Stores the references for TensorRT plans in half precision: a case and the output names of each graph."""
    arrays = {
        f"{graph}.{name}": array
        for graph, (case, outputs) in cases.items()
        for name, array in {**case.feeds, **dict(zip(outputs, case.expected, strict=True))}.items()
    }
    np.savez(folder / REFERENCE, allow_pickle=False, **arrays)


def check(graph: str, found: list[Found], expected: list[Found], precision: str) -> dict[str, float]:
    """Compares a graph's results with the expected ones, case by case. "identity" is the scene of the whole chain.

    Returns:
        "<graph>_difference" and, for unit vectors, "<graph>_cosine".

    Raises:
        ModelError: a result differs from its reference.
    """
    pairs = [pair for own, wanted in zip(found, expected, strict=True) for pair in zip(own, wanted, strict=True)]
    for a, b in pairs:
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ModelError(f"the graph {graph} gives {a.dtype} {a.shape}, expected {b.dtype} {b.shape}")
    difference = float(np.max([np.abs(a - b).max() for a, b in pairs]))  # NaN stays NaN
    if graph == "backbone":
        difference /= max(float(np.abs(b).max()) for _, b in pairs)
    elif graph == "attention":
        difference *= expected[0][0].shape[1]
    measured = {f"{graph}_difference": difference}
    bound = BOUNDS[precision][graph]
    if not difference <= bound:  # refuses NaN too
        message = f"{graph}_difference {difference:.3g}, allowed <= {bound}"
        raise ModelError(f"a graph differs from its reference: {message}")
    if graph not in ("backbone", "attention"):
        # A map is not a unit vector: divide by its length.
        cosines = [(a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1)) for a, b in pairs]
        cosine = measured[f"{graph}_cosine"] = float(np.min([cosine.min() for cosine in cosines]))
        if not cosine >= MIN_COSINE[precision]:
            message = f"{graph}_cosine {cosine:.6f}, allowed >= {MIN_COSINE[precision]}"
            raise ModelError(f"a graph differs from its reference: {message}")
    return measured
