"""Reads the sound of spans of a video: decoded and placed at its times, or as packets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard

from keyreel.decode.packets import BROKEN, demux
from keyreel.decode.source import Source, select_video
from keyreel.decode.timeline import start_seconds
from keyreel.types import F32

RATE = 48000  # samples a second
FADE_SECONDS = 0.03  # length of the fade at both ends of a span
PREROLL_SECONDS = 0.5  # to read before a span: lossy audio needs a few frames to settle
SLACK_SECONDS = 0.01  # larger steps are real gaps; pts may be rounded to milliseconds

_STEP = RATE // 50  # samples to measure the energy of

T = TypeVar("T", bound=Any)


def faded(blocks: Iterator[F32], count: int) -> Iterator[F32]:
    """Fades blocks [2, n] float32, `count` samples in all, linearly at both ends."""
    length = max(1.0, min(FADE_SECONDS * RATE, count / 2))
    done = 0
    for block in blocks:
        place = np.arange(done, done + block.shape[1]) + 0.5
        gain = np.clip(np.minimum(place, count - place) / length, 0.0, 1.0)
        yield (block * gain).astype(np.float32)
        done += block.shape[1]


def quietest(reader: SoundReader, seconds: float, reach_seconds: float) -> float:
    """The middle of the quietest 60 ms within reach of a time; the time itself if it is at most twice as loud.

    It measures the energy of both channels in steps of 20 ms.
    """
    start = max(seconds - reach_seconds, 0.0)
    steps = int((seconds + reach_seconds - start) * RATE) // _STEP
    blocks = list(placed_sound(reader, start, steps * _STEP))
    if steps < 3 or not blocks:
        return seconds
    samples = np.concatenate(blocks, axis=1)
    energy = np.square(samples[:, : steps * _STEP].reshape(2, steps, _STEP)).mean((0, 2))
    around = np.convolve(energy, np.ones(3) / 3, mode="valid")  # of the steps n to n + 2
    places = start + (np.arange(len(around)) + 1.5) * _STEP / RATE
    now = int(np.abs(places - seconds).argmin())
    best = int(np.lexsort((np.abs(places - seconds), around))[0])
    return seconds if around[now] <= 2 * around[best] else float(places[best])


def placed_sound(reader: SoundReader, start_seconds: float, count: int) -> Iterator[F32]:
    """Yields `count` samples, [2, n] float32 at 48 kHz, from `start_seconds` on, each at its time; silence in gaps."""
    done = 0
    end = (count, np.zeros((2, 0), np.float32))
    for position, block in itertools.chain(_placed(reader, start_seconds), [end]):
        while done < min(position, count):
            silence = min(min(position, count) - done, RATE)
            yield np.zeros((2, silence), np.float32)
            done += silence
        if position >= count:
            return
        block = block[:, done - position : count - position]
        if block.shape[1]:
            yield block
            done += block.shape[1]


def _placed(reader: SoundReader, start_seconds: float) -> Iterator[tuple[int, F32]]:
    """Yields (number of the first sample, from `start_seconds`, block [2, n]); numbers may be negative or overlap."""
    resampler = AudioResampler(format="fltp", layout="stereo", rate=RATE)
    kind: tuple[str, str, int] | None = None
    due = position = 0.0  # expected time of the next frame in seconds; number of its first sample

    for frame, seconds in reader.frames(start_seconds):
        arrived = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != arrived or (seconds is not None and abs(seconds - due) > SLACK_SECONDS):
            for block in _blocks(resampler, None) if kind is not None else ():
                yield round(position), block
            resampler, kind = AudioResampler(format="fltp", layout="stereo", rate=RATE), arrived
            due = seconds if seconds is not None else due
            position = (due - start_seconds) * RATE
        frame.pts = None
        for block in _blocks(resampler, frame):
            yield round(position), block
            position += block.shape[1]
        due += frame.samples / frame.sample_rate
    if kind is not None:
        for block in _blocks(resampler, None):
            yield round(position), block


def _blocks(resampler: AudioResampler, frame: av.AudioFrame | None) -> Iterator[F32]:
    for resampled in resampler.resample(frame):
        yield resampled.to_ndarray().astype(np.float32, copy=False)


class SoundReader:
    """Decodes the sound of a source from any time on. It opens the file once."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._container: InputContainer | None = None

    def close(self) -> None:
        """Closes the file."""
        if self._container is not None:
            self._container.close()
        self._container = None

    def frames(self, start_seconds: float) -> Iterator[tuple[av.AudioFrame, float | None]]:
        """Yields frames from a little before `start_seconds` on, with their time from the file's start."""
        return self._read(start_seconds, _decoded)

    def packets(self, start_seconds: float) -> Iterator[tuple[Packet[Any], float | None]]:
        """Yields packets instead of frames, see `frames`."""
        return self._read(start_seconds, _packets)

    def _read(self, start_seconds: float, read: Callable[[Any, Any], Iterator[T]]) -> Iterator[tuple[T, float | None]]:
        for again in (False, True):
            if again:
                self.close()  # the index is wrong or missing: read from the beginning
            opened = self._container is None
            container = self._container = self._container or self._source.open()
            stream = container.streams.audio[0]
            base = float(stream.time_base or 1.0)
            origin = origin_of(container)
            for other in container.streams:
                if other.index != stream.index:
                    other.discard = Discard.all
            target = start_seconds - PREROLL_SECONDS + origin
            from_start = opened and (again or target <= 0)
            if not from_start:
                try:
                    container.seek(max(0, int(target / base)), stream=stream)
                except av.FFmpegError:
                    continue
            landed = from_start
            for item in read(container, stream):
                seconds = None if item.pts is None else item.pts * base - origin
                if not landed and (seconds is None or seconds > start_seconds):
                    break
                landed = True
                yield item, seconds
            if landed:
                return


def origin_of(container: InputContainer) -> float:
    """The start of the file, on its clock."""
    stream = select_video(container)
    start = None if stream is None else start_seconds(container, stream)
    return float(start or 0)


def _packets(container: Any, stream: Any) -> Iterator[Packet[Any]]:
    packets = demux(container, stream)
    while True:
        try:
            packet = next(packets, None)
        except BROKEN:
            return
        if packet is None:
            return
        if packet.size:
            yield packet


def _decoded(container: Any, stream: Any) -> Iterator[av.AudioFrame]:
    """Yields the frames that can be decoded. A damaged packet leaves a gap, which becomes silence."""
    for packet in itertools.chain(_packets(container, stream), [None]):
        try:
            yield from stream.codec_context.decode(packet)
        except BROKEN:
            continue
