"""Makes the folder that is brought, with this checkout, to a GPU machine without a network, and checks their size.

    python -m benchmarks.gpu_pack FOLDER [--media DIR]

It holds the small clips of the tests of NVDEC (the others skip), and wheels for Python 3.12 of what such a machine
lacks beside torch, torchvision, CuPy, onnxruntime, pytest and hypothesis. PyNvVideoCodec is left with what it loads.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_MIB = 60  # such machines take 64
PYTHON = "3.12"
# Without what torch and torchvision need: Jinja2, Pillow. wcwidth, which ftfy needs, before it was compiled.
WHEELS = ("av", "ftfy", "wcwidth==0.2.13", "msgspec", "pathspec", "flash-kmeans", "PyNvVideoCodec==2.2.4")
_LOADED = re.compile(
    r"PyNvVideoCodec/(__init__\.py|decoders/.*|transcoder/.*|VersionCheck.*|PyNvVideoCodec_130.*"
    r"|libavformat\.so\.\d+|libavutil\.so\.\d+)|pynvvideocodec\./.*|.*\.dist-info/.*"
)
_CLIP, _CLIP_BYTES = "natural/bikes.mp4", 120_000  # the one that most tests read, and the most of another one


def trim(wheel: Path) -> None:
    """Leaves out of PyNvVideoCodec's wheel what is not loaded: samples, FFmpeg's source, copies of libraries."""
    smaller = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        for name in old.namelist():
            if _LOADED.fullmatch(name):
                new.writestr(old.getinfo(name), old.read(name), zipfile.ZIP_DEFLATED, 9)
    smaller.replace(wheel)


def pack(folder: Path, media: Path) -> int:
    """Fills an empty folder; returns its bytes and those of the checkout's tracked files."""
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", wheels]
    subprocess.run([*pip, f"--python-version={PYTHON}", *WHEELS], check=True)
    for wheel in wheels.glob("[Pp]y[Nn]v*.whl"):
        trim(wheel)
    clips = set(re.findall(r'"((?:format|broken)/\w[^"]+)"', (ROOT / "tests/test_nvdec.py").read_text("utf-8")))
    for name in (_CLIP, *sorted(clips)):
        clip, copy = media / name, folder / "media" / name
        if clip.is_file() and (name == _CLIP or clip.stat().st_size <= _CLIP_BYTES):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(clip, copy)
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [*(ROOT / name for name in filter(None, tracked.split("\0"))), *folder.rglob("*")]
    return sum(path.stat().st_size for path in files if path.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="is made")
    parser.add_argument("--media", type=Path, default=ROOT.parent / "shared" / "media", help="folder of real clips")
    options = parser.parse_args()
    mib = pack(options.folder, options.media) / 2**20
    print(f"{options.folder} and the checkout: {mib:.1f} MiB of {MOST_MIB}")
    return int(mib > MOST_MIB)


if __name__ == "__main__":
    raise SystemExit(main())
