"""The device object, and the emulation it is tested on."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import cuda_streams
import numpy as np
import pytest
from bounds import FLOAT32
from cuda_on_host import HostedCupy, host_cuda
from cuda_streams import Fault

from keyreel_kernels import cuda as module
from keyreel_kernels import pictures
from keyreel_kernels.arrays import HostArrays
from keyreel_kernels.cuda import Cuda
from keyreel_kernels.ops import ops_on
from keyreel_kernels.surfaces import Surface

HEAD = 'extern "C" __global__ void kernel'
SUM = "(const float* x, int n, float* out) {\n    if (threadIdx.x < n) out[threadIdx.x] = x[threadIdx.x] + PLUS;\n}\n"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Takes the code of one kernel, called kernel; returns a file name for `launch`."""
    prelude = (module.FOLDER / "device.cuh").read_text("utf-8")

    def write(code: str) -> str:
        monkeypatch.setattr(module, "source_of", lambda _: f"{prelude}\n{code}")
        return f"{zlib.crc32(code.encode())}.cu"

    return write


# --- the device ---------------------------------------------------------------------------------------------------


def test_a_launch_runs_and_defines_make_variants(cuda: Cuda, written: Callable[[str], str]) -> None:
    file = written(HEAD + SUM)
    with cuda.scope():
        x, out = cuda.to_device(np.arange(32, dtype=np.float32)), cuda.to_device(np.zeros(32, np.float32))
        for plus in (1, 2, 1):
            cuda.launch(file, "kernel", (1,), (32,), (x, np.int32(7), out), defines=(("PLUS", plus),))
            expected = np.where(np.arange(32) < 7, np.arange(32) + plus, 0)
            np.testing.assert_array_equal(cuda.to_host(out), expected)
            out[:] = 0


def test_each_variant_is_compiled_once(written: Callable[[str], str]) -> None:
    emulated, file = host_cuda(1), written(HEAD + SUM)
    made: list[Any] = []
    plain = emulated.cupy.RawModule

    def counting(**options: Any) -> Any:
        made.append(options["options"])
        return plain(**options)

    emulated.cupy.RawModule = counting
    x, out = emulated.to_device(np.zeros(32, np.float32)), emulated.to_device(np.zeros(32, np.float32))

    def launch(plus: int) -> None:
        emulated.launch(file, "kernel", (1,), (32,), (x, np.int32(7), out), defines=(("PLUS", plus),))

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(launch, (1, 2, 1, 2, 1)))
    assert sorted(made) == [(module.STANDARD, "-DPLUS=1"), (module.STANDARD, "-DPLUS=2")]


