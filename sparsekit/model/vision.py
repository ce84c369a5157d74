"""What a vision model is given, by its configuration."""

from typing import Any

import torch
from torch import Tensor

from sparsekit.model.hearing import hears
from sparsekit.model.patched import beside_patches, given_patches, sample_patches
from sparsekit.model.towers import chosen_tower, sees, tower_name


def sees_images(model: Any) -> bool:
    """Whether a model, or its chosen tower, is given pixels, and not tokens."""
    if tower_name(model):
        return sees(chosen_tower(model))
    return getattr(model, "main_input_name", None) == "pixel_values"


def perceives(model: Any) -> bool:
    """Whether a model, or its chosen tower, is given images or sound, and not text."""
    return sees_images(model) or hears(model)


def predicts_text(model: Any) -> bool:
    """Whether a model says of each token of a text which one comes next: perplexity and prompts have a meaning."""
    return bool(model.can_generate()) and not tower_name(model) and not in_two_parts(model) and not perceives(model)


def in_two_parts(model: Any) -> bool:
    """Whether a model has an encoder, and a decoder that reads what the encoder makes of another text."""
    return not tower_name(model) and bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def unreadable(model: Any) -> str:
    """Why neither text nor images nor sound go through a model, as a part of a sentence; empty: they do."""
    given = "" if tower_name(model) else getattr(model, "main_input_name", "input_ids")
    if given not in ("", "input_ids", "pixel_values") and not hears(model):
        return f"is given {given}, and neither text nor images nor sound"
    return ""


def channels_of(config: Any) -> int:
    """Colours that a vision model sees, by its configuration."""
    return int(getattr(vision_config(config), "num_channels", 3))


def vision_config(config: Any) -> Any:
    """The part of a configuration that describes the image encoder."""
    return getattr(config, "vision_config", config)


def described(model: Any) -> Any:
    """The part of a model's configuration that describes its blocks: the language model's, or the image encoder's."""
    whole = chosen_tower(model).config
    return vision_config(whole) if sees_images(model) else whole.get_text_config()


def height_and_width(size: Any) -> tuple[int, int]:
    """Height and width, of a number or a pair in a configuration."""
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


def patches(model: Any, side: int = 0) -> int:
    """Patches of an image, by the model's configuration.

    side: pixels along the sides of the squares that it is given, where it takes patches of images of any size
    """
    tower = chosen_tower(model)
    height, width = (side, side) if side and beside_patches(tower) else image_size(tower.config)
    own = vision_config(tower.config)
    # a stride for each stage, of which the first makes the patches; else a number or a pair
    strides = getattr(own, "patch_stride", None) or getattr(own, "strides", None) or (4,)
    size = getattr(own, "patch_size", None) or (strides if isinstance(strides, int) else strides[0])
    tall, wide = height_and_width(size)
    return (height // tall) * (width // wide)


def image_size(config: Any) -> tuple[int, int]:
    """Height and width of the images that a model is made for; 224 where it takes any."""
    own = vision_config(config)
    own = own if getattr(own, "image_size", None) else getattr(own, "backbone_config", own)
    return height_and_width(getattr(own, "image_size", None) or 224)


def sample_image(model: Any) -> Tensor:
    """Pixels of one image, or its patches, all zeros, as a vision model or tower is given them."""
    tower = chosen_tower(model)
    if beside_patches(tower):
        return sample_patches(tower)
    size = image_size(tower.config)
    return torch.zeros(1, channels_of(tower.config), *size, dtype=model.dtype, device=model.device)


def features(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features of images: of each as a whole (images, width), and of its places (images, places, width).

    pixels: (images, channels, height, width), or patches (images, patches, values) where the tower takes these

    Of CLIP and SigLIP the embedding that texts are compared with; else what the encoder's pooling gives, or where it
    has none its first token, or the mean of a map. Of a classifier the head is left out, of SAM all but the encoder.
    """
    base = chosen_tower(model)
    base = getattr(base, base.base_model_prefix, base) if base.base_model_prefix else base
    if hasattr(base, "get_image_embeddings"):
        places = base.vision_encoder(pixels)[0].flatten(2).transpose(1, 2)
        return places.mean(1), places
    if beside_patches(base):
        out = base(**given_patches(base, pixels))
        places, pooled = out.last_hidden_state, getattr(out, "pooler_output", None)
        places = places.reshape(len(pixels), -1, places.shape[-1])
        return (places if pooled is None else pooled.reshape(len(pixels), -1, pooled.shape[-1])).mean(1), places
    out = getattr(base, "vision_model", base)(pixel_values=pixels)
    places = out.last_hidden_state
    is_map = places.dim() == 4
    places = places.flatten(2).transpose(1, 2) if is_map else places
    pooled = getattr(out, "pooler_output", None)
    if pooled is not None:
        whole = pooled.flatten(1)
    else:
        whole = places.mean(1) if is_map else places[:, 0]
    return (base.visual_projection(whole) if hasattr(base, "visual_projection") else whole), places
