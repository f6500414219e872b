"""The whole way on a device: what the CPU finds, and nothing but the summary leaves the device.

On a machine without a GPU the device is emulated: the same kernels, arrays that refuse to become NumPy's.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cuda_streams
import numpy as np
import pytest
from bounds import FLOAT32_SUM
from cuda_on_host import HostedCupy
from hosted_session import HostedSession
from test_nvdec import host_module

import keyreel
from benchmarks.gpu import Copied
from keyreel.config import EncodeConfig, Sampling, SelectConfig
from keyreel.decode import nvdec_pool
from keyreel.decode.nvdec import pool_of
from keyreel.decode.source import Source
from keyreel.decode.stream import FrameStream
from keyreel.errors import BackendUnavailable, MissingExtra
from keyreel.runtime import backend
from keyreel.runtime.backend import Backend, open_cuda_session
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.sessions import OnnxRuntimeSession
from keyreel.types import FrameBatch
from keyreel_kernels.cuda import Cuda
from keyreel_kernels.ops import ops_on

pytestmark = pytest.mark.full

CLIP = "natural/bikes.mp4"


class Uploaded:
    """Decoded on the CPU, handed on as a device would: the pictures are the same on both sides."""

    def __init__(self, stream: FrameStream, cuda: Cuda) -> None:
        self._stream, self._cuda = stream, cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> Uploaded:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[FrameBatch]:
        return self

    def __next__(self) -> FrameBatch:
        batch = next(self._stream)
        return FrameBatch(self._cuda.to_device(batch.data), batch.pts_seconds, batch.frame_index)


def opener(cuda: Cuda) -> Callable[[Path], Any]:
    """Opens graphs for the device; where no runtime for CUDA is installed, the CPU runs them, with copies."""
    if isinstance(cuda.cupy, HostedCupy):
        return HostedSession
    opens = partial(open_cuda_session, cuda=cuda, batch_size=16)
    try:
        opens(Bundle.find("builtin").file("text.onnx")).close()
    except (BackendUnavailable, MissingExtra):
        return lambda path: Copied(OnnxRuntimeSession(path, threads=0), cuda)
    return opens


def backend_on(cuda: Cuda, batch_size: int = 16) -> Backend:
    def stream(source: Source, sampling: Sampling, *, aside: Any = None, **how: Any) -> Any:
        return Uploaded(FrameStream(source, sampling, **how), cuda)

    return Backend("cuda:0", "test", ops_on(cuda), opener(cuda), stream, batch_size)


@pytest.fixture(scope="module")
def engine(cuda: Cuda) -> Iterator[keyreel.Engine]:
    with keyreel.Engine(Bundle.find("builtin"), backend_on(cuda)) as made:
        yield made


@pytest.fixture(scope="module")
def reference() -> Iterator[keyreel.Engine]:
    with keyreel.Engine.from_pretrained(device="cpu", threads=1) as made:
        yield made


@pytest.mark.parametrize("shift", ["off", "fixed", "adaptive"])
def test_a_summary_is_that_of_the_cpu(
    engine: keyreel.Engine, reference: keyreel.Engine, media: Callable[[str], Path], shift: Any
) -> None:
    config = {"encode": EncodeConfig(shift=shift, batch_size=16)}
    got, want = (one.summarize(media(CLIP), **config) for one in (engine, reference))
    for name in ("scene", "subject", "attention"):
        one, other = (getattr(summary.embedding, name) for summary in (got, want))
        np.testing.assert_allclose(one, other, atol=FLOAT32_SUM, err_msg=name)
    assert [frame.frame_index for frame in got.keyframes] == [frame.frame_index for frame in want.keyframes]
    assert got.shots == want.shots
    assert got.device == "cuda:0"
    for one, other in zip(got.search("a bicycle", k=3), want.search("a bicycle", k=3), strict=True):
        assert (one.start_seconds, one.stop_seconds) == (other.start_seconds, other.stop_seconds)
        assert one.score == pytest.approx(other.score, abs=1e-5)


def test_nothing_but_the_summary_leaves_the_device(
    engine: keyreel.Engine, media: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda: Any = engine.backend.ops.arrays
    left: list[tuple[tuple[int, ...], int]] = []
    down = Cuda.to_host

    def noted(self: Cuda, array: Any) -> Any:
        found = down(self, array)
        if not isinstance(array, np.ndarray):
            left.append((found.shape, found.nbytes))
        return found

    monkeypatch.setattr(Cuda, "to_host", noted)
    before = cuda.bytes_to_host
    summary = engine.summarize(media(CLIP), select=SelectConfig(max_keyframes=8))
    assert sum(size for _, size in left) == cuda.bytes_to_host - before > 0
    count, width = summary.embedding.vectors.shape
    patches = summary.embedding.attention.shape[1]
    summary_itself = {(count, width), (count, patches), (count, 5)}
    assert summary_itself <= {shape for shape, _ in left}
    # The rest: numbers of one frame or one cluster, and the luma of small frames for the second look at cuts.
    for shape, size in left:
        if shape not in summary_itself:
            small = shape[1:] == (72, 128)
            assert small or size <= 8 * max(count, 8 * width), shape
    looks = sum(size for shape, size in left if shape[1:] == (72, 128))
    pictures = count * 224 * 224 * 3  # as most models look at; the built-in one's own are smaller than a summary
    assert cuda.bytes_to_host - before - looks < pictures / 10
    # No more than the frames of the file between the first and the last sample, once for each of two candidates.
    assert looks <= 2 * 72 * 128 * int(summary.embedding.frame_index[-1] + 1)


def test_from_packets_to_summary(
    cuda: Cuda, reference: keyreel.Engine, media: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend as it is made for a device, with NVDEC or its stub."""
    if isinstance(cuda.cupy, HostedCupy):
        module = host_module()
        monkeypatch.setattr(nvdec_pool, "import_module", lambda _: module)
    made = replace(backend._cuda(ops_on(cuda), "test", strict=True), open_session=opener(cuda))
    want = reference.summarize(media(CLIP))
    with keyreel.Engine(Bundle.find("builtin"), made) as engine:
        got = engine.summarize(media(CLIP))
        assert pool_of(cuda).idle > 0
    assert pool_of(cuda).idle == 0  # given back with the engine
    assert got.warnings == want.warnings
    np.testing.assert_array_equal(got.embedding.frame_index, want.embedding.frame_index)
    # The thumbnails are made of the same frames, on the device.
    assert list(got.thumbnails) == list(want.thumbnails) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    for time, picture in got.thumbnails.items():
        assert np.abs(picture.astype(int) - want.thumbnails[time]).mean() < 1.5, time
    # Our filter and swscale's differ by up to a few levels at edges.
    assert (got.embedding.vectors * want.embedding.vectors).sum(1).min() > 0.98
    assert len(got.keyframes) == len(want.keyframes)
    for one, other in zip(got.shots, want.shots, strict=True):
        assert one.start_seconds == pytest.approx(other.start_seconds, abs=0.05)


