"""Summarizes a folder of videos with a pool of threads that share one engine.

pip install 'keyreel[cpu]'
python batch_threads.py ~/Videos out
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keyreel


def main(videos: Path, output: Path, threads: int = 2) -> None:
    # One engine for all threads: the model is loaded once. Decoding and inference release the interpreter lock.
    with keyreel.Engine.from_pretrained() as engine, ThreadPoolExecutor(threads) as pool:

        def work(path: Path) -> str:
            try:
                summary = engine.summarize(path)
                summary.save(output / path.stem, overwrite=True)
            except keyreel.KeyreelError as error:  # one bad file must not stop the others
                return f"{path.name}: failed: {error}"
            return f"{path.name}: {len(summary.keyframes)} key-frames, {len(summary.shots)} shots"

        for line in pool.map(work, sorted(videos.glob("*.mp4"))):
            print(line)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
