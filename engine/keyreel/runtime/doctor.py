"""The checks of `keyreel doctor`: those that choose the device (`backend`), and others of the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np

from keyreel.decode.nvdec import pool_of
from keyreel.errors import KeyreelError, MissingExtra, pip_install
from keyreel.runtime.backend import Probe, cpu_runtime, probe_cuda
from keyreel.runtime.bundle import Bundle, cache_root
from keyreel.runtime.openvino import OpenVINOSession, image_precision
from keyreel.runtime.sessions import OnnxRuntimeSession, Session
from keyreel_kernels.cores import usable_cores

__all__ = ["Probe", "probe_codec", "probes"]


def probes() -> tuple[Probe, ...]:
    """Runs every check, in the order of `keyreel doctor`."""
    on_device, ops = probe_cuda(0)
    choice, runtime = _probe_choice()
    return (
        Probe("python", True, f"{platform.python_version()} on {platform.machine()}, {usable_cores()} cores"),
        choice,
        _probe_onnxruntime(required=runtime != "openvino"),
        _probe_openvino(required=runtime == "openvino"),
        *(probe_codec(name, "r", required=name == "h264") for name in ("h264", "hevc", "vp9", "av1")),
        *(probe_codec(name, "w", required=False) for name in ("libx264", "aac")),
        _probe_cache(),
        *on_device,
        *([_probe_nvdec(ops.arrays)] if ops is not None else []),
    )


def _probe_choice() -> tuple[Probe, str | None]:
    name = "cpu runtime"
    try:
        runtime, description = cpu_runtime()
    except (ValueError, KeyreelError, MissingExtra) as error:
        found, _, fix = str(error).partition("Hint: ")
        return Probe(name, False, found.strip(), fix or "unset KEYREEL_CPU_RUNTIME, or set it to one of these"), None
    return Probe(name, True, description), runtime


def _probe_onnxruntime(*, required: bool) -> Probe:
    name = "onnxruntime"
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    wheels = [f"{wheel} {installed[wheel]}" for wheel in (name, "onnxruntime-gpu") if wheel in installed]
    if len(wheels) > 1:
        fix = f"pip uninstall -y onnxruntime onnxruntime-gpu && {pip_install('cpu')}"
        return Probe(name, False, f"{' and '.join(wheels)} overwrite each other's files", fix)
    found = f"{' '.join(wheels) or name} runs on CPUExecutionProvider"
    return _probe_session(name, "cpu", OnnxRuntimeSession, lambda: found, required=required)


def _probe_openvino(*, required: bool) -> Probe:
    name = "openvino"

    def found() -> str:
        return f"openvino {metadata.version(name)} runs, images in {image_precision()}"

    return _probe_session(name, name, OpenVINOSession, found, required=required)


def _probe_session(
    name: str, extra: str, open_session: Callable[[Path], Session], found: Callable[[], str], *, required: bool
) -> Probe:
    """Checks that a CPU runtime runs the built-in model."""
    bundle = Bundle.find("builtin")
    try:
        with closing(open_session(bundle.file("text.onnx"))) as session:
            session.run({"token_ids": np.zeros((1, bundle.context_length), np.int64)})
        return Probe(name, True, found(), required=required)
    except MissingExtra:
        return Probe(name, False, "not installed", pip_install(extra), required)
    except KeyreelError as error:
        return Probe(name, False, error.args[0], error.hint, required)


def probe_codec(name: str, mode: Literal["r", "w"], *, required: bool) -> Probe:
    """Checks that PyAV's FFmpeg has a codec. mode: "r" decodes, "w" encodes."""
    label = f"{'decode' if mode == 'r' else 'encode'} {name}"
    try:
        codec = av.Codec(name, mode)
    except ValueError:  # PyAV's UnknownCodecError is one
        return Probe(label, False, f"PyAV {av.__version__} has no {name}", "pip install --force-reinstall av", required)
    return Probe(label, True, f"{codec.name} ({codec.long_name})", required=required)


def _probe_cache() -> Probe:
    root = cache_root()
    first = next((folder for folder in (root, *root.parents) if folder.exists()), Path("/"))
    writable = os.access(first, os.W_OK)
    fix = None if writable else "set KEYREEL_CACHE to a folder that you can write to"
    return Probe("cache folder", writable, f"{root}{'' if writable else ' cannot be written'}", fix, required=False)


def _probe_nvdec(cuda: Any) -> Probe:
    try:
        caps = pool_of(cuda).capabilities("h264", "420", 8)
    except KeyreelError as error:
        return Probe("nvdec", False, error.args[0], error.hint, required=False)
    found = f"H.264 up to {caps['width_max']} x {caps['height_max']}, {caps.get('num_decoder_engines', 'some')} engines"
    return Probe("nvdec", True, found, required=False)
