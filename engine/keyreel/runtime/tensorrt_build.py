"""Compiles ONNX graphs to plans with TensorRT 11 or TensorRT-RTX.

Both are strongly typed: a plan has the precision of its graph. TensorRT-RTX builds without a GPU, for the compute
capabilities that it lists.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keyreel.errors import BackendUnavailable, MissingExtra, ModelError
from keyreel.render.files import atomic_write
from keyreel.types import Progress

# TensorRT-RTX has the second name or, without a package that only renames it, the third.
_MODULES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt_rtx", "tensorrt_rtx_bindings": "tensorrt_rtx"}
_MAX_TEXTS = 64


@dataclass(frozen=True, slots=True)
class TensorRT:
    """The installed TensorRT."""

    module: Any
    flavour: str  # "tensorrt" or "tensorrt_rtx"
    version: str
    logger: Any  # one for the process: TensorRT ignores all but the first
    complaints: deque[str]

    def supports(self, capability: tuple[int, int]) -> bool:
        """Whether it builds plans for such devices. Only TensorRT-RTX has a list; TensorRT fails when building."""
        known = getattr(self.module, "ComputeCapability", None)
        return self.flavour == "tensorrt" or hasattr(known, "SM{}{}".format(*capability))

    def reason(self) -> str:
        """The errors that it logged since the last call."""
        logged = "; ".join(self.complaints)
        self.complaints.clear()
        return logged or "it gave no reason"


@functools.cache
def load_tensorrt() -> TensorRT:
    """Imports TensorRT, else TensorRT-RTX. Raises MissingExtra if neither is installed."""
    for name, flavour in _MODULES.items():
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError):
            continue  # missing, or without its native library
        if hasattr(module, "Builder"):
            complaints: deque[str] = deque(maxlen=4)
            return TensorRT(module, flavour, str(module.__version__), _logger(module, complaints), complaints)
    raise MissingExtra("tensorrt", "gpu", "running a model with TensorRT")


def _logger(module: Any, complaints: deque[str]) -> Any:
    severity = module.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.INFO,  # its warnings are for people who export models
        severity.INFO: logging.DEBUG,
    }
    log = logging.getLogger("keyreel.tensorrt")

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity)
            if level is not None:
                log.log(level, "%s", message)
            if level == logging.ERROR:
                complaints.append(message)

    return Logger()


@dataclass(frozen=True, slots=True)
class Profile:
    """Batch sizes of a plan, in rows."""

    smallest: int
    typical: int  # the size to tune for
    largest: int

    def padded(self, rows: int) -> int:
        """The size at which a batch of `rows` <= `largest` runs: a power of two, to prepare few sizes."""
        return min(max(1 << (rows - 1).bit_length(), self.smallest), self.largest)


def profile_for(graph: str, batch_size: int) -> Profile:
    """The profile of a graph ("backbone", "attention", "fusion", "text") for batches of frames."""
    if graph == "text":
        return Profile(1, 1, _MAX_TEXTS)  # queries come one at a time, the labels of a library many at once
    return Profile(1, batch_size, batch_size)


def build_plan(
    path: Path,
    profile: Profile,
    *,
    capability: tuple[int, int],
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> bytes:
    """Compiles a graph. Only the first dimension of its inputs and outputs may be dynamic.

    Args:
        capability: compute capability to build for; TensorRT always builds for its device.
        timing_cache: file of measurements, read and written; TensorRT-RTX measures nothing.
        progress: called as progress("plan <graph>", done, 1.0), from TensorRT's threads.

    Raises:
        ModelError: TensorRT cannot build the graph.
    """
    found = load_tensorrt()
    trt = found.module
    found.complaints.clear()
    builder = trt.Builder(found.logger)
    network = builder.create_network()
    parser = trt.OnnxParser(network, found.logger)
    if not parser.parse_from_file(str(path)):
        errors = "; ".join(_described(parser.get_error(index)) for index in range(parser.num_errors))
        raise ModelError(f"TensorRT cannot parse {path.name}: {errors}", hint="export the model again")
    config = builder.create_builder_config()
    if found.flavour == "tensorrt_rtx":
        _set_capability(found, config, capability)
        timing_cache = None  # TensorRT-RTX warns that it measures nothing
    config.add_optimization_profile(_optimization_profile(builder, network, profile, path.name))
    monitor = None if progress is None else _monitor(trt, f"plan {path.stem}", progress)
    if monitor is not None:
        config.progress_monitor = monitor
    timings = None if timing_cache is None else _set_timings(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if monitor is not None and monitor.failure is not None:
        raise monitor.failure
    if plan is None:
        raise ModelError(f"TensorRT cannot build {path.name}: {found.reason()}", hint="use --device cpu")
    if timing_cache is not None and timings is not None:
        with contextlib.suppress(OSError), atomic_write(timing_cache) as part:
            part.write_bytes(bytes(timings.serialize()))
    return bytes(plan)


def _described(error: Any) -> str:
    operator = error.node_operator()
    return f"{error.desc()}{f' (in {operator} {error.node_name()!r})' if operator else ''}"


def _set_capability(found: TensorRT, config: Any, capability: tuple[int, int]) -> None:
    if not found.supports(capability):
        raise BackendUnavailable(
            f"TensorRT-RTX {found.version} does not build for compute capability {capability[0]}.{capability[1]}",
            probe="tensorrt",
            hint="pip install tensorrt-cu13, or uninstall TensorRT-RTX to run on onnxruntime",
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(found.module.ComputeCapability, "SM{}{}".format(*capability)), 0)


def _optimization_profile(builder: Any, network: Any, profile: Profile, name: str) -> Any:
    made = builder.create_optimization_profile()
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for tensor in (*inputs, *(network.get_output(index) for index in range(network.num_outputs))):
        if -1 in tuple(tensor.shape)[1:]:
            raise ModelError(f"{name}: {tensor.name} is {tuple(tensor.shape)}, only the first dimension may vary")
    for tensor in inputs:
        first, *rest = tuple(tensor.shape) or (0,)
        if first == -1:
            sizes = (profile.smallest, profile.typical, profile.largest)
            made.set_shape(tensor.name, *((size, *rest) for size in sizes))
    return made


def _set_timings(config: Any, path: Path) -> Any:
    """Sets the timing cache from disk, or an empty one if it is missing or damaged."""
    for content in (path.read_bytes() if path.is_file() else b"", b""):
        timings = config.create_timing_cache(content)
        if timings is not None and config.set_timing_cache(timings, False):
            return timings
    return None


def _monitor(trt: Any, stage: str, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Converts TensorRT's nested phases to one rising fraction."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.failure: BaseException | None = None
            self._lock = threading.Lock()
            self._phases: dict[str, tuple[str | None, int, int]] = {}  # parent, steps, done
            self._fraction = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases[phase_name] = (parent_phase, num_steps, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                parent, steps, _ = self._phases.get(phase_name, (None, step + 1, 0))
                self._phases[phase_name] = (parent, steps, step + 1)
                fraction = max((self._done(n) for n, phase in self._phases.items() if not phase[0]), default=0.0)
                if self.failure is None and fraction > self._fraction:
                    self._fraction = fraction
                    try:
                        progress(stage, fraction, 1.0)
                    except BaseException as error:  # noqa: BLE001  it must not pass through TensorRT; build_plan raises it
                        self.failure = error
                return self.failure is None  # False ends the build

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.pop(phase_name, None)

        def _done(self, name: str) -> float:
            _, steps, done = self._phases[name]
            inner = (self._done(other) for other, phase in self._phases.items() if phase[0] == name)
            return min((done + max(inner, default=0.0)) / steps, 1.0)

    return Monitor()
