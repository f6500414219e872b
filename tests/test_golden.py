"""What users see, frozen: documents, sampled frames, answers, help texts, and the service's API.

`python tests/test_golden.py` writes the files in tests/golden anew; a change in them is a change for users and needs a
reason in its commit. Times, versions, paths and the machine are masked; numbers are compared with a small tolerance.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import served

from keyreel import Engine, Library, Sampling
from keyreel.config import ImageTransform
from keyreel.errors import KeyreelError

SHARED = Path(os.environ.get("KEYREEL_SHARED", Path(__file__).resolve().parents[2] / "shared"))
MEDIA = SHARED / "media"
GOLDEN = Path(__file__).parent / "golden"
MASKED = {"timings_seconds", "seconds", "indexed_at", "version", "bytes", "sha256", "model_sha256", "video_id", "date"}

CLIPS = (
    "animation/big-buck-bunny-480p-30sec.mp4",
    "broken/corrupted.mp4",
    "format/cursed-vfr.mp4",
    "format/flower.webm",
    "format/hdr10-av1.mp4",
    "format/rotate-buck-bunny.mp4",
    "natural/bikes.mp4",
    "natural/bottle-detection.mp4",
    "natural/car-detection.mp4",
    "natural/chaplin.mp4",
    "natural/stream-of-water.mp4",
    "natural/test.mp4",
)
MODES = (
    Sampling(),
    Sampling(mode="near", fps=3.0),
    Sampling(mode="every", every=7),
    Sampling(mode="times", times=(0.7, 0.0, 2.5, 0.7)),
    Sampling(mode="keyframes"),
    Sampling(mode="all", stop_seconds=4.0),
)
QUERIES = (
    "a bicycle", "a bottle", "a car in a car park", "a rabbit", "water", "a flower", "people", "a man with a hat",
    "a street", "grass", "a house", "the sky", "a dog", "a city at night", "a face", "a phone", "text on a screen",
    "a forest", "black and white film", "an animal",
)  # fmt: skip
COMMANDS = (
    (), ("summarize",), ("search",), ("index",), ("serve",), ("bench",), ("demo",), ("export",), ("doctor",),
    ("version",), ("library",), ("library", "list"), ("library", "stats"), ("library", "remove"),
    ("library", "verify"), ("library", "compact"), ("library", "update"), ("library", "reindex"),
    ("library", "upgrade"), ("library", "export"), ("library", "reshard"), ("models",),
    ("models", "list"), ("models", "install"), ("models", "remove"), ("models", "verify"),
)  # fmt: skip


def run(*words: str, folder: Path, code: int = 0) -> str:
    environment = {**os.environ, "KEYREEL_CPU_RUNTIME": "onnxruntime", "COLUMNS": "80", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "keyreel", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    return done.stdout


def masked(value: Any, name: str = "") -> Any:
    """A document without what differs between runs and machines."""
    if name in MASKED:
        return "masked"
    if isinstance(value, dict):
        return {key: masked(own, key) for key, own in value.items()}
    if isinstance(value, list):
        return [masked(own) for own in value]
    if isinstance(value, str):
        for start in (str(MEDIA), str(SHARED)):
            value = value.replace(start, "MEDIA")
    return value


def summaries(folder: Path) -> dict[str, Any]:
    words = [str(MEDIA / name) for name in CLIPS]
    printed = json.loads(run("summarize", *words, "-o", "out", "--json", "-q", folder=folder))
    written = [json.loads(path.read_text()) for path in sorted((folder / "out").glob("*/summary.json"))]
    for document in [*printed["summaries"], *written] if "summaries" in printed else written:
        document["device"] = "masked"
    return {"printed": masked(printed), "written": masked(written)}


def _is_hdr(path: Path) -> bool:
    return "hdr" in path.stem or path.stem == "bt2020_10bit"


def frames(folder: Path) -> dict[str, Any]:
    """MD5 of times, places and pixels of each clip in each mode.

    Of HDR clips the mean colour, not each pixel: FFmpeg interpolates colours by other instructions on other processors.
    """
    found = {}
    small = ImageTransform(90, 160, mode="fit", interpolation="area")
    clips = [path for path in MEDIA.glob("*/*.*") if path.parent.name != "reported" and path.suffix != ".md"]
    with Engine.from_pretrained(device="cpu") as engine:
        for path in sorted(clips):
            for sampling in MODES:
                digest, count, colour = hashlib.md5(), 0, np.zeros(3)
                try:
                    with engine.frames(path, sampling, transform=small) as stream:
                        for batch in stream:
                            count += len(batch)
                            digest.update(batch.pts_seconds.tobytes())
                            digest.update(batch.frame_index.tobytes())
                            if _is_hdr(path):
                                colour += batch.data.sum(axis=(0, 1, 2)) / (255 * small.height * small.width)
                            else:
                                digest.update(batch.data.tobytes())
                    ended = "whole"
                except KeyreelError as error:
                    ended = type(error).__name__
                row = [count, ended, digest.hexdigest()]
                if _is_hdr(path):
                    row.append([round(value, 5) for value in (colour / max(count, 1)).tolist()])
                found[f"{path.relative_to(MEDIA)} {sampling.mode}"] = row
    return found


def answers(folder: Path) -> dict[str, Any]:
    with Engine.from_pretrained(device="cpu") as engine, Library(folder / "library", engine) as library:
        library.add([MEDIA / name for name in CLIPS])
        return {
            query: [
                [Path(hit.video).name, hit.start_seconds, hit.stop_seconds, hit.pts_seconds, hit.score]
                for hit in library.search(query, k=5)
            ]
            for query in QUERIES
        }


def documents(folder: Path) -> dict[str, Any]:
    """What every --json prints."""
    bikes, chaplin = str(MEDIA / "natural/bikes.mp4"), str(MEDIA / "natural/chaplin.mp4")
    broken, at = str(MEDIA / "broken/annex-b.mp4"), ("--library", "library")
    done: dict[str, Any] = {}

    def keep(name: str, *words: str, code: int = 0) -> None:
        done[name] = masked(json.loads(run(*words, "--json", folder=folder, code=code)))

    keep("search", "search", "a bicycle", bikes, chaplin, "-q")
    keep("search image", "search", "--image", str(SHARED / "teacher/CLIP.png"), bikes, "-q")
    keep("index plan", "index", bikes, chaplin, *at, "--dry-run", "-q")
    keep("index", "index", bikes, chaplin, *at, "--tag", "film", "-q")
    keep("index again", "index", bikes, chaplin, broken, *at, "-q")
    keep("search library", "search", "a bicycle", *at)
    keep("search videos", "search", "a bicycle", *at, "--videos")
    keep("search filtered", "search", "a man", *at, "--tag", "film", "--path", "*/chaplin.mp4")
    keep("search like", "search", *at, "--like", f"{bikes}@2.0")
    keep("library list", "library", "list", "library")
    keep("library stats", "library", "stats", "library")
    keep("library verify", "library", "verify", "library")
    keep("library update", "library", "update", "library")
    keep("library remove", "library", "remove", "library", chaplin)
    keep("library compact", "library", "compact", "library")
    doctor = json.loads(run("doctor", "--json", folder=folder))
    done["doctor"] = {"schema": doctor["schema"], "keys": sorted({key for probe in doctor["probes"] for key in probe})}
    return done


def helps(folder: Path) -> dict[str, Any]:
    def all_of(words: tuple[str, ...]) -> list[str]:
        short = run(*words, "--help", folder=folder)
        return run(*words, "--help-all", folder=folder).splitlines() if "--help-all" in short else short.splitlines()

    return {" ".join(words): all_of(words) for words in COMMANDS}


def api(folder: Path) -> dict[str, Any]:
    with served(folder / "library") as service:
        found: dict[str, Any] = masked(service.http.get("/openapi.json").json())
    return found


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    part.__name__: part for part in (summaries, frames, answers, documents, helps, api)
}


def differences(found: Any, wanted: Any, where: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in {**found, **wanted}:
            if key not in found or key not in wanted:
                yield f"{where}/{key}: {'missing' if key in wanted else 'new'}"
            else:
                yield from differences(found[key], wanted[key], f"{where}/{key}")
    elif isinstance(found, list) and isinstance(wanted, list):
        if len(found) != len(wanted):
            yield f"{where}: {len(found)} entries, were {len(wanted)}"
        for number, pair in enumerate(zip(found, wanted, strict=False)):
            yield from differences(*pair, f"{where}/{number}")
    elif isinstance(found, float) and isinstance(wanted, float):
        if not math.isclose(found, wanted, rel_tol=1e-4, abs_tol=1e-4):
            yield f"{where}: {found}, was {wanted}"
    elif found != wanted:
        yield f"{where}: {found!r}, was {wanted!r}"


@pytest.mark.full
@pytest.mark.parametrize("part", PARTS)
def test_what_users_see_is_unchanged(part: str, tmp_path: Path) -> None:
    if not MEDIA.exists():
        pytest.skip(f"real clips are not here: {MEDIA} is missing (set KEYREEL_SHARED)")
    found = json.loads(json.dumps(PARTS[part](tmp_path)))
    wanted = json.loads((GOLDEN / f"{part}.json").read_text())
    assert list(differences(found, wanted)) == []


if __name__ == "__main__":
    for chosen in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory() as work:
            text = json.dumps(PARTS[chosen](Path(work)), indent=1, ensure_ascii=False)
        (GOLDEN / f"{chosen}.json").write_text(text + "\n", encoding="utf-8")
        print(chosen)
