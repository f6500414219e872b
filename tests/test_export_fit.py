"""Fitting an exported model's subject to labelled pictures, and what an export does to the subject without."""

from __future__ import annotations

import json
from colorsys import hsv_to_rgb
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra export is not installed")

import tiny_models  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_export import chain, outputs, run  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from keyreel.cli.app import app  # noqa: E402
from keyreel.config import ImageTransform  # noqa: E402
from keyreel.errors import ModelError  # noqa: E402
from keyreel.models import calibration  # noqa: E402
from keyreel.runtime.bundle import Bundle, SubjectScale  # noqa: E402
from keyreel.runtime.text import Tokenizer  # noqa: E402
from keyreel_export import bundle as module  # noqa: E402
from keyreel_export import fit, pictures, subject  # noqa: E402
from keyreel_export.fusion import AveragePooling, TemporalSpatialFusion, subject_map  # noqa: E402
from keyreel_export.towers import split_tower  # noqa: E402

VIT = "keyreel-tiny-vit"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (48, 32)) -> Path:
    """Noisy plain colours, a subfolder each."""
    rng = np.random.default_rng(0)
    for label, colour in COLOURS.items():
        (folder / label).mkdir(parents=True)
        for number in range(count):
            noisy = np.array(colour) + rng.normal(0, 12, (size[1], size[0], 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / label / f"{number}.png")
    return folder


def limit_clips(patch: pytest.MonkeyPatch, fitted: int = 24, held: int = 8) -> None:
    patch.setattr(pictures, "CLIPS", fitted)
    patch.setattr(pictures, "CLIPS_A_PICTURE", 1)
    patch.setattr(subject, "HELD_CLIPS", held)


def test_subfolders_and_tables_are_read_alike(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "by folder", 3)
    (folder / "red" / "notes.txt").write_text("not a picture")
    (folder / "red").rename(folder / "dark_red")
    read = pictures.read_pictures(folder)
    assert sorted({picture.labels for picture in read}) == [("blue",), ("dark red",), ("green",), ("white",)]
    assert len(read) == 12
    table = ["\ufefffile,label,source", "blue/0.png,the sea; water,a", 'white/1.png,"snow, at night",b']
    (folder / "labels.csv").write_text("\n".join(table), "utf-8")
    read = pictures.read_pictures(folder)
    assert [picture.labels for picture in read] == [("the sea", "water"), ("snow, at night",)]
    np.testing.assert_array_equal(np.asarray(read[0].image), np.asarray(Image.open(folder / "blue" / "0.png")))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("name,label\nred/0.png,red", "no column file"),
        ("file,label\nred/0.png,", "line 2: no file or no label"),
        ("file,label\n", "holds no labelled pictures"),
        ("file,label\nred/0.png,red\nblue/0.png,red", "have the label 'red'"),
        ("file,label\nred/0.png,red\nlost.png,blue", r"lost\.png cannot be read"),
        ("file,label\nred/0.png,red\nbroken.png,blue", r"broken\.png cannot be read"),
        (b"file,label\nred/0.png,r\xe9d", "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path: Path, table: str | bytes, message: str) -> None:
    folder = write_pictures(tmp_path / "pictures", 1)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "labels.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    with pytest.raises(ModelError, match=message):
        pictures.read_pictures(folder)


def test_bad_folders_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    few = write_pictures(tmp_path / "few", 1)
    for folder, message in (("none", "not a folder"), ("empty", "no labelled pictures"), (few.name, "too few")):
        with pytest.raises(ModelError, match=message):
            module.export_model("RN50/openai", tmp_path / "out", fit=tmp_path / folder)
    assert not (tmp_path / "out").exists()


def test_a_fifth_of_each_label_is_held_out(tmp_path: Path) -> None:
    fitted, held = pictures.split(pictures.read_pictures(write_pictures(tmp_path / "pictures", 10)), seed=3)
    assert sorted(picture.labels[0] for picture in held) == sorted(2 * list(COLOURS))
    assert len(fitted) == 32
    assert not {id(picture) for picture in fitted} & {id(picture) for picture in held}


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_clips_show_pictures_of_other_labels(tmp_path: Path, mode: Any) -> None:
    read = pictures.read_pictures(write_pictures(tmp_path / "pictures", 4))
    drawn, moved = pictures.clips(read, ImageTransform(48, 64, mode), seed=1), 0
    for clip, _ in zip(drawn, range(30), strict=False):
        assert clip.frames.shape == (pictures.FRAMES, 48, 64, 3)
        assert not {thing.labels for thing in clip.things} & {clip.place.labels}
        wanted = np.array([COLOURS[seen.labels[0]] for seen in (*clip.things, clip.place)])
        away = np.abs(clip.frames[:, :, :, None].astype(int) - wanted).max(-1)
        assert (away.min(-1) < 60).mean() > 0.6  # each pixel is of one of the pictures
        assert (away < 60).mean((1, 2)).min() > 0.01  # and each of them is seen in every frame
        moved += bool((clip.frames[0] != clip.frames[-1]).mean() > 0.05)
    assert moved > 20


def test_pictures_are_seen_as_the_engine_makes_them() -> None:
    wide = Image.fromarray(np.tile(np.arange(0, 240, 4, np.uint8)[None, :, None], (30, 1, 3)))  # 60 x 30
    middle, whole = np.asarray(wide)[:, 15:45], np.asarray(wide)
    seen = {mode: calibration.as_seen(wide, ImageTransform(30, 30, mode, fill=9)) for mode in ("shortest", "longest")}
    np.testing.assert_array_equal(seen["shortest"], middle)
    assert (seen["longest"][:7] == 9).all()
    assert seen["longest"][15, :, 0].mean() == pytest.approx(whole[..., 0].mean(), abs=1)


HUES = {f"hue {n}": hsv_to_rgb(n / 12, 0.9, 0.9 if n % 2 else 0.5) for n in range(12)}


class ColourTower(torch.nn.Module):
    """Tokens are colours of patches, 4 x 4 of them; the layer tells plain pictures apart by ridge regression."""

    grid, prefix_tokens, token_width, feature_width, embedding_width = (4, 4), 1, 8, 8, len(HUES)

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
        plain = torch.relu(torch.tensor(list(HUES.values())) @ self.mix)
        self.projection = torch.nn.Linear(8, len(HUES), bias=False).requires_grad_(False)
        self.projection.weight.copy_(torch.linalg.solve(plain.T @ plain + 0.01 * torch.eye(8), plain.T).T)

    def forward(self, frames: Any) -> Any:
        small = torch.nn.functional.adaptive_avg_pool2d(frames.float().permute(0, 3, 1, 2) / 255, self.grid)
        found = torch.relu(small.flatten(2).transpose(1, 2) @ self.mix)
        return torch.cat([torch.zeros_like(found[:, :1]), found], 1)

    def features(self, tokens: Any, bias: Any) -> Any:
        return AveragePooling().features(tokens[:, 1:], bias)


def test_a_fit_finds_what_moves_in_pictures_it_has_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    shown = []
    for label, colour in HUES.items():
        for _ in range(5):
            noisy = 255 * np.array(colour) + rng.normal(0, 12, (32, 48, 3))
            shown.append(pictures.Picture(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), None, (label,)))
    tower: Any = ColourTower()
    fusion = TemporalSpatialFusion(tower, tower.projection)
    side = subject.ImageSide(tower, module.UniformAttention(16), "tokens", fusion, ImageTransform(32, 32, "squash"))
    axes = dict(zip(HUES, torch.eye(len(HUES)), strict=True))
    monkeypatch.setattr(subject, "calibrate", lambda *_: calibration.Calibration(SubjectScale(), 1.0, 0.6))
    limit_clips(monkeypatch, 100, 60)
    parts = pictures.split(shown, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = subject.fit_to_pictures(
            side,
            lambda names: torch.stack([axes[name] for name in names]),
            *parts,
            epochs=200,
            seed=0,
        )
    measured = found.measured
    assert measured["held_out_objects_fitted"] > measured["held_out_objects_scene"] + 0.05
    assert measured["held_out_objects_fitted"] > measured["held_out_objects_training_free"] + 0.05
    assert (measured["fitted_pictures"], measured["held_out_pictures"]) == (48, 12)


def test_the_scale_without_training_by_hand() -> None:
    texts = np.eye(2, dtype=np.float32)
    scene = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    turned = np.array([[0, 1], [0.6, 0.8], [0.6, 0.8]], np.float32)
    scale = calibration.scale_without_training(scene, turned, texts)
    assert scale.offset == pytest.approx((1 + 1.4 + 1) / 6 - (1 + 1.4 + 1.4) / 6, abs=1e-4)
    assert (scale.slope, scale.novelty) == (1.0, pytest.approx(0.7 * 0.8, abs=1e-3))


def test_what_is_true_of_a_frame_as_well_is_not_wrong() -> None:
    seen = fit.Frames(
        torch.zeros(2, 1, 1), torch.zeros(2, 1),
        objects=torch.tensor([[1.0, 0], [0, 1]]), places=torch.tensor([[0, 1.0], [1, 0]]),
        true=torch.tensor([[True, True], [True, True]]),
    )  # fmt: skip
    scores = np.array([[0.1, 0.9], [0.8, 0.2]], np.float32)  # finds the places, not the objects
    assert subject._precision(scores, seen) == {"objects": 1.0, "places": 1.0}
    seen.true[:] = (seen.objects + seen.places * 0).bool()
    assert subject._precision(scores, seen) == {"objects": 0.5, "places": 1.0}


@pytest.mark.full
@pytest.mark.parametrize("name", ["keyreel-tiny-rn", "keyreel-tiny-map", "keyreel-tiny-token", "keyreel-tiny-avg"])
def test_each_way_of_pooling_is_fitted(
    open_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its subject starts as the training-free one over uniform maps, and changes; the scene stays."""
    limit_clips(monkeypatch)
    shown = pictures.split(pictures.read_pictures(write_pictures(tmp_path / "pictures", 5)), seed=0)
    model = tiny_models.build(open_clip, name, text=False)
    tower = split_tower(model)
    fusion = TemporalSpatialFusion(tower, tower.projection)
    image = ImageTransform(*tower.image_size)
    side = subject.ImageSide(tower, module.UniformAttention(tower.grid[0] * tower.grid[1]), "tokens", fusion, image)
    texts = torch.nn.functional.normalize(torch.randn(64, tower.embedding_width), dim=-1)
    found = subject.fit_to_pictures(side, lambda names: texts[: len(names)], *shown, epochs=30, seed=0)
    frames = np.random.default_rng(0).integers(0, 256, (3, *tower.image_size, 3), dtype=np.uint8)
    tokens, change = tower(torch.from_numpy(frames)).detach(), torch.zeros(3, tower.grid[0] * tower.grid[1])
    with torch.no_grad():
        scene, own = found.head(tokens, change)
    stock = torch.from_numpy(tiny_models.stock_vectors(model, frames))
    torch.testing.assert_close(scene, stock, atol=1e-5, rtol=0)
    assert (own - scene).abs().max() > 1e-4
    first = subject._trainable(tower.projection, tower)
    assert not all(
        torch.equal(a, b) for a, b in zip(found.head.projection.parameters(), first.parameters(), strict=True)
    )


@pytest.fixture(scope="module")
def fitted(open_clip: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A bundle without a fit, then one with, in the same folder: the folder, the first one's sha256, what was said."""
    top = tmp_path_factory.mktemp("fit")
    folder = module.export_model(VIT, top / "out", attention="uniform", random_weights=True)
    before = Bundle.load(folder).sha256
    words = ["export", VIT, "-o", str(folder), "--random-weights", "--fit", str(write_pictures(top / "pictures", 5))]
    with pytest.MonkeyPatch.context() as patch:
        limit_clips(patch)
        done = CliRunner().invoke(app, [*words, "--attention", "uniform"])
    assert done.exit_code == 0, done.output
    return folder, before, done.stderr


@pytest.mark.full
def test_a_fit_is_written_and_told(fitted: tuple[Path, str, str]) -> None:
    folder, before, said = fitted
    bundle = Bundle.load(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    measured, tensors = manifest["verify"], load_file(folder / "subject.safetensors")
    assert measured["identity_cosine"] >= 0.9999
    assert "fitted to 16 pictures; mean average precision on clips of 4 other pictures" in said
    assert f"{measured['held_out_objects_fitted']:.3f} with fitted ones" in said
    assert bundle.same_scene == {before: ""}
    assert (bundle.attention_input, manifest["attention"]["layer"]) == ("tokens", "the tower's tokens")
    assert "subject.safetensors" in manifest["files"]
    assert manifest["fusion"]["power"] == round(float(tensors["power"]), 4)
    for name in ("slope", "offset", "novelty"):
        assert getattr(bundle.subject, name) == pytest.approx(float(tensors[name]), abs=1e-6)
    assert [source["what"] for source in manifest["sources"]] == ["image and text tower"]


@pytest.mark.full
def test_the_tensors_give_the_graphs(open_clip: Any, fitted: tuple[Path, str, str]) -> None:
    folder, tensors = fitted[0], load_file(fitted[0] / "subject.safetensors")
    model = tiny_models.build(open_clip, VIT)
    tower = split_tower(model)
    rng = np.random.default_rng(2)
    frames, change = rng.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8), rng.random((5, 16), np.float32)
    attention = fit.TokenAttention(tower.token_width, tower.grid, tower.prefix_tokens)
    parts = {"attention": attention, "projection": torch.nn.Linear(64, 32, bias=False)}
    for part, layer in parts.items():
        layer.load_state_dict({name.removeprefix(f"{part}."): own for name, own in tensors.items() if part in name})
    with torch.no_grad():
        tokens = tower(torch.from_numpy(frames))
        weights = subject_map(attention(tokens), torch.from_numpy(change), tensors["power"], tensors["floor"])
        own = parts["projection"](tower.features(tokens, (16 * weights).clamp_min(1e-6).log()))
        own = torch.nn.functional.normalize(own, dim=-1)
    (scene, found, maps), _ = chain(folder, frames, change)
    np.testing.assert_allclose(maps, weights, atol=1e-6)
    np.testing.assert_allclose(found, own, atol=1e-5)
    np.testing.assert_allclose(scene, tiny_models.stock_vectors(model, frames), atol=1e-5)


@pytest.mark.full
def test_scores_of_drawn_scenes_are_fair_without_a_fit_and_bundles_are_named(
    open_clip: Any, fitted: tuple[Path, str, str]
) -> None:
    """Exported again with the attention that is not fitted, over the fitted one."""
    folder, before, _ = fitted
    between = Bundle.load(folder).sha256
    shas = []
    for _ in range(2):
        bundle = Bundle.load(module.export_model(VIT, folder, random_weights=True))
        shas.append(bundle.sha256)
    assert shas[0] == shas[1]  # the same model again: the same manifest
    assert bundle.same_scene == {before: "", between: ""}
    assert not (folder / "subject.safetensors").exists()
    frames = calibration.pictures(bundle.image)
    tokens, maps = run(folder, "backbone", frames=frames), run(folder, "attention", frames=frames)
    scene, own, _ = outputs(folder, "fusion", tokens=tokens, attention=maps, change=np.zeros_like(maps))
    tokenizer = Tokenizer(folder / "tokenizer.json", clean=bundle.clean, context_length=bundle.context_length)
    texts = run(folder, "text", token_ids=tokenizer.encode(calibration.WORDS))
    assert (scene @ texts.T).mean() == pytest.approx((own @ texts.T).mean() + bundle.subject.offset, abs=1e-4)
    assert ((scene * own).sum(1) < bundle.subject.novelty + 1e-4).mean() == pytest.approx(
        calibration.STORED_STILL, abs=0.15
    )
    other = Bundle.load(module.export_model(VIT, folder, attention="uniform", random_weights=True, seed=8))
    assert other.same_scene == {}
