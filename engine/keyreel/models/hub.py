"""Downloads files of the Hugging Face Hub by huggingface_hub, with its cache, mirrors, proxies and offline switches."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal, overload

from keyreel.errors import ModelError
from keyreel.models.folders import check_space
from keyreel.types import Progress

OFFLINE = "use --from for a file of your own, HF_ENDPOINT for a mirror, HF_HUB_OFFLINE=1 for the cache only"


@overload
def download(
    repository: str, name: str, revision: str, size: int, progress: Progress, *, missing_ok: Literal[False] = False
) -> Path: ...


@overload
def download(
    repository: str, name: str, revision: str, size: int, progress: Progress, *, missing_ok: Literal[True]
) -> Path | None: ...


def download(
    repository: str, name: str, revision: str, size: int, progress: Progress, *, missing_ok: bool = False
) -> Path | None:
    """Returns a file of a repository: from the hub's cache, else it downloads it. An interrupted download continues.

    Args:
        size: its approximate bytes; the disk must have as many free.
        progress: called with ("download", bytes done, bytes in total).
        missing_ok: return None if the repository has no such file.

    Raises:
        ModelError: the hub cannot be reached or refuses, there is no such repository, revision or file, or not enough
            space.
    """
    from huggingface_hub import errors, hf_hub_download
    from huggingface_hub.constants import HF_HUB_CACHE

    wrong: Any = errors
    try:
        try:
            return Path(hf_hub_download(repository, name, revision=revision, local_files_only=True))
        except wrong.LocalEntryNotFoundError:
            check_space(Path(HF_HUB_CACHE), size)
        return Path(hf_hub_download(repository, name, revision=revision, tqdm_class=_reporting(progress)))
    except wrong.LocalEntryNotFoundError as error:  # the hub cannot be reached; see the cause
        why = _first(error.__cause__ or error)
        raise ModelError(f"{repository}: {name} cannot be downloaded: {why}", hint=OFFLINE) from error
    except wrong.EntryNotFoundError as error:
        if missing_ok:
            return None
        raise ModelError(f"{repository} has no file {name} at {revision}", hint=OFFLINE) from error
    except (wrong.HTTPError, OSError, ValueError) as error:
        raise ModelError(f"{repository}: {name} cannot be downloaded: {_first(error)}", hint=OFFLINE) from error


def forget(path: Path) -> None:
    """Deletes a file from the hub's cache, so that the next use downloads it again."""
    with contextlib.suppress(OSError):
        path.resolve().unlink()
        path.unlink(missing_ok=True)


def _first(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _reporting(progress: Progress) -> Any:
    """A class of progress bars that calls `progress` and draws nothing."""
    from tqdm import tqdm

    class Reporting(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": False, "file": _Nowhere()})

        def update(self, n: float | None = 1) -> bool | None:
            done: bool | None = super().update(n)
            if self.total:
                progress("download", self.n, self.total)
            return done

    return Reporting


class _Nowhere:
    """A stream that drops everything."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass
