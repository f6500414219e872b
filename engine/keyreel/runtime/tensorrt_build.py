"""ONNX graphs to TensorRT plans, with TensorRT 11 or TensorRT-RTX.

Both are strongly typed: a plan computes in the precision that the graph is written in. TensorRT-RTX needs no GPU to
build, but names the compute capabilities that it can build for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keyreel.errors import BackendUnavailable, MissingExtra, ModelError
from keyreel.render.files import atomic_write
from keyreel.types import Progress

# TensorRT-RTX is installed under the second name, or, without the package that only renames it, under the third.
_MODULES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt_rtx", "tensorrt_rtx_bindings": "tensorrt_rtx"}
_MOST_TEXTS = 64


@dataclass(frozen=True, slots=True)
class Library:
    """TensorRT as it is installed here."""

    module: Any
    flavour: str  # "tensorrt" or "tensorrt_rtx"
    version: str
    logger: Any  # there is one a process: TensorRT ignores all but the first
    complaints: deque[str]

    def supports(self, capability: tuple[int, int]) -> bool:
        """Whether it has plans for such devices. TensorRT says so when it builds, TensorRT-RTX has a list."""
        known = getattr(self.module, "ComputeCapability", None)
        return self.flavour == "tensorrt" or hasattr(known, "SM{}{}".format(*capability))

    def reason(self) -> str:
        """What it complained of since this was last asked, in its own words."""
        said = "; ".join(self.complaints)
        self.complaints.clear()
        return said or "it gave no reason"


@functools.cache
def library() -> Library:
    """TensorRT, or TensorRT-RTX where only that is installed.

    Raises:
        MissingExtra: neither is.
    """
    for name, flavour in _MODULES.items():
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError):
            continue  # missing, or there without the library beneath it
        if hasattr(module, "Builder"):
            complaints: deque[str] = deque(maxlen=4)
            return Library(module, flavour, str(module.__version__), _logger(module, complaints), complaints)
    raise MissingExtra("tensorrt", "gpu", "running a model with TensorRT")


def _logger(module: Any, complaints: deque[str]) -> Any:
    severity = module.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.INFO,  # what it warns of is for who exports, not for who watches videos
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
    """Batch sizes that a plan is made for, in rows; every other dimension is the graph's own."""

    least: int
    usual: int  # what it is tuned for
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.usual <= self.most:
            raise ValueError(f"a profile rises from 1, got {self.least}, {self.usual}, {self.most}")

    def padded(self, rows: int) -> int:
        """The size at which a batch of `rows` <= most is run: few sizes, so that few have to be prepared."""
        power = 1 << (rows - 1).bit_length()
        return min(max(power, self.least), self.most)


def profile_for(graph: str, batch_size: int) -> Profile:
    """The profile of one of a bundle's graphs: "backbone", "attention", "fusion" or "text".

    Args:
        batch_size: frames in one inference.
    """
    if graph == "text":
        return Profile(1, 1, _MOST_TEXTS)  # queries come one by one, labels of a library many at once
    return Profile(1, batch_size, batch_size)


