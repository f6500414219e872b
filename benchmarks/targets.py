"""What was aimed at beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.cases.encode import ATTENTION
from benchmarks.cases.end_to_end import NAIVE, SUMMARY
from benchmarks.cases.search import FLOOR, SCAN
from benchmarks.rows import Results

FULL_DECODE = "pyav"
OTHER_DECODERS = ("torchcodec", "decord", "opencv")
OTHER_RUNTIMES = ("onnxruntime fp32", "onnxruntime int8", "torch bf16", "openvino bf16")
ONE_START = "scikit-learn n_init=1"


@dataclass(frozen=True, slots=True)
class Target:
    """What was aimed at beside what was measured."""

    what: str
    bound: float
    measured: float
    at_most: bool = False
    percent: bool = False

    @property
    def met(self) -> bool:
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    def row(self) -> list[str]:
        show: Callable[[float], str] = (lambda x: f"{100 * x:.3g} %") if self.percent else (lambda x: f"{x:.3g}x")
        sign = "<=" if self.at_most else ">="
        return [self.what, f"{sign} {show(self.bound)}", show(self.measured), "yes" if self.met else "no"]


def _own(systems: Any) -> tuple[str, ...]:
    """keyreel's systems that give what its peers give."""
    return tuple(name for name in systems if name.split()[0] == "keyreel" and name not in (ATTENTION, SUMMARY))


def targets(results: Results) -> list[Target]:
    found = [*_decode_targets(results), *_encode_targets(results), *_array_targets(results), *_end_targets(results)]
    return [Target(what, bound, value, **more) for what, bound, value, more in found if value is not None]


_Wanted = tuple[str, float, float | None, dict[str, bool]]


def _decode_targets(results: Results) -> Iterator[_Wanted]:
    for gop, full in ((250, 1.6), (60, 2.5)):
        group = results.first("decode", codec="h264", height=1080, gop=gop)
        if group is None:
            continue
        what = f"decode, 1080p H.264, GOP {gop}, 1 fps"
        yield f"{what}: full decode / keyreel", full, group.ratio(FULL_DECODE, "keyreel"), {}
        best = group.least(OTHER_DECODERS)
        if best is not None:
            said = f"{what}: best of torchcodec, decord, OpenCV ({best[0]}) / keyreel"
            yield said, 1.5, group.ratio(best[0], "keyreel"), {}
    ratios = [ratio for group in results.groups("decode") if (ratio := group.ratio(FULL_DECODE, "keyreel"))]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        yield f"decode, geometric mean over {len(ratios)} clips: full decode / keyreel", 3.0, mean, {}


def _encode_targets(results: Results) -> Iterator[_Wanted]:
    for group in results.groups("encode"):
        best, model = group.least(OTHER_RUNTIMES), group.params["model"]
        for own in _own(group.systems) if best is not None else ():
            yield f"encode, {model}: rate of {own} / of the best other ({best[0]})", 0.95, group.ratio(best[0], own), {}
        share = group.ratio(ATTENTION, "keyreel")
        yield f"encode, {model}: time that spatial attention adds", 0.15, share, {"at_most": True, "percent": True}


def _array_targets(results: Results) -> Iterator[_Wanted]:
    for group in results.groups("select", frames=3_000, clusters=32):
        ratio = group.ratio(ONE_START, "keyreel")
        fits = [f"{group.median(name, 'objective') or 0:.4f}" for name in (ONE_START, "keyreel")]
        what = f"k-means, {group.params['data']}, 3,000 x 512, K = 32: {ONE_START} / keyreel"
        yield f"{what} (objective {fits[0]} / {fits[1]})", 10.0, ratio, {}
    group = results.first("search", lambda params: params["queries"] == 1)
    if group is not None:
        ratio = group.ratio("keyreel", FLOOR, "wall_seconds")
        what = f"search, {group.params['rows']:,} x 512"
        yield f"{what}: keyreel / one pass over memory", 1.15, ratio, {"at_most": True}
        recall = group.median(SCAN, "recall") or 0.0
        yield f"{what}: keyreel / {SCAN}, recall {recall:.3f}", 2.0, group.ratio("keyreel", SCAN, "wall_seconds"), {}
    for group in results.groups("end_to_end"):
        seconds, whole = group.median(SUMMARY, "select_seconds"), group.median(SUMMARY)
        if seconds is not None and whole:
            what = f"automatic number of key-frames in a summary, GOP {group.params['gop']}"
            yield what, 0.05, seconds / whole, {"at_most": True, "percent": True}


def _end_targets(results: Results) -> Iterator[_Wanted]:
    for gop, bound in ((250, 2.75), (60, 4.0)):
        group = results.first("end_to_end", gop=gop, height=1080)
        if group is not None:
            what = f"end to end, 1080p H.264, GOP {gop}, 1 fps, ViT-B/32: plain / "
            for own in ("keyreel", "keyreel int8"):
                for name, least in ((own, bound), (f"{own} keyframes", 20.0)):
                    yield f"{what}{name}", least, group.ratio(NAIVE, name), {}
                    yield f"{what}{name}, wall time", least, group.ratio(NAIVE, name, "wall_seconds"), {}
