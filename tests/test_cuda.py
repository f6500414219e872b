"""The device object, the emulation it is tested on, and the arithmetic of launches."""

from __future__ import annotations

import itertools
import threading
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cuda_on_host import HostedArray, host_cuda

from keyreel_kernels import cuda as module
from keyreel_kernels import cuda_patches
from keyreel_kernels.arrays import HostArrays
from keyreel_kernels.cuda import Cuda

HEAD = 'extern "C" __global__ void kernel'
SUM = "(const float* x, int n, float* out) {\n    if (threadIdx.x < n) out[threadIdx.x] = x[threadIdx.x] + PLUS;\n}\n"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a file of the code of one kernel, called kernel; gives a name that no other test has."""
    prelude = (module.FOLDER / "device.cuh").read_text("utf-8")

    def write(code: str) -> str:
        monkeypatch.setattr(module, "source_of", lambda _: f"{prelude}\n{code}")
        return f"{zlib.crc32(code.encode())}.cu"

    return write


@pytest.fixture
def emulated() -> Cuda:
    return host_cuda()


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


def test_each_variant_is_compiled_once(emulated: Cuda, written: Callable[[str], str]) -> None:
    file = written(HEAD + SUM)
    made: list[Any] = []
    plain = emulated.cupy.RawModule

    def counting(**options: Any) -> Any:
        made.append(options["options"])
        return plain(**options)

    emulated.cupy.RawModule = counting
    x, out = emulated.to_device(np.zeros(32, np.float32)), emulated.to_device(np.zeros(32, np.float32))

    def launch(plus: int) -> None:
        emulated.launch(file, "kernel", (1,), (32,), (x, np.int32(7), out), defines=(("PLUS", plus),))

    threads = [threading.Thread(target=launch, args=(plus,)) for plus in (1, 2, 1, 2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [(module.STANDARD, "-DPLUS=1"), (module.STANDARD, "-DPLUS=2")]


def test_wrong_arguments_are_seen_before_they_do_harm(emulated: Cuda, written: Callable[[str], str]) -> None:
    """On a device they would be read as something else."""
    file = written(HEAD + SUM)
    x = emulated.to_device(np.zeros(32, np.float32))
    for args, message in (
        ((x, np.int32(1)), "takes 3 arguments"),
        ((x, np.int64(1), x), "argument 1 has 8 bytes, the kernel takes 4"),
        ((x, 1, x), "NumPy scalars"),
        ((np.zeros(32, np.float32), np.int32(1), x), "ndarray"),
    ):
        with pytest.raises((RuntimeError, TypeError), match=message):
            emulated.launch(file, "kernel", (1,), (32,), args, defines=(("PLUS", 0),))


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

    class Stream:
        def __init__(self, name: str, ptr: int) -> None:
            self.name, self.ptr = name, ptr

        def record(self) -> str:
            return self.name

        def wait_event(self, event: str) -> None:
            done.append((self.name, event))

    ours, callers = Stream("ours", 1), Stream("callers", 2)
    monkeypatch.setattr(cuda, "stream", ours)
    for current, expected in ((callers, [("ours", "callers"), ("callers", "ours")]), (ours, [])):
        monkeypatch.setattr(cuda.cupy.cuda, "get_current_stream", lambda current=current: current)
        done.clear()
        cuda.join()
        assert done == expected


def test_nothing_leaves_by_itself(cuda: Cuda) -> None:
    with cuda.scope():
        there = cuda.to_device(np.arange(3.0))
        with pytest.raises(TypeError):
            np.asarray(there)
        with pytest.raises(TypeError):
            there + np.arange(3.0)


def test_the_emulation_refuses_what_would_copy(emulated: Cuda) -> None:
    """CuPy copies a number down for these without a word: on the CPU they are errors."""
    one = emulated.to_device(np.ones(1))
    attempts: list[Callable[[Any], Any]] = [bool, int, float, lambda x: range(3)[x], lambda x: np.zeros(3)[x]]
    for attempt in attempts:
        with pytest.raises((TypeError, IndexError)):
            attempt(one)
    with pytest.raises(AttributeError):
        emulated.cupy.no_such_function  # noqa: B018


def test_the_scope_is_entered_again_and_left_in_order(emulated: Cuda) -> None:
    depths = []
    with emulated.scope():
        depths.append(emulated.stream.depth)
        with emulated.scope():
            depths.append(emulated.stream.depth)
            emulated.to_device(np.zeros(2))
        depths.append(emulated.stream.depth)
    with pytest.raises(KeyError), emulated.scope():
        raise KeyError
    assert [*depths, emulated.stream.depth] == [1, 2, 1, 0]


def test_a_device_shared_by_threads(cuda: Cuda) -> None:
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            x = np.random.default_rng(number).integers(-3, 4, (40, 8)).astype(np.float32)
            with cuda.scope():
                _, rows = cuda_patches.top_k(cuda, x[:1], cuda.to_device(x), 5)
            expected = np.argsort(-(x[:1] @ x.T)[0], kind="stable")[:5]
            np.testing.assert_array_equal(cuda.to_host(rows)[0], expected)
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# --- the primitives, emulated and real ----------------------------------------------------------------------------


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


def test_a_cluster_reads_its_neighbours_memory(cuda: Cuda, written: Callable[[str], str]) -> None:
    size = 4 if cuda.capability >= (9, 0) else 1
    file = written(
        "KR_CLUSTER_KERNEL kernel(int* out) {\n"
        "    KR_SHARED(int, own);\n"
        "    own[threadIdx.x] = blockIdx.x * 100 + threadIdx.x;\n"
        "    kr_cluster_sync();\n"
        "    const unsigned next = (kr_cluster_rank() + 1) % kr_cluster_size();\n"
        "    out[blockIdx.x * 32 + threadIdx.x] = kr_cluster_shared(own, next)[threadIdx.x];\n"
        "    kr_cluster_sync();\n}\n"
    )
    with cuda.scope():
        out = cuda.to_device(np.zeros((3 * size, 32), np.int32))
        cuda.launch(file, "kernel", (3 * size,), (32,), (out,), shared=128, defines=(("CLUSTER", size),))
    block = np.arange(3 * size)
    expected = (block // size * size + (block + 1) % size)[:, None] * 100 + np.arange(32)
    np.testing.assert_array_equal(cuda.to_host(out), expected)


def test_all_blocks_of_a_cooperative_launch_meet(cuda: Cuda, written: Callable[[str], str]) -> None:
    file = written(
        HEAD + "(int* sums, unsigned* barrier, int rounds) {\n"
        "    for (int round = 0; round < rounds; ++round) {\n"
        "        if (threadIdx.x == 0) atomicAdd(sums + round, 1);\n"
        "        kr_grid_sync(barrier);\n"
        "        if (threadIdx.x == 0 && sums[round] != int(gridDim.x)) atomicAdd(sums + rounds, 1);\n"
        "        kr_grid_sync(barrier);\n"
        "    }\n}\n"
    )
    with cuda.scope():
        sums, barrier = cuda.to_device(np.zeros(6, np.int32)), cuda.to_device(np.zeros(2, np.uint32))
        for _ in range(2):  # the barrier is fit for the next launch
            sums[:] = 0
            cuda.launch(file, "kernel", (7,), (64,), (sums, barrier, np.int32(5)), cooperative=True)
    assert cuda.to_host(sums).tolist() == [7] * 5 + [0]


def test_copies_arrive(cuda: Cuda, written: Callable[[str], str]) -> None:
    file = written(
        HEAD + "(const uint4* from, uint4* to) {\n"
        "    KR_SHARED(uint4, held);\n"
        "    kr_copy_async_16(held + threadIdx.x, from + threadIdx.x);\n"
        "    kr_copy_wait();\n"
        "    __syncthreads();\n"
        "    to[threadIdx.x] = held[31 - threadIdx.x];\n}\n"
    )
    numbers = np.arange(128, dtype=np.uint32).reshape(32, 4)
    with cuda.scope():
        out = cuda.to_device(np.zeros_like(numbers))
        cuda.launch(file, "kernel", (1,), (32,), (cuda.to_device(numbers), out), shared=512)
    np.testing.assert_array_equal(cuda.to_host(out), numbers[::-1])


@pytest.mark.parametrize(
    ("barrier", "waiting"),
    [("__syncthreads()", "0 threads wait for their warp, 40 for their block"), ("__syncwarp()", "8 threads wait for")],
)
def test_a_barrier_that_not_all_reach_is_reported(
    emulated: Cuda, written: Callable[[str], str], barrier: str, waiting: str
) -> None:
    """On a device it may hang, or pass."""
    file = written(HEAD + "(int* out) {\n    if (threadIdx.x < 40) " + barrier + ";\n    out[threadIdx.x] = 1;\n}\n")
    with pytest.raises(RuntimeError, match=waiting):
        emulated.launch(file, "kernel", (1,), (64,), (emulated.to_device(np.zeros(64, np.int32)),))


def test_a_device_array_is_the_stand_ins(emulated: Cuda) -> None:
    assert isinstance(emulated.to_device(np.zeros(3)), HostedArray)


# --- the arithmetic of launches -----------------------------------------------------------------------------------


def test_search_spans_cover_all_rows_and_fit() -> None:
    for rows, processors, resident in itertools.product(
        (1, 127, 128, 129, 5000, 10**8 + 7, 2**32 - 1), (1, 4, 132), (1, 4)
    ):
        span = cuda_patches.rows_of_a_block(rows, processors, resident)
        count = cuda_patches.blocks(rows, span)
        assert (count - 1) * span < rows <= count * span
        assert count <= processors * resident
        assert span % 128 == 0


def test_search_passes_hold_all_queries_and_fit_every_card() -> None:
    most = {}
    for size, columns, k, shared in itertools.product(
        (2, 4), (16, 512, 768, 1152), (1, 10, 100, 1024), (64 << 10, 99 << 10, 163 << 10, 227 << 10)
    ):
        capacity = max(64, 1 << (2 * k - 1).bit_length())
        assert capacity >= 2 * k
        for number in (1, 2, 5, 33, 64, 65, 200):
            at_once = cuda_patches.pass_queries(number, columns, size, capacity, shared)
            tiles, taken = cuda_patches._pass(at_once, columns, size, capacity)
            assert 1 <= at_once <= min(number, 4 * tiles)
            assert taken <= shared
            assert (("HALF", int(size == 2)), ("TILES", tiles)) in cuda_patches.VARIANTS["topk.cu"]
            passes = cuda_patches.blocks(number, at_once)
            most[size, columns, k, shared, number] = at_once
            assert passes * at_once >= number
    # The sizes that matter: rows of 512 halves on an H100 or H200.
    assert most[2, 512, 10, 227 << 10, 64] == 64
    assert most[2, 512, 1024, 227 << 10, 5] == 5
    with pytest.raises(ValueError, match="does not fit"):
        cuda_patches.pass_queries(1, 60000, 2, 64, 64 << 10)


def test_shift_rings_fit_and_cover_all_columns() -> None:
    for columns, size, steps in itertools.product((1, 7, 100, 768, 1024, 1537), (2, 4), (1, 3, 8, 32)):
        width = cuda_patches.ring_columns(columns, size, steps)
        assert width * size % 16 == 0  # each launch begins where 16 bytes do
        part = min(width, columns)
        assert 4 * (steps + 2) * 16 * cuda_patches.blocks(part * size, 16) <= 48 << 10
    assert cuda_patches.ring_columns(768, 2, 3) == 768  # one launch, each token read once


def test_warps_cover_all_frames_and_read_little_twice() -> None:
    for count, places, steps, processors in itertools.product(
        (1, 5, 64, 1000, 70000), (1, 49, 729), (1, 3, 32), (1, 132)
    ):
        span = cuda_patches.frames_of_a_warp(count, places, steps, processors)
        parts = cuda_patches.blocks(count, span)
        assert (parts - 1) * span < count <= parts * span
        assert parts <= 65535
        assert (parts - 1) * steps <= count / 2
