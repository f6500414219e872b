"""Makes thumbnails of frames that are decoded for the analysis anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from av.video.frame import VideoFrame

from keyreel.config import ImageTransform
from keyreel.decode.color import Converter
from keyreel.decode.timeline import Timeline
from keyreel.types import U8


class Aside:
    """Collects pictures of the frames shown at given times, if these frames are decoded.

    Several workers may add pictures at the same time.

    Args:
        timeline: of the video.
        times: seconds from the video's start.
        transform: size of the pictures.
    """

    def __init__(self, timeline: Timeline, times: Sequence[float], transform: ImageTransform) -> None:
        self.transform = transform
        ranks = np.searchsorted(timeline.starts, np.asarray(times) + 1e-9, side="right") - 1
        self._wanted = dict(zip(times, timeline.ticks[np.maximum(ranks, 0)].tolist(), strict=True))
        self._ticks = frozenset(self._wanted.values())
        self._pictures: dict[int, Any] = {}

    def converter(self, sample_aspect_ratio: Fraction | None) -> Callable[[VideoFrame], None]:
        """Makes the function with which a worker adds pictures of its frames."""
        convert = Converter(self.transform, sample_aspect_ratio)

        def add(frame: VideoFrame) -> None:
            if frame.pts is not None and self.wants(frame.pts):
                self.add(frame.pts, convert(frame))

        return add

    def wants(self, ticks: int | None) -> bool:
        """Whether the picture at a pts is wanted and still missing."""
        return ticks in self._ticks and ticks not in self._pictures

    def add(self, ticks: int, picture: Any) -> None:
        """Adds the picture at a pts."""
        self._pictures[ticks] = picture

    def pictures(self, to_host: Callable[[Any], U8]) -> dict[float, U8]:
        """Returns time -> [H, W, 3] uint8 RGB, for each time whose frame was decoded.

        Args:
            to_host: copies a picture from its device; pictures stay there until the end, so that nothing waits.
        """
        shown = {ticks: to_host(picture) for ticks, picture in self._pictures.items()}
        return {time: shown[ticks] for time, ticks in self._wanted.items() if ticks in shown}
