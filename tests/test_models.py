"""`keyreel models`: a model from the hub's protocol to answers, without PyTorch, and everything that can go wrong."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hub_server
import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
import tiny_bundle
from commands import document, run, write_clip
from safetensors.numpy import save, save_file
from tokenizers import Tokenizer
from tokenizers import models as kinds

import keyreel
from keyreel.cli.documents import ModelChecks, Models
from keyreel.errors import CheckpointMismatch, ModelError, ModelNotFound
from keyreel.models import catalogue, folders, install, tokenizers
from keyreel.models.template import Template
from keyreel.runtime.bundle import Bundle

NAME = "keyreel-tiny-vit/tests"
REPOSITORY, FILE = "tests/tiny", "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle.write_words(tmp_path_factory.mktemp("words") / "tokenizer.json")


@pytest.fixture(scope="module")
def tensors() -> dict[str, Any]:
    return tiny_bundle.random_tensors()


@pytest.fixture
def known(
    words: Path, tensors: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[hub_server.Hub]:
    """The tiny model in the catalogue, its files on a server, and empty caches."""
    data = save(tensors)
    pinned = NAME, REPOSITORY, hub_server.COMMIT, hub_server.digest(data), len(data)
    weights = catalogue.Weights(*pinned, "Apache-2.0", "tests", 1.0, 32)
    tiny_bundle.put_in_catalogue(monkeypatch, words, weights)
    monkeypatch.setenv("KEYREEL_CACHE", str(tmp_path / "cache"))
    hub = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    files = {f"{REPOSITORY}/{FILE}": data, f"{REPOSITORY}/tokenizer.json": words.read_bytes()}
    with hub_server.serving(files) as served:
        fetch = functools.partial(huggingface_hub.hf_hub_download, endpoint=served.url, cache_dir=hub)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
        yield served


def install_own(path: Path, words: Path | None = None, called: str | None = "own") -> Path:
    return install.install("keyreel-tiny-vit", checkpoint=path, tokenizer=words, called=called)


def holds(folder: Path, graph: str, values: np.ndarray) -> bool:
    """Whether a graph has a matrix among its weights, or its transpose."""
    stored = folder.joinpath(graph).read_bytes()
    return any(found.tobytes() in stored for found in (values, np.ascontiguousarray(values.T)))


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_from_the_hub_to_an_answer(known: hub_server.Hub, tensors: dict[str, Any], tmp_path: Path) -> None:
    seen: list[tuple[str, float, float | None]] = []
    folder = install.install(NAME, progress=lambda *step: seen.append(step))
    assert folder == tmp_path / "cache" / "models" / "keyreel-tiny-vit--tests"
    bundle = Bundle.find(NAME)
    assert (bundle.name, bundle.family, bundle.grid, bundle.embedding_width) == (NAME, "cls", (4, 4), 32)
    assert (bundle.image.mode, bundle.image.height, bundle.attention_input) == ("shortest", 64, "frames")
    [source] = bundle.manifest["sources"]
    assert source["from"].startswith(f"hf-hub:{REPOSITORY}@{hub_server.COMMIT}/{FILE} sha256:")
    assert source["licence"] == "Apache-2.0"
    stages = [stage for stage, _, _ in seen]
    assert [stage for n, stage in enumerate(stages) if stages[n - 1 : n] != [stage]] == ["download", "weights", "check"]
    # The weights are those of the checkpoint: the layer that ends the tower, times its input.
    assert holds(folder, "fusion.onnx", tensors["visual.proj"])
    assert holds(folder, "text.onnx", tensors["token_embedding.weight"])
    with keyreel.Engine.from_pretrained(NAME, device="cpu") as engine:
        frames = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), np.uint8)
        vectors, told = engine.embed(frames), engine.encode_text(["a red circle", "a dog"])
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([vectors, told]), axis=1), 1, atol=1e-5)
    assert not np.allclose(told[0], told[1])
    assert install.check(NAME) == {"pictures": 32, "texts": 24, "length_difference": pytest.approx(0, abs=1e-5)}
    assert install.installed() == (NAME,)
    known.asked.clear()
    again = Bundle.load(install.install(NAME))  # from the hub's cache; the same model gives the same manifest
    assert (known.asked, again.sha256) == ([], bundle.sha256)
    assert install.remove(NAME) == folder
    assert not folder.exists()
    with pytest.raises(ModelNotFound):
        install.remove(NAME)


def test_pixels_are_those_of_the_weights(
    known: hub_server.Hub, words: Path, tensors: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean and scale stand in the graph: a white frame less the mean, by the scale, is what the tower sees."""
    [weights] = catalogue.CATALOGUE
    other = dataclasses.replace(weights, pixels=((0.1, 0.2, 0.3), (0.5, 0.25, 2.0)), mode="squash")
    monkeypatch.setattr(install, "CATALOGUE", (other,))
    save_file(tensors, tmp_path / "own.safetensors")
    folder = install_own(tmp_path / "own.safetensors", words)
    assert holds(folder, "backbone.onnx", np.array([25.5, 51.0, 76.5], np.float32))
    assert holds(folder, "backbone.onnx", 1 / (np.float32(255) * np.array([0.5, 0.25, 2.0], np.float32)))
    assert Bundle.load(folder).image.mode == "squash"


