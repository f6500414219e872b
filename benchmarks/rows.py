"""The rows of the suite as its report asks for them: the newest of each metric."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(slots=True)
class Group:
    """One set of parameters: the rows of each system by metric, or why there are none."""

    params: dict[str, Any]
    systems: dict[str, dict[str, Row]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # system -> "skipped: why" or "failed: why"

    def median(self, system: str, metric: str = "cpu_seconds") -> float | None:
        row = self.systems.get(system, {}).get(metric)
        return None if row is None else float(row["median"])

    def ratio(self, over: str, under: str, metric: str = "cpu_seconds") -> float | None:
        """How many times as much `over` takes as `under`."""
        above, below = self.median(over, metric), self.median(under, metric)
        return above / below if above is not None and below else None

    def least(self, systems: Iterator[str] | tuple[str, ...], metric: str = "cpu_seconds") -> tuple[str, float] | None:
        """The system that takes the least of those that were measured, and how much."""
        known = [(value, name) for name in systems if (value := self.median(name, metric)) is not None]
        return (min(known)[1], min(known)[0]) if known else None


class Results:
    """All rows of a folder's *.jsonl that the suite wrote, the later ones instead of the earlier."""

    def __init__(self, folder: Path) -> None:
        self._cases: dict[str, dict[str, Group]] = {}
        self.last: Row | None = None  # the newest row
        self.dates: set[str] = set()
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text("utf-8").splitlines():
                row = json.loads(line)
                if {"case", "params", "system", "metric"} <= row.keys():
                    self._add(row)

    def _add(self, row: Row) -> None:
        self.last = row
        self.dates.add(row["environment"]["date"])
        groups = self._cases.setdefault(row["case"], {})
        group = groups.setdefault(json.dumps(row["params"], sort_keys=True), Group(row["params"]))
        status = next((f"{word}: {row[word]}" for word in ("skipped", "failed") if word in row), None)
        if status is None:
            group.absent.pop(row["system"], None)
            group.systems.setdefault(row["system"], {})[row["metric"]] = row
        else:
            group.systems.pop(row["system"], None)
            group.absent[row["system"]] = status

    def groups(self, case: str, **params: Any) -> list[Group]:
        """The groups of a case that have these parameters, in the order of their first rows."""
        return [
            group
            for group in self._cases.get(case, {}).values()
            if all(group.params.get(key) == value for key, value in params.items())
        ]

    def first(self, case: str, holds: Callable[[dict[str, Any]], bool] = lambda _: True, **params: Any) -> Group | None:
        """The first such group."""
        return next((group for group in self.groups(case, **params) if holds(group.params)), None)
