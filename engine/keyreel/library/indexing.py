"""Indexes one video: decides whether it is new, changed, moved, copied or unchanged, and stores it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from av.container import InputContainer

from keyreel.config import DecodeLimits, IndexConfig
from keyreel.decode.source import Source
from keyreel.errors import Failure, KeyreelError, LibraryError, MissingExtra, SourceError
from keyreel.library import upkeep
from keyreel.library.contents import contents, recorded_at
from keyreel.library.files import Catalog, FileState, fingerprint, path_of
from keyreel.library.planned import compared, is_done
from keyreel.library.run import Halted
from keyreel.library.shards import Shards
from keyreel.library.table import Tables
from keyreel.library.types import Added, Change, Extras, Preview, Record, Rows
from keyreel.types import Progress

if TYPE_CHECKING:
    from keyreel.engine import Engine

_log = logging.getLogger(__name__)


class _Watched(Source):
    """A source that checks at each opening whether to stop, since the search for cuts reports no progress.

    Args:
        name: the name for messages.
    """

    def __init__(self, video: str | Path, name: str, limits: DecodeLimits, checkpoint: Callable[[], None]) -> None:
        super().__init__(video, limits=limits)
        self.name, self._checkpoint = name, checkpoint

    def open(self) -> InputContainer:
        self._checkpoint()
        return super().open()


class Indexer:
    """Indexes videos, one with each call of `index`. Safe to share between threads.

    The first commit creates missing tables. `checkpoint` is called often, and raises Halted to stop.

    Args:
        held: another path to read the only video from, see `Library.add`.
    """

    def __init__(
        self,
        engine: Engine,
        tables: Tables | Shards,
        catalog: Catalog,
        config: IndexConfig,
        preview_height: int,
        checkpoint: Callable[[], None],
        held: Path | None = None,
    ) -> None:
        self._engine, self._tables, self._catalog, self._config = engine, tables, catalog, config
        self._preview_height, self._checkpoint, self._held = preview_height, checkpoint, held
        self._lock = threading.Lock()  # of what follows
        self._claims: dict[str, threading.Lock] = {}
        self._committing: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)  # of each shard

    def index(self, name: str, progress: Progress) -> Added:
        """Indexes one video, by its name from `files.name_of`, if needed.

        A failure of the video is part of the result. Errors of the library, a missing package and Halted are raised.
        """
        began = time.perf_counter()
        known = self._catalog.at(name)
        name = name if known is None else known.path
        path, state, content, failure = self._read(name), None, "", None
        change: Change
        record: Record | None
        try:
            state = FileState.of(path)
            if known is not None and not self._config.force and is_done(known, path, state):
                change, record = "unchanged", self._renewed(known)
            else:
                content = "" if path is None or state is None else fingerprint(path)
                with self._claim(content):
                    change, record = self._compared(name, known, state, content, progress)
        except (Halted, LibraryError, MissingExtra):
            raise
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one video, the others go on
            failure = Failure.of(name, _cause(error, name, path, state))
            change, record = "failed", self._failed(failure.error, name, known, state, content)
        seconds = time.perf_counter() - began
        _log.info("%s: %s in %.2f s", name, change, seconds)
        return Added(name, change, record, failure, seconds)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _read(self, name: str) -> Path | None:
        """The path to read for a name; None for a URL."""
        return self._held or path_of(name)

    @contextmanager
    def _claim(self, content: str) -> Iterator[None]:
        """Lets one file of each content in at a time, so that later ones are recognised as copies."""
        with self._lock:
            claim = self._claims.setdefault(content, threading.Lock()) if content else threading.Lock()
        with claim:
            yield

    def _compared(
        self, name: str, known: Record | None, state: FileState | None, content: str, progress: Progress
    ) -> tuple[Change, Record]:
        choice = compared(name, self._read(name), known, content, self._catalog, self._config.force)
        _log.info("%s: %s, %s", name, choice.change, choice.why)
        if choice.record is not None:
            moved = choice.change == "moved"
            state = state if moved or known is not None else None  # only another name of the same file
            return choice.change, self._renewed(choice.record, state=state, path=name if moved else None)
        record = self._record(name, known, state, content)
        current = self._current(record.id)
        if not self._config.force and current is not None and is_done(current, self._read(name), state):
            return "unchanged", self._renewed(current)  # another process was quicker
        for twin in choice.twins:
            if (copied := self._copied(record, twin)) is not None:
                return choice.change, copied
        return "added" if known is None or not known.generation else "changed", self._decoded(record, state, progress)

    def _decoded(self, record: Record, state: FileState | None, progress: Progress) -> Record:
        config, path = self._config, self._read(record.path)
        shown = str(path_of(record.path) or record.path)
        with _Watched(path or record.path, shown, config.limits, self._checkpoint) as source:
            summary = self._engine.summarize(
                source, sampling=config.sampling, encode=config.encode, select=config.select, progress=progress
            )
            novelty = self._engine.bundle.subject.novelty
            rows, previews, extras = contents(summary, source, self._preview_height, novelty, progress)
            date = recorded_at(source)
        if state is not None and FileState.of(path) != state:
            raise _changed(record.path)
        count, subjects = rows.counts
        end = summary.stop_seconds
        if config.sampling.stop_seconds is not None:
            end = summary.video.duration_seconds or end
        record = dataclasses.replace(
            record,
            generation=uuid.uuid4().hex,
            frames=count,
            subjects=subjects,
            date=record.date if date is None else date,
            duration_seconds=end,
            probe={**dataclasses.asdict(summary.video), "path": record.path},
            grid=summary.embedding.grid,
            shots=tuple((shot.start_seconds, shot.stop_seconds) for shot in summary.shots),
            scenes=tuple((scene.start_seconds, scene.stop_seconds) for scene in summary.scenes),
        )
        return self._put(record, rows, previews, extras)

    def _copied(self, record: Record, twin: Record) -> Record | None:
        """Copies the twin's rows to the record's id; None if they are damaged, or removed meanwhile."""
        try:
            tables = self._tables.of(twin.id)
            found = dict(tables.rows([twin.generation]))
            previews, extras = tables.previews(twin.generation), tables.extras(twin.generation)
        except LibraryError:
            return None
        rows = found.get(twin.generation)
        if rows is None or extras is None or not twin.describes(rows) or len(previews) != rows.keyframe.sum():
            return None
        same = {
            name: getattr(twin, name) for name in ("frames", "subjects", "duration_seconds", "grid", "shots", "scenes")
        }
        record = dataclasses.replace(
            record,
            generation=uuid.uuid4().hex,
            date=record.date if twin.date is None else twin.date,
            probe={**twin.probe, "path": record.path},
            **same,
        )
        return self._put(record, rows, previews, extras)

    def _renewed(self, record: Record, *, state: FileState | None = None, path: str | None = None) -> Record:
        """Updates the record with the state of its file; the rows stay."""

        def renew(record: Record) -> Record:
            return dataclasses.replace(
                record,
                path=path or record.path,
                probe={**record.probe, "path": path} if path else record.probe,
                size=record.size if state is None else state.size,
                mtime_ns=record.mtime_ns if state is None else state.mtime_ns,
                tags=_joined(record.tags, self._config.tags),
            )

        new = renew(record)
        while new != record:
            # Another process may have changed the record since the catalog was read.
            current = self._current(record.id)
            if current is None:
                raise KeyreelError(f"{record.path}: was removed from the library during indexing", hint="add it again")
            record, new = current, renew(current)
            self._checkpoint()
            tables = self._tables.of(new.id)
            with self._commit_to(new.id):
                if new != record and tables.renew(new):
                    self._catalog.put(new)
                    upkeep.tidy(tables)
                    break
        return new

    def _current(self, id: str) -> Record | None:
        """The current record in the table, of any process."""
        return next(iter(self._tables.records([id])), None) if self._tables.exists() else None

    def _failed(
        self, error: KeyreelError, name: str, known: Record | None, state: FileState | None, content: str
    ) -> Record | None:
        """Records why a video failed. The rows of an unchanged file stay."""
        intact = known is not None and known.status == "ok" and content in ("", known.fingerprint)
        if state is None or intact:
            return known
        record = self._record(name, known, state, content)
        record = dataclasses.replace(record, status="failed", error=_text(error.args[0]), hint=_text(error.hint))
        if known is not None and dataclasses.replace(record, indexed_at=known.indexed_at) == known:
            return known
        return self._put(record)

    def _record(self, name: str, known: Record | None, state: FileState | None, content: str) -> Record:
        """A record without rows, for a file to read."""
        bundle = self._engine.bundle
        return Record(
            id=self._new_id(name) if known is None else known.id,
            path=name,
            size=0 if state is None else state.size,
            mtime_ns=0 if state is None else state.mtime_ns,
            fingerprint=content,
            tags=_joined(() if known is None else known.tags, self._config.tags),
            indexed_at=time.time(),
            model=bundle.name,
            model_sha256=bundle.sha256,
        )

    def _new_id(self, name: str) -> str:
        """An id that every process computes alike, and that no moved video has."""
        for number in itertools.count():
            id = hashlib.blake2b(f"{name}\n{number}".encode(), digest_size=16).hexdigest()
            current = self._current(id)
            if current is None or current.path == name:
                return id
        raise AssertionError("unreachable")

    def _put(
        self,
        record: Record,
        rows: Rows | None = None,
        previews: Sequence[Preview] = (),
        extras: Extras | None = None,
    ) -> Record:
        self._checkpoint()
        tables = self._tables.of(record.id)
        with self._commit_to(record.id):
            if not self._tables.exists():
                bundle = self._engine.bundle
                self._tables.create(model=bundle.name, model_sha256=bundle.sha256, width=bundle.embedding_width)
            record = tables.put(record, rows, previews, extras)
            self._catalog.put(record)
            upkeep.tidy(tables)
        return record

    def _commit_to(self, id: str) -> threading.Lock:
        """The lock for writing to a video's shard."""
        with self._lock:
            return self._committing[self._tables.number_of(id)]


def _joined(tags: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*tags, *more)))


def _text(said: Any) -> str | None:
    """Text that a table can store: file names may have bytes that are not UTF-8."""
    return None if said is None else str(said).encode("utf-8", "backslashreplace").decode()


def _changed(name: str) -> SourceError:
    return SourceError(
        f"{name}: changed while it was read.",
        hint="Index it again when it is complete; --watch waits for that.",
    )


def _cause(error: Exception, name: str, path: Path | None, state: FileState | None) -> Exception:
    """The error or its cause: a file that changes while it is read looks damaged."""
    try:
        same = state is None or FileState.of(path) == state
    except SourceError:
        return error
    return error if same else _changed(name)
