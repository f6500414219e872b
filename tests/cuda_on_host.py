"""CuPy's interface on a CPU: arrays that never become NumPy's implicitly, kernels run by cuda_host.h.

The product's own CUDA code runs; only memory and launches are replaced. Work is done at once; cuda_streams.py checks
that its order did not depend on that. Where CuPy is installed, names that it lacks are refused.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import operator
import os
import re
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda_streams
import numpy as np
from cuda_streams import root, work

from keyreel_kernels.cuda import STANDARD, Cuda
from keyreel_kernels.cuda_pictures import SOURCE

HEADER = Path(__file__).with_name("cuda_host.h")
FLAVOURS = {
    "fibers": ("-O2",),
    "threads": ("-O1", "-g", "-DKR_THREADS"),
}
_ENTRY = re.compile(
    r'(?:extern\s+"C"\s+__global__\s+void|KR_CLUSTER_KERNEL)\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\('
)
_PARAMETERS = re.compile(_ENTRY.pattern + r"([^)]*)\)")
_CLUSTERED = re.compile(r"KR_CLUSTER_KERNEL\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(")
_LOCK = threading.RLock()
_ALLOWED = set[int]()  # kernels that may have clusters of more than eight blocks
_launching = threading.Lock()  # the emulation has one launch at a time


def host_source(code: str) -> str:
    """The program that runs the kernels of `code`: header, code, one entry per kernel."""
    declared = (
        "const unsigned* grid, const unsigned* block, size_t shared, size_t together, void** arguments, "
        "const size_t* sizes, size_t count"
    )
    given = "grid, block, shared, together, arguments, sizes, count"
    entries = "\n".join(
        f'extern "C" const char* krh_{name}({declared}) {{ return krh::start({name}, {given}); }}'
        for name in dict.fromkeys(_ENTRY.findall(code))
    )
    return f'#define KEYREEL_HOST\n#include "{HEADER}"\n{code}\n#line 1 "entries"\n{entries}\n'


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="keyreel-kernels-")


def build(code: str, options: Sequence[str], *, flavour: str = "fibers", extra: Sequence[str] = ()) -> Path:
    """Compiles kernels to a shared library, once for each code and options."""
    flags = ["-std=c++20", *FLAVOURS[flavour], *(option for option in options if option != STANDARD), *extra]
    flags += ["-march=native", "-ffp-contract=fast", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"]
    program = host_source(code)
    digest = hashlib.sha256("\0".join([program, *flags]).encode()).hexdigest()[:24]
    with _LOCK:
        library = Path(_folder().name) / f"{digest}.so"
        if not library.exists():
            path = library.with_suffix(".cpp")
            path.write_text(program)
            command = [os.environ.get("CXX", "g++"), *flags, "-shared", "-fPIC", "-pthread", str(path)]
            done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the kernels do not compile for the host:\n{done.stderr[:8000]}")
    return library


# --- arrays -------------------------------------------------------------------------------------------------------


class HostedArray:
    """Like cupy.ndarray: never mixes with NumPy arrays, never becomes one implicitly, nor a number."""

    __array_ufunc__ = None

    def __init__(self, host: np.ndarray[Any, Any], keep: Any = None) -> None:
        self._host, self._keep = host, keep
        cuda_streams.hold(host)
        weakref.finalize(self, cuda_streams.drop, host).atexit = False

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __bool__(self) -> bool:
        raise TypeError("implicit copy from the device: bool()")

    def __int__(self) -> int:
        raise TypeError("implicit copy from the device: int()")

    def __float__(self) -> float:
        raise TypeError("implicit copy from the device: float()")

    __index__ = __int__

    def __iter__(self) -> Iterator[HostedArray]:
        return (self[n] for n in range(len(self)))

    def __len__(self) -> int:
        return len(self._host)

    def __repr__(self) -> str:
        return f"HostedArray({self._host!r})"

    def __getitem__(self, index: Any) -> HostedArray:
        return _done((self, index), self._host[_plain(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        work(_hosts((index, value)), [self._host])
        self._host[_plain(index)] = _plain(value)

    def get(self) -> np.ndarray[Any, Any]:
        with cuda_streams.Device(self.device.id):  # as CuPy does
            work([self._host])
            cuda_streams.current().synchronize()
        return self._host.copy()

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self._host.ctypes.data)

    @property
    def device(self) -> Any:
        return SimpleNamespace(id=cuda_streams.device_of(self._host))

    @property
    def T(self) -> HostedArray:
        return HostedArray(self._host.T)

    def __dlpack__(self, **_: Any) -> Any:
        return self._host.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self.device.id)  # kDLCUDA

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _known("ndarray", name)
        found = getattr(self._host, name)
        return _wrapped(found, self) if callable(found) else found


def _plain(value: Any) -> Any:
    """The NumPy array inside; NumPy arrays themselves are refused, as in CuPy."""
    if isinstance(value, HostedArray):
        return value._host
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError("Unsupported type <class 'numpy.ndarray'>: it is not on the device")
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(one) for one in value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value


def _hosts(value: Any) -> Iterator[np.ndarray[Any, Any]]:
    """The memory of all arrays in arguments or results."""
    if isinstance(value, HostedArray):
        yield value._host
    elif isinstance(value, (tuple, list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _hosts(one)


def _done(given: Any, found: Any) -> Any:
    """`found` as arrays of the device. Records work that read `given` and made it; a view is no work."""
    result = _back(found)
    taken, made = list(_hosts(given)), list(_hosts(result))
    if not {id(root(one)) for one in taken} & {id(root(one)) for one in made}:
        work(taken, made)
    return result


def _back(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return HostedArray(np.asarray(value))
    if isinstance(value, (tuple, list)):
        return type(value)(_back(one) for one in value)
    return value


def _wrapped(function: Callable[..., Any], *bound: HostedArray) -> Callable[..., Any]:
    """bound: the array whose method it is."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        found = function(*_plain(args), **_plain(options))
        if function.__name__ == "copyto":
            work(_hosts(args[1]), _hosts(args[0]))
            return None
        return _done((bound, args, options), found)

    return call


