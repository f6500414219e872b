"""The pages: what they show, that nothing in them is more than data, and how they behave in a browser."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from render_clips import make_summary, write_clip

from keyreel.config import OutputConfig
from keyreel.decode.source import Source
from keyreel.render.documents import ReelEntry, summary_document
from keyreel.render.pictures import pictures_at, shrink
from keyreel.render.save import save_summary
from keyreel.render.storyboard import _curve, link_to, picture_edge, search_page, storyboard_page
from keyreel.types import SearchHit, Shot

HOSTILE = """<script>alert(1)</script>"' onload=x &amp; \udcff.mp4"""
REEL = ReelEntry("reel.mp4", (Shot(1.0, 2.0), Shot(4.0, 6.0)), "encode", "asked for")
VOID = {"meta", "img", "source", "input", "br", "link"}


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced, and keeps them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def assert_harmless(page: Page) -> None:
    """Nothing but data: pictures is loaded, and no handler stands in an attribute."""
    for tag, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on") or name == "style"]
        if tag == "img":
            assert attrs["src"].startswith("data:image/")
            assert "alt" in attrs
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("href", "src"):
            if attrs.get(name):
                assert not attrs[name].lower().startswith(("javascript:", "//"))
    policy = next(attrs["content"] for attrs in page.all("meta") if attrs.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip & #1.mp4"
    with Source(write_clip(path, [n / 10 for n in range(120)], [2.0, 7.0], size=(90, 160))) as source:
        yield source


def page_of(source, summary, *, video_link="./clip.mp4", reel=REEL):
    pictures = [shrink(picture, 160) for _, picture in pictures_at(source, [k.pts_seconds for k in summary.keyframes])]
    files = [f"keyframes/{n}.jpg" for n in range(len(pictures))]
    document = summary_document(summary, files, reel, {})
    return storyboard_page(summary, document, pictures=pictures, video_link=video_link)


def test_page_shows_what_the_summary_says(source):
    page = Page(page_of(source, make_summary(source, keyframes=5, shots=[4.0, 8.0])))
    assert_harmless(page)
    seeks = [float(b["data-seek"]) for b in page.all("button") if b.get("class") == "picture"]
    assert seeks == pytest.approx([k.pts_seconds for k in make_summary(source, keyframes=5).keyframes])
    assert [s["src"] for s in page.all("source")] == ["./clip.mp4", "reel.mp4"]
    timeline = next(d for d in page.all("div") if d.get("class") == "timeline")
    assert json.loads(timeline["data-reel"]) == [[1.0, 2.0], [4.0, 6.0]]
    assert (timeline["role"], timeline["tabindex"], timeline["aria-valuemax"]) == ("slider", "0", "11.940")
    circles = [c["cx"] for c in page.all("circle") if c["cx"].endswith("%")]
    assert [float(c[:-1]) / 100 * 11.94 for c in circles] == pytest.approx(seeks, abs=1e-3)
    bands = [r for r in page.all("rect") if r.get("height") == "16"]
    assert [float(r["x"][:-1]) / 100 * 11.94 for r in bands] == pytest.approx([0, 4], abs=1e-3)  # scenes
    cuts = [line for line in page.all("line") if line.get("y2") == "16" and line["y1"] == "0"]
    assert [float(line["x1"][:-1]) / 100 * 11.94 for line in cuts] == pytest.approx([4, 8], abs=1e-3)
    assert len([i for i in page.all("img") if i.get("class") == "heat"]) == 5


def test_everything_is_escaped(source):
    summary = make_summary(source, keyframes=2, warnings=(HOSTILE,))
    summary = dataclasses.replace(
        summary,
        video=dataclasses.replace(summary.video, path=HOSTILE),
        embedding=dataclasses.replace(summary.embedding, model=HOSTILE),
        device_reason=HOSTILE,
        config={**summary.config, HOSTILE: HOSTILE},
    )
    text = page_of(source, summary, video_link=link_to(Path("/tmp") / HOSTILE.replace("/", "_"), Path("/tmp/out")))
    page = Page(text)
    assert_harmless(page)
    assert len(page.all("script")) == 1
    assert "alert(1)</script>\"' onload" in "".join(page.text)
    text.encode("utf-8")


def test_curve_of_many_and_of_one_sample():
    importance = np.linspace(0, 1, 1000, dtype=np.float32)
    for count in (1, 300, 1000):
        points = [tuple(map(float, p.split())) for p in _curve(importance[:count], np.arange(count) / 10, 100.0)]
        assert len(points) == {1: 2, 300: 300, 1000: 334}[count]
        assert all(0 <= x <= 1000 and 0 <= y <= 100 for x, y in points)


def test_size_stays_in_check():
    edges = [picture_edge(n) for n in (1, 4, 8, 32, 128, 1024)]
    assert edges == sorted(edges, reverse=True)
    assert edges[3] == 480
    # Noise is the worst that a JPEG can meet: 32 of them still fit.
    noise = np.random.default_rng(0).integers(0, 256, (270, 480, 3), np.uint8)
    smooth = np.asarray(shrink(noise, 60).resize((480, 270)))
    hits = [SearchHit("a", 0, 1, 0.5, 0.3)] * 32
    assert len(search_page("x", hits, [smooth] * 32)) < 3_000_000


def test_links_are_relative_and_quoted(tmp_path):
    assert link_to(tmp_path / "a b#1.mp4", tmp_path / "out") == "./../a%20b%231.mp4"
    assert link_to(tmp_path / "out" / "x:y?.mp4", tmp_path / "out") == "./x%3Ay%3F.mp4"


def test_search_page(tmp_path):
    file = tmp_path / "real & true.mp4"
    file.write_bytes(b"")
    region = (0.25, 0.5, 0.5, 0.25)
    hits = [
        SearchHit("javascript:alert(1)", 1.0, 2.0, 1.5, 0.1),
        SearchHit(str(file), 61.0, 63.5, 62.0, 0.4),
        SearchHit("https://example.org/a.mp4", 5.0, 6.0, 5.5, 0.2, None, "subject", region),
    ]
    previews = [None, np.full((90, 160, 3), 128, np.uint8), np.zeros((90, 160, 3), np.uint8)]
    page = Page(search_page(HOSTILE, hits, previews))
    assert_harmless(page)
    assert len(page.all("script")) == 1
    (played,) = (b for b in page.all("button") if "data-play" in b)
    assert played["data-play"] == f"{file.as_uri()}#t=61.000,63.500"  # files of this machine only
    assert [a["href"] for a in page.all("a")] == [
        f"{file.as_uri()}#t=61.000,63.500",
        "https://example.org/a.mp4#t=5.000,6.000",
    ]
    assert re.findall(r"score (\S+)", " ".join(page.text)) == ["0.400", "0.200,", "0.100"]
    assert [r["width"] for r in page.all("rect") if "x" not in r] == ["100.0%", "50.0%", "25.0%"]
    (frame,) = (svg for svg in page.all("svg") if svg["class"] == "region")
    assert frame["viewbox"] == "0 0 160 90"
    wanted = {"x": "40.00", "y": "45.00", "width": "80.00", "height": "22.50"}
    assert [r for r in page.all("rect") if "x" in r] == [wanted, wanted]
    for hit in (dataclasses.replace(hits[2], answered_by="scene"), dataclasses.replace(hits[2], region=None)):
        assert '<svg class="region"' not in search_page("x", [hit], previews[2:])
    assert "1:01.0 – 1:03.5" in page.text
    assert "Nothing was found." in Page(search_page("x", [], [])).text


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """browser(page, *options) -> (stdout, stderr) of headless Chromium."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium here: the page is not opened in a browser")
    profile = tmp_path_factory.mktemp("profile")

    def run(page: Path, *options: str) -> tuple[str, str]:
        flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        flags += "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=3000"
        command = [program, *flags.split(), f"--user-data-dir={profile}", *options, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
        return done.stdout, done.stderr

    return run


def result_of(browser, page: Path, script: str, *options: str) -> list[str]:
    """What a visitor's script leaves in `data-result`, without the policy, which would stop it too."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    page.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    dom, log = browser(page, "--dump-dom", *options)
    assert "Uncaught" not in log
    return re.search(r'data-result="([^"]*)"', dom).group(1).split(" ")


# What a visitor does: a click on the second key-frame, keys on the timeline, a click in its middle.
VISIT = """
const result = [], look = () => result.push(document.querySelector("output").textContent + "|" +
  document.querySelectorAll(".card.now").length + "|" + getComputedStyle(document.querySelector(".heat")).opacity);
const press = (key) => timeline.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
cards[1].querySelector("button").click(); look();
press("ArrowRight"); look(); press("PageDown"); look(); press("End"); look(); press("Home"); look();
const box = timeline.getBoundingClientRect();
timeline.dispatchEvent(new MouseEvent("click", { clientX: box.left + box.width / 2, bubbles: true })); look();
document.querySelector(".switch input").click(); look();
result.push(toReel(4.5), fromReel(toReel(4.5)));
result.push(document.documentElement.scrollWidth - document.documentElement.clientWidth);
document.body.dataset.result = result.join(" ");
"""


@pytest.mark.full
def test_page_in_a_browser(source, tmp_path, browser):
    summary = make_summary(source, keyframes=3, shots=[4.0])
    save_summary(summary, source, tmp_path / "out", OutputConfig(reel_seconds=3.0, thumbnails=False))
    page = tmp_path / "out" / "storyboard.html"
    dom, log = browser(page, "--dump-dom", "--window-size=500,900")
    assert 'data-ready="3"' in dom
    assert 'class="no-video"' not in dom
    assert "Content Security Policy" not in log
    assert "Uncaught" not in log
    times = [k.pts_seconds for k in summary.keyframes]
    found = result_of(browser, page, VISIT, "--window-size=500,900", "--force-prefers-reduced-motion")
    duration = summary.video.duration_seconds
    wanted = [times[1], times[1] + 1, times[2], duration, 0.0, duration / 2]
    got = [float(entry.split("|")[0].split(":")[1]) for entry in found[:6]]
    assert got == pytest.approx(wanted, abs=0.101)
    assert [entry.split("|")[1] for entry in found[:6]] == [*"111101"]
    assert [entry.split("|")[2] for entry in found[:7]] == ["0"] * 6 + ["1"]
    spans = [tuple(s.values()) for s in json.loads((tmp_path / "out" / "summary.json").read_text())["reel"]["spans"]]
    before = sum(max(0.0, min(stop, 4.5) - start) for start, stop in spans if start < 4.5)
    shown = next((max(4.5, start) for start, stop in spans if stop > 4.5), spans[-1][1])
    assert [float(entry) for entry in found[7:]] == pytest.approx([before, shown, 0], abs=1e-6)


@pytest.mark.full
def test_search_page_in_a_browser(tmp_path, browser):
    """With the focus on its card, the subject's part of the picture has a frame; the card stays as it was."""
    hit = SearchHit("https://example.org/a.mp4", 5.0, 6.0, 5.5, 0.2, None, "subject", (0.0, 0.5, 0.5, 0.5))
    page = tmp_path / "page.html"
    page.write_text(search_page("x", [hit], [np.full((90, 160, 3), 128, np.uint8)]))
    assert "Content Security Policy" not in browser(page, "--dump-dom")[1]
    script = """
      const frame = document.querySelector(".region"), card = document.querySelector(".card");
      frame.style.transition = "none";  // what counts is where it ends
      const look = () => [getComputedStyle(frame).opacity, card.clientWidth, card.clientHeight].join();
      const before = look(), box = card.querySelector("img").getBoundingClientRect();
      const measure = () => {
        card.querySelector("a").focus();
        const own = frame.firstElementChild.getBoundingClientRect();
        const part = [own.left - box.left, own.top - box.top, own.right - box.left, own.bottom - box.top];
        const shares = part.map((value, n) => (value / (n % 2 ? box.height : box.width)).toFixed(3));
        document.body.dataset.result = [before, look(), shares.join()].join(" ");
      };
      let tries = 0;  // on a busy machine the window gets the focus late
      const timer = setInterval(() => {
        if (!document.hasFocus() && (tries += 1) < 40) return;
        clearInterval(timer);
        measure();
      }, 50);"""
    options = "--window-size=500,900", "--force-prefers-reduced-motion"
    before, after, shares = result_of(browser, page, script, *options)
    assert (before.split(",")[0], after.split(",")[0]) == ("0", "1")
    assert before.split(",")[1:] == after.split(",")[1:]
    assert [float(share) for share in shares.split(",")] == pytest.approx([0, 0.5, 0.5, 1], abs=0.02)


@pytest.mark.full
def test_a_click_on_a_result_plays_it_in_the_page(source, tmp_path, browser):
    hit = SearchHit(str(source.path), 2.0, 4.0, 3.0, 0.2)
    text = search_page("x", [hit, hit], [np.full((90, 160, 3), 128, np.uint8), np.zeros((160, 90, 3), np.uint8)])
    script = """
      const size = (tile) => `${tile.clientWidth}x${tile.clientHeight}`;
      const tiles = [...document.querySelectorAll(".picture")].map(size);
      document.querySelector("[data-play]").click();
      const box = document.querySelector("dialog"), film = box.querySelector("video");
      let tries = 0;
      const timer = setInterval(() => {
        if (film.readyState < 2 && (tries += 1) < 60) return;
        clearInterval(timer);
        const open = [box.open, film.currentTime.toFixed(1), film.error === null];
        document.querySelector("[data-close]").click();
        document.body.dataset.result = [...open, box.open, film.hasAttribute("src"), ...tiles].join(" ");
      }, 50);"""
    page = tmp_path / "page.html"
    page.write_text(text)
    opened, seconds, plays, still, left, *tiles = result_of(browser, page, script, "--virtual-time-budget=8000")
    assert (opened, plays, still, left) == ("true", "true", "false", "false")
    assert float(seconds) == pytest.approx(2.0, abs=0.3)
    assert tiles[0] == tiles[1]  # a wide and an upright video


@pytest.mark.full
def test_page_without_a_video_says_so(source, tmp_path, browser):
    page = tmp_path / "page.html"
    page.write_text(page_of(source, make_summary(source, keyframes=2), video_link="./gone.mp4", reel=None))
    dom, _ = browser(page, "--dump-dom")
    assert 'class="no-video"' in dom
    assert 'data-ready="2"' in dom
