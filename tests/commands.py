"""Runs commands of the command line, in this process and in one of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import jsonschema
import numpy as np
from typer.testing import CliRunner, Result

from keyreel.cli.app import app
from keyreel.render.documents import schema_of

BARE = ("--no-reel", "--no-storyboard", "--no-thumbnails", "--keyframes", "1")


def run(*words: object, code: int = 0, input: bytes | None = None) -> Result:
    done = CliRunner().invoke(app, [str(w) for w in words], input=input, env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == code, (done.output, done.exception)
    return done


def document(kind: type, *words: object, code: int = 0, input: bytes | None = None) -> Any:
    """What a command prints with --json, valid by its schema."""
    found = json.loads(run(*words, "--json", code=code, input=input).stdout)
    jsonschema.validate(found, schema_of(kind))
    return found


def spawn(*words: object, **options: Any) -> subprocess.Popen[bytes]:
    """The command in a process of its own, warnings as errors.

    Files left open by an interrupt are none: a signal between the opening of a file and the `with` that closes it is
    something Python code cannot prevent.
    """
    command = [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-m", "keyreel", *map(str, words)]
    environment = {**os.environ, "NO_COLOR": "1", **options.pop("env", {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, env=environment, **streams)


def write_clip(path: Path, *, fps: int = 10, frames: int = 5) -> Path:
    """A small video with a key frame each second."""
    with av.open(str(path), "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=fps, options={"g": str(fps), "keyint_min": str(fps)})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(frames):
            picture = np.full((48, 64, 3), (200, min(4 * n, 255), 30), np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    return path
