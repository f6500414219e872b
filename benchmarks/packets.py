"""Python's share of decoding on a device: microseconds a packet, with a decoder that gives back at once.

    python -m benchmarks.packets [--quick] [-o FILE]

Everything else is real: reading, planning, the filter, the checks; pictures are neither copied nor converted. A process
can decode no more than 1e6 / that many packets a second, whatever the device. A packet's time is that between a long
clip and a short one. What a file takes besides is a row of its own: it is opened once for each decoder and up to twice
more, and its first picture is decoded on the CPU.
"""

from __future__ import annotations

import argparse
import heapq
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from statistics import median
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


def _decoded(path: Path, device: Any, shape: tuple[int, int], mode: str, lanes: int) -> tuple[float, int]:
    """Seconds of CPU time, of all threads, and packets that were decoded."""
    pool = DecoderPool(device, _module(shape))
    going = {"cuda": device, "ops": None, "strict": True, "pool": pool, "workers": lanes}
    with Source(path) as source:
        began = time.process_time()
        with nvdec.open_stream(source, Sampling(mode), transform=ImageTransform(224, 224), **going) as stream:
            rows = sum(len(batch) for batch in stream)
        taken = time.process_time() - began
    assert rows
    return taken, stream.packets_fed


def measure(options: argparse.Namespace) -> Iterator[Row]:
    lengths = (4, 12) if options.quick else (10, 40)
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
            (short, few), (long, many) = ((median(s for s, _ in each), each[0][1]) for each in zip(*runs, strict=True))
            packet = (long - short) / (many - few)
            found = {"us_per_packet": 1e6 * packet, "ms_per_file": 1e3 * (short - few * packet)}
            for metric, value in found.items():
                yield {"case": "packets", "metric": metric, "lanes": lanes, "mode": mode, "median": value}


def main() -> int:
    return run(parser_of(__doc__), measure)


if __name__ == "__main__":
    raise SystemExit(main())
