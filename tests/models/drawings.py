"""Drawings with the masks of what is on them: what the tiny SAM of this folder is trained and tested on."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SIZE = 64  # pixels, both ways
LEAST = 40  # pixels of a shape that must be seen, or it is not asked for
CONTRAST = 60.0  # the least distance between the colours of two things, of 442

Picture = NDArray[np.uint8]
Masks = NDArray[np.bool_]


def drawing(seed: int) -> tuple[Picture, Masks]:
    """A picture (64, 64, 3) and the seen part of each of its shapes (shapes, 64, 64), the same for the same seed.

    Two to six ellipses, rings and polygons lie over one another on a background, each with a colour and a texture of
    its own; noise lies over all.
    """
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
    colours = [random.uniform(0, 255, 3)]
    picture = colours[0] + _texture(random, x, y)
    owner = np.zeros((SIZE, SIZE), dtype=np.int64)
    count = int(random.integers(2, 7))
    for number in range(1, count + 1):
        colour = random.uniform(0, 255, 3)
        while min(np.linalg.norm(colour - other) for other in colours) < CONTRAST:
            colour = random.uniform(0, 255, 3)
        colours.append(colour)
        inside = _shape(random, x, y)
        texture = _texture(random, x, y)
        picture[inside] = (colour + texture)[inside]
        owner[inside] = number
    picture = picture + random.normal(0, random.uniform(2, 12), picture.shape)
    masks = np.stack([owner == number for number in range(1, count + 1)])
    seen = masks[masks.sum((1, 2)) >= LEAST]
    return picture.clip(0, 255).round().astype(np.uint8), seen if len(seen) else (owner == 0)[None]


def _shape(random: np.random.Generator, x: NDArray[np.float64], y: NDArray[np.float64]) -> Masks:
    """Where a shape is: an ellipse, a ring or a convex polygon, turned by some angle."""
    centre, turn = random.uniform(6, SIZE - 6, 2), random.uniform(0, np.pi)
    radii = random.uniform(6, 22, 2)
    along = ((x - centre[0]) * np.cos(turn) + (y - centre[1]) * np.sin(turn)) / radii[0]
    across = ((y - centre[1]) * np.cos(turn) - (x - centre[0]) * np.sin(turn)) / radii[1]
    kind = int(random.integers(0, 5))
    if kind == 0:
        distance = np.hypot(along, across)
        return (distance <= 1) & (distance > 0.5)
    if kind <= 2:
        return np.hypot(along, across) <= 1
    corners = int(random.integers(3, 7))
    inside = np.ones_like(x, dtype=bool)
    for corner in range(corners):
        angle = 2 * np.pi * corner / corners + random.uniform(-0.3, 0.3)
        inside &= along * np.cos(angle) + across * np.sin(angle) <= 0.8
    return inside


def _texture(random: np.random.Generator, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """What is added to a colour (64, 64, 3): nothing, a slope, stripes, squares or spots."""
    kind, strength = int(random.integers(0, 5)), random.uniform(8, 28)
    tint = random.uniform(0.5, 1, 3) * strength
    angle, period = random.uniform(0, np.pi), random.uniform(4, 12)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    if kind == 0:
        pattern = np.zeros_like(x)
    elif kind == 1:
        pattern = (along - along.mean()) / SIZE * 2
    elif kind == 2:
        pattern = np.sign(np.sin(2 * np.pi * along / period))
    elif kind == 3:
        pattern = np.sign(np.sin(2 * np.pi * along / period) * np.sin(2 * np.pi * across / period))
    else:
        pattern = np.kron(random.uniform(-1, 1, (SIZE // 4, SIZE // 4)), np.ones((4, 4)))
    return pattern[..., None] * tint


def write_drawings(folder: Path, seeds: range) -> None:
    """Drawings as files: `NAME.png` and, for each shape, `NAME.K.png` beside it in `masks`."""
    from PIL import Image

    (folder / "masks").mkdir(parents=True, exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    for seed in seeds:
        picture, masks = drawing(seed)
        Image.fromarray(picture).save(folder / "images" / f"{seed:06d}.png")
        for number, mask in enumerate(masks):
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{seed:06d}.{number}.png")
    (folder / "README.json").write_text(json.dumps({"seeds": [seeds.start, seeds.stop]}))
