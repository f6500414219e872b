"""Embeds videos into a FAISS index and searches it with text.

pip install 'keyreel[cpu]' faiss-cpu
python faiss_search.py "a red car" holiday.mp4 city.mp4
"""

import sys

import faiss
import numpy as np

import keyreel


def main(text: str, videos: list[str]) -> None:
    with keyreel.Engine.from_pretrained() as engine:
        vectors, places = [], []  # a vector for each sampled frame, and where the frame is
        for video in videos:
            embedding = engine.embed_video(video, sampling=keyreel.Sampling(fps=1.0))
            vectors.append(embedding.vectors)  # [T, D] float32, unit length
            places += [(video, seconds) for seconds in embedding.pts_seconds]

        # The vectors have unit length, so the inner product is the cosine.
        index = faiss.IndexFlatIP(vectors[0].shape[1])
        index.add(np.concatenate(vectors))

        scores, rows = index.search(engine.encode_text(text), 5)  # the query is [1, D]
        for score, row in zip(scores[0], rows[0], strict=True):
            if row >= 0:  # FAISS fills up with -1 where it has fewer frames
                video, seconds = places[row]
                print(f"{score:.3f}  {seconds:7.2f} s  {video}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
