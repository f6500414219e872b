"""The script that makes the built-in model: its parts against references, and a small run of the whole."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from sklearn.linear_model import LogisticRegression  # noqa: E402

from keyreel.runtime.bundle import Bundle as Checked  # noqa: E402
from keyreel.runtime.bundle import SubjectScale  # noqa: E402
from keyreel.runtime.words import SILENT, words_of  # noqa: E402
from keyreel_export.builtin import corpus, data, text  # noqa: E402
from keyreel_export.builtin.__main__ import main  # noqa: E402
from keyreel_export.builtin.corpus import careless, make_phrases  # noqa: E402
from keyreel_export.builtin.data import Bank, Example, random_view  # noqa: E402
from keyreel_export.builtin.distil import Distillation, Lesson, Plan, draw_scenes  # noqa: E402
from keyreel_export.builtin.knowledge import RIDGE, WIDTH, Glove, Meaning, fit_map, unit  # noqa: E402
from keyreel_export.builtin.language import Language, plural, read_rows  # noqa: E402
from keyreel_export.builtin.measure import Shown, ask_libraries, fit_chance, label_ranks, logistic  # noqa: E402
from keyreel_export.builtin.phrases import describe, encode  # noqa: E402
from keyreel_export.builtin.saliency import compose, outline  # noqa: E402
from keyreel_export.builtin.scenes import COLOURS as PALETTE  # noqa: E402
from keyreel_export.builtin.scenes import KINDS, render_scene  # noqa: E402
from keyreel_export.builtin.space import Space, contrast  # noqa: E402
from keyreel_export.builtin.student import UNKNOWN_MARK, TextTower  # noqa: E402
from keyreel_export.builtin.text import Labelled, Sources  # noqa: E402
from keyreel_export.builtin.vocabulary import make_tokenizer, word_list  # noqa: E402
from keyreel_export.builtin.wordnet import Nouns, read_entries  # noqa: E402
from keyreel_export.fit import Outlined, TokenAttention, fit_attention  # noqa: E402

pytestmark = pytest.mark.full


def tiny_trainset(folder: Path) -> Path:
    (folder / "shards").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    with tarfile.open(folder / "shards" / "train-000.tar", "w") as tar:
        for number in range(24):
            raw = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)).save(raw, "JPEG")
            entry = tarfile.TarInfo(f"x-{number}.jpg")
            entry.size = raw.tell()
            raw.seek(0)
            tar.addfile(entry, raw)
            labels = [["dog", "animal"], ["cat", "animal"], ["car"], []][number % 4]
            captions = [f"picture {number}", "a grey wall"] if number in (3, 5) else []
            rows.append({"file": f"shards/train-000.tar/{entry.name}", "source": "x"})
            rows[-1] |= {"labels": labels, "captions": captions}
            rows[-1]["split"] = "val" if number < 8 else "train"
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return folder


class Blocks:
    """A teacher whose features are the mean colours of blocks, and whose classes are three of them."""

    widths = (48, 3)

    def __init__(self, model: Path) -> None:
        assert model.name == "teacher.tflite"

    def __call__(self, view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        side = view.shape[0] // 4
        blocks = view.reshape(4, side, 4, side, 3).mean(axis=(1, 3)).reshape(-1).astype(np.float32) / 64
        return blocks, blocks[:3]


def letters(texts: Sequence[str]) -> np.ndarray:
    """A teacher of sentences: how often each letter stands in a text, unit length."""
    counts = np.array([[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz "] for text in texts])
    return unit((counts + 0.01).astype(np.float32))


def text_sources(folder: Path) -> Sources:
    """A few words with vectors, and WordNet's format with nouns, verbs and adjectives."""
    folder.mkdir()
    words = ["the", "dog", "puppy", "poodle", "cat", "running", "car", "red", "run", "barks", "young", "old"]
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"index": words})
    pytest.importorskip("pyarrow.parquet").write_table(table, folder / "glove_6B_index.parquet")
    vectors = np.random.default_rng(0).standard_normal((len(words), 50)).astype(np.float16)
    np.save(folder / "glove_6B_50d_emb.npy", vectors)
    (folder / "data.noun").write_text(NOUNS)
    (folder / "cntlist.rev").write_text(COUNTS)
    (folder / "data.verb").write_text('00000900 38 v 01 run 0 000 00 | move fast; "the dog runs in the park"\n')
    (folder / "data.adj").write_text("00001000 00 a 02 red 0 ruddy(p) 0 000 | of the colour of blood\n")
    return Sources(folder, folder, folder)


