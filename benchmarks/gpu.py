"""Proves and measures keyreel on a CUDA device: one JSON line a case.

    python -m benchmarks.gpu [--quick] [--video CLIP] [--only WORD ...] [-o FILE]

In order of importance: the parity tests; k-means and the other kernels, beside a copy within the device; the chain from
a file to a summary, with NVDEC alone beside it; k-means of other libraries on the same vectors; the encoder. A case
whose package is missing says so, one that fails says how, and one that no longer fits into the time (2 minutes with
--quick, else 8) is recorded as not run.

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

from benchmarks._common import RESULTS, ROOT, Absent, Row, Worker, parser_of, run, say
from benchmarks.clips import Clip, clip
from benchmarks.peers import ROUNDS
from benchmarks.select import cloud, objective

NO_DEVICE = 5
SECONDS = {True: 110.0, False: 470.0}  # with --quick, without
WIDTH, CLUSTERS = 512, 32
SHAPES = ((256, 600), (1, 600), (1, 3000), (1, 100_000))  # videos x frames
PENALTY, MARGIN = 0.1, 0.8  # SelectConfig's


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

    def timed(self, work: Callable[[], Any], wait: Callable[[], Any] | None = None) -> Row:
        """`ms`: median of calls on an idle device, so with the launch; `ms_back_to_back`: mean of calls in a row."""
        wait = wait or self.arrays.synchronize

        def once() -> float:
            began = time.perf_counter()
            work()
            wait()
            return time.perf_counter() - began

        first, taken = once(), once()
        runs = max(1 if taken > 0.5 else 3, min(50, int((0.15 if self.quick else 0.5) / taken)))
        ms = 1e3 * statistics.median(once() for _ in range(runs))
        began = time.perf_counter()
        for _ in range(runs):
            work()
        wait()
        together = 1e3 * (time.perf_counter() - began) / runs
        return {"ms": ms, "ms_back_to_back": together, "runs": runs, "first_call_seconds": round(first, 3)}

    @cached_property
    def copy_gb_per_s(self) -> float:
        """Bytes read and written by a copy within the device: the ceiling of everything that streams."""
        xp = self.arrays.xp
        with self.arrays.scope():
            source = xp.ones(1 << 28, "float32")
            target = xp.empty_like(source)
            row = self.timed(lambda: xp.copyto(target, source))
        return float(2 * source.nbytes / row["ms_back_to_back"] / 1e6)

    def moved(self, row: Row, size: int) -> Row:
        """Adds the bandwidth of a kernel that reads and writes so many bytes, as a share of a copy's."""
        rate = size / row["ms_back_to_back"] / 1e6
        return {**row, "gb_per_s": rate, "share_of_copy": rate / self.copy_gb_per_s}


def torch_on(device: int) -> Any:
    import torch

    if not torch.cuda.is_available():
        raise Absent("torch sees no CUDA device")
    torch.cuda.set_device(device)
    return torch


