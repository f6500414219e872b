"""Beyond memory: an index over the stored vectors names candidates.

LanceDB's IVF_RQ (RabitQ, one bit a dimension): measured on 100,000 vectors of 512 numbers, clustered as those of videos
are, with queries that lie apart from them as texts do, on two busy cores:

    kind                                  build       index    recall@10 after re-ranking    a search
    IVF_RQ, one bit, l2, 32 probes        24 CPU-s    7 MB     0.994                         8 ms
    IVF_RQ, one bit, l2, 64 probes                             1.000                         11 ms
      the same on 300,000 vectors         56        22       0.980                         8
    IVF_FLAT, dot, 32 probes              131         98       0.990                         16
    IVF_SQ, dot, 32 probes                70          49       0.960                         14
    IVF_HNSW_SQ, dot, ef 400              47          70       0.956                         5
    IVF_PQ, 64 parts of a vector          over 400 s

The kinds were not measured alike: RQ had 100 parts of the table, 20 rounds and 336 candidates, the others dot product
and up to 200 candidates.

Rows that the index does not know yet are compared one by one, so that nothing that is committed is missed for being
new. What it names are frames; their videos are then read and looked at frame by frame with the stored vectors, so that
scores, moments and their order are exact, and only a video may be missed.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from keyreel.errors import import_extra
from keyreel.library.matrix import RowStore, Snapshot
from keyreel.library.types import BOOL, Filter
from keyreel.library.upkeep import told
from keyreel.types import F32, I64

# Frames that are asked for with each video that is wanted: the best ones are often of one scene.
FRAMES_A_VIDEO = 16
# Rows of a filter's videos up to which they are all looked at.
FEW_ROWS = 65_536
# Videos up to which a filter's are named to the table; of more, what does not fit is thrown away afterwards.
FEW_VIDEOS = 1000
# Rows in one part of the index, rounds of its clustering, and the parts that are looked at: at least so many, and a
# share of all, or recall would fall as libraries grow.
ROWS_A_PART, ROUNDS = 1000, 20
PROBES, PROBES_SHARE = 64, 0.2


class SearchStore(RowStore, Protocol):
    """What a search needs of a store."""

    @property
    def uri(self) -> str: ...
    def model(self) -> tuple[str, str, int]: ...
    def table(self, name: str) -> Any: ...


class Candidates:
    """Names videos that may answer a query."""

    def __init__(self, store: SearchStore, exact_rows: int) -> None:
        self._store, self._few = store, min(exact_rows, FEW_ROWS)

    def videos(self, snapshot: Snapshot, chosen: BOOL, query: F32, where: Filter, wanted: int) -> tuple[I64, bool]:
        """The records with the best frames.

        Args:
            chosen: [V] bool: the records to choose from. query: [D] float32. where: of which the times count here.
            wanted: about so many.

        Returns:
            Numbers of records, and whether there are no others.
        """
        numbers = np.flatnonzero(chosen)
        frames = np.array([record.frames for record in snapshot.records], np.int64)
        if len(numbers) <= wanted or frames[numbers].sum() <= self._few:
            return numbers, True
        known = {snapshot.records[number].generation: number for number in numbers.tolist()}
        conditions = []
        if len(known) <= FEW_VIDEOS and len(known) < len(frames):
            conditions.append("generation IN (" + ", ".join(f"'{name}'" for name in known) + ")")
        if where.start_seconds is not None:
            conditions.append(f"pts_seconds >= {float(where.start_seconds)!r}")
        if where.stop_seconds is not None:
            conditions.append(f"pts_seconds < {float(where.stop_seconds)!r}")
        limit = wanted * FRAMES_A_VIDEO
        probes = max(PROBES, int(PROBES_SHARE * frames.sum() / ROWS_A_PART))
        while True:
            names = self._rows(query, limit, probes, " AND ".join(conditions))
            found = list(dict.fromkeys(known[name] for name in names if name in known))
            if len(found) >= wanted or len(names) < limit:
                return np.array(found, np.int64), len(names) < limit
            limit *= 4

    def _rows(self, query: F32, limit: int, probes: int, condition: str) -> list[str]:
        """Generations of the best rows, best first."""
        search = self._store.table("frames").search(query, vector_column_name="vector").distance_type("l2")
        # Looks into more parts where a filter leaves fewer rows than were asked for.
        search = search.minimum_nprobes(probes).maximum_nprobes(0).limit(limit)
        if condition:
            search = search.where(condition, prefilter=True)
        with told(self._store.uri):
            names: list[str] = search.select(["generation", "_distance"]).to_arrow()["generation"].to_pylist()
        return names

    def build(self) -> bool:
        """Builds the index where there is none; says whether it did."""
        table = self._store.table("frames")
        if any("vector" in index.columns for index in table.list_indices()):
            return False
        lancedb_index = import_extra("lancedb.index", extra="library", purpose="a vector index")
        parts = max(1, table.count_rows() // ROWS_A_PART)
        kind = lancedb_index.IvfRq(distance_type="l2", num_partitions=parts, max_iterations=ROUNDS)
        with told(self._store.uri):
            # The candidates' rows are read by generation: without this that would be a look at every row.
            table.create_index("generation", config=lancedb_index.BTree())
            table.create_index("vector", config=kind)
        return True