def test_the_script_makes_a_bundle_that_loads_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "Teacher", Blocks)
    monkeypatch.setattr(text, "Sentences", lambda folder: letters)
    monkeypatch.setattr(corpus, "SENTENCES", 100)
    monkeypatch.setattr(text, "SCENES", 20)
    sources = text_sources(tmp_path / "texts")
    trainset, out, work = tiny_trainset(tmp_path / "set"), tmp_path / "out" / "tiny", tmp_path / "work"
    (tmp_path / "imagenet_labels.txt").write_text("background\ntench, Tinca tinca\ndog\n")
    arguments = ["--trainset", str(trainset), "--teacher", str(tmp_path / "teacher.tflite"), "-o", str(out)]
    arguments += ["--work", str(work), "--minutes", "0.05", "--steps", "4", "--workers", "1", "--views", "2"]
    arguments += ["--batch", "8", "--scenes", "24", "--text-steps", "3"]
    for name in ("glove", "sentences", "wordnet"):
        arguments += [f"--{name}", str(getattr(sources, name))]
    main(arguments)
    made = Checked.load(out)
    assert (made.grid, made.family, made.token_width) == ((7, 7), "average", 512)
    verify = made.manifest["verify"]
    assert max(value for name, value in verify.items() if name.endswith("max_abs_difference")) < 1e-3
    assert verify["val_label_images"] == 6
    assert verify["training_images_seen"] >= 8
    # Three images make libraries of one; a fit to them may come out either way: without sense it is left out.
    assert made.chance is None or (made.chance.lead > 0 and made.chance.pictures == 0)
    first = {name: entry["sha256"] for name, entry in made.manifest["files"].items()}
    [kept] = work.glob("space-student-*.pt")
    kept.unlink()
    main(arguments)  # the time is used up: only the last joint space is learnt again, to the same weights
    again = Checked.load(out)
    assert {name: entry["sha256"] for name, entry in again.manifest["files"].items()} == first


def test_scenes_are_as_their_captions_say() -> None:
    for kind in KINDS:
        one, same = (render_scene(kind, np.random.default_rng(5), (120, 80)) for _ in range(2))
        assert one.pixels.shape == (80, 120, 3)
        np.testing.assert_array_equal(one.pixels, same.pixels)
        assert one.captions
        assert all(tags <= one.tags for _, tags in one.captions)
    for seed in range(20):
        made = render_scene("shape", np.random.default_rng(seed))
        ground = next(tag for tag in made.tags if tag.endswith(" background")).split()[0]
        border = np.median(
            np.concatenate([made.pixels[0], made.pixels[-1], made.pixels[:, 0], made.pixels[:, -1]]), axis=0
        )
        nearest = min(PALETTE, key=lambda name: float(np.abs(np.asarray(PALETTE[name]) - border).sum()))
        assert nearest == ground


# Parts ------------------------------------------------------------------------------------------------------------

# WordNet's format: offset, file, kind, words with lexical ids, pointers; animal > dog > puppy, poodle; animal > cat.
NOUNS = """  1 a licence
00000100 05 n 01 animal 0 000 | a living thing
00000200 05 n 02 dog 0 domestic_dog 0 001 @ 00000100 n 0000 | barks
00000300 05 n 01 puppy 0 001 @ 00000200 n 0000 | a young dog
00000400 05 n 01 poodle 0 001 @ 00000200 n 0000 | curly
00000500 05 n 01 cat 0 001 @ 00000100 n 0000 | meows
00000600 07 n 01 truth 0 000 | cannot be seen
00000700 05 n 01 Lassie 0 001 @i 00000200 n 0000 | one dog
00000800 06 n 01 dog 1 000 | a rare sense, an andiron
"""
COUNTS = "dog%1:05:00:: 1 42\npuppy%1:05:00:: 1 5\nanimal%1:05:00:: 1 9\ntruth%1:07:00:: 1 9\n"


