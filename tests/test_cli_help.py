"""Help texts, their examples, completion, keyreel.toml, -v, --dry-run and --csv."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from commands import document, run, write_clip
from typer.testing import CliRunner

import keyreel
from keyreel.chance import percent
from keyreel.cli.app import app
from keyreel.cli.documents import Plan
from keyreel.render.documents import SearchDocument

ROOT: Any = typer.main.get_command(app)


def commands(group: Any = ROOT, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*above, name))
        elif not command.hidden:
            yield (*above, name), command


COMMANDS = dict(commands())
EXAMPLES = [
    (name, shlex.split(line, comments=True))
    for name, command in COMMANDS.items()
    for line in command.epilog.splitlines()
]


def shown(*words: str) -> str:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "100"}).stdout


# --- help -------------------------------------------------------------------------------------------------------------


def test_the_root_groups_its_commands() -> None:
    found = shown("-h")
    heads = re.findall(r"^(\w+):$", found, flags=re.MULTILINE)
    assert heads == ["Summarize", "Search", "Library", "Models", "System", "Options", "Examples"]
    assert "..." not in found.replace("[ARGS]...", "")  # no description is cut
    assert shown("--version").strip() == shown("version").strip() == keyreel.__version__


@pytest.mark.parametrize("name", COMMANDS, ids=" ".join)
def test_help_fits_a_screen_and_says_all(name: tuple[str, ...]) -> None:
    short, everything = shown(*name, "-h"), shown(*name, "--help-all")
    assert short == shown(*name, "--help")
    assert len(short.splitlines()) <= 40
    options = [p for p in COMMANDS[name].params if p.param_type_name == "option"]
    rare = [option for option in options if option.rich_help_panel]
    for option in options:
        assert option.help
        name_shown = f"{max(option.opts, key=len)} "
        assert (name_shown in short) != (option in rare), name_shown
        assert not rare or name_shown in everything
    assert (f"--help-all shows {len(rare)} more options" in short) == bool(rare)


@pytest.mark.parametrize(("name", "words"), EXAMPLES, ids=lambda value: " ".join(value))
def test_examples_are_understood(name: tuple[str, ...], words: list[str]) -> None:
    assert tuple(words[1 : 1 + len(name)]) == name
    with COMMANDS[name].make_context(name[-1], words[1 + len(name) :]) as context:
        assert not context.args


def test_every_command_has_two_examples() -> None:
    assert {name: sum(own == name for own, _ in EXAMPLES) for name in COMMANDS} == dict.fromkeys(COMMANDS, 2)


# What downloads, serves, watches, or needs what a machine may not have.
NOT_RUN = re.compile("models (install|remove)|export|serve|--watch|s3://|reindex lib --model ViT|bench ~")


def test_examples_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "Videos" / "old").mkdir(parents=True)
    write_clip(tmp_path / "holiday.mp4", frames=20)
    for number, name in enumerate(("match.mp4", "Videos/a.mp4", "Videos/old/b.mp4")):
        write_clip(tmp_path / name, frames=10 + number)
    done = []
    for _, words in [
        *((name, words) for name, words in EXAMPLES if name[0] == "index"),
        *((name, words) for name, words in EXAMPLES if name[0] not in ("index", "demo")),
    ]:
        line = " ".join(words)
        if NOT_RUN.search(line):
            continue
        if line.startswith("keyreel library remove lib holiday.mp4"):
            run("index", "holiday.mp4", "--library", "lib")
        run(*(word.replace("~", str(tmp_path)) for word in words[1:]))
        done.append(line)
    assert len(done) >= 22
    assert (tmp_path / "out" / "match" / "reel.mp4").is_file()
    assert "<title>" in (tmp_path / "hits.html").read_text()


def test_typos_get_suggestions() -> None:
    assert "Did you mean 'search'" in run("serach", code=2).stderr
    assert "--reel-seconds" in run("summarize", "a.mp4", "--reel-second", "3", code=2).stderr
    said = " ".join(run("search", "a", "b.mp4", "--sampling", "nearly", code=2).stderr.split())
    assert "'nearly' is not one of 'fps', 'near', 'every', 'keyframes', 'all'" in said


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("keyreel summ", "summarize"),
        ("keyreel search --like", "--like"),
        ("keyreel summarize --shift ", "adaptive"),
        ("keyreel index --model built", "builtin"),
        ("keyreel index --device cu", "cuda:0"),
    ],
)
def test_the_tab_key_completes(line: str, wanted: str) -> None:
    asked = {"_KEYREEL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    done = CliRunner().invoke(app, [], prog_name="keyreel", env=asked)
    assert wanted in done.stdout.split()


# --- keyreel.toml -----------------------------------------------------------------------------------------------------


def parsed(monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    """The parameters of a command that does not run."""
    context: Any = ROOT.make_context("keyreel", list(words))
    found: dict[str, Any] = {}
    for command in COMMANDS.values():
        monkeypatch.setattr(command, "invoke", lambda own: found.update(own.params))
    ROOT.invoke(context)
    return found


def test_a_file_gives_options_and_the_command_line_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEYREEL_CONFIG")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    user = Path(typer.get_app_dir("keyreel"))
    user.mkdir(parents=True)
    (user / "keyreel.toml").write_text('[search]\nk = 9\nafter = 2024-06-01\nand = ["snow"]\n')
    words = ("search", "a dog", "a.mp4")
    found = parsed(monkeypatch, *words)
    assert (found["k"], list(found["also"])) == (9, ["snow"])
    assert found["after"] == pytest.approx(1717200000, abs=14 * 3600)
    assert parsed(monkeypatch, *words, "-k", "3")["k"] == 3
    # The file in this folder stands for the user's.
    own = tmp_path / "keyreel.toml"
    own.write_text(
        "[summarize]\nfps = 4\nreel = false\noutput = 'out'\nsubject = 'off'\nkeyframes = 7\nmax_keyframes = 9\n"
        "[library.update]\nprune = true\ntag = 'x'\n"
    )
    assert parsed(monkeypatch, *words)["k"] == 5
    found = parsed(monkeypatch, "summarize", "a.mp4")
    names = ("fps", "reel", "subject", "keyframes", "max_keyframes")
    assert [found[name] for name in names] == [4.0, False, False, 7, 9]
    assert found["output"] == Path("out")
    assert parsed(monkeypatch, "summarize", "a.mp4", "--reel")["reel"]
    found = parsed(monkeypatch, "library", "update", "lib")
    assert (found["prune"], list(found["tag"])) == (True, ["x"])
    # Another file by its name.
    other = tmp_path / "other.toml"
    other.write_text("[summarize]\nfps = 1\n")
    assert parsed(monkeypatch, "--config", str(other), "summarize", "a.mp4", "-o", "x")["fps"] == 1.0
    monkeypatch.setenv("KEYREEL_CONFIG", str(other))
    assert parsed(monkeypatch, "summarize", "a.mp4", "-o", "x")["fps"] == 1.0
    monkeypatch.setenv("KEYREEL_CONFIG", os.devnull)
    assert parsed(monkeypatch, "summarize", "a.mp4", "-o", "x")["fps"] == 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[summarise]\nfps = 1", "there is no command [summarise]\nHint: did you mean summarize?"),
        ("[library.updat]\nfps = 1", "there is no command [library.updat]\nHint: did you mean update?"),
        ("[search]\nfp = 1", "there is no option fp in [search]\nHint: did you mean fps?"),
        ("[search]\nreel_secs = 1", "there is no option reel_secs in [search]\nHint: allowed: "),
        ("fps = 1", "fps is not inside the table of a command"),
        ("[search]\nfps = true", "fps in [search] must not be true or false, got True"),
        ("[search]\nvideos = 1", "videos in [search] must be true or false, got 1"),
        ("[search]\nfps = [1, 2]", "fps in [search] takes one value, got [1, 2]"),
        ("[search]\nfps = 'fast'", "Invalid value for '--fps'"),
        ("[search\n", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    path = tmp_path / "my.toml"
    path.write_text(text)
    monkeypatch.setenv("KEYREEL_CONFIG", str(path))
    said = run("search", "a dog", "a.mp4", code=2).stderr
    assert message in said
    assert str(path) in said
    path.unlink()
    assert f"{path}: cannot be read" in run("search", "a dog", "a.mp4", code=2).stderr


def test_a_terminal_shows_what_a_found_file_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEYREEL_CONFIG")
    monkeypatch.chdir(tmp_path)
    Path("keyreel.toml").write_text("[search]\nk = 3\nper-video = 1\n")
    words, line = ("search", "a dog", "--library", "nowhere"), "options from keyreel.toml: -k, --per-video"
    assert line not in run(*words, code=6).stderr
    assert re.search(f"^ *[0-9.]+ s  {line}$", run(*words, "-v", code=6).stderr, flags=re.MULTILINE)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich: stderr is a terminal
    for more, shown in (((), 1), (("-q",), 0), (("--json",), 0), (("-v",), 1)):
        assert run(*words, *more, code=6).stderr.count(line) == shown, more
    assert "options from" not in run("library", "list", "nowhere", code=6).stderr
    monkeypatch.setenv("KEYREEL_CONFIG", "keyreel.toml")
    assert "options from" not in run(*words, code=6).stderr


# --- -v, --dry-run, --csv ---------------------------------------------------------------------------------------------


def test_verbose_says_what_is_decided_and_how_long_it_takes(tmp_path: Path) -> None:
    tiny = write_clip(tmp_path / "tiny.mp4")
    said = run("search", "a dog", tiny, "-v").stderr
    assert re.search(r"^ *\d+\.\d\d s  device cpu: ", said, flags=re.MULTILINE)
    assert re.search(r"tiny\.mp4: h264 64x48, 1 frames of 0\.5 s analysed \(fps\), 1 shots, 1 key-frames", said)
    assert re.search(r"tiny\.mp4: decode \d+\.\d\d s, encode \d+\.\d\d s", said)
    assert f"options from {os.devnull}" in said
    assert "Sampling(mode='fps'" not in said
    assert "Sampling(mode='fps'" in run("search", "a dog", tiny, "-vv").stderr
    assert "device cpu" not in run("search", "a dog", tiny).stderr


def test_a_dry_run_says_what_indexing_then_does(tmp_path: Path) -> None:
    videos, library = tmp_path / "in", tmp_path / "lib"
    videos.mkdir()
    for number, name in enumerate(("same", "touched", "edited", "moved", "gone")):
        write_clip(videos / f"{name}.mp4", frames=10 + number)
    words = ("index", videos, "--library", library, "--prune")
    assert "5 added; 0:06.0 of video to decode. Nothing was written" in run(*words, "--dry-run").stdout
    assert not library.exists()
    run(*words)
    os.utime(videos / "touched.mp4", (1, 1))
    write_clip(videos / "edited.mp4", frames=30)
    (videos / "moved.mp4").rename(videos / "new.mp4")
    (videos / "gone.mp4").unlink()
    for copy in ("copy.mp4", "copy2.mp4"):
        (videos / copy).write_bytes((videos / "same.mp4").read_bytes())
    (videos / "broken.mp4").write_bytes(b"no video")
    before = sorted((path, path.stat().st_mtime_ns) for path in library.rglob("*"))
    plan = document(Plan, *words, "--dry-run", code=8)
    assert sorted((path, path.stat().st_mtime_ns) for path in library.rglob("*")) == before
    assert (plan["model"], plan["model_installed"]) == ("builtin", True)
    assert [Path(failure["video"]).name for failure in plan["failed"]] == ["broken.mp4"]
    found = {Path(video["video"]).name: (video["change"], video["why"]) for video in plan["videos"]}
    assert found == {
        "same.mp4": ("unchanged", "same size and time of change"),
        "touched.mp4": ("unchanged", "its time changed, its content did not"),
        "edited.mp4": ("changed", "its content changed"),
        "new.mp4": ("moved", f"from {videos / 'moved.mp4'}"),
        "copy.mp4": ("copied", f"the same content as {videos / 'same.mp4'}"),
        "copy2.mp4": ("copied", f"the same content as {videos / 'same.mp4'}"),
        "gone.mp4": ("removed", "its file is deleted"),
    }
    assert [v["duration_seconds"] for v in plan["videos"] if v["change"] == "changed"] == [3.0]
    done = json.loads(run(*words, "--json", code=8).stdout)
    assert {Path(v["video"]).name: v["change"] for v in done["videos"] if v["change"] != "failed"} == {
        name: change for name, (change, _) in found.items()
    }
    said = run(*words, "--dry-run", "--model", "ViT-B-32/laion2b_s34b_b79k", code=8).stderr
    assert "the model ViT-B-32/laion2b_s34b_b79k is not installed" in said
    assert "the library has the model builtin" in said
    run(*words, "--dry-run", "--watch", code=2)


def test_csv_has_what_json_has(media: Callable[[str], Path], tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b'a, "b"\xff.mp4')
    odd.write_bytes(media("natural/test.mp4").read_bytes())
    words = ("search", "a dog", odd, "-k", 2)
    hits = document(SearchDocument, *words)["hits"]
    text = CliRunner().invoke(app, [*map(str, words), "--csv"]).stdout_bytes.decode("utf-8", "surrogateescape")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == len(hits) > 0
    for row, hit in zip(rows, hits, strict=True):
        assert row["video"] == hit["video"] == str(odd)
        for name in ("start_seconds", "stop_seconds", "pts_seconds", "score", "chance"):
            assert float(row[name]) == pytest.approx(hit[name])
    run(*words, "--csv", "--json", code=2)


def test_chances_are_never_none() -> None:
    chances = (0.0, 0.0099, 0.01, 0.125, 0.995)
    assert [percent(chance) for chance in chances] == ["<1 %", "<1 %", "1 %", "13 %", "100 %"]
