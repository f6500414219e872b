"""The order of work on an emulated device: which stream may read, write or free what, whatever the timing.

The emulation computes at once, so a missing join would never show. Instead each stream has a vector clock, as threads
have in ThreadSanitizer: it knows how far the others had come when it last waited for them. A stream that uses what
another one wrote, or writes what another one reads, without having waited for that, is a `Fault`. So is memory that is
freed while a stream other than its own may still use it: CuPy's pool gives it to its own stream's next work at once.
Freed memory is filled with 0xAB and lies idle for a while, so that an address of it that is used later is a `Fault`.
A stream, an event or memory that is used while another device than its own is current is a `Fault` too.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

Clock = dict[int, int]  # how many pieces of work of a stream, by its pointer


class Fault(AssertionError):
    """Work of two streams that nothing puts in order, on another device than the current one, or on freed memory."""


class _Memory:
    """One allocation: how many arrays refer to it, who wrote it last and who has read it since."""

    def __init__(self, address: int, size: int, stream: Stream, owner: np.ndarray[Any, Any] | None = None) -> None:
        self.address, self.size, self.owner, self.holders = address, size, owner, 0
        self.stream, self.device = stream.ptr, stream.place
        self.wrote: tuple[int, int] = (stream.ptr, 0)
        self.read: Clock = {}


_lock = threading.RLock()
_local = threading.local()
_host: Clock = {}  # what the host has waited for
_memories: dict[int, _Memory] = {}  # by address
_freed: deque[_Memory] = deque()  # the last ones, which keep their addresses
_FREED, _FREED_BYTES = 256, 64 << 20  # at most
_streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()
_pointers = itertools.count(0x1000, 0x10)
faults: list[str] = []  # also of work whose thread has no one to tell


def _merge(into: Clock, other: Clock) -> None:
    for stream, count in other.items():
        into[stream] = max(into.get(stream, 0), count)


def device() -> int:
    """The index of this thread's current device."""
    return _devices()[-1] if _devices() else 0


def _devices() -> list[int]:
    if not hasattr(_local, "devices"):
        _local.devices = []
    devices: list[int] = _local.devices
    return devices


