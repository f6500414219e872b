"""Makes an upright reel (9:16) of each video in a folder. The picture follows the subject.

pip install 'keyreel[cpu]'
python vertical_reels.py ~/Videos reels
"""

import sys
from pathlib import Path

import keyreel


def main(videos: Path, output: Path, seconds: float = 20.0) -> None:
    output.mkdir(parents=True, exist_ok=True)
    with keyreel.Engine.from_pretrained() as engine:
        for path in sorted(videos.glob("*.mp4")):
            try:
                summary = engine.summarize(path)
                spans = summary.render_reel(output / f"{path.stem}.mp4", aspect="9:16", seconds=seconds)
            except keyreel.KeyreelError as error:  # one bad file must not stop the others
                print(f"{path.name}: failed: {error}")
                continue
            length = sum(span.duration_seconds for span in spans)
            print(f"{path.name}: {len(spans)} spans, {length:.1f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