def build_plan(
    path: Path,
    profile: Profile,
    *,
    capability: tuple[int, int],
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> bytes:
    """Compiles a graph.

    Args:
        path: the .onnx file; only the first dimension of its inputs and outputs may be dynamic.
        capability: the device's compute capability. TensorRT builds for the device at hand, TensorRT-RTX for this one.
        timing_cache: what TensorRT measured in earlier builds, read and written; TensorRT-RTX measures nothing.
        progress: called as progress("plan <graph>", done, 1.0), from threads of TensorRT's.

    Raises:
        MissingExtra: TensorRT is not installed.
        BackendUnavailable: TensorRT-RTX does not build for such a device.
        ModelError: the graph cannot be parsed or built.
    """
    found = library()
    trt = found.module
    found.complaints.clear()
    builder = trt.Builder(found.logger)
    network = builder.create_network()
    parser = trt.OnnxParser(network, found.logger)
    if not parser.parse_from_file(str(path)):
        errors = "; ".join(_told(parser.get_error(index)) for index in range(parser.num_errors))
        raise ModelError(f"TensorRT cannot parse {path.name}: {errors}", hint="export the model again")
    config = builder.create_builder_config()
    if found.flavour == "tensorrt_rtx":
        _aim(found, config, capability)
    config.add_optimization_profile(_profile(builder, network, profile, path.name))
    monitor = None if progress is None else _monitor(trt, f"plan {path.stem}", progress)
    if monitor is not None:
        config.progress_monitor = monitor
    # TensorRT-RTX has this for show: it measures nothing, and warns that it does not.
    measured = timing_cache if found.flavour == "tensorrt" else None
    times = None if measured is None else _read_timings(config, measured)
    plan = builder.build_serialized_network(network, config)
    if monitor is not None and monitor.failure is not None:
        raise monitor.failure
    if plan is None:
        raise ModelError(f"TensorRT cannot build {path.name}: {found.reason()}", hint="use --device cpu")
    if measured is not None and times is not None:
        with contextlib.suppress(OSError), atomic_write(measured) as made:  # lost, it costs time
            made.write_bytes(bytes(times.serialize()))
    return bytes(plan)


def _told(error: Any) -> str:
    operator = error.node_operator()
    return f"{error.desc()}{f' (in {operator} {error.node_name()!r})' if operator else ''}"


def _aim(found: Library, config: Any, capability: tuple[int, int]) -> None:
    if not found.supports(capability):
        raise BackendUnavailable(
            f"TensorRT-RTX {found.version} does not build for compute capability {capability[0]}.{capability[1]}",
            probe="tensorrt",
            hint="pip install tensorrt-cu13, or uninstall TensorRT-RTX to run on onnxruntime",
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(found.module.ComputeCapability, "SM{}{}".format(*capability)), 0)


def _profile(builder: Any, network: Any, profile: Profile, name: str) -> Any:
    made = builder.create_optimization_profile()
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for tensor in (*inputs, *(network.get_output(index) for index in range(network.num_outputs))):
        if -1 in tuple(tensor.shape)[1:]:
            raise ModelError(f"{name}: {tensor.name} is {tuple(tensor.shape)}, only the first dimension may vary")
    for tensor in inputs:
        first, *rest = tuple(tensor.shape) or (0,)
        if first == -1:
            made.set_shape(tensor.name, *((size, *rest) for size in (profile.least, profile.usual, profile.most)))
    return made


def _read_timings(config: Any, path: Path) -> Any:
    """The timing cache that the build uses: what is on disk, or an empty one where that is missing or of no use."""
    for content in (path.read_bytes() if path.is_file() else b"", b""):
        times = config.create_timing_cache(content)
        if times is not None and config.set_timing_cache(times, False):
            return times
    return None


def _monitor(trt: Any, stage: str, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Turns TensorRT's nested phases into one share of the whole that only rises."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.failure: BaseException | None = None
            self._lock = threading.Lock()
            self._phases: dict[str, tuple[str | None, int, int]] = {}  # parent, steps, done
            self._shown = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases[phase_name] = (parent_phase, num_steps, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                parent, steps, _ = self._phases.get(phase_name, (None, step + 1, 0))
                self._phases[phase_name] = (parent, steps, step + 1)
                share = max((self._share(name) for name, found in self._phases.items() if not found[0]), default=0.0)
                if self.failure is None and share > self._shown:
                    self._shown = share
                    self._tell(lambda: progress(stage, share, 1.0))
                return self.failure is None  # False ends the build

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.pop(phase_name, None)

        def _share(self, name: str) -> float:
            _, steps, done = self._phases[name]
            inner = (self._share(other) for other, found in self._phases.items() if found[0] == name)
            return min((done + max(inner, default=0.0)) / steps, 1.0)

        def _tell(self, call: Callable[[], None]) -> None:
            try:
                call()
            except BaseException as error:  # noqa: BLE001  it may not pass through TensorRT; build_plan raises it
                self.failure = error

    return Monitor()
