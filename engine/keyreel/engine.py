"""The Engine: one model on one device, loaded once, for many videos and queries."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from keyreel.actions import VideoActions
from keyreel.chance import Chances
from keyreel.config import DecodeLimits, EncodeConfig, ImageTransform, Sampling, SelectConfig
from keyreel.decode.source import Source
from keyreel.decode.stream import Stream, distinct
from keyreel.encode import Encoded, Encoder, timed
from keyreel.errors import Cancelled, ModelError
from keyreel.render.notebook import hits_html
from keyreel.render.pictures import attended_area, picture_at, read_picture
from keyreel.render.results import PREVIEW
from keyreel.render.thumbnails import thumbnails_of
from keyreel.runtime.backend import Backend, resolve
from keyreel.runtime.bundle import BUILTIN, Bundle, SubjectScale
from keyreel.runtime.telemetry import record_stages, span
from keyreel.runtime.text import TextEncoder
from keyreel.scenes import find_scenes
from keyreel.search import Asked, FrameScores, Part, answered, best_hits, moments
from keyreel.select import Selection, select_keyframes
from keyreel.shots import find_candidates, place_boundaries, shots_between
from keyreel.types import (
    F32,
    U8,
    Combined,
    Embedding,
    Example,
    FrameBatch,
    Hits,
    Progress,
    Query,
    SearchHit,
    Shot,
    Summary,
)
from keyreel_kernels.arrays import on_host

_log = logging.getLogger(__name__)
Video: TypeAlias = Source | str | os.PathLike[str] | bytes | BinaryIO


class Engine:
    """Turns videos into key-frames, vectors and moments. Safe to share between threads.

    In asyncio code call `await asyncio.to_thread(engine.summarize, path)`: the work runs in native code, which releases
    the interpreter lock.

        with Engine.from_pretrained() as engine:
            summary = engine.summarize("match.mp4")
            summary.save("out")
    """

    def __init__(self, bundle: Bundle, backend: Backend, *, images: bool = True) -> None:
        if bundle.precision not in backend.precisions:
            hint = f"export it with --precision {backend.precisions[0]}, or use another device"
            where = f"{backend.device} ({backend.reason})"
            raise ModelError(f"{bundle.name} is in {bundle.precision}, which {where} does not run", hint=hint)
        self.bundle, self.backend = bundle, backend
        self._encoder: Encoder | None = None
        self._text: TextEncoder | None = None
        self._chances: Chances | None = None
        self._closed = False
        self._image_lock, self._text_lock = threading.Lock(), threading.Lock()
        if images:
            self._images()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = BUILTIN,
        *,
        device: str = "auto",
        threads: int | None = None,
        images: bool = True,
    ) -> Engine:
        """Loads a model onto a device. With TensorRT it builds missing plans, which may take minutes.

        Args:
            model: "builtin"; the name of an installed or exported model, such as "ViT-B-32/laion2b_s34b_b79k"; or the
                folder of a bundle.
            device: "auto", "cpu" or "cuda:N". An explicit device never falls back.
            threads: threads inside one operator; by default the runtime chooses.
            images: load the image tower now. If False, only when it is needed: a search by text does without it.

        Raises:
            ModelError: the model is not found or damaged.
            BackendUnavailable: the device does not work.
            MissingExtra: no runtime is installed.
        """
        bundle = Bundle.find(model)
        engine = cls(bundle, resolve(device, threads=threads, precision=bundle.precision), images=images)
        _log.info("device %s: %s; model %s", engine.backend.device, engine.backend.reason, bundle.name)
        return engine

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model. Idempotent. Wait for running calls first."""
        with self._image_lock, self._text_lock, self.backend.ops.arrays.scope():
            self._closed = True
            for tower in (self._encoder, self._text):
                if tower is not None:
                    tower.close()
            self._encoder = self._text = None
            self.backend.release()

    def warmup(self) -> None:
        """Does the slow work of the first calls now: opens both towers, compiles kernels, records CUDA graphs.

        Raises:
            ModelError: a TensorRT plan cannot be built, or gives other values than the graph.
        """
        image, size = self.bundle.image, self.backend.batch_size
        numbers = np.arange(size)
        grey = np.full((size, image.height, image.width, 3), 128, np.uint8)
        batch = FrameBatch(grey, numbers.astype(np.float64), numbers)
        images = self._images()
        for _ in range(2):  # the first run of a plan is recorded, the second replays it
            with self.backend.running():
                found = images.encode([batch], EncodeConfig())
                self._select(found, SelectConfig(), float(size), ())
        self.encode_text("a")
        self.chances()

    def __repr__(self) -> str:
        return f"Engine(model={self.bundle.name!r}, device={self.backend.device!r})"

    # --- frames and vectors ---------------------------------------------------------------------------------------

    def frames(
        self,
        video: Video,
        sampling: Sampling | None = None,
        *,
        transform: ImageTransform | None = None,
        batch_size: int | None = None,
    ) -> Stream:
        """Decodes frames. Returns an iterator of FrameBatch: close it, or use it in a `with`.

        On a CUDA device `FrameBatch.data` is a CuPy array; other libraries read it through DLPack. It is ready on the
        stream that was current when it was taken. Keep it until your work on it is done: memory is used again at once.

        Args:
            sampling: which frames; by default two a second.
            transform: size of the frames; by default the display size. `engine.bundle.image` is what the model takes.
            batch_size: frames in a batch; the default depends on the device.

        Raises:
            SourceError: the video cannot be opened.
        """
        size = self.backend.batch_size if batch_size is None else batch_size
        return self.backend.open_stream(_as_source(video), sampling or Sampling(), transform=transform, batch_size=size)

    def embed(self, frames: FrameBatch | NDArray[Any] | Any) -> F32:
        """Encodes frames in memory as vectors.

        Args:
            frames: a FrameBatch, or any array with `__dlpack__`: [T, H, W, 3] uint8 RGB, in order of time.

        Returns:
            [T, D] float32, unit length: scene vectors. A CuPy array for frames on the engine's CUDA device, else NumPy.

        Raises:
            ValueError, TypeError: another shape, dtype or device.
        """
        data: Any = frames.data if isinstance(frames, FrameBatch) else frames
        if not hasattr(data, "__dlpack__"):
            raise TypeError(f"frames must be a FrameBatch or an array with __dlpack__, got {type(frames).__name__}")
        arrays, images = self.backend.ops.arrays, self._images()
        on_device = not on_host(data)
        arrays.join()
        with self.backend.running():
            data = arrays.to_device(data)
            if data.ndim != 4 or data.shape[-1] != 3 or not len(data):
                raise ValueError(f"frames must be [T, H, W, 3] with T >= 1, got {data.shape}")
            if data.dtype != np.uint8:
                raise TypeError(f"frames must be uint8, got {data.dtype}")
            count, size = np.arange(len(data)), self.backend.batch_size
            parts = (slice(start, start + size) for start in range(0, len(data), size))
            fit, image = self.backend.ops.transform, dataclasses.asdict(self.bundle.image)
            batches = (FrameBatch(fit(data[p], **image), count[p].astype(np.float64), count[p]) for p in parts)
            found = images.encode(batches, EncodeConfig(subject=False))  # waits: its end copies to the CPU
        vectors: F32 = found.vectors if on_device else found.embedding.vectors
        return vectors

    def embed_video(
        self,
        video: Video,
        *,
        sampling: Sampling | None = None,
        encode: EncodeConfig | None = None,
        progress: Progress | None = None,
    ) -> Embedding:
        """Encodes a video: a scene and a subject vector for each sampled frame, attention maps and picture signals.

        Raises:
            SourceError: the video cannot be decoded.
        """
        source, sampling, encode = _as_source(video), sampling or Sampling(), encode or EncodeConfig()
        image, images = self.bundle.image, self._images()
        with (
            self.backend.running(),
            self.frames(source, sampling, transform=image, batch_size=encode.batch_size) as stream,
        ):
            batches = _with_progress(stream, progress, source, sampling)
            return images.encode(batches, encode).embedding

    @span("keyreel.encode_text")
    def encode_text(self, texts: str | Sequence[str]) -> F32:
        """Encodes texts as [Q, D] float32 vectors of unit length; their cosines with frame vectors rank frames.

        Raises:
            TypeError: `texts` is not a sequence of strings.
        """
        encoder = self._texts()
        with self.backend.running():
            return encoder.encode([texts] if isinstance(texts, str) else list(texts))

    def unknown_words(self, query: Query | Combined) -> list[str]:
        """Lists the words of a query's texts that the model does not know, in order.

        Only the built-in model has a list of words; others, such as CLIP, give []. Unknown words lower the chances of
        hits.
        """
        words = [word for text in Combined.of(query).texts for word in self._texts().tokenizer.unknown_words(text)]
        return list(dict.fromkeys(words))

    def known(self, text: str) -> float:
        """Fraction of a text's words that the model knows, 0..1. Words such as "the" do not count."""
        return self._texts().tokenizer.known(text)

    def chances(self) -> Chances | None:
        """Returns what converts scores to chances; None if the model was not calibrated."""
        scale = self.bundle.chance
        if self._chances is None and scale is not None:
            self._chances = Chances(self.encode_text(scale.background), scale)
        return self._chances

    @span("keyreel.encode_image")
    def encode_image(self, image: str | os.PathLike[str] | NDArray[Any]) -> F32:
        """Encodes a picture as a [1, D] float32 vector of unit length.

        Args:
            image: path of a picture, or [H, W, 3] uint8 RGB.

        Raises:
            SourceError: the file is missing or is not a picture.
        """
        if isinstance(image, (str, os.PathLike)):
            image = read_picture(image)
        return self.embed(np.asarray(image)[None])

    # --- the main job ---------------------------------------------------------------------------------------------

    @span("keyreel.summarize")
    def summarize(
        self,
        video: Video,
        *,
        keyframes: int | Literal["auto"] = "auto",
        sampling: Sampling | None = None,
        encode: EncodeConfig | None = None,
        select: SelectConfig | None = None,
        fps: float | None = None,
        limits: DecodeLimits | None = None,
        thumbnails: bool = True,
        progress: Progress | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> Summary:
        """Finds the key-frames, shots and scenes of a video.

        Args:
            keyframes: how many, or "auto"; `select` has more settings.
            sampling: which frames to analyse; by default two a second.
            fps: frames to analyse per second, short for `sampling=Sampling(fps=fps)`.
            limits: the largest video to accept, and whether to open URLs.
            thumbnails: keep at most 200 small pictures for `save`, 43 KB each; without them `save` decodes again.
            progress: called as progress(stage, done, total) from this thread.
            cancel: called after each batch of frames, such as `threading.Event().is_set`; True stops the work.

        Raises:
            SourceError: the video cannot be decoded.
            Cancelled: `cancel` returned True.
            ValueError, TypeError: wrong or contradicting arguments.
        """
        for name, value, kind in (
            ("sampling", sampling, Sampling),
            ("encode", encode, EncodeConfig),
            ("select", select, SelectConfig),
            ("limits", limits, DecodeLimits),
        ):
            if value is not None and not isinstance(value, kind):
                hint = " (fps=1.0 takes one frame a second)" if name == "sampling" else ""
                raise TypeError(f"{name} must be a keyreel.config.{kind.__name__}, got {value!r}{hint}")
        if fps is not None:
            if sampling is not None:
                raise ValueError("give fps or sampling, not both")
            sampling = Sampling(fps=fps)
        sampling, encode, select = sampling or Sampling(), encode or EncodeConfig(), select or SelectConfig()
        if keyframes != "auto":
            if not isinstance(keyframes, int):
                raise TypeError(f"keyframes must be a whole number or 'auto', got {keyframes!r}")
            select = dataclasses.replace(select, keyframes=keyframes, per_minute=None)
        # All later stages need rising times.
        sampling = dataclasses.replace(sampling, times=tuple(sorted(sampling.times)))
        if limits is not None and isinstance(video, Source):
            raise TypeError("this video is a Source, which has its own limits")
        source = video if isinstance(video, Source) else Source(video, limits=limits or DecodeLimits())
        _log.debug("%s: %s, %s, %s", source.name, sampling, encode, select)
        began = time.perf_counter()

        def checkpoint() -> None:
            if cancel is not None and cancel():
                raise Cancelled(f"{source.name}: cancelled")

        source.timeline(checkpoint)
        info, images = source.probe(), self._images()
        aside = thumbnails_of(source, info, sampling.stop_seconds) if thumbnails else None
        image, size = self.bundle.image, encode.batch_size or self.backend.batch_size
        with (
            span("keyreel.encode"),
            self.backend.running(),
            self.backend.open_stream(source, sampling, transform=image, batch_size=size, aside=aside) as stream,
        ):
            batches = _with_progress(distinct(stream), progress, source, sampling, checkpoint)
            encoded = images.encode(batches, encode)
            warnings, decode_seconds = stream.warnings, stream.decode_seconds
            duration = info.duration_seconds if stream.end_seconds is None else stream.end_seconds
        embedding = encoded.embedding
        stop = _stop_seconds(embedding, sampling, duration)
        seconds = {"decode": decode_seconds, **encoded.seconds}
        with self.backend.running(), span("keyreel.select"), timed(seconds, "select"):
            candidates = find_candidates(embedding)
            cuts = place_boundaries(source, embedding, candidates, self.backend)
            shots = shots_between(cuts, start_seconds=sampling.start_seconds, stop_seconds=stop)
            found = self._select(encoded, select, stop - sampling.start_seconds, shots)
        timings = {**seconds, "total": time.perf_counter() - began}
        record_stages(timings)
        _log.info(
            "%s: %s %dx%d, %d frames of %.1f s analysed (%s), %d shots, %d key-frames (%s)",
            *(source.name, info.codec, info.width, info.height, len(embedding), stop - sampling.start_seconds),
            *(sampling.mode, len(shots), len(found.keyframes)),
            "as many as differ" if select.automatic else "as many as asked for",
        )
        _log.info("%s: %s", source.name, ", ".join(f"{stage} {spent:.2f} s" for stage, spent in timings.items()))
        return Summary(
            video=info,
            embedding=embedding,
            keyframes=found.keyframes,
            shots=shots,
            scenes=find_scenes(embedding.vectors, embedding.pts_seconds, shots, self.bundle.scene_similarity),
            importance=found.importance,
            device=self.backend.device,
            device_reason=self.backend.reason,
            config={
                "sampling": dataclasses.asdict(sampling),
                "encode": {
                    **dataclasses.asdict(encode),
                    "shift": images.shift_mode(encode),
                },
                "select": dataclasses.asdict(select),
                "image": dataclasses.asdict(self.bundle.image),
            },
            warnings=(*warnings, *found.warnings),
            timings_seconds=timings,
            actions=VideoActions(
                source,
                lambda summary, query, k: self.search(query, [summary], k=k),
                lambda summary, query: self._scores(summary, self._asked(query)).best,
            ),
            thumbnails=aside.pictures(self.backend.ops.arrays.to_host) if aside is not None else {},
        )

    def search(self, query: Query | Combined, summaries: Sequence[Summary], *, k: int = 5) -> Hits[SearchHit]:
        """Finds the k best moments of several summarized videos for a text or a picture, best first.

        Raises:
            ValueError: k < 1, or a summary has vectors of another model.
            SourceError: the picture cannot be read.
            TypeError: an `Example`; `Library.search` takes it.
        """
        asked = self._asked(query)
        pictures = sum(len(summary.shots) for summary in summaries)
        image, hits = dataclasses.asdict(self.bundle.image), list[SearchHit]()
        for summary in summaries:
            embedding, scores = summary.embedding, self._scores(summary, asked)
            area = attended_area(summary.video, image)
            found = moments(
                scores.best,
                embedding.pts_seconds,
                summary.scenes,
                video=summary.video.path,
                stop_seconds=summary.stop_seconds,
                k=k,
            )
            hits += [answered(hit, scores, embedding, area, asked, pictures) for hit in found]
        by_name = {summary.video.path: summary for summary in summaries}
        return Hits(best_hits(hits, k), lambda found: hits_html(found, lambda hit: _picture(by_name[hit.video], hit)))

    # --- inside ---------------------------------------------------------------------------------------------------

    def _texts(self) -> TextEncoder:
        with self._text_lock:
            self._check_open()
            if self._text is None:
                self._text = TextEncoder(self.bundle, self.backend)
            return self._text

    def _images(self) -> Encoder:
        with self._image_lock:
            self._check_open()
            if self._encoder is None:
                self._encoder = Encoder(self.bundle, self.backend)
            return self._encoder

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the engine is closed")

    def _select(
        self, encoded: Encoded, config: SelectConfig, duration_seconds: float, shots: Sequence[Shot]
    ) -> Selection:
        embedding, vectors, ops = encoded.embedding, encoded.joint, self.backend.ops
        return select_keyframes(embedding, config, ops, duration_seconds=duration_seconds, shots=shots, vectors=vectors)

    def _asked(self, query: Query | Combined) -> Asked:
        """Encodes a query. The subject's scale is fitted for texts; pictures are compared by plain cosines."""
        own = self.bundle.subject
        plain = SubjectScale(novelty=own.novelty)

        def part_of(one: Query) -> Part:
            if isinstance(one, str):
                return Part(self.encode_text(one)[0], own, self.known(one))
            if isinstance(one, Example):
                raise TypeError("search with a frame of a library in that library: Library.search")
            return Part(self.encode_image(one)[0], plain, None)

        return Asked.of(query, part_of, self.chances)

    def _scores(self, summary: Summary, asked: Asked) -> FrameScores:
        if summary.embedding.model_sha256 not in {self.bundle.sha256, *self.bundle.same_vectors}:
            raise ValueError(f"the summary was made with {summary.embedding.model!r}, this is {self.bundle.name!r}")
        return asked.scores(summary.embedding.scene, summary.embedding.subject)


def _picture(summary: Summary, hit: SearchHit) -> U8 | None:
    """A small picture of a hit's best frame; None if the video cannot be read any more."""
    source = getattr(summary.actions, "source", None)
    return None if source is None else picture_at(source, hit.pts_seconds, PREVIEW)


def _as_source(video: Video) -> Source:
    return video if isinstance(video, Source) else Source(video)


def _with_progress(
    batches: Iterable[FrameBatch],
    progress: Progress | None,
    source: Source,
    sampling: Sampling,
    checkpoint: Callable[[], None] = lambda: None,
) -> Iterable[FrameBatch]:
    """Calls checkpoint() and progress("encode", done, total), in seconds of video, after each batch."""
    start, stop = sampling.start_seconds, sampling.stop_seconds or source.probe().duration_seconds
    checkpoint()
    for batch in batches:
        yield batch
        checkpoint()
        if progress is None:
            continue
        progress("encode", float(batch.pts_seconds[-1]) - start, None if stop is None else stop - start)


def _stop_seconds(embedding: Embedding, sampling: Sampling, duration: float | None) -> float:
    """End of the analysed part: the container's duration, but not before the last frame."""
    pts = embedding.pts_seconds
    step = float(np.median(np.diff(pts))) if len(pts) > 1 else 0.0
    stop = duration if duration is not None else float(pts.max()) + step
    if sampling.stop_seconds is not None:
        stop = min(stop, sampling.stop_seconds)
    return max(stop, float(pts.max()) + 1e-3)
