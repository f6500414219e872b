"""Downloads files of the Hugging Face Hub by huggingface_hub, with its cache, mirrors, proxies and offline switches."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from keyreel.errors import ModelError
from keyreel.models.folders import check_space
from keyreel.types import Progress

OFFLINE = "use --from for a file of your own, HF_ENDPOINT for a mirror, HF_HUB_OFFLINE=1 for the cache only"


class NoSuchFile(ModelError):
    """The repository has no file of that name."""


def download(repository: str, name: str, revision: str, size: int, progress: Progress) -> Path:
    """Returns a file of a repository: from the hub's cache, else it downloads it. An interrupted download continues.

    Args:
        size: its approximate bytes; the disk must have as many free.
        progress: called with ("download", bytes done, bytes in total).

    Raises:
        NoSuchFile: the repository has no such file.
        ModelError: the hub cannot be reached or refuses, there is no such repository or revision, or not enough space.
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
        raise NoSuchFile(f"{repository} has no file {name} at {revision}", hint=OFFLINE) from error
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
    """A class of progress bars that calls `progress` and draws nothing: to tqdm they are disabled."""
    from tqdm import tqdm

    class Reporting(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float = 1) -> None:
            self.n += n
            if self.total:
                progress("download", self.n, self.total)

    return Reporting
