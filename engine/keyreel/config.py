"""All settings and their defaults, in frozen dataclasses that check their values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from ipaddress import ip_address
from typing import Any, Literal, get_args

SamplingMode = Literal["fps", "near", "every", "times", "keyframes", "all"]
ShiftMode = Literal["off", "fixed", "adaptive"]
ResizeMode = Literal["shortest", "longest", "squash", "fit"]
Interpolation = Literal["bicubic", "bilinear", "area"]
ReframeMode = Literal["follow", "fit"]
ReelOrder = Literal["time", "score"]
ReelMode = Literal["auto", "copy", "encode"]
Markers = Literal["otio", "edl", "fcpxml"]


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _check_choice(what: str, value: str, choices: Any) -> None:
    """Raises ValueError unless a value is one of the texts of a Literal."""
    allowed = get_args(choices)
    _check(value in allowed, f"unknown {what} {value!r}, allowed: {', '.join(allowed)}")


def _check_within(config: object, interval: str, *names: str) -> None:
    """Raises ValueError unless each named field is None or lies within an interval such as "(0, 1000]".

    As in mathematics, a square bracket includes the bound, a round one excludes it.
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    for name in names:
        value = getattr(config, name)
        above = value is None or (low <= value if interval[0] == "[" else low < value)
        below = value is None or (value <= high if interval[-1] == "]" else value < high)
        _check(above and below, f"{name} must be in {interval}, got {value}")


def aspect_ratio(aspect: str) -> float:
    """Converts a shape such as "9:16" to width over height, 0.5625.

    Raises:
        ValueError: not WIDTH:HEIGHT with numbers above 0, or beyond 10:1 or 1:10.
    """
    found = re.fullmatch(r"(\d{1,5}(?:\.\d{1,4})?):(\d{1,5}(?:\.\d{1,4})?)", aspect)
    width, height = (float(found[1]), float(found[2])) if found else (0.0, 0.0)
    allowed = "allowed: 9:16, 1:1, 4:5, 16:9 and any width:height from 1:10 to 10:1"
    _check(0 < height <= 10 * width <= 100 * height, f"unknown aspect {aspect!r}, {allowed}")
    return width / height


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which frames to take. The frame shown at time t is the last one with pts <= t. Times are seconds."""

    mode: SamplingMode = "fps"  # fps, near, every, times, keyframes or all
    fps: float = 2.0  # modes fps and near: frames per second of video
    tolerance_seconds: float | None = None  # mode near: how far from its time a frame may be; None: half a step
    every: int = 1  # mode every: take each n-th frame
    times: tuple[float, ...] = ()  # mode times: the times, in any order, with repeats
    start_seconds: float = 0.0  # start of the part of the video to look at
    stop_seconds: float | None = None  # its end, exclusive; None: the end of the video

    def __post_init__(self) -> None:
        _check_choice("sampling mode", self.mode, SamplingMode)
        _check_within(self, "(0, 1000]", "fps")
        _check_within(self, "[1, inf)", "every")
        _check_within(self, "[0, 1e9)", "tolerance_seconds", "start_seconds")
        _check(all(0 <= t < 1e9 for t in self.times), "times must be finite and >= 0")
        _check(self.mode != "times" or bool(self.times), "mode times needs times=(...), which only Python can give")
        stop = self.stop_seconds
        window = self.start_seconds > 0 or stop is not None
        _check(self.mode != "times" or not window, "mode times takes no start_seconds and stop_seconds")
        _check(stop is None or stop > self.start_seconds, f"stop_seconds {stop} is not after {self.start_seconds}")


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """How to bring an upright frame to a given size in pixels.

    Modes: shortest scales the short side to the size and crops the middle; longest scales the long side and pads with
    `fill`; squash scales each side by itself; fit scales to fit inside, without crop or padding.
    """

    height: int
    width: int
    mode: ResizeMode = "shortest"
    interpolation: Interpolation = "bicubic"
    fill: int = 0

    def __post_init__(self) -> None:
        _check_within(self, "[1, 16384]", "height", "width")
        _check(self.mode in get_args(ResizeMode), f"unknown resize mode {self.mode!r}")
        _check(self.interpolation in get_args(Interpolation), f"unknown interpolation {self.interpolation!r}")


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Limits on the videos to accept, against hostile or mistaken input."""

    max_pixels: int = 16384 * 8704  # largest picture, in pixels
    max_duration_seconds: float = 24 * 3600.0  # longest video, in seconds
    max_frames: int = 24 * 3600 * 120  # most frames in the file
    allow_network: bool = False  # allow http and https URLs


