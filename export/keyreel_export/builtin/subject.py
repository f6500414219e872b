"""The last step of the training: both layers of the fusion and the attention, on tokens that stay as they are.

The scene's layer is fitted again to the names of the labels and mixed with what it was, half way: that keeps what it
knows of sentences (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv:2109.01903). The subject's
side is fitted on short videos of objects that move over places (`composites.py`, `keyreel_export.fit`).

`python -m keyreel_export.builtin.subject --bundle FOLDER --trainset DIR -o FOLDER` does this step alone, with the
towers of a bundle.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from keyreel.config import EncodeConfig
from keyreel.render.files import atomic_write
from keyreel.runtime.bundle import MANIFEST, SubjectScale, write_manifest
from keyreel.runtime.sessions import OnnxRuntimeSession
from keyreel.runtime.text import Tokenizer
from keyreel.types import F32, U8
from keyreel_export.builtin.bundle import GRID, Fitted, write_fusion
from keyreel_export.builtin.composites import FRAMES, read_parts, varied
from keyreel_export.builtin.data import SIZE, Example, read_examples, read_images, square_view
from keyreel_export.builtin.measure import Towers, measure_all
from keyreel_export.builtin.saliency import PLACES, find_objects, marked
from keyreel_export.builtin.student import TOKEN_WIDTH
from keyreel_export.fit import (
    Frames,
    Outlined,
    SubjectHead,
    TokenAttention,
    fit_attention,
    fit_subject,
    marks,
    scale_of,
)
from keyreel_export.fusion import AveragePooling
from keyreel_kernels.shift import patch_change

CLIPS, PART = 8000, 250  # videos to fit on, and of one part in the work folder
STILLS = 5000  # photographs as they are
MARKED = 3000  # pictures with outlines, of each of two kinds
EPOCHS = 4
SCENE_EPOCHS, SCENE_RATE, SCENE_BATCH = 6, 1e-3, 256
MIXED = 0.5  # share of the scene's new layer

Tokens = Callable[[U8], F32]  # frames [N, S, S, 3] -> tokens [N, P, C]
Texts = Callable[[Sequence[str]], F32]  # texts -> unit vectors [Q, D]


def fit(tokens: Tokens, texts: Texts, scene: nn.Linear, trainset: Path, work: Path, seed: int = 0) -> Fitted:
    """Fits the layers. What the tower sees is kept in `work` and not computed again."""
    train = read_examples(trainset, "train")
    scene, log = fit_scene(pooled_photographs(tokens, trainset, train, work), train, texts, scene, seed)
    names = sorted({label for example in train for label in example.labels})
    moving = clips(tokens, trainset, train, names, work, seed)
    still = stills(tokens, trainset, train, names, work)
    outlined = pictures(tokens, trainset, train, work, seed)
    attention = TokenAttention(TOKEN_WIDTH, (GRID, GRID))
    if outlined is not None:
        fit_attention(attention, outlined, seed=seed)
    head = SubjectHead(AveragePooling(), scene, attention)
    scale = SubjectScale()
    if moving is not None:
        told = torch.from_numpy(texts(names))
        for row in fit_subject(head, moving, still, told, outlined=outlined, epochs=EPOCHS, seed=seed):
            log.append({"stage": "subject", **row})
        scale = scale_of(head, moving)
    assert isinstance(head.projection, nn.Linear)
    power, floor = float(head.power.detach()), float(head.log_floor.detach().exp())
    return Fitted(scene, head.attention, head.projection, power, floor, scale, log)


def pooled_photographs(tokens: Tokens, trainset: Path, examples: Sequence[Example], work: Path) -> Tensor:
    """[M, C]: the mean token of each photograph."""
    path = work / "photographs.npy"
    if not path.exists():
        found: list[tuple[int, F32]] = []
        batch: list[tuple[int, U8]] = []
        for index, image in read_images(trainset, examples):
            batch.append((index, square_view(image)))
            if len(batch) == 64:
                found += _pooled(tokens, batch)
                batch = []
        found += _pooled(tokens, batch) if batch else []
        with atomic_write(path) as part, part.open("wb") as file:
            np.save(file, np.stack([mean for _, mean in sorted(found, key=lambda pair: pair[0])]))
    return torch.from_numpy(np.load(path))


def _pooled(tokens: Tokens, batch: Sequence[tuple[int, U8]]) -> list[tuple[int, F32]]:
    means = tokens(np.stack([frame for _, frame in batch])).mean(axis=1)
    return [(index, mean) for (index, _), mean in zip(batch, means, strict=True)]


def fit_scene(
    pooled: Tensor, examples: Sequence[Example], texts: Texts, scene: nn.Linear, seed: int
) -> tuple[nn.Linear, list[dict[str, Any]]]:
    """The scene's layer, fitted to tell each photograph's most specific label from all other names."""
    torch.manual_seed(seed)
    labelled = [row for row, example in enumerate(examples) if example.labels]
    names = sorted({label for row in labelled for label in examples[row].labels})
    place = {name: column for column, name in enumerate(names)}
    told = torch.from_numpy(texts(names))
    layer, log_scale = copy.deepcopy(scene).requires_grad_(True), nn.Parameter(torch.tensor(20.0).log())
    groups: list[dict[str, Any]] = [{"params": layer.parameters()}, {"params": [log_scale], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=SCENE_RATE, weight_decay=0.01)
    steps, log = SCENE_EPOCHS * len(labelled) // SCENE_BATCH, list[dict[str, Any]]()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = SCENE_RATE * max(0.02, 0.5 * (1 + float(np.cos(np.pi * step / steps))))
        rows = [labelled[int(n)] for n in torch.randint(len(labelled), (SCENE_BATCH,))]
        broader = torch.zeros(SCENE_BATCH, len(names), dtype=torch.bool)
        for n, row in enumerate(rows):
            broader[n, [place[label] for label in examples[row].labels[1:]]] = True
        right = torch.tensor([place[examples[row].labels[0]] for row in rows])
        logits = log_scale.exp() * functional.normalize(layer(pooled[rows]), dim=-1) @ told.T
        loss = functional.cross_entropy(logits.masked_fill(broader, -1e4), right)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 50 == 0 or step + 1 == steps:
            log.append({"stage": "scene", "step": step + 1, "loss": round(float(loss.detach()), 4)})
    with torch.no_grad():
        for own, old in zip(layer.parameters(), scene.parameters(), strict=True):
            own.copy_(MIXED * own + (1 - MIXED) * old)
    return layer.requires_grad_(False), log


def pictures(tokens: Tokens, trainset: Path, examples: Sequence[Example], work: Path, seed: int) -> Outlined | None:
    """Pictures of objects before plain grounds, and of the same put on places; None where there are none."""
    path = work / "marked.npz"
    if not path.exists():
        objects, places = find_objects(trainset, examples)
        if not objects or not places:
            return None
        kinds = marked(objects, places, SIZE, (GRID, GRID), count=min(MARKED, len(objects)), seed=seed)
        seen = [tokens(kind.frames[n : n + 64]) for kind in kinds for n in range(0, len(kind.frames), 64)]
        masks = np.concatenate([kind.masks for kind in kinds])
        with atomic_write(path) as part, part.open("wb") as file:
            np.savez(file, tokens=np.concatenate(seen).astype(np.float16), masks=masks.astype(np.float16))
    kept = np.load(path)
    return Outlined(torch.from_numpy(kept["tokens"]), torch.from_numpy(kept["masks"]).flatten(1))


def stills(tokens: Tokens, trainset: Path, examples: Sequence[Example], names: Sequence[str], work: Path) -> Frames:
    """Some photographs as they are, as frames in which nothing moves."""
    labelled = [example for example in examples if example.labels]
    count = min(STILLS, len(labelled))
    chosen = [labelled[int(n)] for n in sorted(np.random.default_rng(5).choice(len(labelled), count, replace=False))]
    path = work / "stills.npy"
    if not path.exists():
        found: list[Any] = [None] * count
        for index, image in read_images(trainset, chosen):
            found[index] = tokens(square_view(image)[None])[0].astype(np.float16)
        with atomic_write(path) as part, part.open("wb") as file:
            np.save(file, np.stack(found))
    seen = torch.from_numpy(np.load(path))
    pairs = [([], example) if example.source in PLACES else ([example], None) for example in chosen]
    shown = [([e.labels for e in things], ground.labels if ground else ()) for things, ground in pairs]
    return Frames(seen, torch.zeros(seen.shape[:2]), *marks(shown, names))


def clips(
    tokens: Tokens, trainset: Path, examples: Sequence[Example], names: Sequence[str], work: Path, seed: int
) -> Frames | None:
    """The two middle frames of each video; None where there are no objects or no places."""
    parts = [work / f"clips-{seed}-{number:03d}.npz" for number in range(CLIPS // PART)]
    if not all(path.exists() for path in parts):
        objects, places = read_parts(trainset, examples)
        if not objects or not places:
            return None
        for number, path in enumerate(parts):
            if not path.exists():
                made = varied(objects, places, count=PART, seed=1000 * seed + number)
                flat = made.frames.reshape(-1, *made.frames.shape[2:])
                seen = np.concatenate([tokens(flat[first : first + 64]) for first in range(0, len(flat), 64)])
                labels = [[list(thing.labels) for thing in things] for things in made.things]
                with atomic_write(path) as aside, aside.open("wb") as file:
                    np.savez(file, **_looked_at(seen), labels=np.array(json.dumps(labels)))
    read: list[Any] = [np.load(path) for path in parts]
    columns = [np.concatenate([part[key] for part in read]) for key in ("tokens", "change")]
    labels = [things for part in read for things in json.loads(str(part["labels"]))]
    own, change = map(torch.from_numpy, columns)
    both = [(things, ground) for *things, ground in labels for _ in range(2)]  # frames of a video
    return Frames(own, change, *marks(both, names))


def _looked_at(tokens: F32) -> dict[str, Any]:
    """The tokens and the change of the two middle frames of videos [V * FRAMES, P, C]."""
    grid = (round(tokens.shape[1] ** 0.5),) * 2
    found: dict[str, list[Any]] = {"tokens": [], "change": []}
    linked = np.arange(FRAMES) > 0
    for own in tokens.reshape(-1, FRAMES, *tokens.shape[1:]):
        found["tokens"].append(own[1:3].astype(np.float16))
        found["change"].append(patch_change(own, grid, linked, steps=EncodeConfig().shift_steps)[1:3])
    return {key: np.concatenate(value) for key, value in found.items()}


def main(arguments: list[str] | None = None) -> None:
    """Fits the layers of a bundle and writes another with the same towers."""
    parser = argparse.ArgumentParser(prog="python -m keyreel_export.builtin.subject", description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="folder of a built-in bundle, of any version")
    parser.add_argument("--trainset", type=Path, required=True, help="folder with labels.jsonl and tar shards")
    parser.add_argument("--work", type=Path, default=Path("subject-run"), help="what is kept for going on")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the new bundle")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    old = json.loads((options.bundle / MANIFEST).read_text("utf-8"))
    options.output.mkdir(parents=True, exist_ok=True)
    for name in ("backbone.onnx", "text.onnx", "tokenizer.json"):
        if options.bundle.resolve() != options.output.resolve():
            shutil.copyfile(options.bundle / name, options.output / name)
    backbone, text = (OnnxRuntimeSession(options.bundle / f"{name}.onnx", threads=1) for name in ("backbone", "text"))
    said = {name: old["text"].get(name) for name in ("clean", "context_length", "unknown_mark")}
    tokenizer = Tokenizer(options.bundle / "tokenizer.json", **said)
    layer = scene_layer(options.bundle)
    fitted = fit(
        lambda frames: backbone.run({"frames": frames})["tokens"],
        lambda texts: text.run({"token_ids": tokenizer.encode(texts)})["vectors"],
        layer,
        options.trainset,
        options.work,
    )
    manifest = {key: value for key, value in old.items() if key not in ("schema", "files")}
    before = hashlib.sha256((options.bundle / MANIFEST).read_bytes()).hexdigest()
    written = write_fusion(options.output, fitted)
    manifest |= {**written, "verify": manifest["verify"] | written["verify"]}
    manifest["fusion"]["same_scene"] = {before: _update(options.output, options.work, layer, fitted.scene)}
    write_manifest(options.output, manifest)
    figures, tables = measure_all(Towers(options.output), options.trainset, manifest)
    manifest["verify"] |= figures
    write_manifest(options.output, manifest)
    log = options.output.with_name(f"{options.output.name}-subject.jsonl")
    log.write_text("".join(json.dumps(row) + "\n" for row in [*fitted.log, *tables]), "utf-8")


def scene_layer(bundle: Path) -> nn.Linear:
    """The scene's layer of a bundle, from its graph."""
    model = onnx.load(str(bundle / "fusion.onnx"))
    arrays = [numpy_helper.to_array(tensor).astype(np.float32) for tensor in model.graph.initializer]
    weight = next(array for array in arrays if array.ndim == 2)
    bias = next(array for array in arrays if array.shape == weight.shape[:1])
    layer = nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
    layer.load_state_dict({"weight": torch.from_numpy(weight.copy()), "bias": torch.from_numpy(bias.copy())})
    return layer


def _update(folder: Path, work: Path, old: nn.Linear, new: nn.Linear) -> str:
    """Writes the matrix [D, D] float16 that takes the old layer's vectors to the new one's, by least squares over the
    photographs; returns its file's name.
    """
    pooled = torch.from_numpy(np.load(work / "photographs.npy"))
    with torch.no_grad():
        before, after = (functional.normalize(layer(pooled), dim=-1).numpy() for layer in (old, new))
    matrix = np.linalg.lstsq(before.astype(np.float64), after.astype(np.float64), rcond=None)[0].T
    name = "scene_update.npy"
    np.save(folder / name, matrix.astype(np.float16))
    return name


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
