"""Procedural drawings: a seed gives the facts of a scene and an image that shows them.

The facts are a pure function of the seed alone; the image is a pure function of the facts, the
seed and the size. Coordinates are relative to the image, so a scene looks the same at any size.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS: dict[str, RGB] = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 70, 230),
    "yellow": (245, 220, 40),
    "orange": (250, 135, 20),
    "purple": (150, 40, 190),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
SIZES = ("small", "large")
POSITIONS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
SCENES: dict[str, RGB] = {
    "field": (96, 150, 70),
    "desert": (214, 182, 120),
    "snow": (225, 232, 238),
    "sea": (30, 110, 150),
}
LIGHTING: dict[str, RGB] = {"day": (150, 205, 245), "night": (18, 20, 52)}
MAX_OBJECTS = 4

HELD_OUT_SEED = 2**50
"""Training draws seeds below this one, evaluation draws this one and above."""

RADII = {"small": (0.100, 0.115), "large": (0.155, 0.170)}
"""Radius over the shorter side. At 128 pixels a small object is 26 pixels wide: more than one and
a half patches of 16; the gap between the ranges keeps the two sizes apart."""

OUTLINE: RGB = (128, 128, 128)


@dataclass(frozen=True)
class Thing:
    """One object; `cell` indexes POSITIONS (row-major 3x3)."""

    shape: str
    color: str
    size: str
    cell: int

    @property
    def position(self) -> str:
        return POSITIONS[self.cell]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """The facts of one image; objects are in cell order."""

    place: str
    lighting: str
    objects: tuple[Thing, ...]


@dataclass(frozen=True)
class Keyframes:
    """Two images of one scene between which one object has moved to another cell."""

    first: Scene
    second: Scene
    moved: Thing
    """The moved object where it was in the first image."""
    target: int
    """The cell where it is in the second image."""


def scene(seed: int, max_objects: int = MAX_OBJECTS) -> Scene:
    """Facts of the drawing with this seed."""
    rng = random.Random(f"facts {seed}")
    cells = sorted(rng.sample(range(len(POSITIONS)), rng.randint(1, max_objects)))
    return Scene(
        place=rng.choice(list(SCENES)),
        lighting=rng.choice(list(LIGHTING)),
        objects=tuple(
            Thing(rng.choice(SHAPES), rng.choice(list(COLORS)), rng.choice(SIZES), cell)
            for cell in cells
        ),
    )


def keyframes(seed: int, max_objects: int = MAX_OBJECTS) -> Keyframes:
    """The scene of this seed, and the same scene after one object has moved to a free cell."""
    first = scene(seed, max_objects)
    rng = random.Random(f"move {seed}")
    moved = rng.choice(first.objects)
    taken = {thing.cell for thing in first.objects}
    target = rng.choice([cell for cell in range(len(POSITIONS)) if cell not in taken])
    after = [replace(t, cell=target) if t is moved else t for t in first.objects]
    second = replace(first, objects=tuple(sorted(after, key=lambda thing: thing.cell)))
    return Keyframes(first, second, moved, target)


def draw(facts: Scene, seed: int, size: tuple[int, int] = (192, 192)) -> Image.Image:
    """Image of `facts`, `size` = (width, height) in pixels.

    The seed decides what the facts leave open: shades, horizon, exact places inside the cells.
    """
    return paint(facts, seed, (size[0] * 2, size[1] * 2)).reduce(2)


def paint(facts: Scene, seed: int, size: tuple[int, int]) -> Image.Image:
    """Like `draw` without anti-aliasing: a canvas to be scaled down."""
    rng = random.Random(f"look {seed}")
    image = Image.new("RGB", size, jitter(rng, LIGHTING[facts.lighting], 10))
    pen = ImageDraw.Draw(image)
    _paint_background(pen, rng, facts, size)
    for thing in facts.objects:
        _paint_thing(pen, seed, thing, size)
    return image


def degrade(image: Image.Image, rng: random.Random) -> Image.Image:
    """Now and then the marks of a lossy source: a blur from a smaller copy, JPEG noise."""
    if rng.random() < 0.1:
        scale = rng.uniform(0.65, 0.9)
        small = (round(image.width * scale), round(image.height * scale))
        image = image.resize(small, Image.Resampling.BILINEAR).resize(image.size)
    if rng.random() < 0.1:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(60, 95))
        image = Image.open(buffer).convert("RGB")
    return image


def jitter(rng: random.Random, color: RGB, amount: int) -> RGB:
    """The colour with up to `amount` added to or taken from each channel."""
    red, green, blue = (max(0, min(255, c + rng.randint(-amount, amount))) for c in color)
    return red, green, blue


def _paint_background(
    pen: ImageDraw.ImageDraw, rng: random.Random, facts: Scene, size: tuple[int, int]
) -> None:
    width, height = size
    unit = min(size) / 128
    horizon = height * rng.uniform(0.42, 0.58)
    dark = 0.45 if facts.lighting == "night" else 1.0
    ground = _shade(jitter(rng, SCENES[facts.place], 10), dark)
    pen.rectangle((0, horizon, width, height), fill=ground)
    if facts.lighting == "night":
        for _ in range(24):
            x, y = rng.uniform(0, width), rng.uniform(0, horizon)
            pen.ellipse((x - unit / 2, y - unit / 2, x + unit / 2, y + unit / 2), fill=OUTLINE)
    for _ in range(12):  # tufts, ripples, drifts: short strokes in a darker or lighter ground
        x, y = rng.uniform(0, width), rng.uniform(horizon, height)
        dx, dy = (0.0, 4 * unit) if facts.place == "field" else (6 * unit, 0.0)
        shade = _shade(ground, 1.12 if facts.place == "sea" else 0.88)
        pen.line((x, y, x + dx, y + dy), fill=shade, width=max(1, round(unit)))


def _paint_thing(pen: ImageDraw.ImageDraw, seed: int, thing: Thing, size: tuple[int, int]) -> None:
    # The object's own stream of random numbers: it keeps its shade when it moves between frames.
    rng = random.Random(f"thing {seed} {thing.size} {thing.name}")
    short = min(size)
    radius = short * rng.uniform(*RADII[thing.size])
    row, column = divmod(thing.cell, 3)
    center = []
    for index, side in ((column, size[0]), (row, size[1])):
        room = min(max(0.0, side / 6 - radius), side / 12)
        center.append((index + 0.5) * side / 3 + rng.uniform(-0.8, 0.8) * room)
    style = {
        "fill": jitter(rng, COLORS[thing.color], 12),
        "outline": OUTLINE,
        "width": max(1, round(short / 128)),
    }
    x, y = center
    if thing.shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), **style)
    else:
        corners = _CORNERS[thing.shape]
        pen.polygon([(x + radius * dx, y + radius * dy) for dx, dy in corners], **style)


def _shade(color: RGB, factor: float) -> RGB:
    red, green, blue = (min(255, int(c * factor)) for c in color)
    return red, green, blue


def _ring(radii: tuple[float, ...], count: int, drop: float = 0.0) -> list[tuple[float, float]]:
    """Corners on rays from the centre, clockwise from the top; `radii` repeat along the ring."""
    turns = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
    lengths = [radii[i % len(radii)] for i in range(count)]
    return [(r * math.cos(a), drop + r * math.sin(a)) for r, a in zip(lengths, turns, strict=True)]


def _cross(arm: float) -> list[tuple[float, float]]:
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


_CORNERS = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": _ring((1.15,), 3, drop=0.2),
    "star": _ring((1.12, 0.45), 10),
    "cross": _cross(0.34),
}