@dataclass(frozen=True, slots=True)
class EncodeConfig:
    """How to encode frames as vectors."""

    shift: ShiftMode | None = None  # mode of the temporal shift; None: the model's default
    shift_steps: int = 3  # how many sampled frames apart shift and change may look
    shift_share: float = 0.25  # mode fixed: fraction of the patches to replace
    shift_threshold: float = 0.15  # mode adaptive: shift patches that change by more (1 - cosine)
    subject: bool = True  # also make a vector of the subject of each frame
    batch_size: int | None = None  # frames in one model run; None: depends on the device

    def __post_init__(self) -> None:
        if self.shift is not None:
            _check_choice("shift mode", self.shift, ShiftMode)
        _check_within(self, "[1, 32]", "shift_steps")
        _check_within(self, "(0, 0.5]", "shift_share")
        _check_within(self, "[0, 2]", "shift_threshold")
        _check_within(self, "[1, 1024]", "batch_size")


@dataclass(frozen=True, slots=True)
class SelectConfig:
    """How to choose key-frames."""

    keyframes: int | None = None  # how many key-frames; None: as many as the video needs
    per_minute: float | None = None  # key-frames per minute of video, instead of a number
    max_keyframes: int = 32  # largest automatic number
    penalty: float = 0.1  # weight of the repulsion between centroids
    margin: float = 0.8  # cosine above which two centroids repel each other
    similarity_limit: float = 0.97  # largest cosine of two key-frames
    min_gap_seconds: float = 0.5  # shortest time between two key-frames
    quality_floor: float = 0.2  # avoid this fraction of the frames: the least sharp

    def __post_init__(self) -> None:
        both = self.keyframes is not None and self.per_minute is not None
        _check(not both, "give keyframes or per_minute, not both")
        _check_within(self, "[1, 10000]", "keyframes")
        _check_within(self, "(0, 6000]", "per_minute")
        _check_within(self, "[1, 1024]", "max_keyframes")
        _check_within(self, "[-1, 1]", "margin", "similarity_limit")
        _check_within(self, "[0, inf)", "penalty", "min_gap_seconds")
        _check_within(self, "[0, 1)", "quality_floor")

    @property
    def automatic(self) -> bool:
        """Whether the number of key-frames depends on the video."""
        return self.keyframes is None and self.per_minute is None


@dataclass(frozen=True, slots=True)
class OutputConfig:
    """What `Summary.save` writes, and how."""

    reel: bool = True  # write reel.mp4
    reel_seconds: float | None = None  # longest reel; None: 15 % of the video, 10 to 60 s, at most half of it
    reel_mode: ReelMode = "auto"  # copy packets, encode, or auto: copy if possible
    reel_height: int = 720  # largest short side of an encoded reel, in pixels
    query: str | None = None  # make the reel of the moments that answer this text
    order: ReelOrder = "time"  # order of the spans with a query: time, or score for the best first
    aspect: str | None = None  # shape of the reel, such as "9:16"; None: as the video
    reframe: ReframeMode = "follow"  # with aspect: follow the subject, or fit the whole frame
    storyboard: bool = True  # write storyboard.html
    thumbnails: bool = True  # write thumbs.vtt and thumbs.jpg
    otio: bool = False  # write reel.otio
    edl: bool = False  # write reel.edl
    markers: Markers | None = None  # write the key-frames as markers for editing programs
    scenes_csv: bool = False  # write the shots as scenes.csv, PySceneDetect's format
    chapters: bool = False  # write chapters.ffmetadata and a copy of the video with chapters
    embeddings: bool = False  # write embeddings.npz, which `Summary.load` needs
    keyframe_height: int = 1080  # tallest key-frame picture, in pixels
    jpeg_quality: int = 90  # JPEG quality, 1 to 95
    overwrite: bool = False  # replace an existing folder

    def __post_init__(self) -> None:
        _check_within(self, "(0, 1e9)", "reel_seconds")
        _check_choice("order", self.order, ReelOrder)
        _check_choice("reel mode", self.reel_mode, ReelMode)
        _check_within(self, "[1, 95]", "jpeg_quality")
        _check_within(self, "[16, inf)", "keyframe_height", "reel_height")
        if self.aspect is not None:
            aspect_ratio(self.aspect)
        _check_choice("reframe mode", self.reframe, ReframeMode)
        if self.markers is not None:
            _check_choice("markers", self.markers, Markers)
        shaped = self.aspect is not None or self.reframe == "follow"
        _check(shaped, f"reframe {self.reframe!r} needs an aspect, such as 9:16")


def output_config(output: OutputConfig | None, options: Mapping[str, Any]) -> OutputConfig:
    """Returns `output`, or the defaults, with the named fields changed.

    Raises:
        TypeError: not an OutputConfig, or an unknown field; the message names similar ones.
    """
    if not isinstance(output, OutputConfig | None):
        raise TypeError(f"output must be an OutputConfig, got {output!r}; or give its fields: save(folder, reel=False)")
    known = [own.name for own in fields(OutputConfig)]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=3)
            close = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are: {', '.join(known)}"
            raise TypeError(f"there is no output option {name!r}; {close}")
    return replace(output or OutputConfig(), **options)


