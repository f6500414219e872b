"""Decides, once, the device to use and the libraries that run on it.

An explicit device never falls back to another. `auto` falls back once, when an engine is made, and every result states
the reason. `keyreel doctor` prints the checks.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from keyreel.config import ImageTransform, Sampling
from keyreel.decode.aside import Aside
from keyreel.decode.nvdec import open_stream, pool_of
from keyreel.decode.source import Source
from keyreel.decode.stream import FrameStream, Stream
from keyreel.errors import BackendUnavailable, MissingExtra, OutOfMemory, pip_install
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.openvino import OpenVINOSession, image_precision
from keyreel.runtime.sessions import OnnxRuntimeCudaSession, OnnxRuntimeSession, Session, import_runtime
from keyreel.runtime.tensorrt import open_tensorrt
from keyreel.runtime.tensorrt_build import load_tensorrt
from keyreel_kernels import Ops, ops_for
from keyreel_kernels.cores import cpu_quota, usable_cores

if TYPE_CHECKING:
    from keyreel_kernels.cuda import Cuda

# Frames in one inference. A smaller batch leaves a GPU idle. On a CPU a frame took up to 20 % less time with 16 than
# with 1; 8 and 32 were like 16, with both runtimes and all tested towers.
CPU_BATCH, CUDA_BATCH = 16, 64


class OpenStream(Protocol):
    """Opens a stream of decoded batches, see `decode.stream`."""

    def __call__(
        self,
        source: Source,
        sampling: Sampling,
        *,
        transform: ImageTransform | None = None,
        batch_size: int = ...,
        aside: Aside | None = None,
    ) -> Stream: ...


@dataclass(frozen=True, slots=True)
class Backend:
    """A device, the reason for the choice, and what runs on it."""

    device: str  # "cpu", "cuda:0"
    reason: str
    ops: Ops
    open_session: Callable[[Path], Session]  # opens a graph; arrays are those of `ops.arrays`
    open_stream: OpenStream  # opens a stream of batches on the device
    batch_size: int  # default frames in one inference
    precisions: tuple[str, ...] = ("fp32", "fp16")  # of the models to run here
    release: Callable[[], None] = lambda: None  # frees cached memory

    @contextmanager
    def running(self) -> Iterator[None]:
        """Activates the device in this thread during the block. Raises OutOfMemory if its memory is full."""
        try:
            with self.ops.arrays.scope():
                yield
        except MemoryError as error:  # CuPy's error is one
            hint = "use smaller batches (--batch-size), or free memory on the device"
            raise OutOfMemory(f"{self.device}: the memory is full: {error}", hint=hint) from error


def resolve(device: str = "auto", *, threads: int | None = None, precision: str = "fp32") -> Backend:
    """Chooses the device, and opens it.

    Args:
        device: "auto", "cpu", "cuda" (the first GPU) or "cuda:N".
        threads: threads inside one operator on a CPU; by default KEYREEL_THREADS, else what the container's quota
            allows, else the runtime's choice.
        precision: of the model to run, see `cpu_runtime`.

    Raises:
        ValueError: an unknown device or runtime.
        MissingExtra: no runtime is installed.
        BackendUnavailable: the requested device or runtime does not work; `probe` names the failed check.
    """
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdigit())):
        raise ValueError(f"unknown device {device!r}, allowed: auto, cpu, cuda, cuda:N")
    count = _threads() if threads is None else threads
    if kind == "cpu":
        return _cpu("asked for", count, precision)
    found, ops = probe_cuda(int(index or 0))
    last = found[-1]
    if ops is not None:
        return _cuda(ops, "asked for" if kind == "cuda" else f"auto: {last.found}", strict=kind == "cuda")
    if kind == "cuda":
        hint = last.fix or "use device='cpu' or 'auto' (--device cpu)"
        raise BackendUnavailable(f"{device} was asked for: {last.found}", probe=last.name, hint=hint)
    return _cpu(f"auto: {last.found}", count, precision)


def _threads() -> int:
    """Runtimes count the machine's cores, not a container's share of their time: one that is used up stops them all."""
    text = os.environ.get("KEYREEL_THREADS", "")
    if text and not text.isdigit():
        raise ValueError(f"KEYREEL_THREADS must be a whole number, got {text!r}")
    return int(text) if text else usable_cores() if math.isfinite(cpu_quota()) else 0


def _cpu(reason: str, threads: int, precision: str) -> Backend:
    runtime, description = cpu_runtime(precision)
    opens: dict[str, Callable[[Path], Session]] = {
        "openvino": lambda path: OpenVINOSession(path, threads=threads),
        "onnxruntime": lambda path: OnnxRuntimeSession(path, threads=threads),
    }
    return Backend(
        device="cpu",
        reason=f"{reason}; inference by {description}",
        ops=ops_for("cpu"),
        open_session=opens[runtime],
        open_stream=FrameStream,
        batch_size=CPU_BATCH,
        precisions=("fp32", "int8"),  # onnxruntime's CPU provider crashes on some graphs in half precision
    )


def cpu_runtime(precision: str = "fp32") -> tuple[str, str]:
    """Chooses the package that runs graphs on the CPU: that of KEYREEL_CPU_RUNTIME, else the fastest that works.

    Returns:
        Its name, and a description: precision, who chose it, and why not a faster one.

    Raises:
        ValueError: KEYREEL_CPU_RUNTIME is not a runtime.
        MissingExtra, BackendUnavailable: the chosen runtime, or every one, is missing or broken.
    """
    chosen = os.environ.get("KEYREEL_CPU_RUNTIME", "auto")
    order = ["openvino", "onnxruntime"]
    if chosen not in ("auto", *order):
        raise ValueError(f"KEYREEL_CPU_RUNTIME must be auto, {' or '.join(order)}, got {chosen!r}")
    if precision == "int8":  # OpenVINO runs these products in float32, which took ViT-B/32 2.6 times as long
        order.reverse()
    broken: list[BackendUnavailable] = []
    for name in order if chosen == "auto" else [chosen]:
        try:
            description = _described(name)
        except MissingExtra:
            if chosen != "auto":
                raise
        except BackendUnavailable as error:
            broken.append(error)
        else:
            asked = "" if chosen == "auto" else ", as KEYREEL_CPU_RUNTIME says"
            return name, "; ".join([description + asked, *(error.args[0] for error in broken)])
    if broken:
        raise broken[0]
    raise MissingExtra("onnxruntime", "cpu", "running a model on a CPU", others={"openvino": "openvino"})


def _described(runtime: str) -> str:
    if runtime == "openvino":
        return f"openvino in {image_precision()}"
    import_runtime("cpu")
    return runtime


def _cuda(ops: Ops, reason: str, *, strict: bool) -> Backend:
    cuda: Any = ops.arrays

    def release() -> None:
        pool_of(cuda).close()
        with cuda.scope():  # CuPy's pool keeps the blocks of each device apart
            cuda.pool.free_all_blocks()

    return Backend(
        device=ops.device,
        reason=reason,
        ops=ops,
        open_session=lambda path: open_cuda_session(path, cuda, batch_size=CUDA_BATCH),
        open_stream=partial(open_stream, cuda=cuda, ops=ops, strict=strict),
        batch_size=CUDA_BATCH,
        release=release,
    )


def open_cuda_session(path: Path, cuda: Cuda, *, batch_size: int) -> Session:
    """Opens a graph with TensorRT if it is installed and supports the device, else with onnxruntime's CUDA provider."""
    try:
        supported = load_tensorrt().supports(cuda.capability)
    except MissingExtra:
        supported = False
    return open_tensorrt(path, cuda, batch_size=batch_size) if supported else OnnxRuntimeCudaSession(path, cuda)


