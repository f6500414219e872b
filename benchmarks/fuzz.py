"""Damaged videos: whatever is in a file, keyreel gives frames or an error of its own.

Small clips in many codecs and containers, made here, and the small ones of --media are mutated: bits flipped, runs
overwritten, lost, repeated or swapped, numbers of headers set to extremes, the end cut off. Each file is read in a
worker with limits on memory and time, in one of the sampling modes; every tenth is summarized, with its reel. The last
line counts the results. Exit code 1 if anything was raised that is no `SourceError`, crashed, or hung.

    python -m benchmarks.fuzz --files 5000 --seed 1
    python -m benchmarks.fuzz --seed 1 --only 77 --keep damaged    # writes that file, raises what it raises
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import av

from benchmarks._common import ROOT, Absent, Worker, resident_mib
from benchmarks.clips import Clip, frames, same_priority
from keyreel import Engine, KeyreelError, Sampling
from keyreel.errors import SourceError
from keyreel.runtime.memory import bound_arenas

SECONDS = 60.0  # a file may take
BYTES = 4 << 30  # of address space beyond what a worker has at its start
_SMALL = 400_000  # bytes of a real clip
_MADE = Clip(height=90, seconds=2, fps=15)
_KINDS = {
    "libx264": ("mp4", "matroska", "mpegts", "flv", "avi", "mov"),
    "libx265": ("mp4", "mpegts"),
    "libvpx": ("webm", "ivf"),
    "libvpx-vp9": ("webm", "mp4"),
    "libsvtav1": ("mp4", "obu"),
    "mpeg4": ("avi", "mp4"),
    "mpeg2video": ("mpegts", "mpeg"),
    "mjpeg": ("avi", "matroska"),
    "flv": ("flv",),
    "ffv1": ("matroska",),
    "gif": ("gif",),
}
_EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_MODES = (
    Sampling(fps=2.0),
    Sampling(mode="all"),
    Sampling(mode="keyframes"),
    Sampling(mode="every", every=3),
    Sampling(mode="times", times=(0.0, 0.5, 1.0, 90.0)),
    Sampling(mode="near", fps=1.0),
)


def originals(folder: Path, media: Path) -> list[Path]:
    """Clips that decode, made and real ones."""
    made = [folder / f"{codec}.{container}" for codec, containers in _KINDS.items() for container in containers]
    for path in made:
        if not path.exists():
            _make(path, path.stem, path.suffix[1:])
    found = sorted(path for path in media.rglob("*") if path.is_file() and path.suffix != ".md")
    return [path for path in [*made, *found] if path.exists() and 0 < path.stat().st_size <= _SMALL]


def _make(path: Path, codec: str, container: str) -> None:
    with same_priority(), av.open(str(path), "w", format=container) as output:
        try:
            stream: Any = output.add_stream(codec, rate=_MADE.fps)
        except ValueError:  # FFmpeg was built without this encoder
            return
        stream.height, stream.width, stream.pix_fmt = _MADE.height, _MADE.width, "yuv420p"
        stream.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(codec, "yuv420p")
        stream.gop_size = 10
        for frame in frames(_MADE):
            shown = frame.reformat(format=stream.pix_fmt)
            shown.pts, shown.time_base = frame.pts, Fraction(1, _MADE.fps)
            output.mux(stream.encode(shown))
        output.mux(stream.encode(None))


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four changes, half of them near the start, where headers are."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        size = len(changed)
        if not size:
            break
        at = draw.randrange(min(size, 2048) if draw.random() < 0.5 else size)
        length = min(size - at, draw.choice((1, 4, 16, 188, 1000)))
        match draw.randrange(8):
            case 0:
                for _ in range(draw.choice((1, 10, 100))):
                    changed[draw.randrange(size)] ^= 1 << draw.randrange(8)
            case 1:
                changed[at : at + length] = draw.randbytes(length)
            case 2:
                changed[at : at + length] = bytes(length)
            case 3:
                del changed[at : at + length]
            case 4:
                changed[at:at] = changed[at : at + length] * draw.choice((1, 3))
            case 5:
                other = draw.randrange(size - length + 1)
                one, two = changed[at : at + length], changed[other : other + length]
                changed[at : at + length], changed[other : other + length] = two, one
            case 6:
                wide = draw.choice((1, 2, 4))
                number = draw.choice(_EXTREMES) & (1 << 8 * wide) - 1
                changed[at : at + wide] = number.to_bytes(wide, draw.choice(("big", "little")))
            case _:
                del changed[at + draw.randrange(size - at) :]
    return bytes(changed)


def damaged(sources: Sequence[Path], seed: int, number: int) -> tuple[bytes, random.Random]:
    """The file of that number, and the draw that chose it."""
    draw = random.Random(f"{seed}/{number}")
    return mutated(draw.choice(sources).read_bytes(), draw), draw


@lru_cache(maxsize=1)
def _engine() -> Engine:
    return Engine.from_pretrained(device="cpu", threads=1)


def read(sources: Sequence[Path], seed: int, number: int, folder: Path) -> tuple[str, float]:
    """Reads one damaged file: "frames" or the class of its error, and MiB of this process; raises any other error."""
    data, draw = damaged(sources, seed, number)
    path = folder / f"{seed}-{number}"
    path.write_bytes(data)
    what = "frames"
    try:
        with _engine().frames(path, draw.choice(_MODES)) as stream:
            for _ in stream:
                pass
        if number % 10 == 0:
            summary = _engine().summarize(path, keyframes=3)
            summary.render_reel(folder / f"{number}.mp4", aspect="1:1")  # another shape: short ones have a reel, too
    except SourceError as error:
        what = type(error).__name__
    except KeyreelError as error:
        raise AssertionError(f"{type(error).__name__} is no error of the video: {error}") from error
    finally:
        path.unlink()
    return what, resident_mib()


def _limit() -> None:
    bound_arenas()
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    _engine()
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _worker() -> Worker:
    made = Worker()
    made.call(_limit, limit_seconds=SECONDS)
    return made


def fuzz(options: argparse.Namespace, sources: Sequence[Path], folder: Path) -> int:
    """Reads all files in workers and prints the counts; returns how many failed."""
    began, idle = time.perf_counter(), [_worker() for _ in range(options.workers)]

    def one(number: int) -> tuple[str, float | None]:
        worker = idle.pop()
        try:
            found: tuple[str, float] = worker.call(read, sources, options.seed, number, folder, limit_seconds=SECONDS)
            return found
        except Absent as error:
            print(f"--seed {options.seed} --only {number}: {error}", file=sys.stderr, flush=True)
            worker.close()
            worker = _worker()
            return "FAILED", None
        finally:
            idle.append(worker)

    with ThreadPoolExecutor(options.workers) as pool:
        results = list(pool.map(one, range(options.files)))
    for worker in idle:
        worker.close()
    counts = Counter(what for what, _ in results)
    memory = [own for _, own in results if own is not None] or [0.0]
    what = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    tenth = max(1, len(memory) // 10)
    grown = f"{median(memory[:tenth]):.0f} MiB in the first tenth, {median(memory[-tenth:]):.0f} in the last"
    print(f"{options.files} files in {time.perf_counter() - began:.0f} s: {what}; memory of a worker {grown}")
    return counts["FAILED"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, help="read this one here, and raise what it raises")
    parser.add_argument("--keep", type=Path, help="write the file of --only to this folder, and leave it")
    parser.add_argument("--media", type=Path, default=ROOT.parent / "shared" / "media", help="folder of real clips")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="keyreel-fuzz-") as name:
        folder = Path(name)
        sources = originals(folder, options.media)
        if options.only is None:
            return int(fuzz(options, sources, folder) > 0)
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            data, _ = damaged(sources, options.seed, options.only)
            (options.keep / f"{options.seed}-{options.only}").write_bytes(data)
        print(read(sources, options.seed, options.only, folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
