"""Rendered scenes with captions: coloured shapes, patterns, gradients, landscapes, text, noise, plain frames.

They teach what labelled photographs do not: colours, plain shapes and grounds, empty frames. A caption is true of every
scene that has all its tags.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

U8 = npt.NDArray[np.uint8]
Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (215, 35, 35),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (245, 220, 50),
    "orange": (245, 140, 30),
    "purple": (130, 50, 170),
    "pink": (245, 130, 180),
    "cyan": (50, 205, 220),
    "brown": (120, 75, 40),
    "black": (12, 12, 12),
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
}
SHAPES: dict[str, tuple[int, float]] = {  # corners, inner radius as a share of the outer one (1: no inner corners)
    "circle": (48, 1.0),
    "square": (4, 1.0),
    "triangle": (3, 1.0),
    "star": (5, 0.42),
    "hexagon": (6, 1.0),
    "ring": (48, 1.0),
    "diamond": (4, 1.0),
}
OTHER_WORDS = {"grey": "gray", "circle": "disc", "chequerboard": "checkerboard", "dots": "polka dots", "ring": "hoop"}
WORDS = ("KEYREEL", "NEWS", "THE END", "CHAPTER", "ONE", "WELCOME", "SCENE 12", "HELLO", "PART TWO", "SALE", "MUSIC")
KINDS = ("shape", "shapes", "pattern", "plain", "gradient", "landscape", "text", "noise")
WEIGHTS = (0.4, 0.1, 0.12, 0.08, 0.08, 0.14, 0.05, 0.03)


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture and what is true of it."""

    pixels: U8  # [h, w, 3]
    tags: frozenset[str]
    captions: tuple[tuple[str, frozenset[str]], ...]  # text, and the tags that make it true

    def squashed(self, side: int) -> Scene:
        """The same scene as a square of `side` pixels."""
        image = Image.fromarray(self.pixels).resize((side, side), Image.Resampling.BICUBIC)
        return Scene(np.asarray(image), self.tags, self.captions)


def render_scene(kind: str, rng: np.random.Generator, size: tuple[int, int] = (224, 224)) -> Scene:
    """One random scene of one of KINDS; `size` is (width, height) in pixels."""
    maker = {"shape": _shape, "shapes": _shape, "pattern": _pattern, "landscape": _landscape}.get(kind, _field)
    pixels, captions = maker(kind, rng, size)
    both = list(captions)
    for text, tags in captions:
        swapped = " ".join(OTHER_WORDS.get(word, word) for word in text.split())
        if swapped != text:
            both.append((swapped, tags))
    frozen = tuple((text, frozenset(tags)) for text, tags in both)
    noisy = pixels.astype(np.float32) + rng.normal(0, rng.uniform(0, 5), pixels.shape)
    return Scene(noisy.clip(0, 255).astype(np.uint8), frozenset[str]().union(*(t for _, t in frozen)), frozen)


Captions = list[tuple[str, set[str]]]


def _hue(name: str, rng: np.random.Generator) -> Rgb:
    r, g, b = (int(np.clip(v + rng.normal(0, 10), 0, 255)) for v in COLOURS[name])
    return r, g, b


def _two(rng: np.random.Generator) -> tuple[str, str]:
    first, second = rng.choice(list(COLOURS), 2, replace=False)
    return str(first), str(second)


