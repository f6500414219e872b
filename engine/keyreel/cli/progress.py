"""Progress bars on stderr, with rate and remaining time. Silent unless stderr is a terminal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from keyreel.cli.output import errors, printable

LONGEST = 40  # characters of a name; keeps the end
# Start and share of each stage in the work on a video, measured: without a reel, and with an encoded one. The bar jumps
# over stages that take no time.
PICTURED = {"encode": (0.0, 0.85), "pictures": (0.85, 0.15)}
RENDERED = {"encode": (0.0, 0.5), "pictures": (0.5, 0.1), "reel": (0.6, 0.4)}


class _Rate(ProgressColumn):
    """Seconds of video per second; for the bar of all videos, how many are done."""

    def render(self, task: Task) -> Text:
        text = f"{task.speed:.1f}x" if task.speed and task.fields.get("seconds") else ""
        if task.fields.get("whole") and task.total is not None:
            text = f"{int(task.completed)}/{int(task.total)}"
        return Text(text, style="progress.data.speed")


class Bars:
    """A bar for the current video of each thread, and one for all videos. A context manager."""

    def __init__(self, *, quiet: bool = False) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), _Rate(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=errors, transient=True, disable=quiet or not errors.is_terminal)
        self._tasks: dict[int, TaskID] = {}  # by thread
        self._whole: TaskID | None = None

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Removes all bars. Idempotent."""
        self._bars.stop()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Hides the bars during the block, to print on stdout."""
        self._bars.stop()
        yield
        self._bars.start()

    def start(
        self, name: str, parts: Mapping[str, tuple[float, float]] = MappingProxyType({})
    ) -> Callable[[str, float, float | None], None]:
        """Adds the bar of a video; returns its progress callback.

        Args:
            parts: start and share of each stage, 0 to 1, for one bar over all stages. By default the bar restarts with
                each stage.
        """
        self.finish()
        label = printable(name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}")
        task = self._tasks[threading.get_ident()] = self._bars.add_task(label, total=None, seconds=not parts)
        current = ""

        def progress(stage: str, done: float, total: float | None) -> None:
            nonlocal current
            if stage in parts:
                begins, share = parts[stage]
                within = min(done / total, 1.0) if total else 0.0
                self._bars.update(task, description=f"{label}: {stage}", completed=begins + share * within, total=1.0)
                return
            if stage != current:  # each stage has its own unit, so rate and remaining time restart
                current = stage
                self._bars.reset(task, description=f"{label}: {stage}", seconds=stage == "encode")
            self._bars.update(task, completed=done, total=total)

        return progress

    def finish(self) -> None:
        """Removes the bar of this thread's video."""
        if (task := self._tasks.pop(threading.get_ident(), None)) is not None:
            self._bars.remove_task(task)

    def whole(self, stage: str, done: float, total: float | None) -> None:
        """Moves the bar of all videos. A progress callback."""
        if self._whole is None:
            self._whole = self._bars.add_task(f"all {stage}", whole=True)
        self._bars.update(self._whole, completed=done, total=total)
