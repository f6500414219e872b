"""Copies for browsers: what is copied, what is encoded, and that nobody waits for what nobody wants."""

from __future__ import annotations

import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from encoded_clips import encode
from served import until

from keyreel.config import Sampling
from keyreel.decode.source import Source
from keyreel.decode.stream import FrameStream
from keyreel.serve import playable
from keyreel.serve.models import Playable
from keyreel.serve.playable import Copies
from keyreel.serve.security import ApiError


@pytest.fixture
def copies(tmp_path: Path) -> Iterator[Copies]:
    made = Copies(tmp_path / "copies", 10 << 20, (str(tmp_path),))
    yield made
    made.close()


def ask(copies: Copies, clip: Path, name: str = "ab") -> Playable:
    """The state of a copy once it is over."""
    states: list[Playable] = []

    def over() -> bool:
        states.append(copies.ask(name, lambda: FileIO(clip)))
        return states[-1].state != "running"

    until(over)
    return states[-1]


def frames(path: Path) -> Any:
    with Source(path) as source, FrameStream(source, Sampling("all")) as stream:
        batches = list(stream)
    return np.concatenate([b.data for b in batches]), np.concatenate([b.pts_seconds for b in batches])


@pytest.mark.parametrize("container", ["mkv", "ts"])
def test_packets_are_copied_where_the_container_is_in_the_way(tmp_path: Path, copies: Copies, container: str) -> None:
    clip = encode(tmp_path / "clip", codec="libx264", container=container, frames=50)
    assert ask(copies, clip).state == "done"
    with Source(copies.path("ab")) as made:
        assert (made.probe().codec, made.probe().duration_seconds) == ("h264", pytest.approx(2.0, abs=1e-3))
    for found, wanted in zip(frames(copies.path("ab")), frames(clip), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-3)
    with copies.open("ab") as file:
        assert file.read() == copies.path("ab").read_bytes()
    copies.forget("ab")
    assert not copies.path("ab").exists()
    copies.forget("ab")


def test_other_codecs_are_encoded(tmp_path: Path, copies: Copies) -> None:
    clip = encode(tmp_path / "old", codec="mpeg4", container="avi", frames=50)
    assert ask(copies, clip).state == "done"
    with Source(copies.path("ab")) as made, Source(clip) as own:
        assert (made.probe().codec, made.probe().pixel_format) == ("h264", "yuv420p")
        assert made.probe().display_size == own.probe().display_size
    (ours, times), (theirs, wanted) = frames(copies.path("ab")), frames(clip)
    np.testing.assert_allclose(times, wanted, atol=1e-3)
    assert np.abs(ours.astype(int) - theirs.astype(int)).mean() < 6


def test_work_that_nobody_asks_for_stops(tmp_path: Path, copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playable, "LEFT_SECONDS", 0.05)
    clip = encode(tmp_path / "long", codec="mpeg4", container="avi", frames=1500)
    assert copies.ask("ab", lambda: FileIO(clip)).state == "running"
    until(lambda: not copies._works)
    assert list((tmp_path / "copies").iterdir()) == []  # nothing is left half-written
    with pytest.raises(ApiError, match="no such copy"):
        copies.open("ab")


def test_closing_stops_the_work(tmp_path: Path) -> None:
    copies = Copies(tmp_path / "copies", 10 << 20, ())
    clip = encode(tmp_path / "long", codec="mpeg4", container="avi", frames=1500)
    copies.ask("ab", lambda: FileIO(clip))
    copies.close()
    assert not copies.path("ab").exists()


def test_a_failure_is_told_once_and_tried_again(tmp_path: Path, copies: Copies) -> None:
    broken = tmp_path / "broken.avi"
    broken.write_bytes(b"no video" * 100)
    state = ask(copies, broken)
    assert (state.state, state.error and state.error.kind) == ("failed", "source")
    assert str(tmp_path) not in (state.error.message if state.error else "")
    assert ask(copies, encode(tmp_path / "good", codec="mpeg4", container="avi")).state == "done"


def test_copies_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = [encode(tmp_path / f"{n}", codec="mpeg4", container="avi", seed=n, frames=25) for n in range(3)]
    copies = Copies(tmp_path / "copies", 10 << 20, ())
    try:
        assert ask(copies, clips[0], "a0").state == "done"
        size = copies.path("a0").stat().st_size
        copies._most = int(2.5 * size)
        for number in (1, 2):
            copies.open("a0").close()  # watched
            time.sleep(0.02)
            assert ask(copies, clips[number], f"a{number}").state == "done"
        until(lambda: len(list((tmp_path / "copies").iterdir())) == 2)  # a copy can be had before older ones go
        assert copies.path("a2").exists()
        copies._most = 10
        state = ask(copies, clips[0], "b0")
        assert state.error is not None
        assert "more than 10 bytes" in state.error.message
        monkeypatch.setattr(playable, "MOST", 0)
        with pytest.raises(ApiError, match="too many"):
            copies.ask("c0", lambda: FileIO(clips[0]))
    finally:
        copies.close()


def test_a_copy_that_is_deleted_as_it_is_finished_is_made_again(
    tmp_path: Path, copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = encode(tmp_path / "clip", codec="mpeg4", container="avi", frames=25)
    trim = Copies._trim
    monkeypatch.setattr(Copies, "_trim", lambda self, kept: (self.forget(kept.stem), trim(self, kept)))
    copies.ask("ab", lambda: FileIO(clip))
    copies._thread.submit(int).result()  # it has one thread: the copy is over
    monkeypatch.undo()
    assert ask(copies, clip).state == "done"
