"""Makes a bundle of a checkpoint, without PyTorch: `keyreel models install`.

The checkpoint is a download by huggingface_hub, with its cache, mirrors, proxies and offline switches, or a file. Its
weights fill the graphs of the architecture's template. The scores are calibrated on pictures that ship with keyreel.
The bundle runs once as a check, and is then put in place, whole or not at all.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from keyreel.config import ImageTransform
from keyreel.errors import CheckpointMismatch, ModelError, ModelNotFound, import_extra
from keyreel.models import calibration, catalogue, hub, quantize, tokenizers, verify
from keyreel.models.catalogue import CATALOGUE, Pixels, Weights
from keyreel.models.checkpoint import opened
from keyreel.models.folders import check_replaceable, check_space, foreign_to_bundle, replacing, write_bundle_manifest
from keyreel.models.template import BUILTIN_FOLDER, GRAPHS, Template
from keyreel.runtime.bundle import MANIFEST, Bundle, bundle_folder, cache_root, cached_names, sha256_of
from keyreel.types import F32, I64, Progress

PRECISIONS = ("fp32", "fp16", "int8")
CHECKED = 8  # pictures to compare a bundle in half precision on
_PACKAGES = ("keyreel", "numpy", "onnxruntime", "tokenizers")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to install."""

    name: str  # name of the bundle, without its precision
    weights: Weights  # of the catalogue; for the user's checkpoint, the first one of its architecture
    checkpoint: Path | None  # the user's own, or None to download
    tokenizer: Path | None


