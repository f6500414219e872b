"""Encodes frames as scene and subject vectors: backbone, temporal shift, attention, fusion, a window at a time.

The result of frame t depends only on frames within `shift_steps` of it. So a window with a halo of that many frames on
both sides gives the same values as the whole video, and memory does not grow with the video.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from keyreel.config import EncodeConfig, ShiftMode
from keyreel.runtime.backend import Backend
from keyreel.runtime.bundle import Bundle
from keyreel.types import JOINT, Embedding, FrameBatch

# The shift does not cross steps with a larger histogram distance. In the test clips at 2 fps it is below 0.4 within a
# scene and mostly above 0.6 across a cut. A missed cut only mixes patches of a few frames.
SHIFT_CUT = 0.5
_PARTS, _FAINT = 32, 4.0  # of a layout: parts on each axis; of 255, added to its magnitude, for even pictures


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the seconds that the block takes to `seconds[stage]`."""
    began = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded video."""

    embedding: Embedding
    vectors: Any  # [T, D] float32, scene vectors, on the device
    joint: Any  # [T, 2 D] float32, `Embedding.joint`, on the device
    seconds: Mapping[str, float]  # wall time of the stages "encode" (backbone) and "fuse" (the rest)


class _Window:
    """The frames that are needed next, with their tokens: those to fuse, and their halo."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self.first = 0  # number of the first frame held
        self.done = 0  # frames that are fused
        self._held: tuple[Any, ...] = ()  # tokens [n, R+P, C], frames [n, H, W, 3], linked [n]

    @property
    def stop(self) -> int:
        return self.first + (len(self._held[0]) if self._held else 0)

    def add(self, *arrays: Any) -> None:
        empty = self.first == self.stop
        pairs = zip(self._held, arrays, strict=True) if not empty else ()
        self._held = arrays if empty else tuple(self._xp.concatenate(pair) for pair in pairs)

    def rows(self, start: int, stop: int) -> tuple[Any, ...]:
        return tuple(array[start - self.first : stop - self.first] for array in self._held)

    def drop_before(self, frame: int) -> None:
        drop = max(frame - self.first, 0)
        self._held = tuple(array[drop:] for array in self._held)
        self.first += drop