def test_a_download_that_is_cut_goes_on(known: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    known.cut_after = [1 << 20, 1 << 20]
    install.install(NAME)
    ranges = [wanted for method, path, wanted in known.asked if method == "GET" and path.endswith(FILE)]
    assert ranges[0] is None
    assert [wanted is not None for wanted in ranges[1:3]] == [True, True]
    Bundle.find(NAME)


def test_a_file_with_another_digest_is_refused(known: hub_server.Hub, tmp_path: Path) -> None:
    good = dict(known.files)
    data = bytearray(good[f"{REPOSITORY}/{FILE}"])
    data[-1] ^= 1
    known.files = {**good, f"{REPOSITORY}/{FILE}": bytes(data)}
    with pytest.raises(CheckpointMismatch, match="is not the file of keyreel-tiny-vit/tests: sha256") as caught:
        install.install(NAME)
    assert "--name" in str(caught.value.hint)
    assert left(tmp_path / "cache") == []
    known.files = good
    install.install(NAME)  # the wrong file is not taken from the hub's cache
    known.files = {**good, f"{REPOSITORY}/{FILE}": bytes(data)}
    assert Bundle.load(install.install(NAME, revision="main")).name == NAME  # another revision is the user's choice


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "has no file open_clip_model.safetensors at 0123"), ({FILE: 0}, "has none of tokenizer.json, merges.txt")],
)
def test_a_repository_without_the_file(
    known: hub_server.Hub, files: dict[str, int], message: str, tmp_path: Path
) -> None:
    known.files = {f"{REPOSITORY}/{name}": known.files[f"{REPOSITORY}/{name}"] for name in files}
    with pytest.raises(ModelError, match=message):
        install.install(NAME)
    assert left(tmp_path / "cache") == []


def test_offline(known: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="cannot be downloaded") as caught:
        install.install(NAME)
    assert "HF_HUB_OFFLINE" in str(caught.value.hint)
    assert known.asked == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    known.status = 403
    with pytest.raises(ModelError, match="403"):
        install.install(NAME)


