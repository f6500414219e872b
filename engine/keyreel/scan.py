"""Exact search in 8 bits and float32, with the integer products of onnxruntime."""

from __future__ import annotations

import numpy as np

from keyreel.errors import import_extra
from keyreel.types import F32
from keyreel_kernels.scan import I8, QUERY, Products, Scan

# What makes queries unsigned.
_ZERO = QUERY + 1


def exact_scan(vectors: F32, *, threads: int = 0) -> Scan:
    """What answers `top_k(queries, k)` over the vectors, exactly, several times as fast as products in float32.

    Args:
        vectors: [N, D] float32, finite; kept and not copied, may be a mapped file. Half of their memory is held
            besides: onnxruntime keeps the rows in 8 bits and what it has packed of them.
        threads: of onnxruntime; 0 takes what it finds.

    Raises:
        MissingExtra: onnxruntime is not installed.
    """
    runtime = import_extra("onnxruntime", extra="cpu", purpose="searching in 8 bits")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def store(rows: I8) -> Products:
        session = runtime.InferenceSession(_graph(rows), options, providers=["CPUExecutionProvider"])

        def products(queries: I8) -> np.ndarray:
            # Unsigned times signed is what processors have an instruction for.
            (found,) = session.run(None, {"queries": (queries + np.int8(_ZERO)).astype(np.uint8)})
            return np.asarray(found)

        return products

    return Scan(vectors, store)


def _graph(rows: I8) -> bytes:
    """The ONNX model MatMulInteger(queries, rows^T, 64), as the fields of onnx.proto: what onnxruntime packs once.

    The package onnx, which would write it, is not needed to run a model.
    """
    count, width = rows.shape

    def held(name: str, kind: int, shape: tuple[int, ...], data: bytes) -> bytes:
        return b"".join(_number(1, n) for n in shape) + _number(2, kind) + _bytes(8, name.encode()) + _bytes(9, data)

    def value(name: str, kind: int, columns: int) -> bytes:
        shape = _bytes(1, _bytes(2, b"Q")) + _bytes(1, _number(1, columns))
        return _bytes(1, name.encode()) + _bytes(2, _bytes(1, _number(1, kind) + _bytes(2, shape)))

    names = b"".join(_bytes(1, name) for name in (b"queries", b"rows", b"zero"))
    graph = (
        _bytes(1, names + _bytes(2, b"products") + _bytes(4, b"MatMulInteger"))
        + _bytes(2, b"scan")
        + _bytes(5, held("rows", 3, (width, count), np.ascontiguousarray(rows.T).tobytes()))
        + _bytes(5, held("zero", 2, (), bytes([_ZERO])))
        + _bytes(11, value("queries", 2, width))
        + _bytes(12, value("products", 6, count))
    )
    return _number(1, 10) + _bytes(7, graph) + _bytes(8, _bytes(1, b"") + _number(2, 20))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
