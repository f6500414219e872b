"""Encodes the queries to a library as vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from keyreel.runtime.bundle import SubjectScale
from keyreel.search import Asked, Part
from keyreel.types import F32, Combined, Example, Query

if TYPE_CHECKING:
    from keyreel.engine import Engine


def asked(
    queries: Sequence[Query | Combined],
    engine: Callable[[str], Engine],
    id_of: Callable[[str], str],
    vector_of: Callable[[Example], F32],
) -> tuple[list[Asked], list[Example | None]]:
    """Encodes queries, all texts in one run. Returns them, and for each the example that it is the vector of, or None.

    Args:
        engine: returns the engine, or raises ValueError if the library has none; takes the purpose.
        id_of: path or id of a video -> its id.
        vector_of: an example, by id -> its vector [D].
    """
    given = [Combined.of(query) for query in queries]
    texts = list(dict.fromkeys(text for one in given for text in one.texts))
    encoded: dict[str, F32] = {}
    if texts:
        encoded = dict(zip(texts, engine("searching for a text").encode_text(texts), strict=True))
    plain = SubjectScale()

    def located(example: Example) -> Example:
        return replace(example, video=id_of(example.video))

    def part_of(query: Query) -> Part:
        if isinstance(query, str):
            own = engine("searching for a text")
            return Part(encoded[query], own.bundle.subject, own.known(query))
        if isinstance(query, Example):
            vector = vector_of(located(query))
        elif isinstance(query, np.ndarray) and query.ndim == 1:
            vector = np.asarray(query, np.float32)
        else:
            vector = engine("searching for a picture").encode_image(query)[0]
        return Part(vector, plain, None)

    own = [located(one.query) if isinstance(one.query, Example) else None for one in given]
    chances = engine("searching for a text").chances if texts else lambda: None
    return [Asked.of(one, part_of, chances) for one in given], own
