"""Carries exceptions between processes: Ray would wrap them, and some cannot be rebuilt from their message."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Carried:
    """An exception as values."""

    kind: type[Exception]
    arguments: tuple[Any, ...]
    fields: Mapping[str, Any]


def carried(work: Callable[[], R]) -> R | Carried:
    """Returns the result of `work`, or its exception as values."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - raised where the result is opened
        return Carried(type(error), error.args, vars(error))


def opened(result: R | Carried) -> R:
    """Returns the result in what `carried` returned, or raises its exception."""
    if not isinstance(result, Carried):
        return result
    error = result.kind.__new__(result.kind)
    error.args = result.arguments
    vars(error).update(result.fields)
    raise error
