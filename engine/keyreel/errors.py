"""The errors, as a tree.

KeyreelError                   .hint: what to do about it, .exit_code: what the command line exits with
├─ SourceError        exit 3   the video
│  ├─ SourceNotFound
│  ├─ UnsupportedCodec         no decoder for it, or no video stream in it
│  ├─ CorruptStream            .recovered_frames: how many could be decoded
│  └─ NoFrames                 no wanted frame lies in the window
├─ ModelError         exit 4   the bundle
│  ├─ ModelNotFound            .near: names that are close
│  ├─ CheckpointMismatch       a file differs from the one in the manifest
│  └─ PlanStale                no TensorRT plan fits this graph on this machine
├─ BackendError       exit 5   the device
│  ├─ BackendUnavailable       .probe: which probe failed
│  └─ OutOfMemory              the hint says what to lower
├─ LibraryError       exit 6   the library of videos
│  ├─ ModelMismatch            its vectors are of another model
│  └─ Damaged                  .findings: what cannot be read
├─ RenderError        exit 7   the outputs
├─ ConfigError        exit 2   the file keyreel.toml
└─ Cancelled          exit 130 the caller's `cancel` asked to stop

MissingExtra(ImportError)      a feature's package is not installed; names the pip command
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
from importlib import metadata
from pathlib import Path
from types import ModuleType


class KeyreelError(Exception):
    """Base of all errors that keyreel raises on purpose.

    Args:
        message: what was wrong, what was got, what is allowed.
        hint: what the user can do about it; printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\nHint: {self.hint}" if self.hint else message


class SourceError(KeyreelError):
    """The video cannot be used."""

    exit_code = 3


class SourceNotFound(SourceError):
    """There is no such file."""


class UnsupportedCodec(SourceError):
    """No decoder for it, or no video stream in it."""


class CorruptStream(SourceError):
    """The stream is too damaged to use."""

    def __init__(self, message: str, *, recovered_frames: int = 0, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.recovered_frames = recovered_frames


class NoFrames(SourceError):
    """No wanted frame lies in the window; streams raise it while they are iterated."""


class ModelError(KeyreelError):
    """The model bundle cannot be used."""

    exit_code = 4


class ModelNotFound(ModelError):
    """No bundle of that name; `near` holds names that are close to it."""

    def __init__(self, name: str, known: Iterable[str] = (), *, hint: str | None = None) -> None:
        self.near = tuple(difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5))
        close = f" Close to it: {', '.join(self.near)}." if self.near else ""
        super().__init__(f"no model named {name!r}.{close}", hint=hint)


class CheckpointMismatch(ModelError):
    """A file of the bundle differs from the one in its manifest."""


class PlanStale(ModelError):
    """No TensorRT plan fits the graph, the device, the batch sizes and the installed TensorRT."""


class BackendError(KeyreelError):
    """The device cannot be used."""

    exit_code = 5


class BackendUnavailable(BackendError):
    """The device that was asked for does not work; `probe` names the check that failed."""

    def __init__(self, message: str, *, probe: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.probe = probe


class OutOfMemory(BackendError):
    """The device's memory is full; the hint says what to lower."""


class LibraryError(KeyreelError):
    """The library cannot be used."""

    exit_code = 6


class ModelMismatch(LibraryError):
    """The library holds vectors of another model."""


class Damaged(LibraryError):
    """Files of the library cannot be read; `findings` has a line for each problem."""

    def __init__(self, message: str, findings: Iterable[str] = (), *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.findings = tuple(findings)


class RenderError(KeyreelError):
    """An output cannot be made."""

    exit_code = 7


class Cancelled(KeyreelError):
    """The caller's `cancel` asked to stop."""

    exit_code = 130


class ConfigError(KeyreelError):
    """The file keyreel.toml is wrong."""

    exit_code = 2


def pip_install(extra: str) -> str:
    """The command that installs an extra, from where keyreel itself is installed from.

    That is a checkout, a wheel or a repository, as pip notes it (PEP 610), else the package index.
    """
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").is_file():  # editable, or not installed at all
        return f"pip install -e {shlex.quote(f'{checkout}[{extra}]')}"
    with contextlib.suppress(metadata.PackageNotFoundError):
        if noted := metadata.distribution("keyreel").read_text("direct_url.json"):
            origin = json.loads(noted)
            vcs = origin.get("vcs_info")
            url = f"{vcs['vcs']}+{origin['url']}@{vcs['commit_id']}" if vcs else origin["url"]
            return f"pip install {shlex.quote(f'keyreel[{extra}] @ {url}')}"
    return f"pip install 'keyreel[{extra}]'"


class MissingExtra(ImportError):
    """An optional package is not installed."""

    exit_code = 2

    def __init__(self, module: str, extra: str, purpose: str, *, others: Mapping[str, str] | None = None) -> None:
        # others: packages that would do as well, and their extras
        either = {module: extra, **(others or {})}
        packages = " or ".join(repr(name) for name in either)
        lines = " or ".join(pip_install(name) for name in either.values())
        super().__init__(f"{purpose} needs the package {packages}. Hint: {lines}", name=module)
        self.extra = extra


@dataclass(frozen=True, slots=True)
class Failure:
    """One of several videos that could not be worked on, and why; the others go on."""

    video: str
    error: KeyreelError

    @classmethod
    def of(cls, video: str, error: Exception) -> Failure:
        """From any exception."""
        known = error if isinstance(error, KeyreelError) else KeyreelError(f"{type(error).__name__}: {error}")
        return cls(video, known)


def import_extra(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Imports an optional module.

    Raises:
        MissingExtra: it is not installed; names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module that is there but misses one of its own is a broken installation, not a missing extra.
        if error.name and module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingExtra(module.split(".")[0], extra, purpose) from error
    except ImportError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # modules in C++ turn it into this
            raise KeyboardInterrupt from error
        raise
