"""The library: an index of many videos that stays on disk and can be searched."""

from __future__ import annotations

import builtins
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from keyreel.config import IndexConfig, LibraryConfig
from keyreel.errors import Damaged, LibraryError, ModelNotFound
from keyreel.library import upkeep
from keyreel.library.asked import asked
from keyreel.library.contents import frame_of
from keyreel.library.errors import REPAIR, Outdated, unknown_video
from keyreel.library.export import export_parquet
from keyreel.library.files import Catalog, FileState, is_gone, names_of
from keyreel.library.indexing import Indexer
from keyreel.library.merge import Search
from keyreel.library.planned import planned
from keyreel.library.run import IndexRun
from keyreel.library.search import SearchIndex, fits
from keyreel.library.shards import Shards, open_tables, reshard
from keyreel.library.table import Tables
from keyreel.library.types import (
    Added,
    Extras,
    Filter,
    Finding,
    LibraryHit,
    LibraryStats,
    Planned,
    Preview,
    Record,
    VideoHit,
)
from keyreel.render.notebook import hits_html
from keyreel.runtime.bundle import Bundle
from keyreel.search import Asked
from keyreel.types import F32, F64, Combined, Example, Hits, Progress, Query

if TYPE_CHECKING:
    from keyreel.engine import Engine

_FRAMES = 500  # decoded frames to keep for previews: some ten megabytes
Videos: TypeAlias = Iterable[str | os.PathLike[str]]


