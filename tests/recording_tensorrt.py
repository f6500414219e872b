"""A stand-in for the module `tensorrt` that writes down what is asked of it and computes with onnxruntime.

Contexts read and write at the addresses that they are given, so that wrong addresses give wrong numbers. What
TensorRT leaves undefined ends in an AssertionError: two threads in one context, and a graph that is replayed after its
context has taken another shape.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from cuda_on_host import host_cuda
from cuda_streams import device

from keyreel.runtime.bundle import Bundle
from keyreel.runtime.plans import Signature
from keyreel.runtime.tensorrt_build import TensorRT, _logger
from keyreel_kernels.cuda import Cuda

NUMPY = {"tensor(uint8)": np.uint8, "tensor(int64)": np.int64, "tensor(float)": np.float32}


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class Base:
    Severity = Severity


class Mode(enum.Enum):
    INPUT, OUTPUT = range(2)


class Recording:
    """The module. `calls` holds everything that was asked for, in order: (name, arguments...)."""

    __version__ = "11.1.0"
    ILogger = Base
    IProgressMonitor = Base
    TensorIOMode = Mode

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.refused: set[str] = set()  # calls that are answered with False or None
        self.spoil: Callable[[Any, bool], Any] = lambda array, _replayed: array  # what an output becomes
        self.streams: dict[int, Stream] = {}
        self.device = 0
        self.numbers = itertools.count()  # of the contexts
        complaints: Any = []
        self.installed = TensorRT(self, "tensorrt", self.__version__, _logger(self, complaints), complaints)

    def note(self, name: str, *arguments: Any) -> bool:
        assert device() == self.device or name == "synchronize", f"{name} while another device is current"
        self.calls.append((name, *arguments))
        if name in self.refused:
            self.installed.logger.log(Severity.ERROR, f"{name} is out of order")
        return name not in self.refused

    def noted(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, *arguments in self.calls if called == name]

    @staticmethod
    def nptype(dtype: Any) -> Any:
        return dtype

    def Builder(self, _logger: Any) -> Any:
        network = SimpleNamespace()
        return SimpleNamespace(
            create_network=lambda: network,
            create_builder_config=lambda: Config(self),
            create_optimization_profile=lambda: SimpleNamespace(set_shape=lambda *a: self.note("set_shape", *a)),
            build_serialized_network=self._build,
        )

    def OnnxParser(self, network: Any, _logger: Any) -> Any:
        def parse(path: str) -> bool:
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            inputs, outputs = (
                [SimpleNamespace(name=n.name, shape=_shape(n)) for n in nodes]
                for nodes in (session.get_inputs(), session.get_outputs())
            )
            network.path, network.num_inputs, network.num_outputs = path, len(inputs), len(outputs)
            network.get_input, network.get_output = inputs.__getitem__, outputs.__getitem__
            return self.note("parse", path)

        error = SimpleNamespace(desc=lambda: "no importer", node_operator=lambda: "Odd", node_name=lambda: "the_node")
        return SimpleNamespace(parse_from_file=parse, num_errors=1, get_error=lambda _: error)

    def _build(self, network: Any, config: Config) -> bytes | None:
        if config.progress_monitor is not None:
            config.progress_monitor.phase_start("build", None, 2)
            going_on = all(config.progress_monitor.step_complete("build", step) for step in range(2))
            config.progress_monitor.phase_finish("build")
            if not going_on:
                return None
        most = {name: shapes[-1][0] for name, *shapes in self.noted("set_shape")}
        made = {"path": network.path, "most": most, "number": len(self.noted("build"))}
        return b"plan" + json.dumps(made).encode() if self.note("build") else None

    def Runtime(self, _logger: Any) -> Any:
        def deserialize(plan: bytes) -> Engine | None:
            sound = self.note("deserialize", plan) and plan.startswith(b"plan{")
            return Engine(self, **json.loads(plan[4:])) if sound else None

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class Config:
    progress_monitor: Any = None

    def __init__(self, trt: Recording) -> None:
        self.add_optimization_profile = lambda profile: 0
        self.create_timing_cache = lambda content: (
            None if content[:4] not in (b"", b"time") else SimpleNamespace(content=content, serialize=lambda: b"timed")
        )
        self.set_timing_cache = lambda cache, ignore: trt.note("set_timing_cache", cache.content, ignore)


class Engine:
    def __init__(self, trt: Recording, path: str, most: dict[str, int], number: int) -> None:
        self.trt, self.most = trt, most
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.given = {node.name: node for node in self.session.get_inputs()}
        self.nodes = {**self.given, **{node.name: node for node in self.session.get_outputs()}}
        self.num_io_tensors = len(self.nodes)
        self.get_tensor_name = list(self.nodes).__getitem__

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return _shape(self.nodes[name])

    def get_tensor_dtype(self, name: str) -> Any:
        return NUMPY[self.nodes[name].type]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in self.given else Mode.OUTPUT

    def create_execution_context(self) -> Context | None:
        number = next(self.trt.numbers)
        return Context(self, number) if self.trt.note("context", number) else None


class Context:
    def __init__(self, engine: Engine, number: int) -> None:
        self.engine, self.trt, self.number = engine, engine.trt, number
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {
            n: _shape(node) for n, node in engine.given.items() if not node.shape
        }
        self.busy = threading.Lock()
        self.fed: dict[str, Any] = {}

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return self.trt.note("set_tensor_address", self.number, name, address)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        fits = shape[1:] == self.engine.get_tensor_shape(name)[1:] and shape[0] <= self.engine.most[name]
        return self.trt.note("set_input_shape", self.number, name, shape) and fits

    def execute_async_v3(self, stream: int) -> bool:
        assert self.shapes.keys() == self.engine.given.keys(), "an input has no shape"
        shapes, on = dict(self.shapes), self.trt.streams[stream]
        if on.recorded is not None:
            on.recorded.append(lambda: self.compute(shapes, replayed=True))
            return self.trt.note("capture", self.number)
        self.compute(shapes, replayed=False)
        return self.trt.note("execute", self.number, stream)

    def compute(self, shapes: dict[str, tuple[int, ...]], *, replayed: bool) -> None:
        assert shapes == self.shapes, "the context has taken another shape since this was captured"
        assert self.busy.acquire(blocking=False), "two threads in one context"
        try:
            self.trt.calls.append(("rows", self.number, max((s[0] for s in shapes.values() if s), default=0)))
            self.fed = {name: self._at(name, shape).copy() for name, shape in shapes.items()}
            for name, array in zip(
                list(self.engine.nodes)[len(self.engine.given) :], self.engine.session.run(None, self.fed), strict=True
            ):
                self._at(name, array.shape)[...] = self.trt.spoil(array, replayed)
            self.trt.calls.append(("fed", self.number, self.fed))
        finally:
            self.busy.release()

    def _at(self, name: str, shape: tuple[int, ...]) -> Any:
        dtype = np.dtype(self.engine.get_tensor_dtype(name))
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(self.addresses[name]), dtype).reshape(shape)


class Stream:
    def __init__(self, trt: Recording) -> None:
        self.trt, self.recorded = trt, None
        self.ptr = 1000 + len(trt.streams)
        trt.streams[self.ptr] = self

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        self.trt.note("synchronize", self.ptr)

    def begin_capture(self, mode: int) -> None:
        self.recorded: Any = []
        self.trt.note("begin_capture", self.ptr, mode)

    def end_capture(self) -> Any:
        recorded, self.recorded = self.recorded, None
        if not self.trt.note("end_capture", self.ptr):
            raise RuntimeError("cudaErrorStreamCaptureInvalidated: operation failed due to a previous error")

        def launch(stream: Stream) -> None:
            self.trt.note("launch", stream.ptr)
            for call in recorded:
                call()

        return SimpleNamespace(launch=launch)


def recording_cuda(trt: Recording, **device: Any) -> Cuda:
    """A device whose streams are written down by `trt`."""
    cuda = host_cuda(1, **device)
    trt.device = cuda.index
    cuda.cupy.cuda.Stream = lambda non_blocking: Stream(trt)
    cuda.cupy.cuda.runtime.streamCaptureModeThreadLocal = 1
    cuda.stream = Stream(trt)
    return cuda


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else -1 for size in node.shape)


def builtin(graph: str) -> Path:
    return Bundle.find("builtin").file(f"{graph}.onnx")


def signature(session: onnxruntime.InferenceSession) -> Signature:
    nodes = session.get_inputs()
    return {n.name: (np.dtype(NUMPY[n.type]), tuple(n.shape[1:]) if n.shape else None) for n in nodes}