# --- the checks of a CUDA device --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Probe:
    """The result of one check."""

    name: str
    passed: bool
    found: str
    fix: str | None = None
    required: bool = True  # whether keyreel needs it


def probe_cuda(index: int) -> tuple[tuple[Probe, ...], Ops | None]:
    """Checks a CUDA device step by step: driver, device, CuPy, a kernel, an inference.

    Returns:
        The checks up to the first failure, and the operations on the device, None after a failure.
    """
    found = [probe_driver(index)]
    ops: Ops | None = None
    if found[-1].passed:
        probe, ops = _probe_cupy(index)
        found.append(probe)
    if ops is not None:
        found.append(_probe_kernels(ops))
        if found[-1].passed:
            found.append(_probe_session(ops))
    return tuple(found), ops if found[-1].passed else None


def probe_driver(index: int = 0) -> Probe:
    """Whether the CUDA driver loads, starts and sees the device."""
    name = "cuda driver"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Probe(name, False, "no CUDA driver (libcuda.so.1 cannot be loaded)", required=False)
    status = int(driver.cuInit(0))
    if status:
        fix = "check `nvidia-smi`; in a container, start it with --gpus all"
        return Probe(name, False, f"the CUDA driver does not start (cuInit gives {status})", fix, required=False)
    count = ctypes.c_int(0)
    if driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return Probe(name, False, "the CUDA driver sees no device", "check CUDA_VISIBLE_DEVICES", required=False)
    if index >= count.value:
        return Probe(name, False, f"there is no device {index}, the driver sees {count.value}", required=False)
    return Probe(name, True, f"{count.value} CUDA device(s)", required=False)


