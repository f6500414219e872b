"""Frames to fused vectors: backbone, temporal shift, spatial attention, fusion; a window at a time.

Every decision on frame t depends on frames within `shift_steps` of t, so that a window with a halo of that many frames
on both sides gives what the whole video would give, and memory does not grow with the video.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from keyreel.backend import Backend
from keyreel.bundle import Bundle
from keyreel.config import EncodeConfig, ShiftMode
from keyreel.types import F32, U8, Embedding, FrameBatch, Progress

# Histogram distance at which the shift sees a cut: between two frames of one scene it stays below 0.4 at 2 fps in the
# clips that were looked at, across a cut it is mostly above 0.6. Missing a cut only mixes patches of a few frames.
SHIFT_CUT = 0.5


@dataclass(slots=True)
class _Window:
    """Frames whose tokens are known and that are still needed: those to be fused next, and their halo."""

    tokens: list[F32] = field(default_factory=list)  # [R+P, C] each
    frames: list[U8] = field(default_factory=list)  # [H, W, 3] each
    linked: list[bool] = field(default_factory=list)
    first: int = 0  # number of the first frame held
    done: int = 0  # frames that are fused

    def drop_before(self, frame: int) -> None:
        gone = max(frame - self.first, 0)
        del self.tokens[:gone], self.frames[:gone], self.linked[:gone]
        self.first += gone


class Encoder:
    """The image side of a bundle on a backend. Safe to share between threads: each `encode` keeps its own state."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self._ops = backend.ops
        self._backbone = backend.open_session(bundle.file("backbone.onnx"))
        self._attention = backend.open_session(bundle.file("attention.onnx"))
        self._fusion = backend.open_session(bundle.file("fusion.onnx"))

    def close(self) -> None:
        for session in (self._backbone, self._attention, self._fusion):
            session.close()

    def shift_mode(self, config: EncodeConfig) -> ShiftMode:
        """The shift that is in force: the caller's, else the bundle's."""
        return config.shift if config.shift is not None else self.bundle.shift_default

    def strength(self, config: EncodeConfig) -> float:
        """The attention strength that is in force: the caller's, else the bundle's."""
        own = config.attention_strength
        return self.bundle.strength_default if own is None else own

    def encode(
        self, batches: Iterable[FrameBatch], config: EncodeConfig, *, progress: Progress | None = None
    ) -> tuple[Embedding, dict[str, float]]:
        """Encodes a stream of frames of the model's size.

        Returns:
            the embedding of all frames, and the busy seconds of "encode" (backbone) and "fuse" (the rest).

        Raises:
            ValueError: the frames have another size than the model takes, or there are none.
        """
        timings = {"encode": 0.0, "fuse": 0.0}
        window, vectors, maps, signals, times, places = _Window(), [], [], [], [], []
        last_histogram: F32 | None = None
        for batch in batches:
            started = time.perf_counter()
            self._check(batch)
            tokens = self._backbone.run({"frames": batch.data})["tokens"]
            timings["encode"] += time.perf_counter() - started
            started = time.perf_counter()
            sharpness, mean, spread, histogram = self._ops.frame_signals(batch.data)
            before = histogram[:1] if last_histogram is None else last_histogram[None]
            change = self._ops.histogram_distance(histogram, np.concatenate([before, histogram[:-1]]))
            signals.append(np.stack([sharpness, mean, spread, change], axis=1))
            window.linked += [bool(c < SHIFT_CUT) for c in change]
            if last_histogram is None:
                window.linked[0] = False
            last_histogram = histogram[-1]
            window.tokens += list(tokens)
            window.frames += list(batch.data)
            times.append(batch.pts_seconds)
            places.append(batch.frame_index)
            for fused, attention in self._fuse(window, config, at_end=False):
                vectors.append(fused)
                maps.append(attention)
            timings["fuse"] += time.perf_counter() - started
            if progress is not None:
                progress("encode", float(batch.pts_seconds[-1]), None)
        started = time.perf_counter()
        for fused, attention in self._fuse(window, config, at_end=True):
            vectors.append(fused)
            maps.append(attention)
        timings["fuse"] += time.perf_counter() - started
        if not vectors:
            raise ValueError("there are no frames to encode")
        sharpness, mean, spread, change = np.concatenate(signals).astype(np.float32).T.copy()
        embedding = Embedding(
            vectors=np.concatenate(vectors),
            pts_seconds=np.concatenate(times),
            frame_index=np.concatenate(places),
            attention=np.concatenate(maps),
            grid=self.bundle.grid,
            sharpness=sharpness,
            luma_mean=mean,
            luma_spread=spread,
            pixel_change=change,
            model=self.bundle.name,
            model_sha256=self.bundle.sha256,
        )
        return embedding, timings

    def _check(self, batch: FrameBatch) -> None:
        want = (self.bundle.image.height, self.bundle.image.width)
        if batch.data.shape[1:3] != want:
            raise ValueError(f"frames are {batch.data.shape[1:3]}, the model {self.bundle.name} takes {want}")

    def _fuse(self, window: _Window, config: EncodeConfig, *, at_end: bool) -> Iterator[tuple[F32, F32]]:
        """Fuses the frames whose halo is there, in steps of the batch size; at the end, all."""
        shift = self.shift_mode(config)
        halo = 0 if shift == "off" else config.shift_steps
        held = window.first + len(window.tokens)
        while True:
            stop = min(window.done + config.batch_size, held)
            if stop == window.done or (not at_end and (stop - window.done < config.batch_size or stop + halo > held)):
                return
            low, high = max(window.done - halo, window.first), min(stop + halo, held)
            rows = slice(low - window.first, high - window.first)
            core = slice(window.done - low, stop - low)
            tokens = np.stack(window.tokens[rows])
            frames = np.stack(window.frames[rows])
            if shift != "off":
                source = self._sources(tokens, np.array(window.linked[rows]), shift, config)
                tokens = self._ops.shift_tokens(tokens, source, self.bundle.prefix_tokens)
                if self.bundle.attention_input == "frames":
                    frames = self._ops.shift_pixels(frames, source, self.bundle.grid)
            tokens, frames = tokens[core], frames[core]
            seen = {"frames": frames} if self.bundle.attention_input == "frames" else {"tokens": tokens}
            attention = self._attention.run(seen)["attention"]
            strength = np.array(self.strength(config), np.float32)
            fused = self._fusion.run({"tokens": tokens, "attention": attention, "strength": strength})["vectors"]
            yield fused, attention
            window.done = stop
            window.drop_before(stop - halo)

    def _sources(
        self, tokens: F32, linked: NDArray[np.bool_], shift: ShiftMode, config: EncodeConfig
    ) -> NDArray[np.int64]:
        # The frame before the window is not there to be taken from: the window's first frame starts a run.
        linked = linked.copy()
        linked[0] = False
        source: NDArray[np.int64]
        if shift == "fixed":
            source = self._ops.fixed_shift(len(tokens), self.bundle.grid, linked, share=config.shift_share, step=1)
        else:
            patches = tokens[:, self.bundle.prefix_tokens :]
            source = self._ops.adaptive_shift(
                patches, self.bundle.grid, linked, steps=config.shift_steps, threshold=config.shift_threshold
            )
        return source
