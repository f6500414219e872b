"""Proves and measures keyreel on a CUDA device: one JSON line a case.

    python -m benchmarks.gpu [--quick] [--video CLIP] [--only WORD ...] [-o FILE]

The parity tests; what the device can do: a copy, a barrier of a team of blocks; k-means, beside flash-kmeans and by
blocks of a team, and the pictures of a decoder; the chain from a file to a summary, with NVDEC alone beside it; the
encoder. A case whose package is missing says so, and one that fails or takes too long says how. With KEYREEL_REHEARSE
set, sizes are such that a CPU can do them.

Exit codes: 1 when a case or a parity test failed; 5 without a CUDA device, and then nothing is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import REHEARSED, RESULTS, ROOT, Absent, Row, Worker, parser_of, run, say
from benchmarks.clips import Clip, clip
from benchmarks.gpu_kmeans import kmeans_cases

NO_DEVICE = 5
PICTURES = {"height": 90, "width": 160, "count": 2} if REHEARSED else {"height": 1080, "width": 1920, "count": 16}
COPIED_MIB = (1,) if REHEARSED else (16, 512)  # what the cache of a large GPU holds, and what none does


@dataclass
class Bench:
    """One device, opened when a case first needs it."""

    device: int
    quick: bool
    video: Path | None  # the user's own clip
    scratch: Path  # for rendered clips
    nvdec_fps: float = 0.0  # of NVDEC alone, once it was measured

    @cached_property
    def ops(self) -> Any:
        from keyreel_kernels import ops_for

        return ops_for(f"cuda:{self.device}")

    @property
    def arrays(self) -> Any:
        return self.ops.arrays

    def timed(self, work: Callable[[], Any], synchronize: Callable[[], Any] | None = None) -> Row:
        """`ms`: median of calls on an idle device, so with the launch; `ms_back_to_back`: mean of calls in a row."""
        synchronize = synchronize or self.arrays.synchronize

        def once() -> float:
            began = time.perf_counter()
            work()
            synchronize()
            return time.perf_counter() - began

        once()
        taken = once()
        runs = max(1 if taken > 0.5 else 3, int((0.15 if self.quick else 0.5) / taken))
        runs = min(runs, 1 if REHEARSED else 50)
        ms = 1e3 * statistics.median(once() for _ in range(runs))
        began = time.perf_counter()
        for _ in range(runs):
            work()
        synchronize()
        together = 1e3 * (time.perf_counter() - began) / runs
        return {"ms": ms, "ms_back_to_back": together, "runs": runs}


def parity(bench: Bench) -> Row:
    """The tests that hold every kernel against NumPy, on the device; a device that is missing fails them."""
    # Those that ask for the device: others may need packages that are not there.
    files = [str(path) for path in (ROOT / "tests").glob("test_*.py") if "cuda: Cuda" in path.read_text("utf-8")]
    options = ["-m", "needs_cuda", "-q", "-rfE", "--tb=line", "--color=no"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *files]
    environment = {**os.environ, "KEYREEL_FAIL_WITHOUT_CUDA": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    if " passed" not in lines[-1]:
        raise RuntimeError(f"no test ran: {' / '.join(lines[-3:])[:400]}")
    failures = [line[:300] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return {"status": "failed" if done.returncode else "ok", "said": lines[-1], "failures": failures[:20]}


def copied(bench: Bench, mib: int) -> Row:
    """A copy on the device: every byte is read and written once, so no kernel moves more bytes a second."""
    arrays = bench.arrays
    with arrays.scope():
        given = arrays.to_device(np.random.default_rng(0).integers(0, 256, mib << 20, np.uint8))
        made = arrays.xp.empty_like(given)
        row = bench.timed(lambda: arrays.xp.copyto(made, given))
    return {**row, "gb_per_s": 2 * given.nbytes / row["ms_back_to_back"] / 1e6}


def surfaces(bench: Bench, height: int, width: int, count: int) -> Row:
    """NV12 pictures of a decoder to the model's pictures, one launch."""
    from keyreel_kernels.surfaces import Surface

    arrays, random, given = bench.arrays, np.random.default_rng(3), []
    size = {"height": 224, "width": 224, "mode": "shortest", "interpolation": "bicubic"}
    with arrays.scope():
        for _ in range(count):
            y = random.integers(16, 236, (height, width), dtype=np.uint8)
            uv = random.integers(16, 241, (-(-height // 2), -(-width // 2), 2), dtype=np.uint8)
            planes = (arrays.to_device(y), arrays.to_device(uv))
            given.append(Surface(planes, bits=8, standard="bt709", full_range=False, display=(height, width)))
        row = bench.timed(lambda: bench.ops.frames_from_surfaces(given, **size))
    return {**row, "pictures_per_s": 1e3 * count / row["ms_back_to_back"]}


class Copied:
    """A session on the CPU for arrays on the device: the stand-in where no runtime for CUDA is installed."""

    def __init__(self, session: Any, arrays: Any) -> None:
        self._session, self._arrays = session, arrays
        self.inputs, self.outputs, self.close = session.inputs, session.outputs, session.close

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        with self._arrays.scope():  # not counted: a runtime for CUDA would copy nothing
            given = {name: feed.get() for name, feed in feeds.items()}
        return {name: self._arrays.to_device(value) for name, value in self._session.run(given).items()}


def engine_on(bench: Bench) -> tuple[Any, str]:
    """An Engine with the built-in model on the device, and what runs its graphs."""
    from keyreel import Engine
    from keyreel.errors import BackendUnavailable
    from keyreel.runtime import backend

    try:
        made, runtime = Engine.from_pretrained(device=f"cuda:{bench.device}"), "TensorRT or onnxruntime"
    except BackendUnavailable as error:
        runtime, cpu = f"the CPU, with copies ({error})", Engine.from_pretrained(device="cpu")
        cuda = backend._cuda(bench.ops, runtime, strict=True)
        opens = lambda path: Copied(cpu.backend.open_session(path), cuda.ops.arrays)  # noqa: E731
        made = Engine(cpu.bundle, dataclasses.replace(cuda, open_session=opens))
    bench.ops = made.backend.ops  # counters are read there
    return made, runtime


def encoder(bench: Bench, batch: int = 64) -> Row:
    """The built-in model on frames that are on the device, and its least cosine to onnxruntime's on the CPU."""
    from keyreel import Engine

    engine, runtime = engine_on(bench)
    image, random = engine.bundle.image, np.random.default_rng(5)
    pictures = random.integers(0, 256, (batch, image.height, image.width, 3), dtype=np.uint8)
    with engine, Engine.from_pretrained(device="cpu") as cpu, engine.backend.running():
        frames = bench.arrays.to_device(pictures)
        row = bench.timed(lambda: engine.embed(frames))
        cosine = (bench.arrays.to_host(engine.embed(frames))[:8] * cpu.embed(pictures[:8])).sum(1).min()
    rate = 1e3 * batch / row["ms_back_to_back"]
    return {**row, "runtime": runtime, "batch": batch, "images_per_s": rate, "cosine": float(cosine)}


def _clip(bench: Bench) -> tuple[Path, int]:
    """The clip that is decoded and how many frames it has."""
    import av

    made = Clip(height=90, seconds=2, fps=10) if REHEARSED else Clip(seconds=8 if bench.quick else 20)
    path = bench.video or clip(bench.scratch, made)
    with av.open(str(path)) as container:
        return path, sum(1 for packet in container.demux(video=0) if packet.size)


def nvdec(bench: Bench) -> Row:
    """Frames a second of NVDEC alone with several decoders, each on the whole clip; frames stay on the device."""
    try:
        import PyNvVideoCodec as nvc
    except RuntimeError as error:  # a library of the driver is missing
        raise Absent(f"PyNvVideoCodec does not load: {error}") from error
    codecs, chroma = nvc.cudaVideoCodec, getattr(nvc.cudaVideoChromaFormat, "420")
    caps = nvc.GetDecoderCaps(gpuid=bench.device, codec=codecs.H264, chromaformat=chroma, bitdepth=8)
    engines = max(int(dict(caps).get("num_decoder_engines", 1)), 1)
    path, frames = _clip(bench)
    count = engines + 1  # one more than there are, so that none waits
    demuxers = [nvc.CreateDemuxer(str(path)) for _ in range(count)]
    options = {"gpuid": bench.device, "usedevicememory": True}
    decoders = [nvc.CreateDecoder(codec=one.GetNvCodecId(), **options) for one in demuxers]
    with ThreadPoolExecutor(count) as pool:
        began = time.perf_counter()
        decoded = sum(pool.map(lambda ours, by: sum(len(by.Decode(packet)) for packet in ours), demuxers, decoders))
        bench.nvdec_fps = decoded / (time.perf_counter() - began)
    return {"engines": engines, "best_fps": bench.nvdec_fps, "frames_missing": count * frames - decoded}


def summary(bench: Bench, mode: str) -> Row:
    """A summary from the file: how long, how much of it left the device, and its share of NVDEC alone."""
    from keyreel import Sampling

    engine, runtime = engine_on(bench)
    path, frames = _clip(bench)
    with engine:
        engine.summarize(path, sampling=Sampling(mode=mode))
        runs, seconds, before = 2 if bench.quick else 4, [], bench.arrays.bytes_to_host
        for _ in range(runs):
            began = time.perf_counter()
            found = engine.summarize(path, sampling=Sampling(mode=mode))
            seconds.append(time.perf_counter() - began)
        left = (bench.arrays.bytes_to_host - before) / runs
    taken, image = statistics.median(seconds), engine.bundle.image
    share = {"share_of_nvdec": frames / taken / bench.nvdec_fps} if bench.nvdec_fps else {}
    pictures = len(found.embedding) * image.height * image.width * 3
    sizes = {"frames": len(found.embedding), "bytes_to_host": left, "bytes_of_pictures": pictures}
    times = {"total_seconds": taken, "video_fps": frames / taken, **share}
    return {"runtime": runtime, **times, **sizes, "warnings": list(found.warnings)}


def cases(*, quick: bool) -> dict[str, Callable[[Bench], Row]]:
    return {
        "parity tests": parity,
        **{f"copy of {mib} MiB": partial(copied, mib=mib) for mib in COPIED_MIB},
        **kmeans_cases(),
        f"pictures {PICTURES['count']} x {PICTURES['height']}p NV12 -> 224": partial(surfaces, **PICTURES),
        "NVDEC alone": nvdec,
        "summary, 2 frames a second": partial(summary, mode="fps"),
        "summary, every frame": partial(summary, mode="all"),
        "encoder, built-in model": encoder,
    }


_bench = cache(Bench)  # one for each worker process


def run_case(case: Callable[[Bench], Row], *arguments: Any) -> Row:
    bench, began = _bench(*arguments), time.perf_counter()
    try:
        return {**case(bench), "seconds": round(time.perf_counter() - began, 3)}
    finally:
        gc.collect()
        if "ops" in bench.__dict__:
            bench.arrays.pool.free_all_blocks()


def measure(options: argparse.Namespace) -> Iterator[Row]:
    smi = subprocess.run("nvidia-smi", shell=True, capture_output=True, text=True, timeout=20, check=False)
    yield {"case": "gpu", "name": "machine", "nvidia_smi": smi.stdout.splitlines()}
    about = (options.device, options.quick, options.video, options.content)
    worker = Worker()
    for name, case in cases(quick=options.quick).items():
        if options.only and not any(word in name for word in options.only):
            continue
        row: Row = {"case": "gpu", "name": name, "quick": options.quick, "status": "ok"}
        try:
            row |= worker.call(run_case, case, *about, limit_seconds=options.limit)
        except Absent as error:
            row |= {"status": {"skipped": "missing"}.get(error.kind, error.kind), "reason": str(error)}
            if error.kind == "failed":  # it may have lost the device
                worker.close()
                worker = Worker()
        say(f"{row}"[:400])
        yield {**row, "failed": True} if row["status"] == "failed" else row
    worker.close()


def has_device(device: int) -> bool:
    try:
        import cupy

        return bool(cupy.cuda.runtime.getDeviceCount() > device)
    except Exception:  # noqa: BLE001 - not installed, no driver, no device: all the same here
        return False


def main() -> int:
    parser = parser_of(__doc__)
    parser.set_defaults(output=RESULTS / "gpu.jsonl")
    parser.add_argument("--device", type=int, default=0, help="number of the CUDA device")
    parser.add_argument("--limit", type=float, default=240, metavar="SECONDS", help="of one case (240)")
    parser.add_argument("--video", type=Path, help="decode this clip instead of a rendered one")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases whose names have one of these words in them")
    device = parser.parse_args().device
    if not has_device(device):
        say(f"no CUDA device {device} that CuPy can use: nothing is measured")
        return NO_DEVICE
    return run(parser, measure)


if __name__ == "__main__":
    raise SystemExit(main())
