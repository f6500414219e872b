"""Decoding on NVDEC, alone and as the first part of a summary, and a thousand files one after the other."""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_cases import encoders
from benchmarks.gpu_cases.bench import Bench
from benchmarks.gpu_cases.runner import Case, Missing, Row, import_or_missing

FPS = 30
SIZES = ((240, 320), (360, 640), (480, 854), (720, 1280), (1080, 1920), (1280, 720))
_LIBRARIES = {"libnvcuvid": "libnvcuvid.so.1", "libnvidia-encode": "libnvidia-encode.so.1"}


def render(path: Path, height: int, width: int, *, frames: int, codec: str = "libx264") -> Path:
    """Encodes scenes of 4 s, each a texture that is panned over: H.264 with B-frames and a key frame every 2 s."""
    av = import_or_missing("av", package="av (PyAV)")
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(6)
    # As much larger than a picture as a scene pans: 1 row and 2 columns a frame.
    coarse = random.integers(16, 236, (8, (height + 4 * FPS) // 16 + 1, (width + 8 * FPS) // 16 + 1), dtype=np.uint8)
    aside = path.with_name(f".{path.name}")
    with av.open(str(aside), "w", format="mp4") as output:
        stream = output.add_stream(codec, rate=FPS)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"preset": "veryfast", "bf": "3", "g": str(2 * FPS), "x265-params": "log-level=none"}
        canvas, chroma = np.empty(0), (128, 128)
        for number in range(frames):
            scene, at = divmod(number, 4 * FPS)
            if at == 0:
                canvas = coarse[scene % len(coarse)].repeat(16, 0).repeat(16, 1)
                canvas = canvas // 2 + random.integers(0, 24, canvas.shape, dtype=np.uint8)
                chroma = tuple(random.integers(64, 192, 2).tolist())
            # Planes one below the other, as PyAV takes yuv420p.
            picture = np.empty((height * 3 // 2, width), np.uint8)
            picture[:height] = canvas[at : at + height, 2 * at : 2 * at + width]
            picture[height : height * 5 // 4], picture[height * 5 // 4 :] = chroma
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        output.mux(stream.encode(None))
    aside.replace(path)
    return path


def clip(bench: Bench) -> tuple[Path, int]:
    """The clip that is decoded and how many frames it has; rendered once."""
    av = import_or_missing("av", package="av (PyAV)")
    frames = (8 if bench.quick else 20) * FPS
    path = bench.video or bench.scratch / f"{frames}.mp4"
    if not path.exists() and bench.video is None:
        render(path, 1080, 1920, frames=frames)
    with av.open(str(path)) as container:
        return path, sum(1 for packet in container.demux(video=0) if packet.size)


def codec() -> Any:
    return import_or_missing("PyNvVideoCodec")


def capabilities(bench: Bench) -> Row:
    """Which of the driver's libraries load, whether PyNvVideoCodec does, and what it says of the decoders."""
    found: Row = {}
    for name, file in _LIBRARIES.items():
        try:
            ctypes.CDLL(file)
            found[name] = True
        except OSError as error:
            found[name] = str(error)
    nvc = codec()
    found["PyNvVideoCodec"] = str(nvc.__version__)
    for name, bits in (("H264", 8), ("HEVC", 8), ("HEVC", 10), ("VP9", 8), ("AV1", 8)):
        caps = nvc.GetDecoderCaps(
            gpuid=bench.device,
            codec=getattr(nvc.cudaVideoCodec, name),
            chromaformat=getattr(nvc.cudaVideoChromaFormat, "420"),
            bitdepth=bits,
        )
        found[f"{name} {bits} bit"] = {key: int(value) for key, value in dict(caps).items()}
    return found


def engines(bench: Bench) -> int:
    """How many NVDEC engines the card says it has."""
    nvc = codec()
    caps = nvc.GetDecoderCaps(
        gpuid=bench.device,
        codec=nvc.cudaVideoCodec.H264,
        chromaformat=getattr(nvc.cudaVideoChromaFormat, "420"),
        bitdepth=8,
    )
    return max(int(dict(caps).get("num_decoder_engines", 1)), 1)


def raw_frames_per_second(bench: Bench, decoders: int) -> Row:
    """Decodes the whole clip in each of several threads; the frames stay where the decoder puts them."""
    nvc = codec()
    path, frames = clip(bench)
    counts, errors = [0] * decoders, []
    ready = threading.Barrier(decoders + 1)

    def decode(number: int) -> None:
        try:
            demuxer = nvc.CreateDemuxer(str(path))
            decoder = nvc.CreateDecoder(gpuid=bench.device, codec=demuxer.GetNvCodecId(), usedevicememory=True)
        except Exception as error:  # noqa: BLE001 - said below
            errors.append(error)
            ready.abort()
            return
        ready.wait()
        for packet in demuxer:
            counts[number] += len(decoder.Decode(packet))

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(decoders)]
    for thread in threads:
        thread.start()
    try:
        ready.wait()
    except threading.BrokenBarrierError:
        raise errors[0] from None
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    return {
        "decoders": decoders,
        "fps": sum(counts) / seconds,
        "frames": sum(counts),
        "frames_expected": decoders * frames,
    }


def nvdec(bench: Bench) -> Row:
    """Frames a second with 1, 2, 4 and as many decoders as there are engines, and one more."""
    count = engines(bench)
    tried = sorted({1, count, count + 1} if bench.quick else {1, 2, 4, count, count + 1, 2 * count})
    rows = [raw_frames_per_second(bench, decoders) for decoders in tried]
    best = max(rows, key=lambda row: row["fps"])
    bench.raw_fps = best["fps"]
    return {
        "engines": count,
        "fps": {row["decoders"]: row["fps"] for row in rows},
        "best_fps": best["fps"],
        "best_decoders": best["decoders"],
        "frames_missing": sum(row["frames_expected"] - row["frames"] for row in rows),
    }


def end_to_end(bench: Bench, mode: str, *, strict: bool = True) -> Row:
    """A summary from the file: how long, how much of it left the device, and how that compares with decoding alone."""
    if not strict and bench.raw_fps:
        raise Missing("not needed: NVDEC decodes here, see the other summaries")
    engine, runtime = encoders.engine(bench, strict=strict)
    from keyreel import Sampling

    path, frames = clip(bench)
    sampling = Sampling(mode=mode)
    with engine:
        arrays = engine.backend.ops.arrays
        engine.summarize(path, sampling=sampling)
        runs, seconds, before = 2 if bench.quick else 4, [], arrays.bytes_to_host
        for _ in range(runs):
            started = time.perf_counter()
            summary = engine.summarize(path, sampling=sampling)
            seconds.append(time.perf_counter() - started)
        left = (arrays.bytes_to_host - before) / runs
    taken = statistics.median(seconds)
    image = engine.bundle.image
    row = {
        "runtime": runtime,
        "video_frames": frames,
        "frames": len(summary.embedding),
        "total_seconds": taken,
        "video_fps": frames / taken,
        "bytes_to_host": left,
        "bytes_of_pictures": len(summary.embedding) * image.height * image.width * 3,
        "timings_seconds": dict(summary.timings_seconds),
        "keyframes": len(summary.keyframes),
        "warnings": list(summary.warnings),
    }
    if bench.raw_fps:
        row |= {"raw_nvdec_fps": bench.raw_fps, "share_of_raw_nvdec": frames / taken / bench.raw_fps}
    return row


def opens(bench: Bench, count: int | None = None) -> Row:
    """Opens files of mixed sizes and codecs, a frame of each, and looks at the device's memory on the way."""
    engine, runtime = encoders.engine(bench)
    from keyreel import Sampling

    count = count or (200 if bench.quick else 1000)
    files = []
    for height, width in SIZES:
        for name in ("libx264", "libx265"):
            path = bench.scratch / f"{name}-{width}x{height}.mp4"
            files.append(path if path.exists() else render(path, height, width, frames=12, codec=name))
    order = np.random.default_rng(7).integers(0, len(files), count)
    taken = []
    with engine:
        started = time.perf_counter()
        for number, which in enumerate(order):
            with engine.frames(
                files[which], Sampling(mode="times", times=(0.2,)), transform=engine.bundle.image
            ) as stream:
                shown = sum(len(batch.data) for batch in stream)
            if shown != 1:
                raise ValueError(f"{files[which].name}, opened as number {number}, gave {shown} frames, not 1")
            if number % max(count // 10, 1) == 0:
                taken.append(bench.free_bytes())
        seconds = time.perf_counter() - started
    # The first tenth fills pools and compiles; from there on nothing may grow.
    grown = [(taken[1] - free) / (1 << 20) for free in taken[1:]]
    return {
        "runtime": runtime,
        "opens": count,
        "files": len(files),
        "ms_an_open": 1e3 * seconds / count,
        "grown_mib": grown,
        "flat": max(grown) <= 64,
    }


def cases() -> list[Case]:
    return [
        Case("NVDEC libraries and capabilities", capabilities, seconds=2),
        Case("NVDEC decoders alone", nvdec, seconds=12, most_seconds=120),
        Case("summary, 2 frames a second", lambda bench: end_to_end(bench, "fps"), seconds=15, most_seconds=180),
        Case("summary, every frame", lambda bench: end_to_end(bench, "all"), seconds=15, most_seconds=180),
        Case(
            "summary, 2 frames a second, the CPU may decode",
            lambda bench: end_to_end(bench, "fps", strict=False),
            seconds=15,
            most_seconds=120,
        ),
        Case("opens of mixed sizes", opens, seconds=20, most_seconds=150),
    ]