def parity(bench: Bench) -> Row:
    """The tests that hold every kernel against NumPy, on the device; a device that is missing fails them."""
    files = [str(path) for path in (ROOT / "tests").glob("test_*.py") if "cuda" in path.read_text("utf-8")]
    # Files whose packages are missing cannot be collected; they must not stop the others.
    options = ["-m", "needs_cuda", "-q", "-rfE", "--tb=line", "--color=no", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *files]
    environment = {**os.environ, "KEYREEL_FAIL_WITHOUT_CUDA": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    if " passed" not in lines[-1]:
        raise RuntimeError(f"no test ran: {' / '.join(lines[-3:])[:400]}")
    failures = [line[:300] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return {"status": "failed" if done.returncode else "ok", "said": lines[-1], "failures": failures[:20]}


@cache
def problem(videos: int, frames: int, width: int = WIDTH, clusters: int = CLUSTERS) -> tuple[Any, Any]:
    """Unit vectors [B, T, D] and the frames [B, K] that are the initial centroids of all."""
    random = np.random.default_rng(0)
    x = cloud(videos * frames, width).reshape(videos, frames, width)
    return x, np.stack([np.sort(random.choice(frames, clusters, replace=False)) for _ in range(videos)])


def fit(x: Any, labels: Any) -> Row:
    """Mean cosine of a frame to the mean of its cluster, from the labels alone; of the first 16 videos."""
    return {"fit": float(np.mean([objective(own, np.asarray(of)) for own, of in zip(x[:16], labels, strict=False)]))}


def keyreel(bench: Bench, videos: int, frames: int, dtype: str, penalty: float, **size: int) -> Row:
    x, seeds = problem(videos, frames, **size)
    arrays, starts = bench.arrays, np.arange(videos, dtype=np.int64) * frames
    spans, count = np.stack([starts, starts + frames], axis=1), np.full(videos, seeds.shape[1], np.int64)
    with arrays.scope():
        given = arrays.to_device(x.reshape(videos * frames, -1).astype(dtype))
        weights = arrays.to_device(np.ones(len(given), np.float32))
        first = arrays.to_device(seeds + starts[:, None])
        options = {"penalty": penalty, "margin": MARGIN, "iterations": ROUNDS}
        row = bench.timed(lambda: bench.ops.cluster(given, weights, spans, count, first, **options))
        before = arrays.bytes_to_host
        found = bench.ops.cluster(given, weights, spans, count, first, **options)
        row["bytes_to_host"] = arrays.bytes_to_host - before
        return {**row, **fit(x, arrays.to_host(found.labels).reshape(videos, frames))}


def lloyd(torch: Any, x: Any, first: Any, rounds: int = ROUNDS) -> Any:
    """Lloyd's algorithm with two batched products a round: x [B, T, D], first [B, K, D] -> labels [B, T].

    Nothing in it waits for the device, so that it can be captured. Clusters without a frame keep their centroid.
    """
    centroids, numbers, labels = first, torch.arange(first.shape[1], device=x.device), None
    for _ in range(rounds):
        squares = centroids.float().square().sum(-1)
        labels = (squares[:, None] - 2 * torch.bmm(x, centroids.transpose(1, 2)).float()).argmin(-1)
        inside = (labels[..., None] == numbers).to(x.dtype)
        counts = inside.sum(1, dtype=torch.float32)[..., None]
        means = torch.bmm(inside.transpose(1, 2), x).float() / counts.clamp(min=1)
        centroids = torch.where(counts > 0, means, centroids.float()).to(x.dtype)
    return labels


def _on_torch(bench: Bench, videos: int, frames: int) -> tuple[Any, Any, Any]:
    torch, (x, seeds) = torch_on(bench.device), problem(videos, frames)
    first = np.take_along_axis(x, seeds[:, :, None], axis=1)
    return torch, torch.from_numpy(x).half().cuda(), torch.from_numpy(first).half().cuda()


def torch_graph(bench: Bench, videos: int, frames: int) -> Row:
    """Captured in a CUDA graph: no launches in the time."""
    torch, x, first = _on_torch(bench, videos, frames)
    with torch.cuda.stream(torch.cuda.Stream()):
        lloyd(torch, x, first, rounds=2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        labels = lloyd(torch, x, first)
    row = bench.timed(graph.replay, torch.cuda.synchronize)
    return {**row, **fit(problem(videos, frames)[0], labels.cpu().numpy())}


def flash_kmeans(bench: Bench, videos: int, frames: int) -> Row:
    from flash_kmeans import batch_kmeans_Euclid

    torch, x, first = _on_torch(bench, videos, frames)
    options = {"max_iters": ROUNDS, "tol": 1e-8, "verbose": False}  # it stops once nothing moves

    def work() -> Any:
        return batch_kmeans_Euclid(x, first.shape[1], init_centroids=first.clone(), **options)

    row = bench.timed(work, torch.cuda.synchronize)
    return {**row, **fit(problem(videos, frames)[0], work()[0].cpu().numpy())}


def surfaces(bench: Bench, height: int = 1080, width: int = 1920, count: int = 16) -> Row:
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
        moved = sum(plane.nbytes for surface in given for plane in surface.planes) + count * 224 * 224 * 3
    return {**bench.moved(row, moved), "pictures_per_s": 1e3 * count / row["ms_back_to_back"]}


def adaptive_shift(bench: Bench, frames: int = 128, grid: tuple[int, int] = (14, 14), width: int = 768) -> Row:
    """Selecting and moving the patches of a batch of ViT-B/16 tokens."""
    arrays, random, places = bench.arrays, np.random.default_rng(4), grid[0] * grid[1]
    with arrays.scope():
        steps = 0.3 * random.standard_normal((frames, places + 1, width), np.float32)
        tokens = arrays.to_device(np.cumsum(steps, axis=0) + random.standard_normal((1, places + 1, width), np.float32))
        linked = np.arange(frames) % 40 != 0

        def work() -> Any:
            source = bench.ops.adaptive_shift(tokens[:, 1:], grid, linked, steps=3, threshold=0.05)
            return bench.ops.shift_tokens(tokens, source, 1)

        # Read for the choice, read and written for the move.
        return bench.moved(bench.timed(work), 3 * tokens.nbytes)


class Copied:
    """A session on the CPU for arrays on the device: the stand-in where no runtime for CUDA is installed."""

    def __init__(self, session: Any, arrays: Any) -> None:
        self._session, self._arrays = session, arrays
        self.inputs, self.outputs, self.close = session.inputs, session.outputs, session.close

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: self._arrays.to_host(feed) for name, feed in feeds.items()}
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

    path = bench.video or clip(bench.scratch, Clip(seconds=8 if bench.quick else 20))
    with av.open(str(path)) as container:
        return path, sum(1 for packet in container.demux(video=0) if packet.size)


def nvdec(bench: Bench) -> Row:
    """Frames a second of NVDEC alone with several decoders, each on the whole clip; frames stay where it puts them."""
    try:
        import PyNvVideoCodec as nvc
    except RuntimeError as error:  # a library of the driver is missing
        raise Absent(f"PyNvVideoCodec does not load: {error}") from error
    codecs, chroma = nvc.cudaVideoCodec, getattr(nvc.cudaVideoChromaFormat, "420")
    caps = nvc.GetDecoderCaps(gpuid=bench.device, codec=codecs.H264, chromaformat=chroma, bitdepth=8)
    engines = max(int(dict(caps).get("num_decoder_engines", 1)), 1)
    path, frames = _clip(bench)
    rates, missing = {}, 0
    for count in sorted({1, engines, engines + 1}):
        demuxers = [nvc.CreateDemuxer(str(path)) for _ in range(count)]
        options = {"gpuid": bench.device, "usedevicememory": True}
        decoders = [nvc.CreateDecoder(codec=one.GetNvCodecId(), **options) for one in demuxers]
        with ThreadPoolExecutor(count) as pool:
            began = time.perf_counter()
            decoded = sum(pool.map(_decode_all, demuxers, decoders))
            rates[count] = decoded / (time.perf_counter() - began)
        missing += count * frames - decoded
    bench.nvdec_fps = max(rates.values())
    return {"engines": engines, "fps_by_decoders": rates, "best_fps": bench.nvdec_fps, "frames_missing": missing}


def _decode_all(demuxer: Any, decoder: Any) -> int:
    return sum(len(decoder.Decode(packet)) for packet in demuxer)


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


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    run: Callable[[Bench], Row]
    seconds: float  # about what it takes
    quick: bool = True


def cases() -> list[Case]:
    """What matters most first."""
    ours, others = [], []
    for videos, frames in SHAPES:
        shape, short = f"k-means {videos} x {frames}", frames <= 600
        for dtype, penalty in (("float16", 0.0), ("float16", PENALTY), ("float32", PENALTY)):
            way = partial(keyreel, videos=videos, frames=frames, dtype=dtype, penalty=penalty)
            ours.append(Case(f"{shape}: keyreel {dtype}, penalty {penalty}", way, 6, dtype == "float16"))
        for name, peer in (("torch in a CUDA graph", torch_graph), ("flash-kmeans", flash_kmeans)):
            others.append(Case(f"{shape}: {name}", partial(peer, videos=videos, frames=frames), 12, short))
    return [
        Case("parity tests", parity, 30),
        *(case for case in ours if case.quick),
        Case("pictures 16 x 1080p NV12 -> 224", surfaces, 3),
        Case("adaptive shift 128 frames, 14x14x768", adaptive_shift, 3),
        Case("NVDEC alone", nvdec, 12),
        Case("summary, 2 frames a second", partial(summary, mode="fps"), 15),
        Case("summary, every frame", partial(summary, mode="all"), 15),
        *(case for case in others if case.quick),
        Case("encoder, built-in model", encoder, 15),
        *(case for case in (*ours, *others) if not case.quick),
    ]


_bench = cache(Bench)  # one for each worker process


def run_case(case: Case, *arguments: Any) -> Row:
    bench, began = _bench(*arguments), time.perf_counter()
    try:
        return {**case.run(bench), "seconds": round(time.perf_counter() - began, 3)}
    finally:
        gc.collect()
        if "ops" in bench.__dict__:
            bench.arrays.pool.free_all_blocks()
        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def measure(options: argparse.Namespace) -> Iterator[Row]:
    until, worker = time.monotonic() + SECONDS[options.quick], None
    smi = subprocess.run("nvidia-smi", shell=True, capture_output=True, text=True, timeout=20, check=False)
    yield {"case": "gpu", "name": "machine", "nvidia_smi": smi.stdout.splitlines()}
    for case in cases():
        if (options.quick and not case.quick) or (options.only and not any(w in case.name for w in options.only)):
            continue
        left, head = until - time.monotonic(), {"case": "gpu", "name": case.name, "quick": options.quick}
        row: Row
        if left < case.seconds:
            row = {**head, "status": "not run", "reason": f"{left:.0f} s left, it takes about {case.seconds:.0f}"}
        else:
            worker, limit = worker or Worker(), min(60 + 4 * case.seconds, left + 8)
            about = (options.device, options.quick, options.video, options.content)
            try:
                row = {**head, "status": "ok", **worker.call(run_case, case, *about, limit_seconds=limit)}
            except Absent as error:
                row = {**head, "status": {"skipped": "missing"}.get(error.kind, error.kind), "reason": str(error)}
                if error.kind == "failed":  # it may have lost the device
                    worker.close()
                    worker = None
        say(f"{case.name}: {str({key: value for key, value in row.items() if key not in head})[:400]}")
        yield {**row, "failed": True} if row["status"] == "failed" else row
    if worker is not None:
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
    parser.add_argument("--video", type=Path, help="decode this clip instead of a rendered one")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases whose names have one of these words in them")
    device = parser.parse_args().device
    if not has_device(device):
        say(f"no CUDA device {device} that CuPy can use: nothing is measured")
        return NO_DEVICE
    return run(parser, measure)


if __name__ == "__main__":
    raise SystemExit(main())