@dataclass(frozen=True, slots=True)
class LibraryConfig:
    """How a library stores and searches vectors."""

    exact_rows: int = 2_000_000  # search up to this many vectors exactly, in memory; more with an index
    fold_similarity: float = 0.98  # show moments of different videos with a higher cosine as one
    preview_height: int = 240  # height of key-frame pictures, in pixels
    shards: int | None = None  # shards of a new library; None: no shards; for an existing library, what it has

    def __post_init__(self) -> None:
        _check_within(self, "[1, 1024]", "shards")
        _check(self.exact_rows >= 0, f"exact_rows must be >= 0, got {self.exact_rows}")
        _check(0 < self.fold_similarity <= 1, f"fold_similarity must be in (0, 1], got {self.fold_similarity}")
        _check(32 <= self.preview_height <= 2160, f"preview_height must be in 32..2160, got {self.preview_height}")


@dataclass(frozen=True, slots=True)
class IndexConfig:
    """How to index videos: for `Library.add`, `Library.update` and a Ray cluster."""

    sampling: Sampling = Sampling()
    encode: EncodeConfig = EncodeConfig()
    select: SelectConfig = SelectConfig()
    limits: DecodeLimits = DecodeLimits()
    tags: tuple[str, ...] = ()  # words to find these videos by
    workers: int = 1  # videos to index at the same time
    force: bool = False  # also index unchanged videos again

    def __post_init__(self) -> None:
        _check(not isinstance(self.tags, str), f"tags are several texts, got one: {self.tags!r}")
        object.__setattr__(self, "tags", tuple(dict.fromkeys(self.tags)))
        _check(1 <= self.workers <= 256, f"workers must be in 1..256, got {self.workers}")


@dataclass(frozen=True, slots=True)
class RayConfig:
    """What each worker requests from a Ray cluster."""

    cpus: float = 1.0  # CPU cores of a worker
    gpus: float = 0.0  # GPUs, or a fraction of one, of a worker
    retries: int = 2  # how often to retry a video whose worker died

    def __post_init__(self) -> None:
        _check(self.cpus > 0, f"cpus must be > 0, got {self.cpus}")
        _check(self.gpus >= 0, f"gpus must be >= 0, got {self.gpus}")
        _check(self.retries >= 0, f"retries must be >= 0, got {self.retries}")


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Settings of the service on a Ray cluster."""

    replicas: int = 1  # processes that answer requests
    wait: bool = False  # wait for lost shards; else answer without them
    replica_cpus: float = 1.0  # CPU cores of a replica
    shard_cpus: float = 1.0  # CPU cores of the actor of a shard
    shard_gpus: float = 0.0  # GPUs, or a fraction of one, of the actor of a shard
    shard_rows: int = 25_000_000  # vectors that the actor of a shard holds in memory; more need an index
    job_cpus: float = 1.0  # CPU cores of the actor that indexes
    job_gpus: float = 0.0  # GPUs of the actor that indexes

    def __post_init__(self) -> None:
        _check_within(self, "[1, 1000]", "replicas")
        _check_within(self, "(0, 1000]", "replica_cpus", "shard_cpus", "job_cpus")
        _check_within(self, "[0, 1000]", "shard_gpus", "job_gpus")
        _check_within(self, "[0, inf)", "shard_rows")


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Settings of the service."""

    host: str = "127.0.0.1"  # address to listen on
    port: int = 8000  # port to listen on; 0 takes a free one
    roots: tuple[str, ...] = ()  # folders whose videos callers may index and play
    folder: str | None = None  # for uploads and the list of jobs; None: serve/ in the library
    token: str | None = field(default=None, repr=False)  # bearer token that callers must send
    hosts: tuple[str, ...] = ()  # host names to answer to, "*" for all; by default those of this machine
    threads: int = 4  # requests to work on at the same time
    timeout_seconds: float = 30.0  # longest work on a request (else 504), longest wait for its header
    job_threads: int = 1  # videos to index at the same time
    max_jobs: int = 256  # longest queue of jobs; more get 429
    upload_bytes: int = 4 << 30  # largest upload, in bytes
    upload_quota: int | None = None  # bytes of all uploads together; None: what the disk holds
    play_bytes: int = 8 << 30  # bytes of all copies for browsers together, see `serve.playable`
    drain_seconds: float = 10.0  # after SIGTERM, time for open requests, then for running jobs

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return self.host.lower() == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __post_init__(self) -> None:
        _check(0 <= self.port <= 65535, f"port must be in 0..65535, got {self.port}")
        token = self.token
        sound = token is None or (len(token) >= 8 and token.isascii() and token.isprintable())
        _check(sound, "a token must have 8 characters or more, all of them printable ASCII")
        for name in ("threads", "job_threads", "max_jobs", "upload_bytes", "play_bytes"):
            _check(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        _check(self.drain_seconds >= 0, f"drain_seconds must be >= 0, got {self.drain_seconds}")
        _check(self.timeout_seconds > 0, f"timeout_seconds must be > 0, got {self.timeout_seconds}")
