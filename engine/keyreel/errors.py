"""The error classes.

KeyreelError                   .hint: what to do; .exit_code of the command line
├─ SourceError        exit 3   the video
│  ├─ SourceNotFound           no such file
│  ├─ UnsupportedCodec         no decoder, or no video stream
│  ├─ CorruptStream            .recovered_frames: how many were decoded
│  └─ NoFrames                 the sampling window has no frame
├─ ModelError         exit 4   the model
│  ├─ ModelNotFound            .near: similar names
│  ├─ CheckpointMismatch       a file differs from the manifest
│  └─ PlanStale                no TensorRT plan for this graph and machine
├─ BackendError       exit 5   the device
│  ├─ BackendUnavailable       .probe: the check that failed
│  └─ OutOfMemory              the hint says what to lower
├─ LibraryError       exit 6   the library
│  ├─ ModelMismatch            its vectors are of another model
│  └─ Damaged                  .findings: one line for each problem
├─ RenderError        exit 7   the outputs
├─ ConfigError        exit 2   the file keyreel.toml
└─ Cancelled          exit 130 the caller's `cancel` returned True

MissingExtra(ImportError)      exit 2, a package is not installed; names the pip command
Wrong arguments raise ValueError or TypeError.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


class KeyreelError(Exception):
    """Base of all errors that keyreel raises on purpose.

    Args:
        message: what is wrong, and what is allowed.
        hint: what the user can do; printed on the next line.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\nHint: {self.hint}" if self.hint else message


class SourceError(KeyreelError):
    """The video cannot be read."""

    exit_code = 3


class SourceNotFound(SourceError):
    """The file does not exist."""


class UnsupportedCodec(SourceError):
    """The file has no video stream, or no decoder reads it."""


class CorruptStream(SourceError):
    """The stream is too damaged to use."""

    def __init__(self, message: str, *, recovered_frames: int = 0, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.recovered_frames = recovered_frames


class NoFrames(SourceError):
    """The sampling window has no frame. Raised while iterating over the frames."""


class ModelError(KeyreelError):
    """The model cannot be used."""

    exit_code = 4


class ModelNotFound(ModelError):
    """There is no model of that name. `near` holds similar names."""

    def __init__(self, name: str, known: Iterable[str] = (), *, hint: str | None = None) -> None:
        self.near = tuple(difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5))
        close = f" Close to it: {', '.join(self.near)}." if self.near else ""
        super().__init__(f"no model named {name!r}.{close}", hint=hint)


class CheckpointMismatch(ModelError):
    """A file of the model differs from its manifest."""


class PlanStale(ModelError):
    """There is no TensorRT plan for this graph, device, batch size and version of TensorRT."""


class BackendError(KeyreelError):
    """The device cannot be used."""

    exit_code = 5


class BackendUnavailable(BackendError):
    """The requested device does not work. `probe` names the check that failed."""

    def __init__(self, message: str, *, probe: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.probe = probe


class OutOfMemory(BackendError):
    """The memory of the device is full. The hint says what to lower."""


class LibraryError(KeyreelError):
    """The library cannot be used."""

    exit_code = 6


class ModelMismatch(LibraryError):
    """The library holds vectors of another model than the engine's."""


class Damaged(LibraryError):
    """Files of the library cannot be read. `findings` has a line for each problem."""

    def __init__(self, message: str, findings: Iterable[str] = (), *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.findings = tuple(findings)


class RenderError(KeyreelError):
    """An output cannot be made."""

    exit_code = 7


class Cancelled(KeyreelError):
    """The caller's `cancel` returned True."""

    exit_code = 130


class ConfigError(KeyreelError):
    """The file keyreel.toml is wrong."""

    exit_code = 2


def pip_install(extra: str) -> str:
    """The pip command that installs an extra of keyreel.

    It installs from the same origin as keyreel itself: a checkout, or what pip recorded (PEP 610), else the index.
    """
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").is_file():  # editable, or not installed at all
        return f"pip install -e {shlex.quote(f'{checkout}[{extra}]')}"
    from importlib import metadata  # slow to import, and rarely needed

    with contextlib.suppress(metadata.PackageNotFoundError):
        if noted := metadata.distribution("keyreel").read_text("direct_url.json"):
            origin = json.loads(noted)
            vcs = origin.get("vcs_info")
            url = f"{vcs['vcs']}+{origin['url']}@{vcs['commit_id']}" if vcs else origin["url"]
            return f"pip install {shlex.quote(f'keyreel[{extra}] @ {url}')}"
    return f"pip install 'keyreel[{extra}]'"


class MissingExtra(ImportError):
    """A feature needs a package that is not installed. The message names the pip command."""

    exit_code = 2

    def __init__(self, module: str, extra: str, purpose: str, *, others: Mapping[str, str] | None = None) -> None:
        # others: alternative packages and their extras
        either = {module: extra, **(others or {})}
        packages = " or ".join(repr(name) for name in either)
        lines = " or ".join(pip_install(name) for name in either.values())
        super().__init__(f"{purpose} needs the package {packages}. Hint: {lines}", name=module)
        self.extra = extra


@dataclass(frozen=True, slots=True)
class Failure:
    """A video that failed among several, and its error. The others go on."""

    video: str
    error: KeyreelError

    @classmethod
    def of(cls, video: str, error: Exception) -> Failure:
        """Makes a Failure of any exception."""
        known = error if isinstance(error, KeyreelError) else KeyreelError(f"{type(error).__name__}: {error}")
        return cls(video, known)


def import_extra(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Imports an optional module.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # An installed module that lacks one of its own dependencies is broken, not a missing extra.
        if error.name and module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingExtra(module.split(".")[0], extra, purpose) from error
    except ImportError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # C++ modules turn Ctrl-C into an ImportError
            raise KeyboardInterrupt from error
        raise
