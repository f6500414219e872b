"""PySceneDetect's scene lists: writes one, or takes one and finds what each of its scenes shows.

    pip install 'keyreel[cpu]'
    python scene_lists.py export movie.mp4 out            # writes out/scenes.csv
    python scene_lists.py import movie.mp4 out/scenes.csv "a dog" "a car" "a room"

PySceneDetect calls a scene what keyreel calls a shot. It reads our list with
`scenedetect -i movie.mp4 load-scenes -i out/scenes.csv save-images`.
"""

import csv
import sys
from pathlib import Path

import keyreel


def export_scenes(video: str, folder: str) -> None:
    with keyreel.Engine.from_pretrained() as engine:
        engine.summarize(video).save(folder, scenes_csv=True, reel=False)


def import_scenes(video: str, scenes: str, words: list[str]) -> None:
    lines = Path(scenes).read_text().splitlines()
    if lines[0].startswith("Timecode List:"):  # PySceneDetect may put the cuts on the first line
        del lines[0]
    rows = list(csv.DictReader(lines))
    spans = [(float(row["Start Time (seconds)"]), float(row["End Time (seconds)"])) for row in rows]

    with keyreel.Engine.from_pretrained() as engine:
        # Only the frame in the middle of each scene is decoded.
        middles = tuple((start + stop) / 2 for start, stop in spans)
        frames = engine.embed_video(video, sampling=keyreel.Sampling("times", times=middles))
        scores = frames.vectors @ engine.encode_text(words).T  # [scenes, words]
        for (start, stop), best in zip(spans, scores.argmax(axis=1), strict=True):
            print(f"{start:8.2f} to {stop:8.2f} s: {words[best]}")


if __name__ == "__main__":
    if sys.argv[1] == "export":
        export_scenes(*sys.argv[2:4])
    else:
        import_scenes(sys.argv[2], sys.argv[3], sys.argv[4:])
