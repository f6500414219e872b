"""The one place where the device is decided, and what runs on it.

An explicit device never falls back. `auto` falls back once, when an engine is made, and the reason stands in every
result. The checks that decide are in probes.py; `keyreel doctor` prints them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from keyreel.config import ImageTransform, Sampling
from keyreel.decode.cpu import FrameStream
from keyreel.decode.nvdec import open_stream, pool_of
from keyreel.decode.source import Source
from keyreel.decode.stream import Stream
from keyreel.errors import BackendUnavailable, MissingExtra, OutOfMemory
from keyreel.runtime.doctor import probe_cuda
from keyreel.runtime.openvino import image_precision, open_openvino
from keyreel.runtime.session_cuda import open_cuda_session
from keyreel.runtime.sessions import OnnxRuntimeSession, Session, import_runtime
from keyreel_kernels import Ops, ops_for

# Frames in one inference. A GPU is idle with fewer. On a CPU 16 cost up to 20 % less time each than one alone, and 8 or
# 32 what 16 cost within the noise, on both runtimes and for each tower tried: a measurement at the start would not pay.
CPU_BATCH, CUDA_BATCH = 16, 64


class OpenStream(Protocol):
    def __call__(
        self, source: Source, sampling: Sampling, *, transform: ImageTransform | None = None, batch_size: int = ...
    ) -> Stream: ...


@dataclass(frozen=True, slots=True)
class Backend:
    """A device, why it was taken, and what runs on it."""

    device: str  # "cpu", "cuda:0"
    reason: str
    ops: Ops
    open_session: Callable[[Path], Session]  # takes and gives arrays of `ops.arrays`
    open_stream: OpenStream  # gives batches whose data is on the device
    batch_size: int  # frames in one inference, where the caller does not say
    precisions: tuple[str, ...] = ("fp32", "fp16")  # of bundles that run here
    release: Callable[[], None] = lambda: None  # gives back what is kept for the next call

    @contextmanager
    def running(self) -> Iterator[None]:
        """Makes the device current in this thread, and says in our words when its memory is full."""
        try:
            with self.ops.arrays.scope():
                yield
        except MemoryError as error:  # CuPy's is one
            hint = "use smaller batches (--batch-size), or leave more of the device's memory free"
            raise OutOfMemory(f"{self.device}: the memory is full: {error}", hint=hint) from error


def resolve(device: str = "auto", *, threads: int | None = None, precision: str = "fp32") -> Backend:
    """Decides where to compute.

    On a CPU, OpenVINO runs the model where it is installed, else onnxruntime; where OpenVINO is there but broken, the
    reason says so. KEYREEL_CPU_RUNTIME names one of them, and then the other is never taken in its place.

    Args:
        device: "auto", "cpu", "cuda" (the first one) or "cuda:N".
        threads: threads inside one operator on a CPU; KEYREEL_THREADS, else what the runtime finds.
        precision: of the bundle that is to run: int8 is run by onnxruntime where both are there.

    Raises:
        ValueError: not the name of a device, or of a runtime.
        MissingExtra: no runtime is installed.
        BackendUnavailable: the device or the runtime that was asked for does not work; `probe` names the check that
            failed.
    """
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdigit())):
        raise ValueError(f"unknown device {device!r}, allowed: auto, cpu, cuda, cuda:N")
    count = _threads() if threads is None else threads
    if kind == "cpu":
        return _cpu("asked for", count, precision)
    found, ops = probe_cuda(int(index or 0))
    if ops is not None:
        return _cuda(ops, "asked for" if kind == "cuda" else f"auto: {found[-1].found}", strict=kind == "cuda")
    failed = found[-1]
    if kind == "cuda":
        hint = failed.fix or "use device='cpu' or 'auto' (--device cpu)"
        raise BackendUnavailable(f"{device} was asked for: {failed.found}", probe=failed.name, hint=hint)
    return _cpu(f"auto: {failed.found}", count, precision)


def _cpu(reason: str, threads: int, precision: str) -> Backend:
    runtime, said = cpu_runtime(precision)
    opens: dict[str, Callable[[Path], Session]] = {
        "openvino": lambda path: open_openvino(path, threads=threads),
        "onnxruntime": lambda path: OnnxRuntimeSession(path, threads=threads),
    }
    return Backend(
        device="cpu",
        reason=f"{reason}; inference by {said}",
        ops=ops_for("cpu"),
        open_session=opens[runtime],
        open_stream=FrameStream,
        batch_size=CPU_BATCH,
        precisions=("fp32", "int8"),  # onnxruntime's CPU provider crashes on some graphs in half precision
    )


def cpu_runtime(precision: str = "fp32") -> tuple[str, str]:
    """Which package runs graphs on the CPU: the one that is asked for, else the faster one of those that work.

    Returns:
        its name; and that with what it computes in, whether it was asked for, and what is wrong with a faster one.

    Raises:
        ValueError: KEYREEL_CPU_RUNTIME names no runtime.
        MissingExtra, BackendUnavailable: the one that is asked for, or each of them, is missing or broken.
    """
    extras = {"openvino": "openvino", "onnxruntime": "cpu"}
    chosen = os.environ.get("KEYREEL_CPU_RUNTIME", "auto")
    if chosen not in ("auto", *extras):
        raise ValueError(f"KEYREEL_CPU_RUNTIME must be auto, {' or '.join(extras)}, got {chosen!r}")
    # OpenVINO computes products of 8 bits that are quantised on the way in float32: ViT-B/32 took 2.6 times as long.
    order = list(extras) if precision != "int8" else list(reversed(extras))
    broken: list[BackendUnavailable] = []
    for name in order if chosen == "auto" else [chosen]:
        said = name if chosen == "auto" else f"{name}, as KEYREEL_CPU_RUNTIME says"
        try:
            if name == "openvino":
                said = said.replace(name, f"{name} in {image_precision()}", 1)
            else:
                import_runtime("cpu")
        except MissingExtra:
            if chosen != "auto":
                raise
        except BackendUnavailable as error:
            broken.append(error)
        else:
            return name, "; ".join([said, *(error.args[0] for error in broken)])
    if broken:
        raise broken[0]
    raise MissingExtra("onnxruntime", "cpu", "running a model on a CPU", others={"openvino": "openvino"})


def _cuda(ops: Ops, reason: str, *, strict: bool) -> Backend:
    cuda: Any = ops.arrays

    def release() -> None:
        pool_of(cuda).close()
        with cuda.scope():  # a pool keeps the blocks of each device apart
            cuda.pool.free_all_blocks()

    def stream(
        source: Source, sampling: Sampling, *, transform: ImageTransform | None = None, batch_size: int = CUDA_BATCH
    ) -> Stream:
        return open_stream(
            source, sampling, transform=transform, batch_size=batch_size, cuda=cuda, ops=ops, strict=strict
        )

    return Backend(
        device=ops.device,
        reason=reason,
        ops=ops,
        open_session=lambda path: open_cuda_session(path, cuda, batch_size=CUDA_BATCH),
        open_stream=stream,
        batch_size=CUDA_BATCH,
        release=release,
    )


def _threads() -> int:
    text = os.environ.get("KEYREEL_THREADS", "0")
    if not text.isdigit():
        raise ValueError(f"KEYREEL_THREADS must be a whole number, got {text!r}")
    return int(text)
