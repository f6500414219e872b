"""Finding, checking and refusing model folders."""

from __future__ import annotations

import functools
import json
import operator
import shutil
from pathlib import Path
from typing import Any

import pytest

from keyreel.errors import CheckpointMismatch, ModelError, ModelNotFound
from keyreel.runtime.bundle import (
    SCENE_SIMILARITY,
    Bundle,
    ChanceScale,
    SubjectScale,
    bundle_folder,
    cached_names,
    sha256_of,
    write_manifest,
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the built-in bundle."""
    return Path(shutil.copytree(Bundle.find("builtin").folder, tmp_path / "copy"))


def test_the_built_in_bundle_is_whole_and_small() -> None:
    bundle = Bundle.find("builtin")
    assert bundle.name == "builtin"
    assert sum(path.stat().st_size for path in bundle.folder.iterdir()) <= 16e6
    assert bundle.grid[0] * bundle.grid[1] > 0
    assert set(bundle.manifest["files"]) == {p.name for p in bundle.folder.iterdir()} - {"manifest.json"}


def test_found_by_folder_and_by_cached_name(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYREEL_CACHE", str(tmp_path / "cache"))
    assert Bundle.find(copy) == Bundle.find(str(copy))
    target = bundle_folder("ViT-B-32/laion2b_s34b_b79k")
    assert target == tmp_path / "cache" / "models" / "ViT-B-32--laion2b_s34b_b79k"
    target.parent.mkdir(parents=True)
    copy.rename(target)
    manifest = json.loads((target / "manifest.json").read_text())
    write_manifest(target, {**manifest, "name": "ViT-B-32/laion2b_s34b_b79k"})
    assert Bundle.find("ViT-B-32/laion2b_s34b_b79k").folder == target
    assert cached_names() == ("builtin", "ViT-B-32/laion2b_s34b_b79k")
    with pytest.raises(ModelNotFound) as caught:
        Bundle.find("ViT-B-32/laion2b_s34b_b79")
    assert caught.value.near == ("ViT-B-32/laion2b_s34b_b79k",)
    assert "keyreel export" in str(caught.value)


@pytest.mark.parametrize("name", ["text.onnx", "tokenizer.json"])
def test_a_changed_or_missing_file_is_refused(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(bytes(content))
    with pytest.raises(CheckpointMismatch, match=name.replace(".", r"\.")):
        Bundle.load(copy)
    (copy / name).unlink()
    with pytest.raises(CheckpointMismatch, match="missing"):
        Bundle.load(copy)


def changed(folder: Path, **changes: Any) -> Bundle:
    """The bundle after changes of its manifest; `fusion__shift_default` is in the part `fusion`."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, value in changes.items():
        *parts, key = name.split("__")
        functools.reduce(operator.getitem, parts, manifest)[key] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.load(folder)


CHANCE = {"lead": 17, "pictures": -0.6, "offset": 0.5, "background": ["a", "b"]}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("schema", "other/1", "schema"),
        ("schema", "keyreel.bundle/1", "schema"),  # with one vector a frame
        ("subject", {"slope": 0.0}, "slope above 0"),
        ("subject", {"offset": float("nan")}, "finite offset"),
        ("subject", {"novelty": 3.0}, "a cosine"),
        ("subject", {"steep": 1.0}, "bad or missing entry"),
        ("subject", None, "bad or missing entry"),
        ("grid", None, "bad or missing entry"),
        ("grid", [7], "rows, columns"),
        ("image", {"height": -1, "width": 2}, "height must be"),
        ("files", {}, "does not list"),
        ("files", None, "lists no files"),
        ("text__clean", "upper", "text.clean is 'upper', allowed"),
        *(("fusion__scene_similarity", wrong, "bad or missing entry") for wrong in (1.5, "x", None, float("nan"))),
        *(
            ("text__chance", wrong, "bad or missing entry")
            for wrong in (
                CHANCE | {"lead": 0},
                CHANCE | {"lead": float("nan")},
                CHANCE | {"pictures": 0.1},
                CHANCE | {"offset": "x"},
                CHANCE | {"offset": None},
                CHANCE | {"background": []},
                [1, 2],
                {},
            )
        ),
    ],
)
def test_a_bad_manifest_is_refused(copy: Path, name: str, value: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        changed(copy, **{name: value})


def test_what_was_fitted_for_a_bundle(copy: Path) -> None:
    subject, known = {"slope": 1.25, "offset": -0.1, "novelty": 0.8}, {"0" * 64: "", "1" * 64: "update.npy"}
    fusion = {"shift_default": "off", "scene_similarity": 0.8, "same_scene": known, "same_vectors": ["2" * 64]}
    bundle = changed(copy, subject=subject, fusion=fusion, text__chance=CHANCE)
    assert bundle.subject == SubjectScale(1.25, -0.1, 0.8)
    assert (bundle.scene_similarity, bundle.same_scene, bundle.same_vectors) == (0.8, known, {"2" * 64})
    assert bundle.chance == ChanceScale(("a", "b"), 17.0, -0.6, 0.5)
    plain = changed(copy, fusion={"shift_default": "off"}, text__chance=None)
    assert (plain.scene_similarity, plain.same_scene, plain.same_vectors) == (SCENE_SIMILARITY, {}, frozenset())
    assert plain.chance is None


def test_a_manifest_cannot_name_files_elsewhere(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["../copy/../../passwd"] = {"sha256": "0"}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="outside"):
        Bundle.load(copy)


def test_not_json_and_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="without a manifest"):
        Bundle.find(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        Bundle.find(tmp_path)
    with pytest.raises(ModelNotFound, match="keyreel export"):
        Bundle.find("no-such-model")


def test_write_manifest_lists_every_file(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    write_manifest(tmp_path, {"name": "x"})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["schema"] == "keyreel.bundle/2"
    assert manifest["files"] == {"a.bin": {"sha256": sha256_of(tmp_path / "a.bin"), "bytes": 3}}
    # SHA-256 of "abc" in FIPS 180-2
    assert sha256_of(tmp_path / "a.bin").startswith("ba7816bf8f01cfea414140de5dae2223")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
