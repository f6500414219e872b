"""The committed rows, and tables made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

from benchmarks._common import RESULTS

Medians = dict[str, float]  # by metric


@cache
def rows() -> list[dict[str, Any]]:
    files = sorted(RESULTS.glob("*.jsonl"))
    found = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    return sorted(found, key=lambda row: row["environment"]["date"])


def groups(case: str, **params: Any) -> list[tuple[dict[str, Any], dict[str, Medians]]]:
    """(params, medians of each system) of all sets of parameters that have these."""
    found: dict[str, tuple[dict[str, Any], dict[str, Medians]]] = {}
    for row in rows():
        if row["case"] == case and row.get("median") is not None and params.items() <= row["params"].items():
            group = found.setdefault(json.dumps(row["params"], sort_keys=True), (row["params"], {}))
            group[1].setdefault(row["system"], {})[row["metric"]] = row["median"]
    return list(found.values())


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = max(2 - math.floor(math.log10(abs(value))), 0) if value else 0
    return f"{value:,.{digits}f}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))
