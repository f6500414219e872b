"""Searches with actors: each has the vectors of one shard, and a query goes to all at the same time.

`library.merge` defines what shards answer and how answers merge, so the result is that of one machine. While the actor
of a shard is lost, until Ray has restarted it and it has read its rows, results skip the shard and say so; or the query
waits for it.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from keyreel.cluster.carried import Carried, carried, opened
from keyreel.config import LibraryConfig
from keyreel.errors import LibraryError
from keyreel.library.library import Library
from keyreel.library.merge import Answered, Search, Shard
from keyreel.library.search import SearchIndex
from keyreel.library.shards import Shards, open_tables
from keyreel.library.table import Tables
from keyreel.library.types import Filter
from keyreel.runtime.backend import resolve

T = TypeVar("T")
_LOOK_SECONDS = 0.2  # between two checks for a lost actor


class ShardActor:
    """The actor that searches one shard of a library. It notices new commits.

    Args:
        uri: of the library.
        number: of the shard, from 0.
        device: for its vectors, see `runtime.backend.resolve`.
    """

    def __init__(
        self,
        uri: str,
        number: int,
        config: LibraryConfig | None = None,
        device: str = "auto",
        storage_options: Mapping[str, str] | None = None,
    ) -> None:
        self._open = partial(open_tables, uri, storage_options)
        self._number, self._config, self._backend = number, config or LibraryConfig(), resolve(device)
        self._index: SearchIndex | None = None
        self._lock = threading.Lock()
        carried(self.ready)  # now, not at the first query

    def ready(self) -> None:
        """Reads the rows, if the library exists."""
        if (found := self._found()) is not None:
            found.refresh()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the `SearchIndex`; returns its answer for `carried.opened`."""
        return carried(lambda: getattr(self._there(), method)(*arguments))

    def process(self) -> tuple[int, int]:
        """Its process id, and its peak memory in bytes."""
        return os.getpid(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _there(self) -> SearchIndex:
        found = self._found()
        if found is None:
            raise LibraryError("there is no library yet", hint="index a video first")
        return found

    def _found(self) -> SearchIndex | None:
        with self._lock:
            if self._index is None:
                tables = self._open()
                if not tables.exists():
                    return None
                part, whole = tables.parts[self._number], None
                if isinstance(tables, Shards):  # the actor has its own memory: only its own rows count
                    whole = Shards(tables.uri, [tables.names[self._number]], part.options)
                self._index = SearchIndex(part, self._config, self._backend, whole)
            return self._index


class _Sender:
    """Has the methods of a shard; each returns Ray's reference to the actor's answer."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *arguments: self._actor.ask.remote(method, *arguments)


class RemoteSearch(Search):
    """Searches with the actors of all shards. Safe to share between threads.

    Args:
        actor_of: returns the current actor of a shard; raises ValueError if there is none.
        wait: wait up to `seconds` for lost shards; else skip them.
        seconds: the longest time for a query.
    """

    def __init__(
        self,
        count: int,
        number_of: Callable[[str], int],
        similarity: float,
        actor_of: Callable[[int], Any],
        *,
        wait: bool,
        seconds: float,
    ) -> None:
        super().__init__(cast("Sequence[Shard]", [None] * count), number_of, similarity)
        self._actor_of, self._wait, self._seconds = actor_of, wait, seconds
        self._actors: dict[int, Any] = {}
        self._lost: set[int] = set()
        self._lock = threading.Lock()

    def ask(self, call: Callable[[Filter, Shard], Answered], where: Filter) -> list[Answered]:
        """Calls all shards at the same time, and returns their answers.

        Raises:
            LibraryError: no shard answers.
        """
        until = time.monotonic() + self._seconds
        parts = self.parts_of(where)
        calls = [(number, partial(call, own)) for number, own in parts]
        sent = [self._sent(number, one) for number, one in calls]
        found = [self._received(*call, reference, until) for call, reference in zip(calls, sent, strict=True)]
        answers = [opened(answer) for answer in found if answer is not None]
        if not answers:
            hint = "try again in some seconds: Ray restarts them"
            raise LibraryError(f"none of {len(parts)} shards answers", hint=hint)
        if lost := len(parts) - len(answers):
            what = f"{lost} of {len(self.shards)} shards"
            answers[0] = replace(answers[0], left_out=(*answers[0].left_out, what))
        return answers

    def ask_one(self, number: int, call: Callable[[Shard], T]) -> T:
        """Calls one shard.

        Raises:
            LibraryError: the shard does not answer.
        """
        until = time.monotonic() + self._seconds
        answer = self._received(number, call, self._sent(number, call), until)
        if answer is None:
            raise LibraryError(f"shard {number} does not answer", hint="try again in some seconds: Ray restarts it")
        return opened(answer)

    def _sent(self, number: int, call: Callable[[Shard], T]) -> Any:
        """Ray's reference to the answer; None without an actor."""
        if number in self._lost:
            return None
        try:
            actor = self._actors.get(number) or self._actors.setdefault(number, self._actor_of(number))
            return call(cast("Shard", _Sender(actor)))
        except (RayActorError, ValueError):
            self._lose(number)
            return None

    def _received(self, number: int, call: Callable[[Shard], T], reference: Any, until: float) -> T | Carried | None:
        """The answer; None if the shard is lost."""
        while True:
            if reference is not None:
                try:
                    answer: T | Carried = ray.get(reference, timeout=max(0.0, until - time.monotonic()))
                    return answer
                except RayActorError:
                    self._lose(number)
                except GetTimeoutError:
                    return None
            if not self._wait or time.monotonic() > until:
                return None
            time.sleep(_LOOK_SECONDS)
            reference = self._sent(number, call)

    def _lose(self, number: int) -> None:
        """Skips a shard until its actor is back."""
        with self._lock:
            self._actors.pop(number, None)
            if number in self._lost:
                return
            self._lost.add(number)
        threading.Thread(target=self._find, args=(number,), name=f"keyreel-shard-{number}", daemon=True).start()

    def _find(self, number: int) -> None:
        while ray.is_initialized():
            try:
                actor = self._actor_of(number)
                ray.get(actor.ready.remote())
            except (RayActorError, ValueError):
                time.sleep(_LOOK_SECONDS)
                continue
            self._actors[number] = actor
            self._lost.discard(number)
            return


class ClusterLibrary(Library):
    """A library that searches with actors; everything else is as in `Library`.

    Args:
        count: number of shards when the actors were started.
        actor_of, wait, seconds: see `RemoteSearch`.
    """

    def __init__(
        self,
        uri: str,
        engine: Any,
        count: int,
        actor_of: Callable[[int], Any],
        *,
        wait: bool,
        seconds: float,
        **options: Any,
    ) -> None:
        super().__init__(uri, engine, **options)
        self._count, self._actor_of, self._wait, self._seconds = count, actor_of, wait, seconds

    def _searcher_of(self, tables: Tables | Shards) -> Search:
        if len(tables.parts) != self._count:
            what = f"the library {self.uri} has {len(tables.parts)} shards now, not {self._count}"
            raise LibraryError(what, hint="start the service again")
        similarity = self.config.fold_similarity
        return RemoteSearch(
            self._count, tables.number_of, similarity, self._actor_of, wait=self._wait, seconds=self._seconds
        )