def _probe_cupy(index: int) -> tuple[Probe, Ops | None]:
    name = "cupy"
    try:
        ops = ops_for(f"cuda:{index}")
        with ops.arrays.scope():
            array = ops.arrays.to_device(np.arange(5))
            right = ops.arrays.to_host(array + array).tolist() == [0, 2, 4, 6, 8]
        if not right:
            return Probe(name, False, "arrays change on the way to the device and back", required=False), None
    except ImportError as error:
        return Probe(name, False, f"CuPy cannot be imported: {error}", pip_install("gpu"), required=False), None
    except Exception as error:  # noqa: BLE001  CuPy's own errors have no common public base
        found = f"CuPy does not work on the device: {type(error).__name__}: {error}"
        fix = f"{pip_install('gpu')}; where the home folder cannot be written, set CUPY_CACHE_DIR"
        return Probe(name, False, found, fix, required=False), None
    return Probe(name, True, f"{ops.arrays!r}", required=False), ops


def _probe_kernels(ops: Ops) -> Probe:
    name = "cuda kernels"
    frames = np.random.default_rng(0).integers(0, 256, (2, 9, 8, 3), np.uint8)
    try:
        got = ops.arrays.to_host(ops.frame_signals(ops.arrays.to_device(frames))[0])
    except Exception as error:  # noqa: BLE001  CuPy's own errors have no common public base
        found = f"kernels do not compile or start: {type(error).__name__}: {str(error)[:500]}"
        return Probe(name, False, found, "pip install 'cupy-cuda13x[ctk]'", required=False)
    if not np.allclose(got, ops_for("cpu").frame_signals(frames)[0], atol=1e-5):
        return Probe(name, False, "a kernel's result differs from NumPy's", required=False)
    return Probe(name, True, "compiled by NVRTC, equal to NumPy", required=False)


def _probe_session(ops: Ops) -> Probe:
    name = "cuda inference"
    device: Any = ops.arrays
    try:
        bundle = Bundle.find("builtin")
        ids = ops.arrays.to_device(np.zeros((1, bundle.context_length), np.int64))
        opened = open_cuda_session(bundle.file("text.onnx"), device, batch_size=1)
        with closing(opened) as session, ops.arrays.scope():
            norm = float(np.linalg.norm(ops.arrays.to_host(session.run({"token_ids": ids})["vectors"])))
    except Exception as error:  # noqa: BLE001  whatever goes wrong, a cache that cannot be written too, `auto` falls back
        return Probe(name, False, str(error), getattr(error, "hint", None) or pip_install("gpu"), required=False)
    if not 0.99 < norm < 1.01:
        return Probe(name, False, f"a unit vector came out with length {norm:.3f}", required=False)
    return Probe(name, True, f"{type(session).__name__} on {ops.arrays!r}", required=False)
