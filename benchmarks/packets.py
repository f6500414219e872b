"""Python's share of decoding on a device: microseconds a packet, with a decoder that gives back at once.

    python -m benchmarks.packets [--quick] [-o FILE]

Everything else is real: reading, planning, the filter, the checks; pictures are neither copied nor converted. A process
can decode no more than 1e6 / `wall_us_per_packet` packets a second, whatever the device: its threads take turns in
Python. `us_per_packet` is the CPU time of all of them, which binds where many processes share few cores. A packet's
time is that between a long clip and a short one. What a file takes besides is a row of its own: it is opened once for
each decoder and up to twice more, and its first picture is decoded on the CPU.
"""

from __future__ import annotations

import argparse
import ctypes
import heapq
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import av
import numpy as np

from benchmarks._common import Row, parser_of, run
from benchmarks.clips import Clip, clip
from keyreel.config import ImageTransform, Sampling
from keyreel.decode import nvdec
from keyreel.decode.nvdec_pool import DecoderPool
from keyreel.decode.source import Source

_let_others_run = ctypes.CDLL(None).getpid  # any function: ctypes gives up Python's lock for it, as Decode does


class _Frame:
    def __init__(self, pts: int, format: int, shape: tuple[int, int]) -> None:
        self.pts, self.format, self.shape = pts, format, shape

    def getPTS(self) -> int:
        return self.pts


class _Decoder:
    """Gives back pictures in the order of their pts, four late, as a decoder does."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape, self._held = shape, list[int]()

    def Decode(self, packet: Any) -> list[_Frame]:
        _let_others_run()
        if packet.bsl:
            heapq.heappush(self._held, packet.pts)
        ready = max(0, len(self._held) - 4) if packet.bsl else len(self._held)
        return [_Frame(heapq.heappop(self._held), 3, self._shape) for _ in range(ready)]


def _device() -> Any:
    """A device on which nothing is done."""
    stream = SimpleNamespace(ptr=0, wait_event=lambda _: None, record=lambda: None)
    made = type("Device", (), {})()
    made.index, made.stream, made.decoding = 0, stream, stream
    made.scope, made.join = lambda *_: nullcontext(), lambda: None
    return made


def _module(shape: tuple[int, int]) -> Any:
    most = {"width_max": 8192, "height_max": 8192, "mb_num_max": 1 << 18, "width_min": 48, "height_min": 16}
    return SimpleNamespace(
        PacketData=SimpleNamespace,
        Pixel_Format=SimpleNamespace(NV12=3),
        cudaVideoCodec=SimpleNamespace(H264=4),
        cudaVideoChromaFormat=SimpleNamespace(**{"420": 1}),
        GetDecoderCaps=lambda **_: {"supported": 1, "num_decoder_engines": 7, **most},
        CreateDecoder=lambda **_: _Decoder(shape),
    )


def _decoded(path: Path, device: Any, shape: tuple[int, int], mode: str, lanes: int) -> tuple[float, float, int]:
    """Seconds of CPU time, of all threads, seconds, and packets that were decoded."""
    pool = DecoderPool(device, _module(shape))
    going = {"cuda": device, "ops": None, "strict": True, "pool": pool, "workers": lanes}
    with Source(path) as source:
        began, cpu = time.perf_counter(), time.process_time()
        with nvdec.open_stream(source, Sampling(mode), transform=ImageTransform(224, 224), **going) as stream:
            rows = sum(len(batch) for batch in stream)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - began
    assert rows
    return cpu, wall, stream.packets_fed


def measure(options: argparse.Namespace) -> Iterator[Row]:
    lengths = (10, 20 if options.quick else 40)  # long enough for every decoder
    paths, device = [clip(options.content, Clip(seconds=seconds)) for seconds in lengths], _device()
    picture = np.empty((1, 1, 3))
    with av.open(str(paths[0])) as container:
        shape = container.streams.video[0].height * 3 // 2, container.streams.video[0].width
    untouched = {
        "keep": lambda _, found: found,
        "convert": lambda _, found: ((mark, picture) for mark, _ in found),
    }
    with patch.multiple(nvdec.NvWorker, **untouched), patch.object(nvdec, "_stacked", lambda _, found: np.stack(found)):
        for lanes, mode in product((1, 3), ("fps", "all")):
            runs = [[_decoded(path, device, shape, mode, lanes) for path in paths] for _ in range(9)]
            short, long = np.median(runs, axis=0)  # (CPU, wall, packets) each
            cpu, wall, _ = (long - short) / (long - short)[2]
            found = {
                "us_per_packet": 1e6 * cpu,
                "wall_us_per_packet": 1e6 * wall,
                "ms_per_file": 1e3 * (short[0] - short[2] * cpu),
            }
            for metric, value in found.items():
                yield {"case": "packets", "metric": metric, "lanes": lanes, "mode": mode, "median": value}


def main() -> int:
    return run(parser_of(__doc__), measure)


if __name__ == "__main__":
    raise SystemExit(main())
