"""A Ray Data pipeline: paths of videos in, Parquet files of key-frames with their vectors out.

pip install 'keyreel[cpu,data,ray]'
python ray_pipeline.py ~/Videos out
"""

import sys
from pathlib import Path
from typing import Any

import ray

import keyreel


class Summarize:
    """An actor: it loads the model once, then works on one video after the other."""

    def __init__(self) -> None:
        self.engine = keyreel.Engine.from_pretrained()

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        try:
            summary = self.engine.summarize(row["item"])
        except keyreel.KeyreelError as error:  # one bad file must not stop the others
            print(f"{row['item']}: {error}")
            return []
        vectors = summary.embedding.vectors
        return [
            {"video": row["item"], "seconds": frame.pts_seconds, "vector": vectors[frame.sample]}
            for frame in summary.keyframes
        ]


def main(videos: Path, output: Path) -> None:
    paths = [str(path.absolute()) for path in sorted(videos.glob("*.mp4"))]
    # `concurrency` is the number of actors; with GPUs add num_gpus=1.
    frames = ray.data.from_items(paths).flat_map(Summarize, concurrency=1, num_cpus=1)
    frames.write_parquet(str(output.absolute()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
