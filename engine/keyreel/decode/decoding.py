"""What makes pictures out of packets, whoever does: the lanes of a decoder, and what is done with their pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from av.container import InputContainer
from av.video.stream import VideoStream

from keyreel.decode.sampling import Decoder

M = TypeVar("M")


class Lane(Protocol):
    """A copy of the video that was opened, and what decodes and converts it."""

    @property
    def container(self) -> InputContainer: ...

    @property
    def stream(self) -> VideoStream: ...

    @property
    def decoder(self) -> Decoder: ...

    def keep(self, picture: Any) -> Any:
        """The picture, valid also after more packets are decoded."""

    def shown(self, pictures: Iterable[tuple[M, Any]]) -> Iterator[tuple[M, Any]]:
        """Upright RGB [H, W, 3] uint8 of each picture, in order; may take some more pictures before it gives one."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """Where lanes come from, and what is done with their pictures."""

    # What opens a lane: the file, its video, what notes warnings, and whether no other lane works beside it.
    open_lane: Callable[[InputContainer, VideoStream, Callable[..., None], bool], AbstractContextManager[Lane]]
    stack: Callable[[list[Any]], Any]  # pictures of one size to [T, H, W, 3]
    lanes: int = 1  # how many may work at a time
    ahead: int = 16  # pictures of one lane that may wait for the lanes before it
    gap: int = 0  # packets that are decoded in vain as cheaply as the decoder is drained and started again
    whole: bool = False  # one lane alone decodes everything as fast as all of them
    after: Callable[[Exception], Decoding] | None = None  # what goes on after DecoderFailed; may raise
    join: Callable[[], None] = lambda: None  # called in the thread that gets a batch, see `Arrays.join`


class DecoderFailed(Exception):
    """This decoder cannot go on with this file; another one may."""