def _shape(kind: str, rng: np.random.Generator, size: tuple[int, int]) -> tuple[U8, Captions]:
    width, height = size
    colour, ground = _two(rng)
    shape = str(rng.choice(list(SHAPES)))
    corners, inner = SHAPES[shape]
    image = Image.new("RGB", size, _hue(ground, rng))
    draw = ImageDraw.Draw(image)
    for _ in range(1 if kind == "shape" else int(rng.integers(3, 9))):
        radius = min(size) * (rng.uniform(0.14, 0.42) if kind == "shape" else rng.uniform(0.08, 0.2))
        x, y = rng.uniform(0.6 * radius, width - 0.6 * radius), rng.uniform(0.6 * radius, height - 0.6 * radius)
        upright = np.pi / 4 if shape == "square" else -np.pi / 2
        turn = upright + (rng.uniform(-0.25, 0.25) if rng.random() < 0.5 else 0.0)
        steps = np.arange(corners * (1 if inner == 1.0 else 2))
        reach = np.where((steps % 2 == 1) & (inner != 1.0), inner, 1.0) * radius
        angles = turn + 2 * np.pi * steps / len(steps)
        points = np.stack([x + reach * np.cos(angles), y + reach * np.sin(angles)], axis=1)
        draw.polygon([(float(a), float(b)) for a, b in points], fill=_hue(colour, rng))
        if shape == "ring":
            hole = radius * 0.62
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=image.getpixel((0, 0)))
    thing, back = f"{colour} {shape}", f"{ground} background"
    one = f"{thing}s" if kind == "shapes" else f"a {thing}"
    many = {"several shapes"} if kind == "shapes" else {"one shape"}
    on = rng.choice(["on", "over", "moving over", "in front of"])
    captions: Captions = [
        (one, {thing}),
        (f"{one} on {ground}", {thing, back}),
        (f"{one} {on} a {back}", {thing, back}),
        (f"{shape}s" if kind == "shapes" else f"a {shape}", {shape}),
        (f"several {thing}s" if kind == "shapes" else f"one {thing}", {thing} | many),
        (f"a {back}", {back}),
        (f"something {colour}", {f"has {colour}"}),
    ]
    return np.asarray(image), captions


def _pattern(kind: str, rng: np.random.Generator, size: tuple[int, int]) -> tuple[U8, Captions]:
    first, second = _two(rng)
    y, x = np.mgrid[0 : size[1], 0 : size[0]] // max(4, int(min(size) / rng.integers(4, 12)))
    fine = np.mgrid[0 : size[1], 0 : size[0]] % max(8, int(min(size) / 6)) / max(8, int(min(size) / 6)) - 0.5
    name = str(rng.choice(["chequerboard", "vertical stripes", "horizontal stripes", "dots"]))
    masks = {"chequerboard": (x + y) % 2, "vertical stripes": x % 2, "horizontal stripes": y % 2}
    mask = masks.get(name, (fine**2).sum(axis=0) < 0.08)[..., None].astype(bool)
    pixels = np.where(mask, np.asarray(_hue(first, rng)), np.asarray(_hue(second, rng))).astype(np.uint8)
    article = "a " if name == "chequerboard" else ""
    tags = {name, "pattern", f"pattern {first}", f"pattern {second}"}
    captions: Captions = [
        (f"{article}{name}", {name}),
        (f"{article}{name} pattern", {name}),
        (f"{article}{first} and {second} {name}", tags),
        (f"{article}{second} and {first} {name}", tags),
        ("a pattern", {"pattern"}),
    ]
    if name.endswith("stripes"):
        captions += [("stripes", {"stripes"}), (f"{first} and {second} stripes", {"stripes"} | (tags - {name}))]
    return pixels, captions