def test_weights_of_ones_own(
    known: hub_server.Hub, words: Path, tensors: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    path = tmp_path / "own" / "mine.safetensors"
    save_file({f"module.{name}": values.astype(np.float16) for name, values in tensors.items()}, path)
    with pytest.raises(ValueError, match="needs a name: --name"):
        install_own(path, words, called=None)
    with pytest.raises(CheckpointMismatch, match="is not the file of keyreel-tiny-vit/tests"):
        install.install(NAME, checkpoint=path, tokenizer=words)
    with pytest.raises(ModelNotFound) as caught:
        install.install("keyreel-tiny-vot", checkpoint=path, called="mine")
    assert caught.value.near == ("keyreel-tiny-vit",)
    with pytest.raises(ModelError, match=r"absent\.safetensors: there is no such file"):
        install_own(tmp_path / "absent.safetensors")
    (path.parent / "tokenizer.json").write_bytes(words.read_bytes())  # found beside the weights
    known.files = {}
    bundle = Bundle.load(install_own(path))
    assert (bundle.name, bundle.manifest["sources"][0]["licence"]) == ("own", "unknown")
    assert known.asked == []
    assert holds(bundle.folder, "fusion.onnx", tensors["visual.proj"].astype(np.float16).astype(np.float32))


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "lacking": (lambda t: t.pop("visual.proj"), "lacks visual.proj"),
    "more": (lambda t: t.update(extra=np.zeros((2, 3), np.float32)), "has extra, which is unknown"),
    "shape": (
        lambda t: t.update({"visual.proj": np.zeros((3, 5), np.float32)}),
        r"has visual.proj of shape \(3, 5\), expected \(64, 32\)",
    ),
    "type": (
        lambda t: t.update({"visual.proj": np.zeros((64, 32), np.int64)}),
        "has visual.proj of type I64, expected one of F64, F32, F16, BF16",
    ),
    "empty": (lambda t: t.clear(), "and .* more"),
    "not a number": (
        lambda t: t.update({"visual.proj": np.full((64, 32), np.nan, np.float32)}),
        "the weights are wrong",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_checkpoints_that_do_not_fit(
    known: hub_server.Hub, words: Path, tensors: dict[str, Any], case: str, tmp_path: Path
) -> None:
    change, message = BAD[case]
    other = dict(tensors)
    change(other)
    save_file(other, tmp_path / "bad.safetensors")
    with pytest.raises(ModelError, match=message):
        install_own(tmp_path / "bad.safetensors", words)
    assert left(tmp_path / "cache") == []


def test_what_is_no_checkpoint(known: hub_server.Hub, words: Path, tmp_path: Path) -> None:
    """A pickle, which could run code, and a file that is cut."""
    import pickle

    (tmp_path / "model.pt").write_bytes(pickle.dumps({"visual.proj": 1}))
    (tmp_path / "cut.safetensors").write_bytes(known.files[f"{REPOSITORY}/{FILE}"][:5000])
    for name in ("model.pt", "cut.safetensors"):
        with pytest.raises(CheckpointMismatch, match="is not a checkpoint in safetensors"):
            install_own(tmp_path / name, words)
    with pytest.raises(CheckpointMismatch, match="is not the model's tokenizer"):
        install.install(NAME, tokenizer=tmp_path / "model.pt")
    assert left(tmp_path / "cache") == []


def test_a_checkpoint_of_bfloat16(known: hub_server.Hub, words: Path, tensors: dict[str, Any], tmp_path: Path) -> None:
    """Written by hand: NumPy has no such type. The values are those of float32 without their last 16 bits."""
    header, body = dict[str, Any](), b""
    for name, values in tensors.items():
        upper = (np.atleast_1d(values).view(np.uint32) >> 16).astype(np.uint16).tobytes()
        place = [len(body), len(body) + len(upper)]
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": place}
        body += upper
    text = json.dumps(header).encode()
    (tmp_path / "half.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    folder = install_own(tmp_path / "half.safetensors", words)
    assert holds(folder, "fusion.onnx", (tensors["visual.proj"].view(np.uint32) & 0xFFFF0000).view(np.float32))


def test_no_room_on_the_disk(known: hub_server.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(ModelError, match=r"needs 0\.01 GB, 0\.00 GB are free") as caught:
        install.install(NAME)
    assert "KEYREEL_CACHE" in str(caught.value.hint)
    assert known.asked == []


def test_a_folder_with_other_things_is_left_alone(known: hub_server.Hub, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"holds holiday\.txt"):
        install.install(NAME, folder=tmp_path / "mine")
    assert known.asked == []


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename = tmp_path / "model", Path.rename
    folder.mkdir()
    (folder / "mine").write_text("earlier")

    def fails(self: Path, target: Path) -> Path:
        if self.name == "made":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(KeyboardInterrupt), folders.replacing(folder) as made:
        (made / "mine").write_text("new")
    assert (folder / "mine").read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [folder]


def test_libraries_go_on_after_another_install(known: hub_server.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is installed anew, by a newer keyreel, names the one before it, which has the same vectors."""
    before = Bundle.load(install.install(NAME))
    monkeypatch.setattr(install, "_versions", lambda _: {"keyreel": "99"})
    after = Bundle.load(install.install(NAME))
    assert after.sha256 != before.sha256
    assert dict(after.same_scene) == {before.sha256: ""}


def test_the_list(known: hub_server.Hub) -> None:
    demo, tiny = document(Models, "models", "list")["models"]
    assert (demo["name"], demo["installed"], demo["width"]) == ("builtin", True, 256)
    assert (tiny["name"], tiny["installed"], tiny["width"], tiny["licence"]) == (NAME, False, 32, "Apache-2.0")
    assert demo["frames_a_second"] > tiny["frames_a_second"] > 0
    run("models", "install", NAME)
    text = run("models", "list").stdout
    assert NAME in text
    assert "builtin: 32 pictures and 24 texts encoded" in run("models", "verify").stdout
    (checked,) = document(ModelChecks, "models", "verify", "builtin")["models"]
    assert (checked["name"], checked["pictures"], checked["texts"]) == ("builtin", 32, 24)
    assert 0 <= checked["length_difference"] < 1e-3
    run("models", "remove", NAME)
    assert install.installed() == ()


def test_a_model_that_is_known_and_not_here_is_offered(known: hub_server.Hub, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    done = run("search", "a red circle", clip, "--model", NAME, code=4)
    assert f"`keyreel models install {NAME}` or the option --yes downloads it" in done.stderr
    assert "Apache-2.0" in done.stderr
    assert known.asked == []
    done = run("search", "a red circle", clip, "--model", NAME, "--yes")
    assert "licence: Apache-2.0" in done.stderr
    assert str(clip) in done.stdout


def test_the_catalogue_is_whole() -> None:
    """Pins are digests and commits, names are unique, every architecture has a template."""
    names = [one.name for one in catalogue.CATALOGUE]
    assert len(set(names)) == len(names)
    assert catalogue.RECOMMENDED in names
    assert len({one.sha256 for one in catalogue.CATALOGUE}) == len(names)
    for one in catalogue.CATALOGUE:
        assert len(bytes.fromhex(one.revision)) == 20
        assert len(bytes.fromhex(one.sha256)) == 32
        assert one.file.endswith(".safetensors")
        # A file in safetensors is its float32 numbers and a header of some ten kilobytes.
        size = sum(4 * int(np.prod(shape)) for shape in Template.find(one.architecture).tensors.values())
        assert abs(one.size_bytes - size) < 0.01 * size, one.name
        if one.size_bytes % 1_000_000:  # of some files only the rounded size is known
            assert 10_000 < one.size_bytes - size < 100_000, one.name


def test_installing_needs_no_torch() -> None:
    code = (
        "import sys; from keyreel.models import install, hub, quantize; "
        "print(sorted({'torch', 'open_clip', 'timm', 'onnx', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_merges_of_a_toy(tmp_path: Path) -> None:
    """CLIP's scheme with four letters: what is built is what the package tokenizers builds of the whole."""
    letters = ["a", "b", "c", "d"]
    merges = [["a", "b"], ["ab", "c</w>"]]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    whole = Tokenizer(
        kinds.BPE(
            {**{piece: n for n, piece in enumerate(pieces)}, "dd</w>": 10},
            [(one, other) for one, other in [*merges, ["d", "d</w>"]]],
            end_of_word_suffix="</w>",
        )
    )
    document = json.loads(whole.to_str())
    del document["model"]["vocab"], document["model"]["merges"]
    known = {
        "kind": "merges",
        "sha256": hub_server.digest(whole.to_str().encode()),
        "document": document,
        "pieces": letters,
        "merges": 2,
        "special_merges": [["d", "d</w>"]],
        "special_tokens": {"dd</w>": 10},
    }
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nab c</w>\n")
    built = tokenizers.build(known, tmp_path / "merges.txt")
    assert built.encode("abc").ids == whole.encode("abc").ids == [9]
    assert built.encode("dd").ids == [10]
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(CheckpointMismatch, match="1 merges, or others"):
        tokenizers.build(known, tmp_path / "merges.txt")
