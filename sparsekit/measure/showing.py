"""What a model cuts out of a few pictures, drawn: to be seen beside what the dense model cuts out."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekit.measure.masks import Overlap, masks_of, prompt_of

COUNT, SIDE, OBJECTS = 4, 240, 8  # pictures, pixels of the longer side, objects of a picture
COLOURS = ((230, 80, 60), (60, 140, 230), (250, 190, 40), (70, 180, 100), (170, 90, 210), (40, 200, 200))
Mask = NDArray[np.bool_]


def mask_pictures(model: Any, processor: Any, overlap: Overlap, count: int = COUNT) -> list[dict[str, str]]:
    """{"prompt": which picture, "asked": the masks that are right, "made": those of the model} of a few pictures.

    Pictures are PNG as data URIs, each object in a colour of its own, with the point or box that asks for it in white.
    """
    every = max(1, len(overlap.chosen) // count)
    found = []
    for index in overlap.chosen[::every][:count]:
        picture, masks = overlap.found.objects(index, min(overlap.objects or OBJECTS, OBJECTS))
        if not masks:
            continue
        prompts = [prompt_of(mask, overlap.prompt) for mask in masks]
        made, _ = masks_of(model, processor, picture, prompts)
        drawn = {"asked": masks, "made": list(made[:, 0].numpy())}
        told = {"prompt": f"{overlap.name}, image {index + 1}"}
        found.append(told | {key: _drawn(picture, each, prompts) for key, each in drawn.items()})
    return found


def _drawn(picture: Any, masks: Sequence[Mask], prompts: Sequence[Sequence[float]]) -> str:
    from PIL import Image, ImageDraw

    pixels = np.asarray(picture).astype(np.float32) * 0.55
    for number, mask in enumerate(masks):
        pixels[mask] = pixels[mask] * 0.4 + np.array(COLOURS[number % len(COLOURS)]) * 0.6
    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    image = Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    for prompt in prompts:
        corners = [(place + 0.5) * scale for place in prompt]
        if len(prompt) == 4:
            draw.rectangle(corners, outline="white")
        else:
            x, y = corners
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill="white", outline="black")
    aside = io.BytesIO()
    image.quantize(64).save(aside, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(aside.getvalue()).decode()
