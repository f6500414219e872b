"""Text queries that come at the same time share one encode and one pass over the library."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from keyreel.config import ServeConfig
from keyreel.library.types import Filter, LibraryHit
from keyreel.serve.limits import Pool
from keyreel.serve.metrics import Metrics
from keyreel.serve.refusals import too_busy

Answer = tuple[list[LibraryHit], float | None]  # hits, and the weak score where they were looked for
SearchMany = Callable[[Sequence[str], int, Filter], list[Answer]]


@dataclass(frozen=True, slots=True, eq=False)
class _Query:
    text: str
    k: int
    where: Filter
    answer: asyncio.Future[Answer]


class Batcher:
    """One pass at a time; queries that come while it runs, or within a short window, wait for the next together.

    A pass takes the queries that ask for the same k and the same filter. A query whose caller left is not worked on.

    Args:
        search_many: (texts, k, where) -> answer to each text; called in a thread.
    """

    def __init__(self, search_many: SearchMany, config: ServeConfig, metrics: Metrics) -> None:
        self._search_many, self._config, self._metrics = search_many, config, metrics
        self._pool = Pool(1, 1, name="keyreel-batch")
        self._waiting: list[_Query] = []
        self._task: asyncio.Task[None] | None = None

    async def search(self, text: str, k: int, where: Filter) -> Answer:
        """The k best moments, the same as for this text alone, and the weak score of where they were looked for.

        Raises:
            Refused: 429, too many queries wait.
        """
        if len(self._waiting) >= self._config.queue + self._config.threads:
            raise too_busy("queries", 1)
        query = _Query(text, k, where, asyncio.get_running_loop().create_future())
        self._waiting.append(query)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        try:
            return await query.answer
        finally:
            if query in self._waiting:
                self._waiting.remove(query)

    def close(self) -> None:
        """Forgets what waits."""
        self._pool.close()

    async def _work(self) -> None:
        while self._waiting:
            await asyncio.sleep(self._config.batch_window_seconds)
            if not self._waiting:
                return
            first = self._waiting[0]
            alike = [query for query in self._waiting if (query.k, query.where) == (first.k, first.where)]
            batch = alike[: self._config.batch_size]
            self._waiting = [query for query in self._waiting if query not in batch]
            try:
                await self._answer(batch)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the callers' answer
                for query in batch:
                    if not query.answer.done():
                        query.answer.set_exception(error)

    async def _answer(self, batch: list[_Query]) -> None:
        self._metrics.batch_queries.observe(len(batch))
        first = batch[0]
        texts = [query.text for query in batch]
        try:
            answers = await self._pool.run(self._search_many, texts, first.k, first.where)
        except Exception:
            if len(batch) == 1:
                raise
            for query in batch:  # one text that cannot be searched must not spoil the others
                if not query.answer.done():
                    await self._one(query)
            return
        for query, answer in zip(batch, answers, strict=True):
            if not query.answer.done():
                query.answer.set_result(answer)

    async def _one(self, query: _Query) -> None:
        try:
            answers = await self._pool.run(self._search_many, [query.text], query.k, query.where)
            query.answer.set_result(answers[0])
        except Exception as error:  # noqa: BLE001 - as above
            if not query.answer.done():
                query.answer.set_exception(error)
