"""What works on this machine: the checks that decide the device and that `keyreel doctor` prints."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import av
import numpy as np

from keyreel.decode.nvdec import pool_of
from keyreel.errors import KeyreelError, MissingExtra
from keyreel.runtime.bundle import Bundle, cache_root
from keyreel.runtime.openvino import image_precision, open_openvino
from keyreel.runtime.session_cuda import open_cuda_session
from keyreel.runtime.sessions import OnnxRuntimeSession, Session
from keyreel_kernels import Ops, ops_for

_GPU_EXTRA = "pip install 'keyreel[gpu]'"


@dataclass(frozen=True, slots=True)
class Probe:
    """The outcome of one check."""

    name: str
    passed: bool
    found: str  # what was seen
    fix: str | None = None  # what to do where it matters that it failed
    required: bool = True  # whether keyreel works without it


# --- the device, each check on top of the one before --------------------------------------------------------------


def probe_cuda(index: int) -> tuple[tuple[Probe, ...], Ops | None]:
    """Checks a CUDA device as far as it works: driver, device, CuPy, a kernel, an inference.

    Returns:
        the checks that were made, the last one is the one that failed if any did; and the operations on the device,
        None where a check failed.
    """
    found = [probe_cuda_driver(index)]
    ops: Ops | None = None
    if found[-1].passed:
        probe, ops = probe_cupy(index)
        found.append(probe)
    if ops is not None:
        found.append(probe_kernels(ops))
        if found[-1].passed:
            found.append(probe_session(ops))
    return tuple(found), ops if found[-1].passed else None


def probe_cuda_driver(index: int = 0) -> Probe:
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


def probe_cupy(index: int) -> tuple[Probe, Ops | None]:
    """Whether CuPy is there and an array goes up and comes back."""
    name = "cupy"
    try:
        ops = ops_for(f"cuda:{index}")
        there = ops.arrays.to_device(np.arange(5))
        if ops.arrays.to_host(there + there).tolist() != [0, 2, 4, 6, 8]:
            return Probe(name, False, "arrays come back from the device changed", required=False), None
    except ImportError as error:
        return Probe(name, False, f"CuPy cannot be imported: {error}", _GPU_EXTRA, required=False), None
    except Exception as error:  # noqa: BLE001  CuPy's own errors have no common public base
        found = f"CuPy does not work on the device: {type(error).__name__}: {error}"
        fix = f"{_GPU_EXTRA}; where the home folder cannot be written, set CUPY_CACHE_DIR"
        return Probe(name, False, found, fix, required=False), None
    return Probe(name, True, f"{ops.arrays!r}", required=False), ops


def probe_kernels(ops: Ops) -> Probe:
    """Whether a kernel of ours compiles and computes what NumPy does."""
    name = "cuda kernels"
    rows = np.random.default_rng(0).random((3, 512), np.float32)
    try:
        one, other = ops.arrays.to_device(rows), ops.arrays.to_device(rows[::-1].copy())
        got = ops.arrays.to_host(ops.histogram_distance(one, other))
    except Exception as error:  # noqa: BLE001  CuPy's own errors have no common public base
        found = f"kernels do not compile or start: {type(error).__name__}: {str(error)[:500]}"
        return Probe(name, False, found, "pip install 'cupy-cuda13x[ctk]'", required=False)
    if not np.allclose(got, ops_for("cpu").histogram_distance(rows, rows[::-1]), atol=1e-5):
        return Probe(name, False, "a kernel computes something else than NumPy", required=False)
    return Probe(name, True, "compiled by NVRTC, equal to NumPy", required=False)


def probe_session(ops: Ops) -> Probe:
    """Whether a graph really runs on the device."""
    name = "cuda inference"
    device: Any = ops.arrays
    try:
        bundle = Bundle.find("builtin")
        ids = ops.arrays.to_device(np.zeros((1, bundle.context_length), np.int64))
        with closing(open_cuda_session(bundle.file("text.onnx"), device, batch_size=1)) as session:
            norm = float(np.linalg.norm(ops.arrays.to_host(session.run({"token_ids": ids})["vectors"])))
    except Exception as error:  # noqa: BLE001  whatever it is, a cache that cannot be written too, `auto` falls back
        return Probe(name, False, str(error), getattr(error, "hint", None) or _GPU_EXTRA, required=False)
    if not 0.99 < norm < 1.01:
        return Probe(name, False, f"a unit vector came out with length {norm:.3f}", required=False)
    return Probe(name, True, f"{type(session).__name__} on {ops.arrays!r}", required=False)


# --- the rest of the machine ----------------------------------------------------------------------------------------


def probe_choice() -> tuple[Probe, str | None]:
    """Which runtime a CPU takes, and its name; None where it takes none."""
    from keyreel.runtime.backend import cpu_runtime  # which decides by the checks above

    name = "cpu runtime"
    try:
        runtime, said = cpu_runtime()
    except (ValueError, KeyreelError, MissingExtra) as error:
        found, _, fix = str(error).partition("Hint: ")
        return Probe(name, False, found.strip(), fix or "unset KEYREEL_CPU_RUNTIME, or set it to one of these"), None
    return Probe(name, True, said), runtime


def probe_openvino(*, required: bool = False) -> Probe:
    """Whether OpenVINO is there and really runs the built-in model; without it onnxruntime does."""
    name = "openvino"
    try:
        _run_text(open_openvino)
        found = f"openvino {metadata.version(name)} runs, images in {image_precision()}"
    except MissingExtra:
        return Probe(name, False, "not installed", "pip install 'keyreel[openvino]'", required)
    except KeyreelError as error:
        return Probe(name, False, error.args[0], error.hint, required)
    return Probe(name, True, found, required=required)


def _run_text(open_session: Callable[[Path], Session]) -> None:
    bundle = Bundle.find("builtin")
    with closing(open_session(bundle.file("text.onnx"))) as session:
        session.run({"token_ids": np.zeros((1, bundle.context_length), np.int64)})


def probe_runtime(*, required: bool) -> Probe:
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
        _run_text(OnnxRuntimeSession)
    except MissingExtra:
        return Probe(name, False, "not installed", "pip install 'keyreel[cpu]'", required)
    except KeyreelError as error:
        return Probe(name, False, error.args[0], error.hint, required)
    return Probe(name, True, f"{' '.join(wheels) or 'onnxruntime'} runs on CPUExecutionProvider", required=required)


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


def probe_nvdec(cuda: Any) -> Probe:
    """Whether the device's video decoder answers for H.264; without it videos are decoded on the CPU."""
    try:
        caps = pool_of(cuda).capabilities("h264", "420", 8)
    except KeyreelError as error:
        return Probe("nvdec", False, error.args[0], error.hint, required=False)
    found = f"H.264 up to {caps['width_max']} x {caps['height_max']}, {caps.get('num_decoder_engines', 'some')} engines"
    return Probe("nvdec", True, found, required=False)


def probes() -> tuple[Probe, ...]:
    """Every check, in the order in which `keyreel doctor` prints them."""
    on_device, ops = probe_cuda(0)
    choice, runtime = probe_choice()
    return (
        Probe("python", True, f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"),
        choice,
        probe_runtime(required=runtime != "openvino"),
        probe_openvino(required=runtime == "openvino"),
        *(probe_codec(name, "r", required=name == "h264") for name in ("h264", "hevc", "vp9", "av1")),
        *(probe_codec(name, "w", required=False) for name in ("libx264", "aac")),
        probe_cache(),
        *on_device,
        *([probe_nvdec(ops.arrays)] if ops is not None else []),
    )
