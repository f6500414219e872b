"""Makes the pictures of the README from clips that keyreel renders itself: `python engine/guide/pictures/make.py`.

Needs the extras `cpu`, `library`, `serve`, and playwright with a Chromium.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from keyreel import Engine, Library, demo
from keyreel.config import ServeConfig
from keyreel.serve import run

HERE = Path(__file__).parent
QUERY = "a red circle"


def clips(folder: Path) -> list[Path]:
    """The demo, and two clips of some of its scenes."""
    scenes, made = demo.SCENES, []
    for name, chosen in (("demo", scenes), ("shapes", scenes[3:1:-1] + scenes[:1]), ("evening", scenes[2:5])):
        demo.SCENES = chosen
        demo.write_demo(folder / f"{name}.mp4")
        made.append(folder / f"{name}.mp4")
    demo.SCENES = scenes
    return made


def shoot(page: Page, name: str) -> None:
    """One PNG of what the window shows, with few colours: at most 300 KB."""
    from PIL import Image

    path = HERE / f"{name}.png"
    page.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(255, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, path.stat().st_size)


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    videos = clips(folder)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with Engine.from_pretrained(device="cpu") as engine, Library(folder / "lib", engine) as library:
        engine.summarize(videos[0]).save(folder / "out")
        assert all(added.failure is None for added in library.add(videos))
        listening, address = threading.Event(), []

        def listen(at: str) -> None:
            address.append(at)
            listening.set()

        config = ServeConfig(port=0, roots=(str(folder),))
        threading.Thread(target=run, args=(library, config), kwargs={"listening": listen}, daemon=True).start()
        listening.wait(60)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium)
            page = browser.new_page()
            page.set_viewport_size({"width": 1200, "height": 1240})
            page.goto((folder / "out" / "storyboard.html").as_uri())
            page.wait_for_timeout(1000)
            shoot(page, "storyboard")
            page.set_viewport_size({"width": 1200, "height": 760})
            page.goto(f"{address[0]}/?q={QUERY.replace(' ', '+')}")
            page.wait_for_timeout(3000)
            shoot(page, "search")
            browser.close()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
