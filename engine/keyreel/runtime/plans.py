"""Stores TensorRT plans on disk, and checks a plan before it stores it.

    <cache>/plans/<key>.plan     the plan
    <cache>/plans/<key>.json     what the plan depends on, its sha256, the measured cosines; written last
    <cache>/plans/<key>.lock     held by the process that builds; others wait
    <cache>/plans/*.timings      TensorRT's measurements on this device

On another device or with another TensorRT a plan can give wrong results or crash. So a plan is used only if key, JSON
file and content agree.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from keyreel.errors import ModelError, PlanStale
from keyreel.render.files import atomic_write
from keyreel.runtime.bundle import MANIFEST, cache_root, sha256_of
from keyreel.runtime.sessions import OnnxRuntimeSession
from keyreel.runtime.tensorrt_build import Profile, load_tensorrt

SCHEMA = "keyreel.plan/1"
MIN_COSINE = 0.999
REFERENCE = "reference.npz"  # in fp16 bundles: torch's float32 results, as "<graph>.<input or output>"
_ROWS = 3

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
Signature: TypeAlias = Mapping[str, tuple[np.dtype[Any], tuple[int, ...] | None]]
"""The dtype of each tensor and its dimensions after the first; None for a scalar."""


@dataclass(frozen=True, slots=True)
class PlanKey:
    """Everything that a plan depends on."""

    onnx_sha256: str
    tensorrt: str  # flavour and version
    device: str  # name: plans are tuned to the number of multiprocessors too
    capability: str  # "9.0"
    precision: str  # "fp32" or "fp16", of the graph
    profile: tuple[int, int, int]  # rows: smallest, typical, largest
    flags: tuple[str, ...] = ("strongly typed", "tf32")  # TensorRT's defaults

    @classmethod
    def of(cls, path: Path, device: str, capability: tuple[int, int], profile: Profile) -> PlanKey:
        """Makes the key of the plan of a graph."""
        weights = path.with_name(path.name + ".data")
        digests = [sha256_of(file) for file in (path, weights) if file.is_file()]
        return cls(
            onnx_sha256=digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
            tensorrt=f"{load_tensorrt().flavour} {load_tensorrt().version}",
            device=device,
            capability=f"{capability[0]}.{capability[1]}",
            precision=_precision(path),
            profile=(profile.smallest, profile.typical, profile.largest),
        )

    def file(self, suffix: str) -> Path:
        """<cache>/plans/<hash of the key><suffix>."""
        return cache_root() / "plans" / f"{_digest(asdict(self))}{suffix}"

    def timings(self) -> Path:
        """Path of the timing cache, shared by all plans of a device and a version of TensorRT."""
        shared = {"device": self.device, "capability": self.capability, "tensorrt": self.tensorrt}
        return cache_root() / "plans" / f"{_digest(shared)}.timings"


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _precision(path: Path) -> str:
    manifest = path.with_name(MANIFEST)
    return str(json.loads(manifest.read_bytes()).get("precision", "fp32")) if manifest.is_file() else "fp32"


def read_plan(key: PlanKey) -> bytes:
    """Reads the plan of a key. Raises PlanStale if there is none that agrees with its JSON file."""
    hint = "`keyreel export MODEL --tensorrt` builds it"
    try:
        sidecar = json.loads(key.file(".json").read_bytes())
        plan = key.file(".plan").read_bytes()
    except FileNotFoundError:
        raise PlanStale(f"there is no TensorRT plan for {key.device} yet", hint=hint) from None
    except (OSError, ValueError) as error:
        raise PlanStale(f"{key.file('.plan')} cannot be read: {error}", hint=hint) from error
    expected = {**json.loads(json.dumps(asdict(key))), "sha256": hashlib.sha256(plan).hexdigest(), "schema": SCHEMA}
    found = sidecar if isinstance(sidecar, dict) else {}
    wrong = sorted(name for name, value in expected.items() if found.get(name) != value)
    if wrong:
        raise PlanStale(f"{key.file('.plan')} does not fit its sidecar: {', '.join(wrong)}", hint=hint)
    return plan


def write_plan(key: PlanKey, plan: bytes, cosines: Mapping[str, float]) -> None:
    """Stores a checked plan. Readers see all of it or nothing."""
    with atomic_write(key.file(".plan")) as part:
        part.write_bytes(plan)
    entry = {"schema": SCHEMA, **asdict(key), "sha256": hashlib.sha256(plan).hexdigest(), "cosine": dict(cosines)}
    with atomic_write(key.file(".json")) as part:
        part.write_text(json.dumps(entry, indent=2) + "\n", "utf-8")


@contextmanager
def building(key: PlanKey) -> Iterator[None]:
    """A lock: one process and thread at a time builds the plan of a key."""
    key.file(".lock").parent.mkdir(parents=True, exist_ok=True)
    with key.file(".lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released with the file, also when the process is killed
        yield


# --- the check --------------------------------------------------------------------------------------------------------


def check_plan(path: Path, signature: Signature, largest: int, run: Callable[[Arrays], Arrays]) -> dict[str, float]:
    """Compares a plan's results with the float32 reference.

    It runs a padded batch, then the largest one twice, since the second may replay the first. `run` runs the plan on
    NumPy arrays.

    Returns:
        The lowest cosine of each output, over rows.

    Raises:
        ModelError: the results differ from the reference.
    """
    feeds, expected = reference(path, signature)
    lowest = dict.fromkeys(expected, 1.0)
    for rows in (min(_ROWS, largest), largest, largest):
        found = run({name: array if array.ndim == 0 else _repeated(array, rows) for name, array in feeds.items()})
        for name, array in expected.items():
            cosine = _lowest_cosine(found[name], _repeated(array, rows))
            lowest[name] = min(lowest[name], cosine)
            if not cosine >= MIN_COSINE:  # refuses NaN too
                raise ModelError(
                    f"the TensorRT plan of {path.name} is refused: {name} of {rows} rows has cosine {cosine:.6f} to "
                    f"the float32 reference, at least {MIN_COSINE} is required",
                    hint="export with --precision fp32, or run on onnxruntime",
                )
    return lowest


def reference(path: Path, signature: Signature) -> tuple[Arrays, Arrays]:
    """Returns feeds of a graph and its outputs in float32.

    onnxruntime computes them, except for graphs in half precision, which its CPU provider may not run: for these the
    export stored torch's.

    Raises:
        ModelError: there are no references, or the graph cannot be run.
    """
    if _precision(path) == "fp32":
        feeds = sample_feeds(signature)
        with closing(OnnxRuntimeSession(path)) as session:
            return feeds, session.run(feeds)
    try:
        with np.load(path.with_name(REFERENCE), allow_pickle=False) as file:
            known = {name.split(".", 1)[1]: file[name] for name in file.files if name.startswith(f"{path.stem}.")}
    except (OSError, ValueError) as error:
        message = f"{path.with_name(REFERENCE)} cannot be read: {error}"
        raise ModelError(message, hint="export the model again") from error
    return (
        {name: array for name, array in known.items() if name in signature},
        {name: array for name, array in known.items() if name not in signature},
    )


def sample_feeds(signature: Signature) -> dict[str, NDArray[Any]]:
    """Makes three rows of pseudo-random values, always the same.

    They are noise for frames and tokens, maps whose rows sum to 1, and changes from 0 to 2.
    """
    random = np.random.default_rng(20)
    feeds: dict[str, NDArray[Any]] = {}
    for name, (dtype, dims) in signature.items():
        if dims is None:
            feeds[name] = np.asarray(1.5, dtype)
        elif dtype.kind in "iu":  # any vocabulary has the first 100 tokens
            feeds[name] = random.integers(1, 256 if dtype == np.uint8 else 100, (_ROWS, *dims)).astype(dtype)
        elif name == "attention":
            energy = random.random((_ROWS, *dims)) ** 3 + 1e-4
            feeds[name] = (energy / energy.sum(axis=1, keepdims=True)).astype(dtype)
        elif name == "change":
            feeds[name] = (2 * random.random((_ROWS, *dims)) ** 3).astype(dtype)
        else:
            feeds[name] = random.standard_normal((_ROWS, *dims)).astype(dtype)
    return feeds


def _repeated(array: NDArray[Any], rows: int) -> NDArray[Any]:
    return np.resize(array, (rows, *array.shape[1:]))


def _lowest_cosine(found: NDArray[Any], expected: NDArray[Any]) -> float:
    if found.shape != expected.shape:
        raise ModelError(f"the TensorRT plan gives {found.shape}, the reference is {expected.shape}")
    a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (found, expected))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(cosines.min())
