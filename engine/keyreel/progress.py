"""Progress bars on stderr, with rates and remaining time; silent where stderr is no terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from keyreel.types import Progress as Callback

STAGES = {
    "encode": "looking",
    "keyframes": "key-frames",
    "reel": "reel",
    "thumbnails": "thumbnails",
    "storyboard": "storyboard",
}


class _Rate(ProgressColumn):
    """Seconds of video a second."""

    def render(self, task: Task) -> Text:
        return Text(
            f"{task.speed:.1f}x" if task.speed and task.fields.get("seconds") else "", style="progress.data.speed"
        )


class Bars:
    """One bar for the video at hand; a context manager."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), _Rate(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
        self._task: TaskID | None = None

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start(self, name: str) -> Callback:
        """Begins the bar of one video; returns what the stages call."""
        self.finish()
        task = self._task = self._bars.add_task(name, total=None, seconds=True)
        current = ""

        def progress(stage: str, done: float, total: float | None) -> None:
            nonlocal current
            if stage != current:
                # A stage counts in its own unit: rate and remaining time begin anew with it.
                current = stage
                self._bars.reset(task, description=f"{name}: {STAGES.get(stage, stage)}", seconds=stage == "encode")
            self._bars.update(task, completed=done, total=total)

        return progress

    def finish(self) -> None:
        """Takes the bar away."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