def _field(kind: str, rng: np.random.Generator, size: tuple[int, int]) -> tuple[U8, Captions]:
    width, height = size
    first, second = _two(rng)
    if kind == "noise":
        grain = int(rng.integers(1, 4))
        depth = 3 if rng.random() < 0.5 else 1
        field = rng.integers(0, 256, (height // grain + 1, width // grain + 1, depth), dtype=np.uint8)
        field = field.repeat(grain, 0).repeat(grain, 1)[:height, :width].repeat(3 // depth, 2)
        return field, [(text, {"noise"}) for text in ("noise", "static", "television static", "random noise")]
    if kind == "gradient":
        across = rng.random() < 0.5
        ramp = np.linspace(0, 1, width)[None, :, None] if across else np.linspace(0, 1, height)[:, None, None]
        mixed = (1 - ramp) * np.asarray(_hue(first, rng)) + ramp * np.asarray(_hue(second, rng))
        tags = {"gradient", f"gradient {first}", f"gradient {second}"}
        texts = [f"a gradient from {first} to {second}", f"a {first} and {second} gradient"]
        plain: Captions = [("a gradient", {"gradient"}), ("a smooth colour gradient", {"gradient"})]
        return np.broadcast_to(mixed, (height, width, 3)).astype(np.uint8), [*plain, *((t, tags) for t in texts)]
    image = Image.new("RGB", size, _hue(first, rng))
    if kind == "text":
        words = " ".join(str(w) for w in rng.choice(WORDS, int(rng.integers(1, 4))))
        font = ImageFont.load_default(size=min(size) * float(rng.uniform(0.09, 0.16)))
        ImageDraw.Draw(image).text((width / 2, height / 2), words, _hue(second, rng), font, anchor="mm")
        tags = {"text on screen", "big text", "title card"}
        texts = ["text on a screen", "a title card", "words", f"{second} text on a {first} background"]
        return np.asarray(image), [(text, tags | ({f"text {second}"} if "ground" in text else set())) for text in texts]
    tags = {f"plain {first}"} | ({"black screen", "dark blank frame"} if first == "black" else set())
    texts = [f"a {first} screen", f"a plain {first} frame", f"an empty {first} background", f"nothing but {first}"]
    return np.asarray(image), [(text, tags) for text in texts]


def _landscape(kind: str, rng: np.random.Generator, size: tuple[int, int]) -> tuple[U8, Captions]:
    width, height = size
    name = str(rng.choice(["sunset", "night", "sea", "mountains", "meadow", "snow"]))
    skies: dict[str, tuple[Rgb, Rgb]] = {"sunset": ((70, 40, 110), (255, 150, 60)), "night": ((3, 4, 18), (16, 22, 55))}
    top, low = (np.asarray(c) + rng.normal(0, 8, 3) for c in skies.get(name, ((80, 140, 225), (190, 220, 245))))
    ramp = np.linspace(0, 1, height)[:, None, None] ** rng.uniform(0.7, 1.4)
    sky = np.broadcast_to((1 - ramp) * top + ramp * low, (height, width, 3)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(sky)
    draw = ImageDraw.Draw(image)
    horizon, unit = height * rng.uniform(0.5, 0.8), min(size)
    x, y, r = rng.uniform(0.15, 0.85) * width, horizon * rng.uniform(0.15, 0.7), unit * rng.uniform(0.05, 0.12)
    if name == "night":
        for px, py in rng.uniform(0, 1, (int(rng.integers(40, 160)), 2)) * (width, height):
            dot = unit * rng.uniform(0.002, 0.009)
            draw.ellipse((px - dot, py - dot, px + dot, py + dot), fill=(235, 235, 255))
        if rng.random() < 0.5:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(240, 238, 215))
    elif name != "mountains" or rng.random() < 0.5:
        y = horizon - r * rng.uniform(0, 2.5) if name == "sunset" else y
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 225, 120) if name == "sunset" else (255, 250, 205))
    grounds: dict[str, Rgb] = {
        "sea": (25, 95, 150),
        "meadow": (70, 150, 55),
        "snow": (238, 243, 250),
        "sunset": (35, 25, 40),
    }
    if name in ("mountains", "sunset", "night"):
        steps = np.linspace(0, width, 9)
        peaks = horizon - unit * rng.uniform(-0.05, 0.4 if name == "mountains" else 0.06, 9)
        ridge = [(float(a), float(b)) for a, b in zip(steps, peaks, strict=True)]
        fill = {"mountains": (95, 100, 115), "night": (2, 2, 6)}.get(name, grounds["sunset"])
        draw.polygon([(0, height), *ridge, (width, height)], fill=fill)
    else:
        draw.rectangle((0, horizon, width, height), fill=grounds[name])
    words: dict[str, tuple[list[str], set[str]]] = {
        "sunset": (["a sunset", "a sunset sky", "the sun going down", "an orange sky at dusk"], {"sunset", "sky"}),
        "night": (["a night sky with stars", "stars", "a starry night", "night"], {"night sky", "sky"}),
        "sea": (["the sea under a blue sky", "the sea", "the ocean", "water and sky"], {"sea", "water", "sky"}),
        "mountains": (["mountains", "mountains under a blue sky", "a mountain range"], {"mountain", "sky"}),
        "meadow": (["a green meadow", "a green field under a blue sky", "grass and sky"], {"meadow", "sky"}),
        "snow": (["a snowy field", "snow under a blue sky", "snow"], {"snow", "sky"}),
    }
    texts, tags = words[name]
    return np.asarray(image), [*((text, tags) for text in texts), ("a landscape", {"landscape"}), ("sky", {"sky"})]