@pytest.fixture
def nouns(tmp_path: Path) -> Nouns:
    (tmp_path / "data.noun").write_text(NOUNS)
    (tmp_path / "cntlist.rev").write_text(COUNTS)
    return Nouns(tmp_path)


def test_words_stand_for_the_nearest_known_things(nouns: Nouns) -> None:
    assert nouns.find(["domestic dog", "dog"]) == 200
    assert nouns.find(["dog"]) == 200  # by frequency, not by place in the file
    assert nouns.find(["old brown dog"]) == 200  # by its last word
    assert nouns.find(["truth"]) is None
    assert nouns.find(["Lassie"]) is None
    assert nouns.ancestors(300) == {200, 100}
    tied = nouns.tie({"dog": ["dog"], "cat": ["cat"]})
    assert tied["dog"] == tied["domestic dog"] == tied["puppy"] == ("dog",)
    assert tied["animal"] == ("cat", "dog")
    assert "poodle" not in tied  # never seen in a text
    assert "truth" not in tied


def examples(*labels: tuple[str, ...]) -> list[Example]:
    return [Example("s.tar", f"{n}.jpg", "x", "train", own, ()) for n, own in enumerate(labels)]


def test_language_says_what_is_true(nouns: Nouns, tmp_path: Path) -> None:
    found = examples(*[("poodle", "dog")] * 70, *[("cat",)] * 30, *[("car",)] * 30)
    words = tmp_path / "words.txt"
    words.write_text("# a comment\nautomobile, taxi: car\nkitten: cat, unheard-of\n")
    grammar = (Path(data.__file__).with_name("grammar.txt")).read_text("utf-8")
    (tmp_path / "grammar.txt").write_text(grammar)
    classes = [[("background", frozenset({"class 0"}))], [("tench", frozenset({"class 1"}))]]
    language = Language(found, classes, [], nouns, words, tmp_path / "tokenizer.json")
    assert language.things == ["car", "cat", "dog", "poodle", "tench"]
    rng = np.random.default_rng(0)
    texts, parts = language.draw_words(200, rng)
    kittens = [part for text, part in zip(texts, parts, strict=True) if "kitten" in text]
    assert kittens
    assert all(part == {language.things.index("cat"): 1.0} for part in kittens)
    sentences, wanted = language.draw_sentences(100, rng)
    assert len(sentences) == len(wanted) == 100
    assert not any("{" in text or "  " in text for text in sentences)
    assert all(set(part) <= set(range(5)) and min(part.values()) > 0 for part in wanted)
    views = describe(found, classes, [0, 70, 100], [-1, -1, 1], {"poodle": frozenset({"animal"})})
    phrases = [("poodle", frozenset({"poodle"})), ("a dog", frozenset({"dog"})), ("tench", frozenset({"class 1"}))]
    true, unknown = language.truth(views, 3, phrases)
    assert (true > 0).tolist() == [[True, True, False], [False, False, False], [False, False, True]]
    assert true[0, 0] > true[0, 1]  # the most specific label counts for more
    assert not (unknown & (true == 0))[1].any()
    assert "animal" in views[0].tags
    told = [Example("s.tar", f"c{n}.jpg", "x", "train", ("car",), (f"caption {n}",)) for n in range(2)]
    other = Language([*found, *told], classes, [], nouns, words, tmp_path / "other.json")
    views = describe([*found, *told], classes, [130, 131], [-1, -1], {})
    true, _ = other.truth(views, 2, [views[0].phrases[0], views[1].phrases[0], ("car", frozenset({"car"}))])
    assert (true > 0).tolist() == [[True, False, True], [False, True, True]]
    again = Language(found, classes, [], nouns, words, tmp_path / "tokenizer.json")
    assert again.encode(sentences).tolist() == language.encode(sentences).tolist()