class Device:
    """cupy.cuda.Device; current inside `with`."""

    def __init__(self, index: int) -> None:
        self.id = index

    def __enter__(self) -> Device:
        _devices().append(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        _devices().pop()


class Event:
    """cupy.cuda.Event; of the device that is current."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = device()
        self.clock: Clock = {}

    def synchronize(self) -> None:
        with _lock:
            _merge(_host, self.clock)


class Stream:
    """cupy.cuda.Stream; of the device that is current, whose current stream it is inside `with`."""

    def __init__(self, *_: Any, pointer: int | None = None, **__: Any) -> None:
        self.ptr = next(_pointers) if pointer is None else pointer
        self.device = None if pointer == 0 else device()  # each device has a null stream: here it is the same one
        self.clock: Clock = {}
        _streams[self.ptr] = self

    @property
    def place(self) -> int:
        return device() if self.device is None else self.device

    def _expect(self, index: int) -> None:
        if self.place != index:
            raise Fault(_fault(f"stream {self.ptr:#x} of device {self.place} is used on device {index}"))

    def __enter__(self) -> Stream:
        self._expect(device())
        _stack(self.place).append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _stack(self.place).pop()

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        self._expect(event.device)
        with _lock:
            event.clock = dict(self.clock)
        return event

    def wait_event(self, event: Event) -> None:
        self._expect(device())
        with _lock:
            _merge(self.clock, event.clock)

    def synchronize(self) -> None:
        with _lock:
            _merge(_host, self.clock)


_null = Stream(pointer=0)


def _stack(index: int) -> list[Stream]:
    if not hasattr(_local, "stacks"):
        _local.stacks = {}
    stack: list[Stream] = _local.stacks.setdefault(index, [])
    return stack


def current() -> Stream:
    stack = _stack(device())
    return stack[-1] if stack else _null


def root(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array that owns the memory of this one."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _memory(array: np.ndarray[Any, Any]) -> _Memory:
    return _memories[_address(root(array))]


def _address(owner: np.ndarray[Any, Any]) -> int:
    address: int = owner.__array_interface__["data"][0]
    return address


def hold(array: np.ndarray[Any, Any]) -> None:
    """An array of the device begins: memory is taken with the first one that refers to it."""
    owner = root(array)
    with _lock:
        address = _address(owner)
        _memories.setdefault(address, _Memory(address, owner.nbytes, current(), owner)).holders += 1


def drop(array: np.ndarray[Any, Any]) -> None:
    """An array of the device ends: memory is freed with the last one that refers to it."""
    with _lock:
        memory = _memory(array)
        memory.holders -= 1
        if not memory.holders:
            _free(memory)


def device_of(array: np.ndarray[Any, Any]) -> int:
    """The device on which its memory was taken."""
    with _lock:
        return _memory(array).device


def _fault(text: str) -> str:
    faults.append(text)
    return text


def _free(memory: _Memory) -> None:
    del _memories[memory.address]
    if (own := _streams.get(memory.stream)) is not None:
        _merge(own.clock, _host)
        for stream, count in (*memory.read.items(), memory.wrote):
            if stream != memory.stream and own.clock.get(stream, 0) < count:
                _fault(f"memory of stream {memory.stream:#x} is freed while stream {stream:#x} may use it")
    if memory.owner is not None and memory.owner.flags.owndata:
        ctypes.memset(memory.address, 0xAB, memory.size)
    _freed.append(memory)
    while len(_freed) > _FREED or sum(one.size for one in _freed) > _FREED_BYTES:
        _freed.popleft()


def work(
    reads: Iterable[np.ndarray[Any, Any]] = (),
    writes: Iterable[np.ndarray[Any, Any]] = (),
    *,
    stream: Stream | None = None,
    raw: Iterable[tuple[int, int, bool]] = (),
) -> None:
    """A piece of work on a stream, the current one by default.

    Args:
        raw: addresses, bytes, whether they are written.

    Raises:
        Fault: another stream's work on the same memory may run before or after it.
    """
    with _lock:
        by = stream or current()
        _merge(by.clock, _host)
        now = by.clock[by.ptr] = by.clock.get(by.ptr, 0) + 1
        read, written = [_memory(one) for one in reads if one.nbytes], [_memory(one) for one in writes if one.nbytes]
        wrong, everything = "", _memories.copy().values()  # a copy, since arrays may end at any time
        for address, size, write in raw:
            found = [m for m in everything if m.address < address + size and address < m.address + m.size]
            (written if write else read).extend(found)
            if not found:
                wrong = f"stream {by.ptr:#x} uses what lies at {address:#x}, which was freed or never taken"
        for memory in (*read, *written):
            other, count = memory.wrote
            if other != by.ptr and by.clock.get(other, 0) < count:
                wrong = f"stream {by.ptr:#x} uses what stream {other:#x} writes, and does not wait for it"
            if memory.device != by.place:
                wrong = f"stream {by.ptr:#x} of device {by.place} uses memory of device {memory.device}"
        for memory in written:
            for other, count in memory.read.items():
                if other != by.ptr and by.clock.get(other, 0) < count:
                    wrong = f"stream {by.ptr:#x} writes what stream {other:#x} reads, and does not wait for it"
        for memory in read:
            memory.read[by.ptr] = now
        for memory in written:
            memory.wrote, memory.read = (by.ptr, now), {}
        if wrong:
            raise Fault(_fault(wrong))


def queued(address: int, size: int, stream: int) -> None:
    """A copy into memory that is not NumPy's, by the stream with that pointer; see host_nvdec.py."""
    by = _streams.get(stream, _null)
    with _lock:
        _memories.setdefault(address, _Memory(address, size, by))
    work(stream=by, raw=[(address, size, True)])


def forget(address: int, size: int) -> None:
    """The end of memory that is not NumPy's."""
    with _lock:
        for at in [at for at in _memories if address <= at < address + size]:
            del _memories[at]


def copied(to: int, origin: int, size: int, stream: int) -> None:
    """A copy on the device, by addresses."""
    work(stream=_streams[stream], raw=[(origin, size, False), (to, size, True)])
