"""The operations of reference.py on a CUDA device: temporal shift and pooling from shift.cu, search from topk.cu.

Tokens, frames and vectors are CuPy arrays, and so are the results; `linked` and queries may still lie on the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from keyreel_kernels import reference
from keyreel_kernels.cuda import Cuda, Defines

SHIFT, SEARCH = "shift.cu", "topk.cu"
# As in shift.cu.
_SHIFT_WARPS, _POOL_COLUMNS = 4, 128
# Shared memory of a block that walks along the frames: small enough for four blocks on a multiprocessor.
_RING_BYTES = 48 << 10
# Warps on a multiprocessor that keep the memory busy, each with one token on its way.
_BUSY_WARPS = 16

# As in topk.cu: threads, columns that are loaded at once, queries of a pass for each TILES.
_SEARCH_THREADS, _TEAM_BYTES, _UNROLL = 256, 64, 4
_SEARCH_HEAD_BYTES = 64 * 8 + 64 * 4 + 4 * 4 + 64 * 4
_HALF_TILES, _FLOAT_TILES = (1, 4, 16), (1, 4)
MOST_RESULTS = 1024

VARIANTS: dict[str, tuple[Defines, ...]] = {
    SHIFT: ((),),
    SEARCH: tuple(
        (("HALF", half), ("TILES", tiles))
        for half, choices in ((1, _HALF_TILES), (0, _FLOAT_TILES))
        for tiles in choices
    ),
}


# --- temporal shift -----------------------------------------------------------------------------------------------


def fixed_shift(cuda: Cuda, count: int, grid: tuple[int, int], linked: Any, *, share: float, step: int) -> Any:
    """As `reference.fixed_shift`; sources [T, P] int64 on the device."""
    # The middle one of three frames shows the pattern.
    pattern = reference.fixed_shift(3, grid, np.array([False, True, True]), share=share, step=1)[1] - 1
    source = cuda.cupy.empty((count, pattern.size), np.int64)
    if source.size:
        offset = cuda.to_device((pattern * step).astype(np.int32))
        args = (offset, _shots(cuda, linked), np.int32(count), np.int32(pattern.size), source)
        cuda.launch(SHIFT, "offset_sources", (blocks(source.size, 256),), (256,), args)
    return source


def adaptive_shift(
    cuda: Cuda, patches: Any, grid: tuple[int, int], linked: Any, *, steps: int, threshold: float
) -> Any:
    """As `reference.adaptive_shift` on [T, P, C] float32 or float16; sources [T, P] int64 on the device.

    Decisions that hang on less than the rounding of float32 may differ.
    """
    count, places, columns = patches.shape
    source = cuda.cupy.empty((count, places), np.int64)
    if not source.size:
        return source
    patches = _tokens(cuda, patches)
    size = patches.dtype.itemsize
    if patches.strides[1:] != (columns * size, size):
        patches = cuda.cupy.ascontiguousarray(patches)
    stride, rest = divmod(patches.strides[0] if count > 1 else places * columns * size, size)
    name = "patch_products_half" if size == 2 else "patch_products_float"
    aligned = not (rest or patches.data.ptr % 16 or stride * size % 16 or columns * size % 16)
    width = ring_columns(columns, size, steps)
    span = frames_of_a_warp(count, places, steps, cuda.multiprocessors)
    shape = blocks(places, _SHIFT_WARPS), blocks(count, span)
    products = cuda.cupy.zeros((steps + 1, count, places), np.float32)
    for column in range(0, columns, width):
        part = min(width, columns - column)
        whole = aligned and part * size % 16 == 0
        numbers = map(np.int32, (columns, count, places, column, part, whole, steps, span))
        args = (patches, np.int64(stride), *numbers, products)
        shared = _SHIFT_WARPS * (steps + 2) * 16 * blocks(part * size, 16)
        cuda.launch(SHIFT, name, shape, (32 * _SHIFT_WARPS,), args, shared=shared)
    sizes = map(np.int32, (count, places, grid[1], steps))
    args = (products, _shots(cuda, linked), *sizes, np.float32(threshold), source)
    shared = 4 * (_SHIFT_WARPS * places + steps)
    cuda.launch(SHIFT, "decide_sources", (count,), (32 * _SHIFT_WARPS,), args, shared=shared)
    return source


def blocks(number: int, size: int) -> int:
    """How many blocks of a size it takes."""
    return -(-number // size)


def ring_columns(columns: int, size: int, steps: int) -> int:
    """Columns that one launch handles: steps + 2 rows of them for each warp fit into the block's shared memory."""
    most = _RING_BYTES // _SHIFT_WARPS // (steps + 2) // 16 * 16 // size
    parts = blocks(columns, most)
    return min(blocks(blocks(columns, parts) * size, 16) * 16 // size, most) if columns else 1


def frames_of_a_warp(count: int, places: int, steps: int, multiprocessors: int) -> int:
    """Frames that a warp walks along: short enough to fill the device, long against the `steps` it reads before."""
    wanted = blocks(multiprocessors * _BUSY_WARPS, places)
    return max(blocks(count, wanted), min(2 * steps, count))


def shift_tokens(cuda: Cuda, tokens: Any, source: Any, prefix: int) -> Any:
    """As `reference.shift_tokens` on float32 or float16."""
    tokens = cuda.cupy.ascontiguousarray(_tokens(cuda, tokens))
    out = cuda.cupy.empty_like(tokens)
    if out.size:
        row_bytes = tokens.shape[2] * tokens.dtype.itemsize
        word = 16 if row_bytes % 16 == 0 and tokens.data.ptr % 16 == 0 else 2
        rows = tokens.shape[0] * tokens.shape[1]
        numbers = (row_bytes // word, prefix, tokens.shape[1] - prefix)
        args = (tokens, _sources(cuda, source), np.int64(rows), *map(np.int32, numbers), out)
        cuda.launch(SHIFT, f"gather_tokens_{word}", (blocks(rows, 8),), (256,), args)
    return out


def shift_pixels(cuda: Cuda, frames: Any, source: Any, grid: tuple[int, int]) -> Any:
    """As `reference.shift_pixels`."""
    frames = cuda.cupy.ascontiguousarray(frames)
    out = cuda.cupy.empty_like(frames)
    if out.size:
        count, height, width = frames.shape[:3]
        word = 4 if width % 4 == 0 and frames.data.ptr % 4 == 0 else 1
        args = (frames, _sources(cuda, source), *map(np.int32, (height, width, *grid)), out)
        cuda.launch(SHIFT, f"gather_pixels_{word}", (count * height,), (128,), args)
    return out


def _tokens(cuda: Cuda, tokens: Any) -> Any:
    tokens = cuda.to_device(tokens)
    return tokens if tokens.dtype in (np.float16, np.float32) else tokens.astype(np.float32)


def _floats(cuda: Cuda, array: Any) -> Any:
    return cuda.cupy.ascontiguousarray(cuda.to_device(array).astype(np.float32, copy=False))


def _sources(cuda: Cuda, source: Any) -> Any:
    return cuda.cupy.ascontiguousarray(cuda.to_device(source).astype(np.int64, copy=False))


def _shots(cuda: Cuda, linked: Any) -> Any:
    """[T] int32: the number of the shot that each frame belongs to."""
    return cuda.cupy.cumsum(~cuda.to_device(linked), dtype=np.int32)


# --- pooling and search -------------------------------------------------------------------------------------------


def weighted_pool(cuda: Cuda, values: Any, weights: Any, attention: Any, strength: float) -> Any:
    """As `reference.weighted_pool` on [N, P, D] float32 or float16 values."""
    values = cuda.cupy.ascontiguousarray(_tokens(cuda, values))
    weights, attention = _floats(cuda, weights), _floats(cuda, attention)
    rows, places, columns = values.shape
    out = cuda.cupy.empty((rows, columns), np.float32)
    if out.size:
        name = "pool_half" if values.dtype == np.float16 else "pool_float"
        args = (values, weights, attention, np.int32(places), np.int32(columns), np.float64(strength), out)
        shared = 8 * (places + 8) + 4 * 8 * _POOL_COLUMNS
        cuda.launch(SHIFT, name, (rows, blocks(columns, _POOL_COLUMNS)), (256,), args, shared=shared)
        cuda.launch(SHIFT, "unit_rows", (blocks(rows, 8),), (256,), (out, np.int32(rows), np.int32(columns)))
    return out


def top_k(cuda: Cuda, queries: Any, vectors: Any, k: int) -> tuple[Any, Any]:
    """As `reference.top_k` on [N, D] float32 or float16 vectors, k up to 1,024.

    The rows are read once for every `pass_queries` queries; rows of halves are multiplied on the tensor cores, by
    queries in two halves each, so that scores are as good as float32's. A NaN counts as minus infinity.

    Raises:
        ValueError: k is larger.
    """
    xp = cuda.cupy
    queries = _floats(cuda, queries)
    vectors = _tokens(cuda, vectors)
    number, rows, size = len(queries), len(vectors), vectors.dtype.itemsize
    k = min(k, rows)
    if k > MOST_RESULTS:
        raise ValueError(f"k is {k}, a search on the device gives at most {MOST_RESULTS}")
    if rows > 0xFFFFFFFF:
        raise ValueError(f"{rows} vectors, a search on the device takes at most {0xFFFFFFFF}")
    scores, found = xp.empty((number, k), np.float32), xp.empty((number, k), np.int64)
    if not scores.size:
        return scores, found
    columns = max(blocks(vectors.shape[1] * size, 16), 1) * 16 // size
    if columns != vectors.shape[1] or vectors.data.ptr % 16:  # rows that do not begin at 16 bytes are copied
        queries, vectors = (_widened(xp, one, columns) for one in (queries, vectors))
    vectors = xp.ascontiguousarray(vectors)
    capacity = max(64, 1 << (2 * k - 1).bit_length())
    at_once = pass_queries(number, columns, size, capacity, cuda.shared_bytes)
    merge_shared = _SEARCH_HEAD_BYTES + 8 * capacity
    for first in range(0, number, at_once):
        some = min(at_once, number - first)
        tiles, shared = _pass(some, columns, size, capacity)
        defines: Defines = (("HALF", int(size == 2)), ("TILES", tiles))
        span = rows_of_a_block(rows, cuda.multiprocessors, min(cuda.shared_bytes // shared, 4))
        lists = xp.empty((blocks(rows, span), some, k), np.uint64)
        numbers = map(np.int32, (some, columns, k, capacity))
        args = (vectors, np.int64(rows), np.int64(span), queries[first : first + some], *numbers, lists)
        cuda.launch(SEARCH, "top_k_stream", (len(lists),), (_SEARCH_THREADS,), args, shared=shared, defines=defines)
        numbers = map(np.int32, (len(lists), some, k, capacity))
        args = (lists, *numbers, scores[first : first + some], found[first : first + some])
        cuda.launch(SEARCH, "top_k_merge", (some,), (_SEARCH_THREADS,), args, shared=merge_shared, defines=defines)
    return scores, found


def _widened(xp: Any, array: Any, columns: int) -> Any:
    wide = xp.zeros((len(array), columns), array.dtype)
    wide[:, : array.shape[1]] = array
    return wide


def pass_queries(number: int, columns: int, size: int, capacity: int, shared_bytes: int) -> int:
    """Queries of one pass over the rows: as many as the tiles and a block's shared memory hold, evenly over passes.

    Raises:
        ValueError: not one fits.
    """
    most = min(number, 4 * (_HALF_TILES if size == 2 else _FLOAT_TILES)[-1])
    while most and _pass(most, columns, size, capacity)[1] > shared_bytes:
        most -= 1
    if not most:
        raise ValueError(f"a query of {columns} numbers does not fit into {shared_bytes} bytes of shared memory")
    return blocks(number, blocks(number, most))


def _pass(number: int, columns: int, size: int, capacity: int) -> tuple[int, int]:
    """TILES and bytes of shared memory for so many queries."""
    tiles = next(n for n in (_HALF_TILES if size == 2 else _FLOAT_TILES) if number <= 4 * n)
    row_bytes = blocks(columns * size, _TEAM_BYTES * _UNROLL) * _TEAM_BYTES * _UNROLL
    # A half's query is placed twice, each on a row that is one load longer: no two lanes meet in a bank.
    placed = 4 * tiles * (2 * (row_bytes + _TEAM_BYTES) if size == 2 else row_bytes)
    return tiles, _SEARCH_HEAD_BYTES + 8 * number * capacity + placed


def rows_of_a_block(rows: int, multiprocessors: int, resident: int) -> int:
    """Rows that a block streams: a multiple of what it takes at once, the same for all blocks that run at once."""
    at_once = _SEARCH_THREADS // 2
    return blocks(blocks(rows, at_once), multiprocessors * resident) * at_once