def install(
    name: str = catalogue.RECOMMENDED,
    *,
    checkpoint: Path | None = None,
    tokenizer: Path | None = None,
    called: str | None = None,
    revision: str | None = None,
    precision: str = "fp32",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Installs a model of the catalogue, or your own weights of one of its architectures.

    Args:
        name: ARCHITECTURE/TAG as in `keyreel models list`; with `checkpoint`, an architecture suffices.
        checkpoint: a safetensors file instead of a download. If `name` is a model of the catalogue and `called` is not
            given, it must be the file of that model.
        tokenizer: tokenizer.json or merges.txt; by default that beside `checkpoint`, of an installed model, or of the
            model's repository.
        called: another name for the model; your own weights need one.
        revision: another commit or branch of the model's repository, without check of the digest.
        precision: "fp32", "fp16" for GPUs, or "int8" for CPUs; the last two make the model "NAME@fp16" or "NAME@int8".
        folder: where to write; by default the user's cache. It replaces a bundle there.
        progress: called with ("download", bytes done, bytes in total), then ("weights" | "check", steps done, steps in
            total).

    Returns:
        The folder.

    Raises:
        ModelNotFound: the catalogue has no such model; `near` has similar names.
        CheckpointMismatch: a file has another digest, or a checkpoint has tensors with other names or shapes.
        ModelError: a missing file, no network, a full disk, a folder with other files, no tokenizer, weights that give
            infinite numbers, or int8 vectors that differ too much.
        MissingExtra: onnxruntime is not installed, or for int8 onnx.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    import_extra("onnxruntime", extra="cpu", purpose="installing a model")  # check first: a download takes minutes
    if precision == "int8":
        import_extra("onnx", extra="int8", purpose="quantising a model")
    wanted = _wanted(name, checkpoint, tokenizer, called, revision)
    full = wanted.name if precision == "fp32" else f"{wanted.name}@{precision}"
    folder = bundle_folder(full) if folder is None else folder
    check_replaceable(folder, foreign_to_bundle)
    template = Template.find(wanted.weights.architecture)
    _check_builtin(template)
    report = progress or (lambda stage, done, total: None)
    check_space(folder, template.size("fp16" if precision == "fp16" else "fp32"))
    path, source = _checkpoint(wanted, revision, report)
    made_tokenizer = _tokenizer(wanted, template, path, report)
    image = wanted.weights.image(**template.manifest["image_size"])
    manifest = {**template.manifest, "name": full, "image": dataclasses.asdict(image), "sources": [source]}
    del manifest["image_size"]
    clean, input_ = str(template.tokenizer["clean"]), manifest["attention"]["input"]
    with replacing(folder) as made, tempfile.TemporaryDirectory(dir=made.parent) as aside:
        made_tokenizer.save(str(made / "tokenizer.json"), pretty=False)
        # Half precision: calibrate the scores in float32, and compare the graphs with float32.
        whole = Path(aside) if precision == "fp16" else made
        _fill(template, path, wanted.weights.pixels, {"fp32": whole, "fp16": made}, precision, report)
        report("check", 0, 2)
        ids = tokenizers.encode(made_tokenizer, clean, calibration.WORDS)
        measured = _calibrate(whole, image, manifest, ids)
        report("check", 1, 2)
        if precision == "fp16":
            measured |= _compare(whole, made, image, ids[:CHECKED])
        elif precision == "int8":
            measured |= quantize.quantize_backbone(made, quantize.pictures(image, None, 0), input_)
        manifest |= {"precision": precision, "versions": _versions(template), "verify": measured}
        write_bundle_manifest(made, manifest, folder)
        Bundle.load(made)
    report("check", 2, 2)
    return folder


def _fill(
    template: Template, path: Path, pixels: Pixels, folders: Mapping[str, Path], precision: str, report: Progress
) -> None:
    """Writes the graphs, in a precision and in float32, with the weights of a checkpoint."""
    wanted = ("fp32", "fp16") if precision == "fp16" else ("fp32",)
    graphs = [(own, graph) for own in wanted for graph in GRAPHS]
    with opened(path, template.architecture, template.tensors, pixels) as values:
        for done, (own, graph) in enumerate(graphs):
            report("weights", done, len(graphs))
            with (folders[own] / f"{graph}.onnx").open("wb") as file:
                template.fill(own, graph, values, file)
    report("weights", len(graphs), len(graphs))


def remove(name: str) -> Path:
    """Deletes an installed or exported model from the cache. Returns its folder.

    Raises:
        ModelNotFound: the cache has no model of that name.
        ModelError: the folder has other files.
    """
    folder = bundle_folder(name)
    if not (folder / MANIFEST).is_file():
        raise ModelNotFound(name, installed(), hint="`keyreel models list` shows the installed models")
    check_replaceable(folder, foreign_to_bundle)
    shutil.rmtree(folder)
    return folder


def installed() -> tuple[str, ...]:
    """Names of the models in the cache."""
    return cached_names()[1:]


def check(name: str) -> dict[str, float]:
    """Compares a model's files with its manifest, and runs it: every vector must be finite and have unit length.

    Returns:
        "pictures" and "texts", how many it encoded, and "length_difference", the largest difference of a vector's
        length from 1.

    Raises:
        ModelNotFound: there is no such model.
        CheckpointMismatch: a file differs from the manifest.
        ModelError: a vector is wrong.
    """
    bundle = Bundle.find(name)
    tokenizer = Tokenizer.from_file(str(bundle.file("tokenizer.json")))
    ids = tokenizers.encode(tokenizer, bundle.clean, calibration.WORDS)
    scene, subject, texts = _vectors(bundle.folder, bundle.image, bundle.attention_input, ids, bundle.precision)
    return {
        "pictures": float(len(scene)),
        "texts": float(len(texts)),
        "length_difference": _length_difference(scene, subject, texts),
    }


def _wanted(
    name: str, checkpoint: Path | None, tokenizer: Path | None, called: str | None, revision: str | None
) -> Wanted:
    weights = catalogue.find(name)
    if weights is None and checkpoint is not None:
        weights = next((one for one in CATALOGUE if one.architecture == name), None)
        if weights is not None and not called:
            raise ValueError(f"{checkpoint} needs a name: --name")
    if weights is None:
        known = [one.name for one in CATALOGUE] if checkpoint is None else list(catalogue.ARCHITECTURES)
        hint = "`keyreel models list` shows all; `keyreel export` converts any other model of open_clip"
        raise ModelNotFound(name, known, hint=hint)
    if checkpoint is not None and revision is not None:
        raise ValueError("a revision is for downloads: it does not work with a checkpoint of your own")
    for path in (checkpoint, tokenizer):
        if path is not None and not path.is_file():
            raise ModelError(f"{path}: there is no such file")
    return Wanted(called or name, weights, checkpoint, tokenizer)


def _check_builtin(template: Template) -> None:
    for name, digest in template.builtin.items():
        if sha256_of(BUILTIN_FOLDER / name) != digest:
            hint = "install keyreel again, or rebuild the templates: python -m keyreel_export.templates"
            raise ModelError(
                f"the built-in model's {name} differs from the one that the templates were made with", hint=hint
            )


def _checkpoint(wanted: Wanted, revision: str | None, report: Progress) -> tuple[Path, dict[str, str]]:
    """Returns the file of the checkpoint, and its entry in the manifest."""
    weights, path = wanted.weights, wanted.checkpoint
    what = "image and text tower"
    if path is None:
        path = hub.download(weights.repository, weights.file, revision or weights.revision, weights.size_bytes, report)
    own = wanted.checkpoint is not None and wanted.name != weights.name
    digest = sha256_of(path)
    if digest != weights.sha256 and not own and revision is None:
        if wanted.checkpoint is None:
            hub.forget(path)
        raise CheckpointMismatch(
            f"{path} is not the file of {weights.name}: sha256 {digest[:12]}, expected {weights.sha256[:12]}",
            hint="download it again, or give your own weights a name with --name",
        )
    if own:
        return path, {"what": what, "from": f"{path.name} sha256:{digest}", "licence": "unknown"}
    at = f"hf-hub:{weights.repository}@{revision or weights.revision}/{weights.file} sha256:{digest}"
    return path, {"what": what, "from": at, "licence": weights.licence}


def _tokenizer(wanted: Wanted, template: Template, checkpoint: Path, report: Progress) -> Tokenizer:
    """Builds the tokenizer: of the given file, one beside the checkpoint, of an installed model, or the repository."""
    known = template.tokenizer
    if wanted.tokenizer is not None:
        return tokenizers.build(known, wanted.tokenizer)
    beside = [checkpoint.parent / name for name in tokenizers.FILES] if wanted.checkpoint is not None else []
    others = (cache_root() / "models").glob("*/tokenizer.json") if known["kind"] == "merges" else ()
    for path in (*beside, *others):
        with suppress(ModelError):  # another model's
            return tokenizers.build(known, path)
    weights = wanted.weights
    for name in tokenizers.FILES:
        with suppress(hub.NoSuchFile):
            return tokenizers.build(known, hub.download(weights.repository, name, weights.revision, 0, report))
    raise ModelError(f"{weights.repository} has none of {', '.join(tokenizers.FILES)}", hint=tokenizers.HINT)


def _vectors(
    folder: Path, image: ImageTransform, attention_input: str, ids: I64, precision: str
) -> tuple[F32, F32, F32]:
    """Encodes the calibration pictures and texts: scenes, subjects, text vectors.

    Raises:
        ModelError: a vector does not have unit length.
    """
    frames = calibration.pictures(image)
    feeds: list[verify.Feeds] = [{"frames": frames[first : first + 16]} for first in range(0, len(frames), 16)]
    runs_as = "fp16" if precision == "fp16" else "fp32"
    found = verify.run_chain(folder, feeds, attention_input, runs_as)
    scene, subject = (np.concatenate([one[place] for one in found]) for place in (0, 1))
    [(texts,)] = verify.run_graph(folder / "text.onnx", [{"token_ids": ids}], runs_as)
    for what, vectors in (("scene", scene), ("subject", subject), ("text", texts)):
        lengths = np.linalg.norm(vectors, axis=1)
        if not np.allclose(lengths, 1, atol=1e-2):  # refuses NaN too
            wrong = float(lengths[~np.isclose(lengths, 1, atol=1e-2)][0])
            raise ModelError(f"a {what} vector has the length {wrong:.3g}, not 1: the weights are wrong")
    return scene, subject, texts


def _calibrate(folder: Path, image: ImageTransform, manifest: dict[str, Any], ids: I64) -> dict[str, float]:
    """Adds the calibration to a manifest."""
    scene, subject, texts = _vectors(folder, image, manifest["attention"]["input"], ids, "fp32")
    told = calibration.calibrate(scene, subject, texts)
    manifest["subject"] = dataclasses.asdict(told.scale)
    manifest["fusion"] = {**manifest["fusion"], "same_scene": {}, "scene_similarity": told.scene_similarity}
    return {"length_difference": _length_difference(scene, subject, texts)}


def _length_difference(*vectors: F32) -> float:
    return float(np.abs(np.concatenate([np.linalg.norm(part, axis=1) for part in vectors]) - 1).max())


def _compare(whole: Path, halves: Path, image: ImageTransform, ids: I64) -> dict[str, float]:
    """Compares graphs in half precision with float32; stores the float32 results to check TensorRT plans."""
    frames = {"frames": calibration.pictures(image)[:CHECKED]}
    given: dict[str, verify.Feeds] = {"backbone": frames, "attention": frames, "text": {"token_ids": ids}}
    found: dict[str, verify.Found] = {}
    measured: dict[str, float] = {}
    for graph in GRAPHS:
        if graph == "fusion":
            (tokens,), (attention,) = found["backbone"], found["attention"]
            change = np.random.default_rng(0).random(attention.shape, np.float32) ** 3
            given[graph] = {"tokens": tokens, "attention": attention, "change": change}
        [found[graph]] = verify.run_graph(whole / f"{graph}.onnx", [given[graph]], "fp32")
        half = verify.run_graph(halves / f"{graph}.onnx", [given[graph]], "fp16")
        measured |= verify.check(graph, half, [found[graph]], "fp16")
    cases = {graph: (verify.Case(given[graph], found[graph]), verify.OUTPUTS[graph]) for graph in GRAPHS}
    verify.write_reference(halves, cases)
    return measured


def _versions(template: Template) -> dict[str, str]:
    found = dict(template.versions)
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