def test_a_rare_label_means_what_the_list_says(tmp_path: Path, nouns: Nouns) -> None:
    words = tmp_path / "words.txt"
    words.write_text("plane: airplane\nairplane: bus\n")
    (tmp_path / "grammar.txt").write_text((Path(data.__file__).with_name("grammar.txt")).read_text("utf-8"))
    found = examples(("plane",), *[("airplane",)] * 30, *[("bus",)] * 30)
    language = Language(found, [[]], [], nouns, words, tmp_path / "tokenizer.json")
    meant = dict(zip(*language.draw_words(300, np.random.default_rng(0)), strict=True))
    assert meant["plane"] == meant["airplane"] == {language.things.index("airplane"): 1.0}


def test_contrast_is_the_mean_of_both_ways() -> None:
    rng = np.random.default_rng(1)
    vectors, texts = (rng.normal(size=(n, 8)) for n in (3, 5))
    vectors, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors, texts))
    true = np.array([[2.0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 3, 1, 0]])
    unknown = np.zeros((3, 5), bool)
    unknown[1, 4] = True
    logits = np.where(unknown & (true == 0), -1e4, 7.0 * vectors @ texts.T)

    def log_softmax(x: np.ndarray, axis: int) -> np.ndarray:
        return x - np.log(np.exp(x - x.max(axis, keepdims=True)).sum(axis, keepdims=True)) - x.max(axis, keepdims=True)

    rows = [-(log_softmax(logits, 1)[i] * true[i]).sum() / true[i].sum() for i in range(3)]
    columns = [-log_softmax(logits, 0)[true[:, q] > 0, q].mean() for q in range(4)]
    expected = 0.7 * np.mean(rows) + 0.3 * np.mean(columns)
    found = contrast(*(torch.from_numpy(x) for x in (vectors, texts, true, unknown)), torch.tensor(7.0))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_views_show_the_same_part_to_both() -> None:
    image = Image.new("RGB", (96, 64), (20, 30, 40))
    ImageDraw.Draw(image).rectangle((0, 0, 47, 63), fill=(220, 200, 30))
    for seed in range(20):
        student, teacher = random_view(image, np.random.default_rng(seed), whole=seed % 2 == 0)
        assert (student.shape, teacher.shape) == ((112, 112, 3), (224, 224, 3))
        bright = [float((view[..., 0].astype(int) > 100).mean()) for view in (student, teacher)]
        assert bright[0] == pytest.approx(bright[1], abs=0.06), seed


def test_outlines_are_found_before_plain_grounds_only() -> None:
    image = Image.new("RGB", (80, 60), (240, 240, 235))
    ImageDraw.Draw(image).ellipse((20, 15, 50, 45), fill=(40, 90, 160))
    ImageDraw.Draw(image).ellipse((30, 25, 38, 33), fill=(240, 240, 235))  # a hole belongs to the object
    found = outline(image)
    assert found is not None
    y, x = np.mgrid[:60, :80]
    disc = (x - 35) ** 2 + (y - 30) ** 2 <= 15**2
    assert ((found.mask > 0) & disc).sum() / ((found.mask > 0) | disc).sum() > 0.93
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    assert outline(Image.fromarray(noise)) is None
    assert outline(Image.new("RGB", (80, 60))) is None
    picture, mask = compose(found, Image.fromarray(noise), np.random.default_rng(1), 96)
    inside = np.asarray(mask) > 250
    assert 0.02 < inside.mean() < 0.5
    blue = np.abs(np.asarray(picture).astype(int) - (40, 90, 160)).max(axis=2) < 20
    assert blue[inside].mean() > 0.6
    assert blue[np.asarray(mask) == 0].mean() < 0.05


