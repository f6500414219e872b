"""How a reel is made: its packets copied, or its frames encoded anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from keyreel.config import ReelMode
from keyreel.decode.source import Source
from keyreel.errors import RenderError
from keyreel.render.copy import NotCopyable, plan_copy, write_copy
from keyreel.render.reel import DEFAULTS, check_target, write_reel
from keyreel.types import Progress, Shot


@dataclass(frozen=True, slots=True)
class Reel:
    """A reel that was written."""

    path: Path
    mode: Literal["copy", "encode"]
    reason: str  # why this mode
    spans: tuple[Shot, ...]  # as they are in the reel: copying moves their ends


def make_reel(
    source: Source,
    spans: Sequence[Shot],
    path: Path,
    *,
    shots: Sequence[Shot],
    mode: ReelMode = "auto",
    height: int = DEFAULTS.reel_height,
    any_container: bool = False,
    progress: Progress | None = None,
) -> Reel:
    """Writes the spans one after the other, copied where `mode` and the video allow it.

    Args:
        spans: disjoint, in time order.
        path: of the file; its folder must be there.
        shots: of the video; copying moves no end of a span over a cut.
        mode: "auto" copies where every span can be copied.
        height: of an encoded picture, see `write_reel`.
        any_container: the suffix of `path` may change to that of a container that fits the packets.
        progress: called with ("reel", seconds done, seconds in all).

    Raises:
        RenderError: the spans cannot be copied and `mode` is "copy", or the file cannot be written.
        SourceError: the video cannot be opened.
    """
    check_target(source, path)
    if mode == "encode":
        write_reel(source, spans, path, height=height, progress=progress)
        return Reel(path, "encode", "asked for", tuple(spans))
    try:
        plan = plan_copy(source, spans, shots)
        target = path.with_suffix(plan.suffix) if any_container else path
        if target.suffix.lower() != plan.suffix:
            raise NotCopyable(f"its packets fit into {plan.suffix}, the reel is to be {target.suffix or path.name}")
        write_copy(source, plan, target, progress=progress)
    except NotCopyable as error:
        if mode == "copy":
            raise RenderError(
                f"{source.name}: the reel cannot be copied: {error}",
                hint="let it be encoded: --reel-mode auto (mode='auto')",
            ) from error
        write_reel(source, spans, path, height=height, progress=progress)
        return Reel(path, "encode", f"cannot be copied: {error}", tuple(spans))
    why = "asked for" if mode == "copy" else "every span can begin and end where packets can be cut"
    return Reel(target, "copy", why, plan.spans)