def _operator(name: str, *, swapped: bool) -> Callable[..., Any]:
    function = getattr(operator, name)

    def apply(*given: Any) -> Any:
        return _done(given, function(*map(_plain, given[::-1] if swapped else given)))

    return apply


def _in_place(name: str) -> Callable[..., Any]:
    function = getattr(operator, name)

    def apply(self: HostedArray, other: Any) -> HostedArray:
        work(_hosts(other), [self._host])
        self._host = function(self._host, _plain(other))
        return self

    return apply


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_"):
    _bare = _name.rstrip("_")
    setattr(HostedArray, f"__{_bare}__", _operator(_name, swapped=False))
    setattr(HostedArray, f"__r{_bare}__", _operator(_name, swapped=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "invert"):
    setattr(HostedArray, f"__{_name}__", _operator(_name, swapped=False))
for _name in ("iadd", "isub", "imul", "itruediv", "iand", "ior"):
    setattr(HostedArray, f"__{_name}__", _in_place(_name))


def _known(owner: str, name: str) -> None:
    """Raises AttributeError for a name that CuPy lacks, if CuPy is installed."""
    try:
        import cupy
    except ImportError:
        return
    if isinstance(cupy, HostedCupy):
        return
    target = cupy.ndarray if owner == "ndarray" else cupy
    if not hasattr(target, name):
        raise AttributeError(f"CuPy has no {owner} {name!r}")


# --- kernels ------------------------------------------------------------------------------------------------------


def _pointed(name: str, args: Any) -> list[tuple[int, int, bool]]:
    """What a kernel reads at the addresses in its table, as `work` takes it."""
    if name != "pictures":
        return []
    table, out = args[0]._host, args[1]._host
    sources = table.view(np.uint8)[: len(out) * SOURCE.itemsize].view(SOURCE)
    return [(int(address), 1, False) for address in sources["planes"].ravel() if address]


class HostedKernel:
    def __init__(self, module: HostedModule, name: str) -> None:
        self._module, self._name = module, name
        self._entry = getattr(module.library, f"krh_{name}")
        self._entry.restype = ctypes.c_char_p
        self._device = cuda_streams.device()
        self.max_dynamic_shared_size_bytes = 48 << 10
        self.kernel = SimpleNamespace(ptr=id(self))
        _ALLOWED.discard(id(self))

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise RuntimeError("CUDA_ERROR_INVALID_VALUE: more shared memory than the kernel asked for")
        assert self._device == cuda_streams.device(), "the kernel was loaded on another device"
        values, keep = [], []
        arrays: dict[bool, list[Any]] = {True: [], False: []}
        for value, constant in zip(args, self._module.constants[self._name], strict=False):
            if isinstance(value, HostedArray):
                arrays[constant].append(value._host)
        work(arrays[True], arrays[False], raw=_pointed(self._name, args))
        for value in args:
            if isinstance(value, HostedArray):
                held: Any = ctypes.c_void_p(value._host.ctypes.data)
            elif isinstance(value, np.generic):
                held = np.asarray(value).tobytes()
                held = (ctypes.c_char * len(held)).from_buffer_copy(held)
            else:
                raise TypeError(f"kernel arguments are device arrays and NumPy scalars, got {type(value).__name__}")
            keep.append(held)
            values.append(ctypes.addressof(held))
        sizes = [ctypes.sizeof(held) for held in keep]
        full_grid, full_block = ((*shape, 1, 1)[:3] for shape in (grid, block))
        together = self._module.cluster if self._name in self._module.clustered else 1
        if together > 8 and id(self) not in _ALLOWED:
            raise DriverError("CUDA_ERROR_INVALID_CLUSTER_SIZE: more than eight blocks without asking for it")
        with _launching:
            error = self._entry(
                (ctypes.c_uint * 3)(*full_grid),
                (ctypes.c_uint * 3)(*full_block),
                ctypes.c_size_t(shared_mem),
                ctypes.c_size_t(together),
                (ctypes.c_void_p * max(len(values), 1))(*values),
                (ctypes.c_size_t * max(len(sizes), 1))(*sizes),
                ctypes.c_size_t(len(values)),
            )
        if error:
            raise RuntimeError(f"{self._name}: {error.decode()}")


class HostedModule:
    flavour = "fibers"
    extra: tuple[str, ...] = ()

    def __init__(self, *, code: str, options: Sequence[str] = ()) -> None:
        assert STANDARD in options
        self.library = ctypes.CDLL(str(build(code, options, flavour=self.flavour, extra=self.extra)))
        self.clustered = set(_CLUSTERED.findall(code))
        self.constants = {
            name: ["const" in one and "*" in one for one in parameters.split(",")]
            for name, parameters in _PARAMETERS.findall(code)
        }
        defines = dict(o[2:].split("=") for o in options if o.startswith("-D"))
        self.cluster = int(defines.get("CLUSTER", 1))

    def get_function(self, name: str) -> HostedKernel:
        return HostedKernel(self, name)


# --- the module ---------------------------------------------------------------------------------------------------


class DriverError(RuntimeError):
    """CUDADriverError."""


def _copy_memory(to: int, origin: int, count: int, kind: int, stream: int) -> None:
    assert kind == 3, "only what is on the device may be copied without being counted"
    cuda_streams.copied(to, origin, count, stream)
    ctypes.memmove(to, origin, count)


class HostedCupy:
    """The module. Anything not defined here is NumPy's, with its arrays wrapped."""

    ndarray = HostedArray
    RawModule = HostedModule

    def __init__(
        self,
        *,
        capability: tuple[int, int] = (9, 0),
        shared_bytes: int = 227 << 10,
        sms: int = 4,
        most_neighbours: int = 16,
    ) -> None:
        def set_attribute(function: int, attribute: int, value: int) -> None:
            assert (attribute, value) == (14, 1), "CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED"
            if most_neighbours > 8:
                _ALLOWED.add(function)

        properties = {
            "name": b"emulated",
            "major": capability[0],
            "minor": capability[1],
            "multiProcessorCount": sms,
            "sharedMemPerBlockOptin": shared_bytes,
        }
        self.cuda = SimpleNamespace(
            Device=cuda_streams.Device,
            Stream=cuda_streams.Stream,
            Event=cuda_streams.Event,
            MemoryPool=lambda: SimpleNamespace(malloc=None, free_all_blocks=lambda: None),
            using_allocator=lambda _: nullcontext(),
            get_current_stream=cuda_streams.current,
            driver=SimpleNamespace(funcSetAttribute=set_attribute, CUDADriverError=DriverError),
            runtime=SimpleNamespace(
                getDeviceCount=lambda: 1,
                getDeviceProperties=lambda _: properties,
                memcpyAsync=_copy_memory,
                memcpyDeviceToDevice=3,
            ),
        )

    def asarray(self, value: Any, dtype: Any = None) -> HostedArray:
        """From NumPy: a copy, as one to a device is."""
        if isinstance(value, HostedArray):
            return value if dtype is None else value.astype(dtype)
        made = HostedArray(np.array(value, dtype=dtype))
        work((), [made._host])
        return made

    def from_dlpack(self, value: Any) -> HostedArray:
        return value if isinstance(value, HostedArray) else HostedArray(np.from_dlpack(value), keep=value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _known("module", name)
        found = getattr(np, name)
        return _wrapped(found) if callable(found) and not isinstance(found, type) else found


def host_cuda(index: int = 0, **device: Any) -> Cuda:
    """A Cuda whose arrays and kernels are the CPU's. device: capability, shared_bytes, sms, most_neighbours."""
    return Cuda(index, cupy=HostedCupy(**device))
