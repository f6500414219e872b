"""Opens one video safely, from a file, stream or address, and describes it.

Video files are hostile input. FFmpeg may use only the `file` protocol (and http if allowed), and only demuxers of
single files. It refuses playlists, which could name any file of this machine or any host of its network.
"""

from __future__ import annotations

import io
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from keyreel.config import DecodeLimits
from keyreel.decode.color import display_size, rotation_degrees, transfer_of
from keyreel.decode.headers import remarks_of
from keyreel.decode.packets import BARREN_PACKETS, BROKEN, demux, reason_of
from keyreel.decode.refusals import HEAD_BYTES, encrypted, head_of_file, is_scrambled, refusal, refuse_playlists
from keyreel.decode.sampling import PlanBroken
from keyreel.decode.streams import FileView, check_size, checked, reading, spooled
from keyreel.decode.timeline import Timeline, clocks_restart, promised_seconds, scan
from keyreel.errors import CorruptStream, SourceError, UnsupportedCodec
from keyreel.types import VideoInfo

# Tags that are not UTF-8 are no reason to refuse a video. PyAV 19 always accepts them.
_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

# FFmpeg accepts a demuxer if any of its names is listed. Left out on purpose: hls, dash, concat, imf, sdp, rtsp and all
# others that open further files; devices; image sequences; text that a demuxer would draw (tty, ansi).
_CONTAINERS = (
    "mov,matroska,avi,asf,flv,live_flv,mpegts,mpeg,mpegvideo,ogg,ivf,h264,hevc,vvc,av1,obu,m4v,h263,vc1,vc1test,"
    "mjpeg,mpjpeg,nut,mxf,gxf,wtv,rm,dv,gif,apng,webp_anim,yuv4mpegpipe,swf,nuv,bink,smk,roq,flic,amv,dirac,cavsvideo,"
    "avs2,avs3,mp3,wav,flac,aac,aiff,w64,caf,amr,ac3,eac3,dts,truehd,ape,tta,wv"
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//|\S*\|)")
_DEFAULT_LIMITS = DecodeLimits()


class Source:
    """A video that can be opened repeatedly. A context manager, which deletes the temporary copy of a stream.

    Several containers may be open at the same time, also on one file object. Facts about the video are cached, for all
    users of the source and all threads.

    Args:
        video: a path; bytes; a binary file object, read from its start; "-" for standard input; with
            `limits.allow_network` an http(s) URL. A stream that cannot seek is first copied to a temporary file.
        limits: the largest video to accept.

    Raises:
        TypeError: `video` is none of these.
    """

    def __init__(
        self, video: str | os.PathLike[str] | bytes | BinaryIO, *, limits: DecodeLimits = _DEFAULT_LIMITS
    ) -> None:
        self.limits = limits
        self.path: Path | None = None
        self._video: Any = video
        self.url: str | None = None  # of a video at a server
        self._lock, self._file_lock = threading.RLock(), threading.Lock()
        self._copy: Any = None  # the temporary file of a stream that cannot seek
        self._analysed = self._closed = False
        self._info: VideoInfo | None = None
        self.remarks: tuple[str, ...] = ()  # warnings about its pictures, after the packets were read
        self._timeline: Timeline | None = None
        if isinstance(video, str) and video == "-":
            self.name = "<stdin>"
        elif isinstance(video, str) and _SCHEME.match(video) and not os.path.exists(video):
            self.name = self.url = video
        elif isinstance(video, (str, os.PathLike)):
            self.name = os.fspath(video)
            # Absolute, so that a change of the working folder does not matter.
            self.path = Path(os.path.abspath(self.name))
        elif isinstance(video, (bytes, bytearray, memoryview)):
            self.name = "<bytes>"
            self._video = bytes(video)
        elif hasattr(video, "read") and not hasattr(video, "encoding"):
            self.name = "<stream>"
        else:
            raise TypeError(f"a video is a path, bytes, a binary file object, '-' or a URL, got {type(video).__name__}")

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Source({self.name!r})"

    def close(self) -> None:
        """Deletes the temporary copy, if there is one. Open containers stay usable. Idempotent."""
        self._closed = True
        if self._copy is not None:
            self._copy.close()

    def open(self) -> InputContainer:
        """Opens a new container, at the start of the video.

        Raises:
            SourceNotFound: the file does not exist.
            CorruptStream: FFmpeg cannot read the file.
            SourceError: refused: a folder, a playlist, a URL that is not allowed, a video over a limit.
            ValueError: the source is closed.
        """
        if self._closed:
            raise ValueError(f"{self.name}: the source is closed")
        target, head = self._target()
        refuse_playlists(self.name, head)
        options = {
            "protocol_whitelist": "http,https,tcp,tls" if self.url else "file",
            "format_whitelist": _CONTAINERS,
            "max_pixels": str(self.limits.max_pixels),
            # Without it, FFmpeg asks servers to close connections. Where one does so and sends no header that says it,
            # FFmpeg loses the first packet.
            "multiple_requests": "1",
        }
        try:
            timeout = (20.0, 60.0) if self.url else None
            container: InputContainer = av.open(target, mode="r", options=options, timeout=timeout, **_METADATA)
        except (*BROKEN, OSError) as error:
            damaged = isinstance(error, av.error.InvalidDataError | av.error.EOFError)
            if damaged and self._is_scrambled():
                raise encrypted(self.name) from error
            raise refusal(self.name, error, head, remote=self.url is not None) from error
        try:
            with self.guarded():
                self._check(container)
        except BaseException:
            container.close()
            raise
        return container

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Raises CorruptStream for PyAV's errors inside the block."""
        try:
            yield
        except BROKEN as error:
            if self._closed:
                raise
            what = f"{type(error).__name__}: {reason_of(error)}"
            raise CorruptStream(
                f"{self.name}: cannot be read: {what}.", hint="Check that it plays; copy or download it again."
            ) from error

    def probe(self) -> VideoInfo:
        """Reads the facts about the video from the file's headers, and colours and rotation from its first frame.

        It also reads the packets, see `timeline`. The result is cached.

        Raises:
            SourceError: as `open`.
            UnsupportedCodec: no video stream, or no decoder for it.
            CorruptStream: no frame can be decoded.
        """
        with self._lock:
            if self._info is None:
                self._analyse(lambda: None)
            assert self._info is not None
            return self._info

    def timeline(self, checkpoint: Callable[[], None] = lambda: None) -> Timeline | None:
        """Reads the video's packets, once. None if the packets do not tell the frames.

        Args:
            checkpoint: called often while reading; raises to stop.
        """
        with self._lock:
            if not self._analysed:
                try:
                    self._analyse(checkpoint)
                except SourceError:
                    if not self._analysed:
                        raise
            return self._timeline

    def forget(self) -> None:
        """Clears the cached facts about the video."""
        with self._lock:
            self._info = self._timeline = None
            self._analysed = False

    def _analyse(self, checkpoint: Callable[[], None]) -> None:
        with self.guarded(), self.open() as container:
            stream = self.require_video(container)
            for other in container.streams:
                if other.index != stream.index:
                    other.discard = Discard.all
            demuxed = self.packets(container, stream)
            read: list[Packet[VideoStream]] = []
            try:
                frame = self._first_frame(demuxed, read)
                self._info = self._describe(container, stream, frame)
            finally:
                self._analysed = True
            with suppress(PlanBroken):
                self._timeline = scan(container, stream, chain(read, demuxed), checkpoint)

    def _describe(self, container: InputContainer, stream: VideoStream, frame: VideoFrame) -> VideoInfo:
        height, width = display_size(frame, stream.sample_aspect_ratio)
        if height * width > self.limits.max_pixels:
            raise SourceError(
                f"{self.name}: shown at {width} x {height} pixels, the limit is {self.limits.max_pixels} (max_pixels).",
                hint="Raise max_pixels if you trust the file.",
            )
        return VideoInfo(
            path=self.name,
            duration_seconds=promised_seconds(container, stream),
            width=width,
            height=height,
            codec=stream.codec_context.codec.canonical_name,
            pixel_format=frame.format.name,
            rotation_degrees=rotation_degrees(frame),
            average_fps=float(stream.average_rate) if stream.average_rate else None,
            has_audio=len(container.streams.audio) > 0,
            transfer=transfer_of(frame),
        )

    def _first_frame(self, packets: Iterator[Packet[VideoStream]], read: list[Packet[VideoStream]]) -> VideoFrame:
        """The first frame that can be decoded; appends the packets up to it to `read`."""
        reason = "it holds no pictures"
        while len(read) < BARREN_PACKETS:
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                read.append(packet)
                for frame in packet.decode():
                    return frame
            except BROKEN as error:
                reason = reason_of(error)
                if isinstance(error, av.error.ArgumentError):
                    reason = f"damaged, or pictures of more than {self.limits.max_pixels} pixels (max_pixels)"
                if not isinstance(error, av.error.InvalidDataError | av.error.ArgumentError):
                    break
        if self._is_scrambled():
            raise encrypted(self.name)
        raise CorruptStream(
            f"{self.name}: no frame can be decoded: {reason}.", hint="Check that it plays; copy or download it again."
        )

    def _target(self) -> tuple[Any, bytes]:
        """The target for FFmpeg, and its first bytes."""
        if self.url is not None:
            if not re.match(r"https?://", self.url, re.I):
                allowed = "Allowed: a path, '-' for standard input, and http(s) URLs where the network is allowed."
                raise SourceError(f"{self.name}: this kind of address cannot be opened. {allowed}", hint="Download it.")
            if not self.limits.allow_network:
                raise SourceError(
                    f"{self.name}: URLs are not opened by default.",
                    hint="Allow it (--allow-network, DecodeLimits(allow_network=True)), or download the file first.",
                )
            return self.url, b""
        if self.path is not None:
            return f"file:{self.path.absolute()}", head_of_file(self.name, self.path)
        target: Any
        if isinstance(self._video, bytes):
            target, head = io.BytesIO(self._video), self._video[:HEAD_BYTES]
        elif self._can_seek():
            target = FileView(self._video, self._file_lock)
            with reading(self.name):
                head = checked(self.name, target.read(HEAD_BYTES))
            target.seek(0)
        else:
            copy = self._spooled()
            target, head = f"file:{copy}", head_of_file(self.name, copy)
        if not head:
            raise CorruptStream(f"{self.name}: empty, 0 bytes of video.", hint="Check what was read.")
        return target, head

    def _can_seek(self) -> bool:
        seekable = getattr(self._video, "seekable", None)
        return self._video != "-" and (bool(seekable()) if seekable else hasattr(self._video, "seek"))

    def _spooled(self) -> Path:
        """The temporary copy of a stream that cannot seek, made at the first use."""
        with self._lock:
            if self._copy is None:
                self._copy = spooled(self.name, sys.stdin.buffer if self._video == "-" else self._video)
            check_size(self.name, self._copy)
            return Path(self._copy.name)

    def _check(self, container: InputContainer) -> None:
        stream = select_video(container)
        if stream is None or stream.codec_context is None:
            return  # `require_video` raises the error
        pixels = stream.width * stream.height
        if pixels > self.limits.max_pixels:
            raise SourceError(
                f"{self.name}: pictures of {stream.width} x {stream.height} = {pixels} pixels, the limit is "
                f"{self.limits.max_pixels} (max_pixels).",
                hint="Raise max_pixels if you trust the file.",
            )
        if "mov" in container.format.name:  # its tables are exact; headers of other formats only guess
            self._check_count(stream.frames)
        if not clocks_restart(container):  # else last time minus first time is not a length
            self.check_duration(promised_seconds(container, stream))
        stream.codec_context.options = {"max_pixels": str(self.limits.max_pixels)}

    def packets(self, container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
        """Yields the packets of the video, from the container's position.

        Raises:
            SourceError: more packets than the limit.
            UnsupportedCodec: the packets are encrypted.
        """
        for number, packet in enumerate(demux(container, stream)):
            self._check_count(number)
            if not number:
                self.remarks = remarks_of(stream, packet)
            if packet.has_sidedata("encryption_info"):
                raise encrypted(self.name)
            yield packet

    def _is_scrambled(self) -> bool:
        if self.url is not None:
            return False
        target, _ = self._target()
        with reading(self.name):
            if not isinstance(target, str):
                return is_scrambled(target)
            with open(target.removeprefix("file:"), "rb") as file:
                return is_scrambled(file)

    def _check_count(self, frames: int) -> None:
        if frames > self.limits.max_frames:
            raise SourceError(
                f"{self.name}: more than {self.limits.max_frames} pictures, which is the limit (max_frames).",
                hint="Cut the video, or raise max_frames in DecodeLimits if you trust the file.",
            )

    def check_duration(self, seconds: float | None) -> None:
        """Raises SourceError if a video of this many seconds is over the limit."""
        if seconds is not None and seconds > self.limits.max_duration_seconds:
            raise SourceError(
                f"{self.name}: {seconds:.0f} s long, the limit is {self.limits.max_duration_seconds:.0f} s "
                "(max_duration_seconds).",
                hint="Raise max_duration_seconds (--longest), or cut the video.",
            )

    def require_video(self, container: InputContainer) -> VideoStream:
        """Returns the video stream of a container.

        Raises:
            UnsupportedCodec: there is no video stream, or no decoder for it.
        """
        stream = select_video(container)
        if stream is None:
            kinds = {"cover picture" if s.type == "video" else s.type for s in container.streams}
            raise UnsupportedCodec(
                f"{self.name}: has no video stream, only: {', '.join(sorted(kinds)) or 'nothing'}.",
                hint="Give a file that has a video stream.",
            )
        if stream.codec_context is None:
            raise UnsupportedCodec(
                f"{self.name}: no decoder for its video, its codec is unknown.",
                hint="Convert it to H.264 with ffmpeg.",
            )
        return stream


def select_video(container: InputContainer) -> VideoStream | None:
    """Chooses the video stream: FFmpeg's best one, never a cover picture."""
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [s for s in container.streams.video if not s.disposition & pictures]
    best = container.streams.best("video")
    return best if best in streams else streams[0] if streams else None
