"""The code of a Markdown page: what it holds, and runs of it from top to bottom.

Blocks of `sh` and `python` run in order, in one folder and one namespace. A block of `text` right after one is its
output: "..." stands for any text, "in 1.7 s" for any time, and other numbers may differ by a tenth, since processors
round differently. `<!-- background -->` before a block starts a service; `<!-- not run: REASON -->` leaves one out.

`python tests/pages.py PAGE...` writes the outputs anew that have no "...".
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "engine" / "guide"
PAGES = (ROOT / "README.md", *sorted(GUIDE.glob("*.md")))
PORT = "8000"  # of the service in the pages
HOME = "/home/me"  # the folder that they run in
_BLOCK = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$"
    r"(?:\n{1,2}```text\n(?P<output>.*?)^```$)?",
    re.M | re.S,
)
_LOOSE = re.compile(r"(\.\.\.|\bin \d+\.\d+ s\b|\d+(?:\.\d+)?)")
_COMMAND = "import sys; from keyreel.cli import main; sys.argv[0] = 'keyreel'; sys.exit(main())"


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a page."""

    language: str
    code: str
    note: str = ""
    output: str | None = None
    place: tuple[int, int] = (0, 0)  # of the output in the page

    @property
    def runs(self) -> bool:
        return self.language in ("sh", "python") and not self.note.startswith(("not run: ", "test"))


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text("utf-8")
    return [
        Block(found["language"], found["code"], found["note"] or "", found["output"], found.span("output"))
        for found in _BLOCK.finditer(text)
    ]


def is_like(expected: str, got: str) -> bool:
    """Whether an output is the expected one; see above."""
    pattern, numbers = "", []
    for part in _LOOSE.split(expected.strip()):
        if part == "...":
            pattern += r"(?s:.*?)"
        elif re.fullmatch(r"in \d+\.\d+ s", part):
            pattern += r"in \d+\.\d+ s"
        elif re.fullmatch(r"\d+(?:\.\d+)?", part):
            numbers.append(part)
            pattern += r"(\d+(?:\.\d+)?)"
        else:
            # Tables are as wide as their terminal.
            pattern += r"\s+".join(re.escape(word) for word in re.split(r"\s+", part))
    found = re.fullmatch(pattern, "\n".join(line.rstrip() for line in got.strip().splitlines()))
    if found is None:
        return False
    pairs = zip(numbers, found.groups(), strict=True)
    return all(abs(float(a) - float(b)) <= 0.1 * float(a) + 10.0 ** -len(a.partition(".")[2]) for a, b in pairs)


def outputs_of(page: Path, folder: Path) -> Iterator[tuple[Block, str]]:
    """Runs the blocks of a page in a folder; yields each with what it wrote."""
    command = folder / ".bin" / "keyreel"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{_COMMAND}" "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{command.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "100",
        "HOME": str(folder / ".home"),
        "XDG_CACHE_HOME": str(folder / ".home" / "cache"),
    }
    environment.pop("KEYREEL_CONFIG", None)  # a page has a file of its own
    names: dict[str, object] = {"__name__": "__main__"}
    with contextlib.ExitStack() as services:
        for block in blocks_of(page):
            if not block.runs:
                continue
            if block.language == "python":
                with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.chdir(folder):
                    exec(compile(block.code, page.name, "exec"), names)
                yield block, said.getvalue().replace(str(folder), HOME)
                continue
            if block.note == "background":
                environment["PORT"] = str(services.enter_context(_served(block.code, folder, environment)))
                continue
            code = block.code.replace(f":{PORT}", f":{environment.get('PORT')}")
            words = ("bash", "-eu", "-o", "pipefail", "-c", code)
            done = subprocess.run(
                words, cwd=folder, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True, check=False
            )
            yield block, done.stdout.replace(str(folder), HOME)
            assert done.returncode == 0 or block.note.startswith("fails"), f"{block.code}\n{done.stdout}"


@contextlib.contextmanager
def _served(code: str, folder: Path, environment: dict[str, str]) -> Iterator[int]:
    """A service that a block starts, at a free port, until the end of the page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    words = ("bash", "-c", f"exec {code.strip().partition('  #')[0]} --port {port}")
    with open(folder / ".service.log", "wb") as log:
        process = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, (folder / ".service.log").read_text()
                assert time.monotonic() < until
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def prepare(folder: Path, media: Path) -> None:
    """Puts the videos that the pages speak of into a folder."""
    (folder / "clips").mkdir(parents=True)
    for name, clip in (
        ("holiday", "natural/car-detection.mp4"),
        ("clips/a", "natural/test.mp4"),
        ("clips/b", "natural/bikes.mp4"),
    ):
        (folder / f"{name}.mp4").write_bytes((media / clip).read_bytes())


def _renew(page: Path, media: Path) -> None:
    text, moved = page.read_text("utf-8"), 0
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), media)
        for block, got in outputs_of(page, Path(name)):
            if block.output is None or is_like(block.output, got):
                continue
            if "..." in block.output:
                print(f"{page.name}: is not like its output, write it by hand:\n$ {block.code}{got}")
                continue
            low, high = block.place
            new = "\n".join(line.rstrip() for line in got.strip("\n").splitlines()) + "\n"
            text = text[: low + moved] + new + text[high + moved :]
            moved += len(new) - (high - low)
    page.write_text(text, "utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    shared = Path(os.environ.get("KEYREEL_SHARED", ROOT.parent / "shared"))
    for name in sys.argv[1:]:
        _renew(Path(name), shared / "media")