def test_the_attention_head_learns_what_is_marked() -> None:
    rng = np.random.default_rng(3)
    masks = (rng.random((300, 7, 7)) < 0.3).astype(np.float32)
    tokens = rng.random((300, 49, 512)).astype(np.float32)
    tokens[..., 5] += 2 * masks.reshape(300, 49)
    head = TokenAttention(tokens.shape[2], (7, 7))
    known = torch.from_numpy(masks[:250].reshape(250, -1))
    fit_attention(head, Outlined(torch.from_numpy(tokens[:250]), known), steps=150)
    with torch.inference_mode():
        maps = head(torch.from_numpy(tokens[250:])).numpy()
    np.testing.assert_allclose(maps.sum(axis=1), 1.0, atol=1e-5)
    inside = masks[250:].reshape(50, 49) > 0.5
    assert (maps[inside][:, None] > maps[~inside]).mean() > 0.95


class Said:
    """Towers that know the texts of labels: the i-th label is the i-th axis."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self.bundle = SimpleNamespace(subject=SubjectScale())

    def texts(self, texts: list[str]) -> np.ndarray:
        return np.eye(len(self._names), dtype=np.float32)[[self._names.index(text) for text in texts]]


def test_chances_tell_present_labels_from_absent_ones() -> None:
    names = [f"thing {n:02d}" for n in range(60)]
    vectors = np.eye(60, dtype=np.float32)
    shown = Shown(examples(*((name,) for name in names)), vectors, 0 * vectors)
    towers: Any = Said(names)
    for answers in ask_libraries(towers, shown, libraries=50, seed=0):
        assert (answers.present.score == 1).all()
        assert (answers.present.lead == 1).all()
        assert (answers.absent.lead <= 0).all()
    chance = fit_chance(towers, shown, libraries=50)
    assert chance is not None
    assert chance["background"] == names[::4]
    assert chance["lead"] + chance["pictures"] * np.log(20) + chance["offset"] > 3
    assert chance["offset"] < -3
    alike = np.eye(2, dtype=np.float32)[[0] * 8]
    everything = Shown(examples(*(("thing", "other"),) * 8), alike, alike)
    assert fit_chance(Said(["thing", "other"]), everything, libraries=9) is None  # type: ignore[arg-type]


def test_a_logistic_regression_is_scikit_learns() -> None:
    draw = np.random.default_rng(0)
    inputs = np.c_[draw.normal(size=(500, 2)), np.ones(500)]
    wanted = (draw.random(500) < 1 / (1 + np.exp(-inputs @ [2.0, -1.0, 0.5]))).astype(np.float64)
    # The penalty 1e-3 / 2 |w|^2 is scikit-learn's C = 1000.
    reference = LogisticRegression(C=1000, fit_intercept=False, tol=1e-10).fit(inputs, wanted)
    np.testing.assert_allclose(logistic(inputs, wanted), reference.coef_[0], atol=1e-4)


def test_label_ranks_and_plurals() -> None:
    scores = np.array([[0.3, 0.9, 0.5], [0.3, 0.1, 0.2]], np.float32)
    assert label_ranks(scores, [[0, 2], [1]]).tolist() == [1, 2]
    words = ("dog", "box", "berry", "boy", "scissors")
    assert [plural(word) for word in words] == ["dogs", "boxes", "berries", "boys", "scissors"]


def test_the_mean_of_all_names_is_taken_off() -> None:
    torch.manual_seed(0)
    space = Space(8, 50).eval()
    space.common += 0.1 * torch.randn(256)
    ids = torch.tensor([[3, 4, 5, 0], [7, 0, 0, 0]])
    with torch.inference_mode():
        plain = space.text(ids).double().numpy() - space.common.double().numpy()
        expected = plain / np.linalg.norm(plain, axis=1, keepdims=True)
        np.testing.assert_allclose(space.told(ids).numpy(), expected, atol=1e-6)


def test_distillation_goes_on_where_it_stopped_with_two_workers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 256, (24, 112, 112, 3), dtype=np.uint8)
    features, logits = (rng.normal(size=(24, n)).astype(np.float16) for n in (6, 3))
    bank = Bank(crops, np.repeat(np.arange(12), 2), features, logits)
    scenes = draw_scenes(4, 0)
    placed, texts = (torch.nn.functional.normalize(torch.randn(n, 256), dim=1) for n in (24, 5))
    true = torch.eye(5)[torch.arange(16) % 5]
    lesson = Lesson(placed, texts, 20.0, true, torch.zeros(16, 5, dtype=torch.bool))
    answers = features[:4], logits[:4]

    def run(minutes: float) -> Distillation:
        made = Distillation(Plan(minutes=minutes, batch=8, workers=2), bank, scenes, answers, tmp_path, lesson)
        made.train()
        return made

    run(0.03)
    first = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    run(0.15)
    second = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert second["clock"]["step"] > first["clock"]["step"] > 0
    assert second["clock"]["seen"] == 8 * second["clock"]["step"]
    assert second["clock"]["seconds"] >= 9 > first["clock"]["seconds"] >= 1.8
    moments = [state["optimizer"]["state"][0]["step"] for state in (first, second)]
    assert [int(m) for m in moments] == [first["clock"]["step"], second["clock"]["step"]]
    done = run(0.15)  # nothing is left to do
    same = done.student.state_dict()
    assert all(torch.equal(same[name], weight) for name, weight in second["student"].items())


def test_photographs_are_scored_by_the_better_of_both_vectors() -> None:
    rng = np.random.default_rng(8)
    scene, subject, texts = (rng.normal(size=(n, 6)).astype(np.float32) for n in (4, 4, 3))
    scene, subject, texts = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (scene, subject, texts))
    found = Shown([], scene, subject).scores(texts, SubjectScale(1.5, -0.2, novelty=2.0))
    for n, q in np.ndindex(4, 3):
        assert found[n, q] == pytest.approx(max(scene[n] @ texts[q], 1.5 * (subject[n] @ texts[q]) - 0.2), abs=1e-5)


# Words from text alone ---------------------------------------------------------------------------------------------


def test_the_map_is_a_kernel_ridge_regression() -> None:
    kernel_ridge = pytest.importorskip("sklearn.kernel_ridge")
    rng = np.random.default_rng(0)
    features, targets, asked = rng.normal(size=(30, 4)), rng.normal(size=(30, 3)), rng.normal(size=(7, 4))
    reference = kernel_ridge.KernelRidge(kernel="rbf", gamma=WIDTH, alpha=RIDGE).fit(features, targets)
    np.testing.assert_allclose(fit_map(features, targets)(asked), reference.predict(asked), rtol=1e-6)


def test_a_phrase_moves_to_the_map_with_its_unknown_words(tmp_path: Path) -> None:
    glove, names = Glove(text_sources(tmp_path / "texts").glove), ["dog", "red car", "young cat"]
    meaning = Meaning(letters, names, ["an old one"], glove, letters)
    asked = ["the dogs", "red cars running", "a dog and a puppy", "poodle", "of the", "old"]
    shares = np.array([0, 1 / 3, 1 / 2, 1, 0, 0])
    np.testing.assert_allclose([meaning.unknown(text) for text in asked], shares)
    features = [np.r_[letters([t])[0], 0.7 * glove.mean([w for w in t.split() if w not in SILENT])] for t in names]
    told = letters(names)
    centre = told.mean(axis=0)
    spread = np.median(np.linalg.norm(told - centre, axis=1))
    own = [np.r_[letters([t])[0], 0.7 * glove.mean([w for w in words_of(t) if w not in SILENT])] for t in asked]
    away = fit_map(np.array(features), told - centre)(np.array(own))
    mapped = unit(centre + spread * unit(away))
    wanted = unit((1 - shares[:, None]) * letters(asked) + shares[:, None] * mapped)
    np.testing.assert_allclose(meaning(asked), wanted, atol=1e-5)


def test_a_listed_word_is_one_token_and_another_is_marked(tmp_path: Path) -> None:
    sources = text_sources(tmp_path / "texts")
    listed = word_list(["a red car"], read_entries(sources.wordnet), Glove(sources.glove).rank)
    assert {"a", "red", "car", "puppy", "barks", "run", "the"} <= set(listed)
    tokenizer = make_tokenizer(listed)

    def tokens(text: str) -> list[str]:
        row = tokenizer.encode(text)
        return row.tokens[1 : sum(row.attention_mask)]

    mark = UNKNOWN_MARK
    assert tokens("The DOG's red-car") == [f"{mark}the", f"{mark}dog", f"{mark}red", f"{mark}car"]
    for word in ("carpaccio", "dogcat", "日本語", "x" * 90):
        first, *rest = tokens(f"{word} dog")
        assert first == mark
        assert rest[-1] == f"{mark}dog" or len(rest) > 20
        assert not any(piece.startswith(mark) for piece in rest[:-1])
    assert tokens("  ...  ") == []


def test_careless_writing_keeps_the_other_words() -> None:
    rng = np.random.default_rng(0)
    written = [careless("an elephant in the savanna", rng).split() for _ in range(2000)]
    kinds = {"whole": 0, "odd": 0, "misspelled": 0}
    for words in written:
        own = {"an", "elephant", "in", "the", "savanna"}
        kinds["odd"] += len(words) == 6
        kinds["misspelled"] += len(own & set(words)) == 4
        kinds["whole"] += words == ["an", "elephant", "in", "the", "savanna"]
        assert len(own & set(words)) >= 4
        assert 5 <= len(words) <= 6
    assert kinds["odd"] / 2000 == pytest.approx(corpus.ODD, abs=0.03)
    assert kinds["misspelled"] / 2000 == pytest.approx(corpus.MISSPELLED, abs=0.03)


def test_phrases_are_of_listed_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SENTENCES", 500)
    sources = text_sources(tmp_path / "texts")
    glove, entries = Glove(sources.glove), read_entries(sources.wordnet)
    grammar = read_rows(Path(data.__file__).with_name("grammar.txt"))
    listed = word_list(["a dog", "barks"], entries, glove.rank)
    made = make_phrases(["dog", "car"], ["a dog barks"], listed, entries, glove.rank, grammar, 0)
    assert made["names"] == ["dog", "car"]
    assert set(made["words"]) == set(listed)
    assert "the dog runs in the park" not in made["defined"]  # "runs", "in" and "park" are in no list here
    assert "barks" not in made["defined"]  # of one word
    assert len(made["sentences"]) == corpus.SENTENCES
    assert any("puppy" in sentence for sentence in made["sentences"])
    assert not any("truth" in sentence for sentence in made["sentences"])  # nobody can see it


def test_photographs_are_told_by_their_first_label() -> None:
    tokenizer = make_tokenizer(["dog", "cat", "animal", "car"])
    torch.manual_seed(0)
    tower = TextTower(tokenizer.get_vocab_size(), 8).eval()
    vectors = torch.nn.functional.normalize(torch.randn(2, 256), dim=1)
    names = ["dog", "cat", "animal", "car"]
    shown = Labelled(vectors, names, torch.tensor([0, 3]), [[2], []])
    with torch.no_grad():
        found = float(shown.loss(tower, tokenizer, torch.tensor(20.0).log(), np.random.default_rng(0)))
        told = tower(encode(tokenizer, names)).double().numpy()
    told /= np.linalg.norm(told, axis=1, keepdims=True)
    logits = 20 * vectors.double().numpy() @ told.T
    logits[0, 2] = -np.inf  # a broader label of the same picture
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[[0, 1], [0, 3]]
    rows = np.random.default_rng(0).integers(0, 2, text.SHOWN)
    assert found == pytest.approx(float(losses[rows].mean()), rel=1e-4)
