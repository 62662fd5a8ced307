"""Pictures of coloured shapes, drawn in batches from signed distances.

Style: one to three shaded, outlined, slightly turned objects of ten forms and twelve jittered paints on a grainy
background of any colour, with a gradient. It is kept apart from easy-VQA's (one flat, upright object of pure colour on
a nearly white ground): grounds that light come up in about one picture in a hundred, by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pretraining.vocabulary import COLOURS, IMAGE_SIZE, PATCH_SIZE, SHAPES

__all__ = ["MAX_OBJECTS", "Scenes", "draw_scenes"]

MAX_OBJECTS: Final = 3

Floats = NDArray[np.float32]

_PALETTE: Final[dict[str, tuple[int, int, int]]] = {
    "red": (214, 44, 52), "green": (42, 160, 66), "blue": (44, 82, 214), "yellow": (232, 208, 48),
    "teal": (30, 146, 146), "brown": (122, 76, 38), "gray": (138, 138, 138), "black": (14, 14, 18),
    "white": (244, 244, 240), "orange": (238, 134, 30), "purple": (128, 52, 168), "pink": (242, 142, 186),
}  # fmt: skip
_PAINTS: Final = np.array([_PALETTE[name] for name in COLOURS], dtype=np.float32) / 255.0


@dataclass(frozen=True)
class Scenes:
    """A batch of N pictures and what is in them; objects of one picture differ in form and in paint.

    Attributes:
        pixels: ``(N, 3, 64, 64)`` uint8.
        count: ``(N,)`` objects in each picture, 1 to 3. The other arrays are meaningful below it only.
        shape: ``(N, 3)`` index into ``SHAPES``.
        colour: ``(N, 3)`` index into ``COLOURS``.
        x: ``(N, 3)`` centre, in pixels from the left.
        y: ``(N, 3)`` centre, in pixels from the top.
        owner: ``(N, 16)`` the object that covers most of each 16 × 16 patch, -1 where none covers 3 % of it.
    """

    pixels: NDArray[np.uint8]
    count: NDArray[np.int64]
    shape: NDArray[np.int64]
    colour: NDArray[np.int64]
    x: Floats
    y: Floats
    owner: NDArray[np.int64]


def _box(u: Floats, v: Floats, half_u: Floats | float, half_v: Floats | float) -> Floats:
    out: Floats = np.maximum(np.abs(u) - half_u, np.abs(v) - half_v)
    return out


def _disc(u: Floats, v: Floats, radius: float) -> Floats:
    out: Floats = np.sqrt(u * u + v * v) - np.float32(radius)
    return out


def _wedge(u: Floats, v: Floats) -> Floats:
    """An equilateral triangle in the unit circle, pointing up (v grows downwards)."""
    out: Floats = np.maximum(np.abs(u) * np.float32(0.866) - v * np.float32(0.5) - 0.5, v - 0.5)
    return out


def _star(u: Floats, v: Floats) -> Floats:
    sector = np.float32(2 * np.pi / 5)
    angle: Floats = np.arctan2(u, -v)
    folded: Floats = np.abs(angle - sector * np.round(angle / sector))
    radius: Floats = np.sqrt(u * u + v * v)
    # The edge runs from the tip at (1, 0) to the notch at radius 0.45 and half a sector.
    notch = np.array([0.45 * np.cos(np.pi / 5), 0.45 * np.sin(np.pi / 5)])
    normal = np.array([notch[1], 1.0 - notch[0]]) / np.hypot(notch[1], 1.0 - notch[0])
    across: Floats = radius * np.cos(folded) - np.float32(1.0)
    along: Floats = radius * np.sin(folded)
    out: Floats = across * np.float32(normal[0]) + along * np.float32(normal[1])
    return out


def _arrow(u: Floats, v: Floats) -> Floats:
    head = np.maximum(np.abs(u) * np.float32(0.75) - (v + 1.0) * np.float32(0.66), v + np.float32(0.05))
    out: Floats = np.minimum(head, _box(u, v - np.float32(0.45), 0.3, 0.55))
    return out


# Each takes coordinates u, v ``(n, 64, 64)`` in units of the object's radius and a random stretch ``(n, 1, 1)`` in
# [0, 1), and returns signed distances in the same units, negative inside.
_FORMS: Final[dict[str, Callable[[Floats, Floats, Floats], Floats]]] = {
    "circle": lambda u, v, _: _disc(u, v, 0.95),
    "rectangle": lambda u, v, t: _box(u, v, 0.95, 0.35 + 0.25 * t),
    "triangle": lambda u, v, _: _wedge(u, v - np.float32(0.15)),
    "square": lambda u, v, _: _box(u, v, 0.8, 0.8),
    "diamond": lambda u, v, t: (np.abs(u) / (0.5 + 0.15 * t) + np.abs(v) - 1.0) * np.float32(0.55),
    "star": lambda u, v, _: _star(u, v),
    "cross": lambda u, v, _: np.minimum(_box(u, v, 1.0, 0.3), _box(u, v, 0.3, 1.0)),
    "ring": lambda u, v, _: np.abs(_disc(u, v, 0.72)) - np.float32(0.23),
    "moon": lambda u, v, _: np.maximum(_disc(u, v, 1.0), -_disc(u - np.float32(0.55), v, 0.8)),
    "arrow": lambda u, v, _: _arrow(u, v),
}


def _place(rng: np.random.Generator, count: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
    """Centres and radii ``(N, 3)``: one object lies anywhere, two or three in different quarters."""
    n = len(count)
    alone = (count == 1)[:, None]
    radius = np.where(
        alone, rng.uniform(6.0, 18.0, (n, MAX_OBJECTS)), rng.uniform(6.0, 14.0, (n, MAX_OBJECTS))
    )
    quarter = rng.permuted(np.tile(np.arange(4), (n, 1)), axis=1)[:, :MAX_OBJECTS]
    room = np.maximum(16.0 - radius, 1.0)
    centres = []
    for place in (quarter % 2, quarter // 2):
        near = 32.0 * place + 16.0 + rng.uniform(-1.0, 1.0, (n, MAX_OBJECTS)) * room
        far = rng.uniform(radius, IMAGE_SIZE - radius)
        centres.append(np.where(alone, far, near).astype(np.float32))
    return centres[0], centres[1], radius.astype(np.float32)


def _background(rng: np.random.Generator, paints: Floats, count: NDArray[np.int64]) -> Floats:
    """Backgrounds ``(N, 3, 64, 64)`` whose tone stays away from the paints ``(N, 3, 3)`` of the objects on them."""
    n = len(count)
    tones = rng.uniform(0.0, 1.0, (n, 12, 3)).astype(np.float32)
    distance = np.abs(tones[:, :, None] - paints[:, None]).sum(-1)  # (n, 12, objects)
    distance[:, :, 1:][
        np.broadcast_to((np.arange(1, MAX_OBJECTS) >= count[:, None])[:, None], (n, 12, 2))
    ] = 9.0
    tone = tones[np.arange(n), distance.min(-1).argmax(1)]
    ramp = np.linspace(-0.5, 0.5, IMAGE_SIZE, dtype=np.float32)
    slope = rng.normal(0.0, 0.09, (2, n, 3)).astype(np.float32)
    down = tone[..., None] + ramp * slope[0][..., None]  # (n, 3, 64)
    across = ramp * slope[1][..., None]
    grain = rng.uniform(0.0, 0.1, (n, 1, 1, 1)).astype(np.float32)
    noise = (rng.random((n, 1, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32) - np.float32(0.5)) * grain
    out: Floats = (down[:, :, :, None] + across[:, :, None, :]) + noise
    return out


def _distances(
    rng: np.random.Generator, shape: NDArray[np.int64], x: Floats, y: Floats, radius: Floats
) -> tuple[Floats, Floats]:
    """Signed distance in pixels ``(n, 64, 64)`` to each of n objects, and a coordinate to shade along."""
    n = len(shape)
    turn = rng.uniform(-0.3, 0.3, n) + np.where(rng.random(n) < 0.5, 0.5 * np.pi, 0.0) * (
        shape == SHAPES.index("rectangle")
    )
    cos, sin = np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)
    grid = np.arange(IMAGE_SIZE, dtype=np.float32) + np.float32(0.5)
    dx = (grid[None, None, :] - x[:, None, None]) / radius[:, None, None]
    dy = (grid[None, :, None] - y[:, None, None]) / radius[:, None, None]
    u = cos[:, None, None] * dx + sin[:, None, None] * dy
    v = cos[:, None, None] * dy - sin[:, None, None] * dx
    stretch = rng.random((n, 1, 1), dtype=np.float32)
    out = np.empty_like(u)
    for index, name in enumerate(SHAPES):
        which = np.flatnonzero(shape == index)
        if which.size:
            out[which] = _FORMS[name](u[which], v[which], stretch[which])
    return out * radius[:, None, None], v


def draw_scenes(rng: np.random.Generator, n: int) -> Scenes:
    """Draw ``n`` pictures; all randomness comes from ``rng``."""
    count = rng.choice(np.array([1, 1, 2, 3]), n)
    shape = rng.permuted(np.tile(np.arange(len(SHAPES)), (n, 1)), axis=1)[:, :MAX_OBJECTS]
    colour = rng.permuted(np.tile(np.arange(len(COLOURS)), (n, 1)), axis=1)[:, :MAX_OBJECTS]
    x, y, radius = _place(rng, count)
    jitter = rng.normal(0.0, 0.035, (n, MAX_OBJECTS, 3)).astype(np.float32)
    paints = np.clip(_PAINTS[colour] + jitter, 0.0, 1.0)
    picture = _background(rng, paints, count)
    cells = IMAGE_SIZE // PATCH_SIZE
    covered = np.zeros((n, MAX_OBJECTS, cells * cells), dtype=np.float32)
    for slot in range(MAX_OBJECTS):
        rows = np.flatnonzero(count > slot)
        distance, v = _distances(rng, shape[rows, slot], x[rows, slot], y[rows, slot], radius[rows, slot])
        inside = np.clip(0.5 - distance, 0.0, 1.0)
        shade = rng.normal(0.0, 0.05, (len(rows), 1, 1)).astype(np.float32) * v
        rim = rng.uniform(0.0, 0.35, (len(rows), 1, 1)).astype(np.float32)
        light = (1.0 - rim * np.clip(distance + 2.0, 0.0, 1.0)) * (1.0 + shade)
        body = paints[rows, slot][:, :, None, None] * light[:, None]
        under = picture[rows]
        body -= under
        body *= inside[:, None]
        picture[rows] = under + body
        blocks = inside.reshape(len(rows), cells, PATCH_SIZE, cells, PATCH_SIZE).mean((2, 4))
        covered[rows, slot] = blocks.reshape(len(rows), cells * cells)
    owner = np.where(covered.max(1) > 0.03, covered.argmax(1), -1)
    pixels = np.clip(picture * 255.0 + 0.5, 0.0, 255.0).astype(np.uint8)
    return Scenes(pixels, count, shape, colour, x, y, owner)
