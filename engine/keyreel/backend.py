"""The one place where the device is decided, and the checks that decide it.

An explicit device never falls back. `auto` falls back once, when an engine is made, and the reason stands in every
result. This version computes on the CPU; the CUDA checks say how far a GPU of this machine could be used.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import av
import numpy as np

from keyreel.bundle import Bundle, cache_root
from keyreel.errors import BackendUnavailable, KeyreelError, MissingExtra
from keyreel.session import OnnxRuntimeSession, Session
from keyreel_kernels import Ops, ops_for


@dataclass(frozen=True, slots=True)
class Probe:
    """The outcome of one check."""

    name: str
    passed: bool
    found: str  # what was seen
    fix: str | None = None  # what to do where it matters that it failed
    required: bool = True  # whether keyreel works without it


@dataclass(frozen=True, slots=True)
class Backend:
    """A device, why it was taken, and what runs on it."""

    device: str  # "cpu"
    reason: str
    ops: Ops
    open_session: Callable[[Path], Session]


def resolve(device: str = "auto", *, threads: int | None = None) -> Backend:
    """Decides where to compute.

    Args:
        device: "auto", "cpu" or "cuda:N".
        threads: threads inside one operator; KEYREEL_THREADS, else what the runtime finds.

    Raises:
        ValueError: not the name of a device.
        BackendUnavailable: the device that was asked for does not work.
    """
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdigit())):
        raise ValueError(f"unknown device {device!r}, allowed: auto, cpu, cuda, cuda:N")
    count = _threads() if threads is None else threads

    def backend(reason: str) -> Backend:
        return Backend("cpu", reason, ops_for("cpu"), lambda path: OnnxRuntimeSession(path, threads=count))

    if kind == "cpu":
        return backend("asked for")
    driver = probe_cuda_driver()
    if kind == "cuda":
        raise BackendUnavailable(
            f"{device} was asked for: {driver.found}; this version of keyreel computes on the CPU",
            probe=driver.name,
            hint="use device='cpu' or 'auto' (--device cpu)",
        )
    return backend(f"auto: {driver.found}; this version of keyreel computes on the CPU")


def _threads() -> int:
    text = os.environ.get("KEYREEL_THREADS", "0")
    if not text.isdigit():
        raise ValueError(f"KEYREEL_THREADS must be a whole number, got {text!r}")
    return int(text)


def probe_cuda_driver() -> Probe:
    """Whether the CUDA driver loads, starts and sees a device."""
    name = "cuda driver"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Probe(name, False, "no CUDA driver (libcuda.so.1 cannot be loaded)", required=False)
    status = int(driver.cuInit(0))
    if status:
        return Probe(name, False, f"the CUDA driver does not start (cuInit gives {status})", required=False)
    count = ctypes.c_int(0)
    if driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return Probe(name, False, "the CUDA driver sees no device", required=False)
    return Probe(name, True, f"{count.value} CUDA device(s)", required=False)


def probe_runtime() -> Probe:
    """Whether onnxruntime is there, once, and really runs the built-in model."""
    name = "onnxruntime"
    wheels = []
    for wheel in ("onnxruntime", "onnxruntime-gpu"):
        try:
            wheels.append(f"{wheel} {metadata.version(wheel)}")
        except metadata.PackageNotFoundError:
            continue
    if len(wheels) > 1:
        fix = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'keyreel[cpu]'"
        return Probe(name, False, f"{' and '.join(wheels)} overwrite each other's files", fix)
    try:
        bundle = Bundle.find("builtin")
        session = OnnxRuntimeSession(bundle.file("text.onnx"))
        session.run({"token_ids": np.zeros((1, bundle.context_length), np.int64)})
        session.close()
    except MissingExtra:
        return Probe(name, False, "not installed", "pip install 'keyreel[cpu]'")
    except KeyreelError as error:
        return Probe(name, False, str(error), error.hint)
    return Probe(name, True, f"{' '.join(wheels) or 'onnxruntime'} runs on CPUExecutionProvider")


def probe_codec(name: str, mode: str, *, required: bool) -> Probe:
    """Whether PyAV's FFmpeg has a codec. mode: "r" decodes, "w" encodes."""
    label = f"{'decode' if mode == 'r' else 'encode'} {name}"
    try:
        codec = av.Codec(name, "r" if mode == "r" else "w")
    except ValueError:  # PyAV's UnknownCodecError is one
        return Probe(label, False, f"PyAV {av.__version__} has no {name}", "pip install --force-reinstall av", required)
    return Probe(label, True, f"{codec.name} ({codec.long_name})", required=required)


def probe_cache() -> Probe:
    """Whether exported models can be kept."""
    root = cache_root()
    first = next((folder for folder in (root, *root.parents) if folder.exists()), Path("/"))
    writable = os.access(first, os.W_OK)
    fix = None if writable else "set KEYREEL_CACHE to a folder that you may write"
    return Probe("cache folder", writable, f"{root}{'' if writable else ' cannot be written'}", fix, required=False)


def probes() -> tuple[Probe, ...]:
    """Every check, in the order in which `keyreel doctor` prints them."""
    return (
        Probe("python", True, f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"),
        probe_runtime(),
        *(probe_codec(name, "r", required=name == "h264") for name in ("h264", "hevc", "vp9", "av1")),
        *(probe_codec(name, "w", required=False) for name in ("libx264", "aac")),
        probe_cache(),
        probe_cuda_driver(),
    )
