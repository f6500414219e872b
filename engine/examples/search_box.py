"""A FastAPI application of your own with a search box over a library of videos.

pip install 'keyreel[cpu,library,serve]'
keyreel index ~/Videos --library lib
python search_box.py lib            # then open http://127.0.0.1:8000
"""

import html
import sys

import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

import keyreel
from keyreel.serve import router


def make_app(library: keyreel.Library) -> FastAPI:
    app = FastAPI(title="my videos")
    # All of keyreel's routes and its own page, under /video.
    app.include_router(router(library), prefix="/video")

    # FastAPI runs a plain `def` in a thread, so a search does not block other requests.
    @app.get("/", response_class=HTMLResponse)
    def page(q: str = "") -> str:
        hits = library.search(q, k=12) if q else []
        items = "".join(
            f'<li><img src="/video/api/v1/videos/{hit.video_id}/previews/{hit.pts_seconds}.jpg" height="120">'
            f" {html.escape(hit.video)}, {hit.start_seconds:.1f} to {hit.stop_seconds:.1f} s</li>"
            for hit in hits
        )
        return f'<form><input name="q" value="{html.escape(q)}" autofocus></form><ol>{items}</ol>'

    return app


def main(folder: str) -> None:
    with keyreel.Engine.from_pretrained() as engine, keyreel.Library(folder, engine) as library:
        uvicorn.run(make_app(library))


if __name__ == "__main__":
    main(sys.argv[1])