class Library:
    """The vectors of many videos in a folder or bucket, for search by text, picture or example. Thread-safe.

        with keyreel.Engine.from_pretrained() as engine, keyreel.Library("./library", engine) as library:
            library.add(["a.mp4", "b.mp4"])
            best = library.search("a red bus")[0]

    Several processes may use a library at the same time. In asyncio code call `await asyncio.to_thread(library.search,
    "a red bus")`. All methods except `add` raise LibraryError if there is no library, or no such video in it.

    Args:
        uri: a folder, or a URI such as "s3://bucket/library". The first `add` creates it.
        engine: encodes videos, texts and pictures. The caller closes it. Without an engine the library can be listed,
            maintained, and searched by example or vector.
        storage_options: credentials and settings of the object store, for LanceDB.

    Raises:
        ValueError: an empty name.
        ModelMismatch: the library's vectors are of another model than the engine's.
        MissingExtra: the extra `library` is not installed.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        engine: Engine | None = None,
        *,
        config: LibraryConfig | None = None,
        storage_options: Mapping[str, str] | None = None,
    ) -> None:
        place = os.fspath(uri)
        if not place:  # it would be the current folder
            raise ValueError("a library has a folder or a URI, got an empty name")
        self.uri = place if "://" in place else os.path.abspath(place)
        self.config = config or LibraryConfig()
        self.engine = engine
        self._options = storage_options
        self._opened: Tables | Shards | None = None
        self._there = False  # whether there is a library, when last looked
        self._searcher: Search | None = None
        self._lock = threading.RLock()
        self._frame = lru_cache(_FRAMES)(partial(frame_of, max_height=self.config.preview_height))
        if engine is not None and self._tables.exists():
            with suppress(Damaged, Outdated):  # raised at the first use, since `verify` and `upgrade` may mend it
                self._check_model(engine)

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Library({self.uri!r}, {self.engine!r})"

    def exists(self) -> bool:
        """Whether the library exists; the first `add` creates it."""
        return self._tables.exists()

    @property
    def model(self) -> str:
        """The name of the model that made the vectors."""
        return self._tables.model()[0]

    def close(self) -> None:
        """Closes the tables and frees vectors and pictures in memory. The engine stays open. Idempotent."""
        with self._lock:
            self._searcher = None
            if self._opened is not None:
                self._opened.close()
                self._opened, self._there = None, False  # it may have other shards at the next use
        self._frame.cache_clear()

    # --- indexing -------------------------------------------------------------------------------------------------

    def add(
        self,
        videos: Videos,
        config: IndexConfig | None = None,
        *,
        progress: Progress | None = None,
        begin: Callable[[str], Progress] | None = None,
        tell: Callable[[Added], None] | None = None,
        stop: Callable[[], bool] | None = None,
        held: Path | None = None,
    ) -> builtins.list[Added]:
        """Indexes videos, and commits each one: after an interrupt, finished videos stay.

        It skips unchanged videos (same path, size and time of change), and tries failed ones again. It does not decode
        a file whose content the library already has: if the other file no longer exists, the video moved, else its
        vectors are copied. A failure does not stop the others. Several names of one file are one video. A new `config`
        applies to unchanged videos only with `config.force`.

        Args:
            videos: paths, and URLs if `config.limits` allows them. Known URLs are read again only with `config.force`.
            config: adds its tags to those of a video; its workers are threads that share the engine.
            progress: called with ("videos", done, total) for all videos; a running one counts as a fraction.
            begin: called when a video starts; returns the progress callback of that video, for the stages "encode"
                (seconds of video) and "pictures" (pictures).
            tell: called with the result of each video when it ends. Callbacks run one at a time, in the working
                threads. Their exceptions end the run.
            stop: called often; after it returns True, running videos are abandoned and no others start.
            held: another path to read the only video from, such as an open file, which no link can replace. The library
                stores the name in `videos`.

        Returns:
            A result for each video, in the order of `videos`; none for videos that did not start.

        Raises:
            ValueError: there is no engine, or an empty name.
            ModelMismatch: the library's vectors are of another model.
            LibraryError: the library cannot be written. Finished videos stay.
        """
        names = names_of(videos)
        config = config or IndexConfig()
        if held is not None and len(names) != 1:
            raise ValueError(f"held works with one video only, got {len(names)}")
        run = IndexRun(stop=stop, progress=progress, begin=begin, tell=tell)
        indexer = self._indexer(config, run, held)
        return run.run(names, indexer.index, config.workers)

    def plan(self, videos: Videos, config: IndexConfig | None = None) -> builtins.list[Planned]:
        """Says what `add` would do with each video, and why. Needs no engine; writes and decodes nothing.

        It reads only the headers of videos that `add` would decode, so it does not find damage further on.
        """
        catalog = Catalog(self._tables.records() if self._tables.exists() else ())
        seen: dict[str, str] = {}
        return [planned(name, catalog, config or IndexConfig(), seen) for name in names_of(videos)]

    def update(
        self,
        config: IndexConfig | None = None,
        *,
        prune: bool = False,
        progress: Progress | None = None,
        begin: Callable[[str], Progress] | None = None,
        tell: Callable[[Added], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> builtins.list[Added]:
        """Checks every video of the library, and indexes changed and failed ones again, as `add` does.

        A video without its file is "missing". Do not prune if a disk may only be disconnected.

        Args:
            prune: remove missing videos.
            config, progress, begin, tell, stop: as for `add`.
        """
        config = config or IndexConfig()
        run = IndexRun(stop=stop, progress=progress, begin=begin, tell=tell)
        records = {record.path: record for record in self._tables.records()}
        indexer = self._indexer(config, run)

        def look(name: str, progress: Progress) -> Added:
            if is_gone(name):
                return Added(name, "missing", records[name], None, 0.0)
            return indexer.index(name, progress)

        found = run.run(tuple(records), look, config.workers)
        if prune:
            self._tables.drop([records[added.path].id for added in found if added.change == "missing"])
            found = [replace(added, record=None) if added.change == "missing" else added for added in found]
        return found

    def remove(self, videos: Iterable[str | os.PathLike[str]]) -> builtins.list[Record]:
        """Removes videos from the library and keeps their files. `compact` frees the space.

        Args:
            videos: ids, paths, or globs over the whole path; * also matches slashes.

        Returns:
            The removed records, in order of path. If a name matches nothing, it only raises LibraryError.
        """
        given = [videos] if isinstance(videos, (str, os.PathLike)) else videos
        catalog = Catalog(self._tables.records())
        found: dict[str, Record] = {}
        for video in given:
            chosen = catalog.fitting(os.fspath(video))
            if not chosen:
                raise unknown_video(video)
            found |= {record.id: record for record in chosen}
        self._tables.drop(list(found))
        return sorted(found.values(), key=lambda record: record.path)

    # --- search ---------------------------------------------------------------------------------------------------

    def search(self, query: Query | Combined, *, k: int = 10, where: Filter | None = None) -> Hits[LibraryHit]:
        """Finds the k best moments of all videos, best first. Near-duplicates in other videos count as one moment.

        A frame scores by the better of its two vectors. For texts, the subject's cosine is first brought to the scale
        of the scene's (`Bundle.subject`); for other queries plain cosines count.

        Args:
            query: a text; a picture as a `Path` or [H, W, 3] uint8 RGB; a frame of the library as an `Example`, by its
                scene vector; a vector [D] of the model; or one of these with conditions, as `Combined`.
            where: which videos and times to search.

        Raises:
            ValueError: k < 1, a vector of another length, or a text or picture without an engine.
            SourceError: the picture cannot be read.
        """
        return self.search_many([query], k=k, where=where)[0]

    def search_many(
        self, queries: Sequence[Query | Combined], *, k: int = 10, where: Filter | None = None
    ) -> builtins.list[Hits[LibraryHit]]:
        """Like `search`, for several queries in one pass over the vectors. Returns the hits of each query."""
        if not len(queries):
            return []
        asked, own = self._asked(queries)

        def show(hits: Sequence[LibraryHit]) -> str:
            return hits_html(hits, lambda hit: self.preview(hit.video_id, hit.pts_seconds))

        return [Hits(hits, show) for hits in self._search().hits(asked, k, self._where(where), own)]

    def search_videos(
        self, query: Query | Combined, *, k: int = 10, moments: int = 3, where: Filter | None = None
    ) -> builtins.list[VideoHit]:
        """Finds the k best videos, best first, each with its best moments.

        Args:
            query, where: as for `search`.
            moments: the most moments of a video.
        """
        [asked], [own] = self._asked([query])
        return self._search().videos(asked, k, moments, self._where(where), own)

    def scores(self, query: Query | Combined, video: str | os.PathLike[str]) -> tuple[F64, F32]:
        """Scores all frames of one video, see `search`. Returns times [T] float64 in seconds and scores [T] float32."""
        [asked], _ = self._asked([query])
        return self._search().scores(asked, self.record(video).id)

    def left_out(self) -> builtins.list[str]:
        """Lists the paths of videos that the last search skipped, since their stored rows are damaged or incomplete.

        `verify` reports the damage. After `verify(repair=True)` the next `update` indexes them again.
        """
        searcher = self._searcher
        return [] if searcher is None else [*searcher.left_out]

    def unknown_words(self, query: Query | Combined) -> builtins.list[str]:
        """Lists the words that the model does not know, see `Engine.unknown_words`. Without an engine: []."""
        return [] if self.engine is None else self.engine.unknown_words(query)

    # --- what is in it --------------------------------------------------------------------------------------------

    def list(self, where: Filter | None = None) -> builtins.list[Record]:
        """Lists the videos in order of path, failed ones included."""
        records, where = self._tables.records(), self._where(where)
        return records if where is None else [record for record in records if fits(record, where)]

    def record(self, video: str | os.PathLike[str]) -> Record:
        """Returns the record of a video, by its id or path."""
        given = os.fspath(video)
        record = next(iter(self._tables.records([given])), None) or Catalog(self._tables.records()).find(given)
        if record is None:
            raise unknown_video(video)
        return record

    def preview(self, video: str | os.PathLike[str], seconds: float, *, decode: bool = True) -> bytes:
        """Returns the frame shown at a time as the content of a JPEG file.

        Key-frames are stored. Other frames are decoded if the video is here and unchanged; the last ones stay in
        memory. Else it returns the nearest key-frame.

        Args:
            decode: False never opens the video, and returns the nearest key-frame.

        Raises:
            LibraryError: the video failed, so it has no pictures.
            Damaged: its pictures are damaged.
        """
        record = self.record(video)
        tables = self._tables.of(record.id)
        picture = tables.preview(record.generation, seconds)
        if picture is None and decode and record.status == "ok":
            shape = int(record.probe["height"]), int(record.probe["width"])
            at = min(max(float(seconds), 0.0), record.duration_seconds or 0.0)
            picture = self._frame(record.path, FileState(record.size, record.mtime_ns), shape, at)
        if picture is None:
            previews = tables.previews(record.generation)
            if not previews and record.generation:
                raise Damaged(f"{record.path}: its key-frames are damaged", [record.path], hint=REPAIR)
            if not previews:
                raise LibraryError(f"{record.path}: has no key-frames in the library: {record.error}", hint=record.hint)
            picture = min(previews, key=lambda preview: abs(preview.pts_seconds - seconds)).jpeg
        return picture

    def previews(self, video: str | os.PathLike[str]) -> tuple[Preview, ...]:
        """Returns the pictures of a video's key-frames and their attention maps, in order of time."""
        record = self.record(video)
        return self._tables.of(record.id).previews(record.generation)

    def extras(self, video: str | os.PathLike[str]) -> Extras:
        """Returns a video's thumbnails, their WebVTT track, and facts about its key-frames.

        Raises:
            LibraryError: the video failed, so it has no pictures.
            Damaged: its pictures are damaged.
        """
        record = self.record(video)
        extras = self._tables.of(record.id).extras(record.generation)
        if extras is None and record.generation:
            raise Damaged(f"{record.path}: its stored pictures are damaged", [record.path], hint=REPAIR)
        if extras is None:
            raise LibraryError(f"{record.path}: has no pictures in the library: {record.error}", hint=record.hint)
        return extras

    def stats(self) -> LibraryStats:
        """Returns the sizes of the library, and its model."""
        records = self._tables.records()
        name, sha256, width = self._tables.model()
        return LibraryStats(
            videos=len(records),
            failed=sum(record.status == "failed" for record in records),
            frames=sum(record.frames for record in records),
            hours=sum(record.duration_seconds or 0.0 for record in records) / 3600,
            bytes=self._tables.bytes(),
            model=name,
            model_sha256=sha256,
            width=width,
        )

    def export_parquet(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> int:
        """Writes all vectors into `folder`/vectors.parquet. Returns how many.

        Each vector is a row: id, video_id, path, tags, recorded, kind ("scene" or "subject"), pts_seconds, frame_index,
        shot, keyframe, vector (float32, unit length). The metadata of the file name the model.

        Raises:
            RenderError: the file exists, or cannot be written.
            Damaged: rows of a video are damaged; then it writes nothing.
        """
        return export_parquet(self._tables, Path(folder), overwrite=overwrite)

    # --- upkeep ---------------------------------------------------------------------------------------------------

    def verify(self, *, repair: bool = False) -> tuple[Finding, ...]:
        """Reads the whole library, and reports damage.

        Args:
            repair: delete what cannot be read and keep the rest. Videos that lost rows are then "failed", and the next
                `add` or `update` indexes them again.
        """
        return tuple(finding for part in self._tables.parts for finding in upkeep.verify(part, repair=repair))

    def compact(self, *, alone: bool = False) -> int:
        """Merges small files, and deletes old versions and the rows of removed videos. Returns the bytes that it freed.

        With more vectors than `config.exact_rows` it also builds the vector index once, which takes minutes.

        Args:
            alone: no other process uses the library, so also delete young files and uncommitted rows.
        """
        given = sum(upkeep.compact(part, alone=alone) for part in self._tables.parts)
        if sum(record.rows for record in self._tables.records()) > self.config.exact_rows:
            self._search().build()
        return given

    def upgrade(self, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Converts a library of an older keyreel or an earlier version of the model. It decodes nothing.

        It keeps the content, except subject vectors: indexing a video again with `force` makes them. No other process
        may use the library meanwhile. After an interrupt, the next call does the rest.

        Args:
            progress: called with the numbers of finished and of all videos, also from another thread.

        Returns:
            The number of converted videos, now without subjects; 0 if the library was up to date.
        """
        bundle = self._bundle()
        return sum(upkeep.upgrade(part, bundle, progress) for part in self._tables.parts)

    def reshard(self, shards: int) -> int:
        """Spreads the library over this many shards, see `shards.reshard`. Returns the number of videos."""
        videos = reshard(self.uri, shards, self._options)
        self.close()
        return videos

    # --- inside ---------------------------------------------------------------------------------------------------

    @property
    def _tables(self) -> Tables | Shards:
        with self._lock:
            if self._opened is None or not self._there:  # other processes may create it, with or without shards
                found = open_tables(self.uri, self._options, self.config.shards)
                if self._opened is None or type(found) is not type(self._opened):
                    self._opened = found
                self._there = self._opened.exists()
            return self._opened

    def _engine_for(self, purpose: str) -> Engine:
        if self.engine is None:
            raise ValueError(f"{purpose} needs an engine: Library({self.uri!r}, Engine.from_pretrained(...))")
        return self.engine

    def _check_model(self, engine: Engine) -> None:
        own = engine.bundle
        for part in self._tables.parts:
            part.check_model(
                own.name, own.sha256, own.embedding_width, same_scene=own.same_scene, same_vectors=own.same_vectors
            )

    def _bundle(self) -> Bundle | None:
        """The engine's model; without an engine the library's, if it is installed here."""
        if self.engine is not None:
            return self.engine.bundle
        try:
            return Bundle.find(upkeep.model_name(self._tables.parts[0]))
        except ModelNotFound:
            return None

    def _indexer(self, config: IndexConfig, run: IndexRun, held: Path | None = None) -> Indexer:
        engine = self._engine_for("adding videos")
        there = self._tables.exists()
        if there:
            self._check_model(engine)
        catalog = Catalog(self._tables.records() if there else ())
        return Indexer(engine, self._tables, catalog, config, self.config.preview_height, run.checkpoint, held)

    def _search(self) -> Search:
        with self._lock:
            if self._searcher is None:
                if self.engine is not None:
                    self._check_model(self.engine)
                self._searcher = self._searcher_of(self._tables)
            return self._searcher

    def _searcher_of(self, tables: Tables | Shards) -> Search:
        backend = None if self.engine is None else self.engine.backend
        whole = tables if isinstance(tables, Shards) else None
        shards = [SearchIndex(part, self.config, backend, whole) for part in tables.parts]
        return Search(shards, tables.number_of, self.config.fold_similarity)

    def _where(self, where: Filter | None) -> Filter | None:
        """The filter with ids in place of paths."""
        return where and replace(where, videos=[self.record(video).id for video in where.videos])

    def _asked(self, queries: Sequence[Query | Combined]) -> tuple[builtins.list[Asked], builtins.list[Example | None]]:
        return asked(
            queries,
            self._engine_for,
            lambda video: self.record(video).id,
            lambda example: self._search().vector(example),
        )