def layout_of(xp: Any, frames: Any) -> Any:
    """Describes the layout of each frame: the means of about 32 x 32 parts, freed of exposure and contrast.

    Two layouts have a mean difference of 0 if they are equal, and about 1 if they have nothing in common.

    Args:
        frames: [n, H, W, 3] uint8; ignores the last rows and columns that fill no part.
    """
    count, height, width, _ = frames.shape
    high, wide = max(1, height // _PARTS), max(1, width // _PARTS)
    rows, columns = height // high, width // wide
    parts = frames[:, : rows * high, : columns * wide].reshape(count, rows, high, columns, wide, 3)
    layout = parts.mean(axis=(2, 4, 5), dtype=np.float32).reshape(count, -1)
    layout = layout - layout.mean(axis=1, keepdims=True)
    return layout / (xp.abs(layout).mean(axis=1, keepdims=True) + _FAINT)


class Encoder:
    """The image side of a model on a backend. Safe to share between threads: each `encode` has its own state."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self._ops, self._arrays = backend.ops, backend.ops.arrays
        self._batch_size = backend.batch_size
        self._backbone = backend.open_session(bundle.file("backbone.onnx"))
        self._attention = backend.open_session(bundle.file("attention.onnx"))
        self._fusion = backend.open_session(bundle.file("fusion.onnx"))

    def close(self) -> None:
        """Frees the graphs."""
        for session in (self._backbone, self._attention, self._fusion):
            session.close()

    def shift_mode(self, config: EncodeConfig) -> ShiftMode:
        """The mode of the shift: the config's, else the model's."""
        return config.shift if config.shift is not None else self.bundle.shift_default

    def encode(self, batches: Iterable[FrameBatch], config: EncodeConfig) -> Encoded:
        """Encodes at least one batch of frames of the model's size. At the end it copies the embedding to the CPU."""
        with self._arrays.scope():
            return self._encode(batches, config)

    def _encode(self, batches: Iterable[FrameBatch], config: EncodeConfig) -> Encoded:
        xp, ops = self._arrays.xp, self._ops
        window = _Window(xp)
        fused: list[tuple[Any, Any, Any]] = []  # scene, subject, map
        signals, times, places = [], [], []
        last: Any = None  # histogram and layout of the frame before
        seconds = {"encode": 0.0, "fuse": 0.0}
        for batch in batches:
            with timed(seconds, "encode"):
                frames = self._arrays.to_device(batch.data)
                tokens = self._backbone.run({"frames": frames})["tokens"]
            with timed(seconds, "fuse"):
                sharpness, mean, spread, histogram = ops.frame_signals(frames)
                layout = layout_of(xp, frames)
                before, placed = (histogram[:1], layout[:1]) if last is None else last
                change = ops.histogram_distance(histogram, xp.concatenate([before, histogram[:-1]]))
                moved = xp.abs(layout - xp.concatenate([placed, layout[:-1]])).mean(axis=1)
                signals.append(xp.stack([sharpness, mean, spread, change, moved], axis=1))
                linked = change < SHIFT_CUT
                if last is None:
                    linked[0] = False
                last = histogram[-1:], layout[-1:]
                window.add(tokens, frames, linked)
                times.append(batch.pts_seconds)
                places.append(batch.frame_index)
                fused += self._fuse(window, config, at_end=False)
        with timed(seconds, "fuse"):
            fused += self._fuse(window, config, at_end=True)
            scene, subject, maps = (xp.concatenate(part) for part in zip(*fused, strict=True))
            joint = scene
            if config.subject:
                joint = xp.concatenate([JOINT[0] * scene, JOINT[1] * subject], axis=1)
            to_host = self._arrays.to_host
            sharpness, mean, spread, change, moved = to_host(xp.concatenate(signals)).astype(np.float32).T.copy()
            embedding = Embedding(
                vectors=to_host(scene),
                subject=to_host(subject) if config.subject else None,
                pts_seconds=np.concatenate(times),
                frame_index=np.concatenate(places),
                attention=to_host(maps),
                grid=self.bundle.grid,
                sharpness=sharpness,
                luma_mean=mean,
                luma_spread=spread,
                pixel_change=change,
                layout_change=moved,
                model=self.bundle.name,
                model_sha256=self.bundle.sha256,
            )
        return Encoded(embedding, scene, joint, seconds)

    def _fuse(self, window: _Window, config: EncodeConfig, *, at_end: bool) -> Iterator[tuple[Any, Any, Any]]:
        """Fuses the frames whose halo is complete, a batch at a time; at the end, all."""
        shift = self.shift_mode(config) if config.subject else "off"
        size = config.batch_size or self._batch_size
        halo = config.shift_steps if config.subject else 0
        while True:
            stop = min(window.done + size, window.stop)
            if stop == window.done or (not at_end and (stop - window.done < size or stop + halo > window.stop)):
                return
            low, high = max(window.done - halo, window.first), min(stop + halo, window.stop)
            core = slice(window.done - low, stop - low)
            tokens, frames, linked = window.rows(low, high)
            # The frame before the window is unknown: nothing shifts across its start.
            linked = linked.copy()
            linked[0] = False
            by_frames = self.bundle.attention_input == "frames"
            seen = frames if by_frames else tokens
            if shift != "off":
                source = self._sources(tokens, linked, shift, config)
                if by_frames:
                    seen = self._ops.shift_pixels(frames, source, self.bundle.grid)
                else:
                    seen = self._ops.shift_tokens(tokens, source, self.bundle.prefix_tokens)
            attention = self._attention.run({self.bundle.attention_input: seen[core]})["attention"]
            if config.subject:
                patches = tokens[:, self.bundle.prefix_tokens :]
                change = self._ops.patch_change(patches, self.bundle.grid, linked, steps=config.shift_steps)[core]
            else:
                change = self._arrays.xp.zeros_like(attention)
            fused = self._fusion.run({"tokens": tokens[core], "attention": attention, "change": change})
            yield fused["scene"], fused["subject"], fused["map"]
            window.done = stop
            window.drop_before(stop - halo)

    def _sources(self, tokens: Any, linked: Any, shift: ShiftMode, config: EncodeConfig) -> Any:
        """[n, P] int64: the frame of the window that each patch is taken from."""
        if shift == "fixed":
            return self._ops.fixed_shift(len(tokens), self.bundle.grid, linked, fraction=config.shift_share, step=1)
        patches = tokens[:, self.bundle.prefix_tokens :]
        return self._ops.adaptive_shift(
            patches, self.bundle.grid, linked, steps=config.shift_steps, threshold=config.shift_threshold
        )