def test_shared_memory_has_a_limit_and_must_be_asked_for(cuda: Cuda, written: Callable[[str], str]) -> None:
    fill = "    KR_SHARED(int, all);\n    for (int i = threadIdx.x; i < n; i += blockDim.x) all[i] = i;\n"
    last = "    __syncthreads();\n    if (threadIdx.x == 0) *out = all[n - 1];\n}\n"
    file = written(HEAD + "(int n, int* out) {\n" + fill + last)
    with cuda.scope():
        out = cuda.to_device(np.zeros(1, np.int32))
        for shared in (4096, cuda.shared_bytes, 1024):
            cuda.launch(file, "kernel", (1,), (64,), (np.int32(shared // 4), out), shared=shared)
            assert cuda.to_host(out)[0] == shared // 4 - 1
        with pytest.raises(ValueError, match=f"{cuda.shared_bytes + 1} bytes of shared memory.*{cuda.shared_bytes}"):
            cuda.launch(file, "kernel", (1,), (64,), (np.int32(1), out), shared=cuda.shared_bytes + 1)
        for grid, block in (((0,), (32,)), ((1, 0), (32,)), ((1,), (0,))):
            with pytest.raises(ValueError, match="empty"):
                cuda.launch(file, "kernel", grid, block, (np.int32(1), out))


def test_what_leaves_the_device_is_counted(cuda: Cuda) -> None:
    before = cuda.bytes_to_host
    host = np.arange(12, dtype=np.int16)
    with cuda.scope():
        there = cuda.to_device(host)
        assert cuda.to_device(there) is there
        host[0] = 99  # a copy went up
        doubled = there + there
    assert cuda.bytes_to_host == before
    np.testing.assert_array_equal(cuda.to_host(doubled), np.arange(12) * 2)
    assert cuda.bytes_to_host == before + 24
    assert cuda.to_host(host) is host
    assert cuda.bytes_to_host == before + 24


def test_arrays_come_over_by_dlpack(cuda: Cuda) -> None:
    class Foreign:
        """An array of another library: nothing but DLPack."""

        def __init__(self, array: Any) -> None:
            self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__

    with cuda.scope():
        own = cuda.to_device(np.arange(6, dtype=np.float32))
        for array in (np.arange(6, dtype=np.float32), own):
            taken = cuda.to_device(Foreign(array))
            assert isinstance(taken, cuda.cupy.ndarray)
            np.testing.assert_array_equal(cuda.to_host(taken), np.arange(6))
        own[0] = 5
        assert cuda.to_host(taken)[0] == 5  # without a copy where it lay on the device
        elsewhere = Foreign(own)
        elsewhere.__dlpack_device__ = lambda: (2, cuda.index + 1)
        with pytest.raises(ValueError, match=f"on cuda:{cuda.index + 1}, the engine on cuda:{cuda.index}"):
            cuda.to_device(elsewhere)
        with pytest.raises(ValueError, match="on a device, the engine on the CPU"):
            HostArrays().to_device(own)


def test_streams_are_put_in_step(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours waits for what the caller's was given, and the caller's for ours; within our scope there is no other."""
    done: list[tuple[str, Any]] = []

    def stream(name: str, ptr: int) -> Any:
        return SimpleNamespace(ptr=ptr, record=lambda: name, wait_event=lambda event: done.append((name, event)))

    ours, callers = stream("ours", 1), stream("callers", 2)
    monkeypatch.setattr(cuda, "stream", ours)
    for current, expected in ((callers, [("ours", "callers"), ("callers", "ours")]), (ours, [])):
        monkeypatch.setattr(cuda.cupy.cuda, "get_current_stream", lambda current=current: current)
        done.clear()
        cuda.join()
        assert done == expected


def test_the_emulation_finds_what_runs_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new thread begins on device 0; CUDA answers cudaErrorInvalidResourceHandle."""
    monkeypatch.setattr(cuda_streams, "faults", [])
    emulated = host_cuda(1)
    with emulated.scope():
        there, event = emulated.to_device(np.zeros(3)), emulated.stream.record()
    assert there.device.id == 1
    for use in (
        emulated.stream.record,
        emulated.stream.__enter__,
        lambda: emulated.stream.wait_event(event),
        lambda: emulated.stream.record(cuda_streams.Event()),
        lambda: there + there,
    ):
        with pytest.raises(Fault, match="of device 1"):
            use()
    assert len(cuda_streams.faults) == 5


def test_the_emulation_poisons_freed_memory() -> None:
    emulated = host_cuda(1)
    with emulated.scope():
        there = emulated.to_device(np.arange(9.0))
        view, address = there[2:], there.data.ptr
        del there
        assert ctypes.string_at(address, 8) == bytes(8)  # a view keeps it
        del view
        assert ctypes.string_at(address, 72) == b"\xab" * 72


@pytest.mark.parametrize("whole", [True, False])
def test_a_contiguous_copy_lives_until_it_is_read(cuda: Cuda, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """The kernel reads frames at addresses in a table, which keep nothing alive."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 37, 90, 3), np.uint8)
    size: dict[str, Any] = {"height": 24, "width": 24, "mode": "squash", "interpolation": "bicubic"}
    with cuda.scope():
        strided = cuda.to_device(frames)[:, :, ::2]
    if whole:
        found = cuda.to_host(ops_on(cuda).transform(strided, **size))
        assert np.abs(found.astype(int) - pictures.transform(frames[:, :, ::2], **size)).max() <= 1
        return
    if not isinstance(cuda.cupy, HostedCupy):
        pytest.skip("a real device does not tell")
    copy = cuda.cupy.ascontiguousarray

    class Dropped(list[Any]):
        """Where a copy lay."""

        def __init__(self, array: Any) -> None:
            super().__init__(range(len(array)))
            self.shape, self.strides, self.data = array.shape, array.strides, array.data

    monkeypatch.setattr(cuda.cupy, "ascontiguousarray", lambda array: Dropped(copy(array)))
    monkeypatch.setattr(cuda_streams, "faults", [])
    with pytest.raises(Fault, match="was freed"):
        ops_on(cuda).transform(strided, **size)


def test_planes_that_go_up_live_until_they_are_read(cuda: Cuda) -> None:
    draw = np.random.default_rng(0)
    planes = [draw.integers(16, 236, shape, np.uint8) for shape in ((32, 48), (16, 24, 2))]
    surfaces = [Surface(tuple(planes), 8, "bt709", False, (32, 48))] * 2
    size: dict[str, Any] = {"height": 20, "width": 20, "mode": "squash", "interpolation": "bilinear"}
    found = cuda.to_host(ops_on(cuda).frames_from_surfaces(surfaces, **size))
    assert np.abs(found.astype(int) - pictures.frames_from_surfaces(surfaces, **size)).max() <= 1


def test_nothing_leaves_by_itself(cuda: Cuda) -> None:
    with cuda.scope():
        there = cuda.to_device(np.arange(3.0))
        with pytest.raises(TypeError):
            np.asarray(there)
        with pytest.raises(TypeError):
            there + np.arange(3.0)


def test_a_device_shared_by_threads(cuda: Cuda) -> None:
    def work(number: int) -> None:
        frames = np.random.default_rng(number).integers(0, 256, (1, 8, 9, 3), np.uint8)
        histogram = ops_on(cuda).frame_signals(cuda.to_device(frames))[3]
        np.testing.assert_allclose(cuda.to_host(histogram), pictures.frame_signals(frames)[3], atol=FLOAT32)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


# --- the primitives, emulated and real ----------------------------------------------------------------------------


@pytest.mark.full
def test_mma_is_a_product(cuda: Cuda, written: Callable[[str], str]) -> None:
    """d [16, 8] = a [16, 16] b [16, 8], its registers as PTX has them."""
    file = written(
        HEAD + "(const uint16_t* a, const uint16_t* b, float* d) {\n"
        "    const int group = threadIdx.x / 4, pair = threadIdx.x % 4 * 2;\n"
        "    uint32_t left[4], right[2];\n"
        "    for (int n = 0; n < 4; ++n) {\n"
        "        const int at = (group + n % 2 * 8) * 16 + pair + n / 2 * 8;\n"
        "        left[n] = a[at] | uint32_t(a[at + 1]) << 16;\n"
        "    }\n"
        "    for (int n = 0; n < 2; ++n) {\n"
        "        const int row = pair + n * 8;\n"
        "        right[n] = b[row * 8 + group] | uint32_t(b[row * 8 + 8 + group]) << 16;\n"
        "    }\n"
        "    float sums[4];\n"
        "    for (int n = 0; n < 4; ++n) sums[n] = d[(group + n / 2 * 8) * 8 + pair + n % 2];\n"
        "    kr_mma_16x8x16(sums, left, right);\n"
        "    for (int n = 0; n < 4; ++n) d[(group + n / 2 * 8) * 8 + pair + n % 2] = sums[n];\n"
        "}\n"
    )
    draw = np.random.default_rng(0)
    a, b = draw.integers(-8, 9, (16, 16)).astype(np.float16), draw.integers(-8, 9, (16, 8)).astype(np.float16)
    d = draw.integers(-8, 9, (16, 8)).astype(np.float32)
    with cuda.scope():
        out = cuda.to_device(d)
        cuda.launch(file, "kernel", (1,), (32,), (cuda.to_device(a), cuda.to_device(b), out))
    np.testing.assert_array_equal(cuda.to_host(out), d + a.astype(np.float32) @ b.astype(np.float32))


def test_products_and_sums_are_fused(cuda: Cuda, written: Callable[[str], str]) -> None:
    """What rounding cut off a product is left if its rounded value is subtracted, as NVRTC compiles it."""
    file = written(
        HEAD + "(const float* a, const float* b, const float* product, float* rest) {\n"
        "    rest[threadIdx.x] = a[threadIdx.x] * b[threadIdx.x] - product[threadIdx.x];\n}\n"
    )
    a, b = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    expected = a.astype(np.float64) * b - a * b
    assert expected.all()
    with cuda.scope():
        rest = cuda.to_device(np.zeros(64, np.float32))
        cuda.launch(file, "kernel", (1,), (64,), (*map(cuda.to_device, (a, b, a * b)), rest))
    found = cuda.to_host(rest)
    assert found.any(), "nothing is fused: this CPU has no FMA, or the compiler does not use it"
    np.testing.assert_array_equal(found, expected)


@pytest.mark.full
def test_halves_are_converted_as_numpy_does(cuda: Cuda, written: Callable[[str], str]) -> None:
    file = written(
        HEAD + "(const float* x, uint16_t* halves, float* back, int n) {\n"
        "    for (int i = threadIdx.x; i < n; i += blockDim.x) {\n"
        "        halves[i] = kr_float_to_half(x[i]);\n"
        "        back[i] = kr_half_to_float(halves[i]);\n"
        "    }\n}\n"
    )
    draw = np.random.default_rng(0)
    ties = np.array([1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 3 * 2**-25, 65519, -0.0, np.inf], np.float32)
    x = np.concatenate([ties, draw.normal(size=300).astype(np.float32) * 10.0 ** draw.integers(-7, 5, 300)])
    x = x.astype(np.float32)
    with cuda.scope():
        halves, back = cuda.to_device(np.zeros(len(x), np.float16)), cuda.to_device(np.zeros(len(x), np.float32))
        cuda.launch(file, "kernel", (1,), (64,), (cuda.to_device(x), halves, back, np.int32(len(x))))
    np.testing.assert_array_equal(cuda.to_host(halves).view(np.uint16), x.astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(cuda.to_host(back), x.astype(np.float16).astype(np.float32))