def vectors_on_a_stream(engine: keyreel.Engine, frames: Any) -> Any:
    """Vectors of frames that the caller's stream writes, read on that stream."""
    cuda: Any = engine.backend.ops.arrays
    with cuda.cupy.cuda.Device(cuda.index), cuda.cupy.cuda.Stream(non_blocking=True):
        there = engine.embed(cuda.cupy.asarray(frames))
        assert isinstance(there, cuda.cupy.ndarray)
        return (there + 0).get()


FRAMES = np.random.default_rng(0).integers(0, 256, (20, 40, 56, 3), dtype=np.uint8)


def test_frames_on_the_device_give_vectors_on_the_device(engine: keyreel.Engine, reference: keyreel.Engine) -> None:
    cuda: Any = engine.backend.ops.arrays
    want = reference.embed(FRAMES)
    # Resized by our kernel there and by NumPy here: a rounding apart, so one level of 255 in some pixels.
    assert (vectors_on_a_stream(engine, FRAMES) * want).sum(1).min() > 0.999
    with cuda.scope():
        assert (cuda.to_host(engine.embed(cuda.to_device(FRAMES))) * want).sum(1).min() > 0.999
    before = cuda.bytes_to_host
    assert isinstance(engine.embed(FRAMES), np.ndarray)
    assert cuda.bytes_to_host > before


def test_the_join_with_the_callers_stream_is_needed(engine: keyreel.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before. After it, `embed` has waited for the device."""
    cuda: Any = engine.backend.ops.arrays
    if not isinstance(cuda.cupy, HostedCupy):
        pytest.skip("a real device does not tell")
    monkeypatch.setattr(cuda, "join", lambda: None)
    with suppress(cuda_streams.Fault):
        vectors_on_a_stream(engine, FRAMES)
    gc.collect()
    found = [*cuda_streams.faults]
    cuda_streams.faults.clear()
    assert "does not wait for it" in found[0]


def test_warming_up_runs_everything_once(engine: keyreel.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: set[str] = set()
    launch = Cuda.launch
    monkeypatch.setattr(
        Cuda, "launch", lambda self, file, *a, **k: (launched.add(file), launch(self, file, *a, **k))[1]
    )
    engine.warmup()
    assert launched >= {"pictures.cu", "kmeans_seed.cu", "kmeans.cu"}
