"""Tiny random models that see images, or are no decoders: classes of transformers with small sizes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.matrix.families import SIZES, TOKENIZER

# beside the sizes of text models: those of towers and of what stands between
MORE: tuple[tuple[str, Any], ...] = (
    (r"^(image_size|img_size|input_size)$", 32),
    (r"^(patch_size|spatial_patch_size)$", 8),
    (r"^(depth|encoder_layers|decoder_layers|num_encoder_layers|encoder_num_layers|num_global_layers)$", 2),
    (r"^(embed_dim|projection_dim|out_hidden_size|projector_hidden_size|d_kv)$", 64),
    (r"^(encoder_attention_heads|decoder_attention_heads|num_heads)$", 4),
    (r"^(encoder_ffn_dim|decoder_ffn_dim|d_ff|mlp_dim|projector_ffn_dim)$", 128),
    (
        r"^(image_token_index|image_token_id|video_token_id|vision_start_token_id|vision_end_token_id|audio_token_id)$",
        5,
    ),
    (r"^(image_seq_length|mm_tokens_per_image|num_image_tokens|image_seq_len)$", 16),
    (r"^(type_vocab_size|num_labels)$", 2),
    (r"^max_target_positions$", 64),
    (r"^max_source_positions$", 50),  # half of the frames of a second
    (r"^(num_mel_bins|input_feat_per_channel)$", 80),
    (r"^feature_projection_input_dim$", 160),
    (r"^(num_conv_pos_embeddings)$", 8),
    (r"^entity_vocab_size$", 16),
)
MROPE = r"(qwen2_vl|qwen2_5_vl|glm4v|glm46v|glm_ocr|paddleocr_vl|qwen2_5_omni)"  # families of such positions
TASKS = {
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "towers": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",  # the same by their vision towers, and CLIP's and SigLIP's
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "images": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "segments": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "masks": "MODEL_FOR_MASK_GENERATION_MAPPING_NAMES",
    "backbones": "",  # the bare models of the classes in BARE
    "two": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "sounds": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}
HEARD = ("speech", "ctc", "sounds")  # tasks that are given sound
SEEN = ("images", "segments", "masks", "backbones", "towers")  # tasks that are given images
BARE = {
    "beit": "BeitModel",
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModel",
    "dinov2": "Dinov2Model",
    "dinov3_vit": "DINOv3ViTModel",
    "siglip": "SiglipModel",
    "siglip_vision_model": "SiglipVisionModel",
    "swin": "SwinModel",
    "vit": "ViTModel",
    "vit_mae": "ViTMAEForPreTraining",
}
FOUR: dict[str, Any] = {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 2], "image_size": 32}
STAGES: dict[str, Any] = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
HIERA: dict[str, Any] = {"embed_dim": 16, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8], "patch_stride": [4, 4]}
# sizes of models of several stages, which are lists
GIVEN: dict[str, dict[str, Any]] = {
    "convnext": FOUR,
    "convnextv2": FOUR,
    "donut-swin": STAGES | {"window_size": 4},
    "swin": STAGES | {"window_size": 4},
    "swinv2": STAGES | {"window_size": 4},
    "hiera": HIERA | {"image_size": [32, 32]},
}
# what no rule says
BESIDE = {"whisper": {"vocab_size": 51_865}}  # its tokenizer adds tokens of its own
# families whose tower is given patches -> what makes them
QWEN = "Qwen2VLImageProcessorPil"
PATCHED = dict.fromkeys(
    [
        "cosmos3_omni",
        "exaone4_5",
        "hyperclovax_vision_v2",
        "lfm3_vl",
        "minimax_m3_vl",
        "muse_glimmer",
        "qwen2_5_omni_thinker",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_omni_moe_thinker",
        "qwen3_vl",
        "qwen3_vl_moe",
    ],
    QWEN,
)
PATCHED |= dict.fromkeys(("glm4v", "glm4v_moe", "glm_ocr"), "Glm4vImageProcessorPil")
PATCHED |= {"glm46v": "Glm46VImageProcessorPil", "gemma4": "Gemma4ImageProcessorPil"}
PATCHED |= {"hunyuan_vl": "HunYuanVLImageProcessorPil", "paddleocr_vl": "PaddleOCRVLImageProcessorPil"}
PATCHED |= {"video_llama_3": "VideoLlama3ImageProcessorPil", "lfm2_vl": "Siglip2ImageProcessorPil"}
PATCHED |= {"siglip2": "Siglip2ImageProcessorPil"}
PATCHED |= {"kimi_k25": QWEN}  # its own needs torchvision; the order of the patches is another one
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "do_resize": True}


def names(task: str) -> list[str]:
    """Model types with a class for this task."""
    from transformers.models.auto import modeling_auto

    found = getattr(modeling_auto, TASKS[task]) if TASKS[task] else BARE
    return sorted({*found, "clip", "siglip"} if task == "towers" else found)


def sizes(kind: Any) -> dict[str, Any]:
    """Small values for the fields of a config's class, and of the configs inside it."""
    from transformers import CONFIG_MAPPING

    try:
        fields = kind().to_dict()
    except Exception:
        fields = {}
    fields |= dict.fromkeys(getattr(kind, "__annotations__", {}) | getattr(kind, "attribute_map", {}), None) | fields
    parts = getattr(kind, "sub_configs", None) or {}
    given: dict[str, Any] = {}
    for field, own in fields.items():
        size = next((size for pattern, size in (*MORE, *SIZES) if re.fullmatch(pattern, field)), None)
        if field not in parts and size is not None and not isinstance(own, list | dict | bool):
            given[field] = size
    if "rope_parameters" in fields and re.match(MROPE, kind.model_type):
        half = 4 if "moe" in kind.model_type else 8  # of a head, in time, height and width
        given["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0} | {
            "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]
        }
    if "kv_lora_rank" in fields:
        given["num_key_value_heads"] = 4
    for name, part in parts.items():
        own = fields.get(name)
        told = own.get("model_type") if isinstance(own, dict) else None
        part = CONFIG_MAPPING[told] if told in CONFIG_MAPPING else part  # noqa: SIM401 (no mapping's get)
        if getattr(part, "model_type", ""):
            given[name] = sizes(part) | {"model_type": part.model_type}
    return given


def save(task: str, name: str, folder: Path) -> type:
    """Build a tiny random model of a type for a task and write it with what reads its input; its class."""
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    found = (getattr(modeling_auto, TASKS[task]) if TASKS[task] else BARE).get(name) or BARE[name]
    cls = getattr(transformers, found if isinstance(found, str) else found[0])
    kind = CONFIG_MAPPING[name]
    made = kind(**(GIVEN.get(name) or sizes(kind) | BESIDE.get(name, {})))
    with torch.device("meta"):
        if sum(parameter.numel() for parameter in cls(made).parameters()) > 20_000_000:
            raise ValueError("its config has sizes that no rule makes small")
    torch.manual_seed(0)
    model: Any = cls(made).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in key and parameter.std() < 0.1:
                parameter.mul_(min(5.0, 0.15 / max(float(parameter.std()), 1e-3)))
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / file, folder / file)
    if task in SEEN:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor(name, made)))
    if task in HEARD:
        (folder / "preprocessor_config.json").write_text(json.dumps(extractor(name, model)))
    return cls


def processor(name: str, config: Any) -> dict[str, Any]:
    """What reads images for a model: the family's own where its tower is given patches, for patches of its size."""
    kind = PATCHED.get(name)
    if kind is None:
        return PROCESSOR
    own = getattr(config, "vision_config", config)
    told = {
        "patch_size": own.patch_size,
        "encoder_patch_size": own.patch_size,
        "merge_size": getattr(own, "spatial_merge_size", 1),
        "temporal_patch_size": getattr(own, "temporal_patch_size", 2 if name == "muse_glimmer" else 1),
        "size": {"shortest_edge": 256, "longest_edge": 4096},
        "min_pixels": 256,
        "max_pixels": 4096,
        "max_num_patches": 16,
        "do_image_splitting": False,
        "max_soft_tokens": 70,
        "pooling_kernel_size": getattr(own, "pooling_kernel_size", 1),
    }
    return {"image_processor_type": kind, **told}


def recordings(folder: Path) -> Path:
    """A few seconds of noise with words, as a folder of wav files."""
    import soundfile

    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(0)
    lines = ["file_name,text"]
    for index in range(8):
        wave = torch.randn(24_000, generator=random) * 0.1
        soundfile.write(folder / f"{index}.wav", wave.numpy(), 16_000)
        lines.append(f"{index}.wav,what was said in number {index}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def is_heard(folder: Path) -> bool:
    """Whether a model is given sound alone, and not text beside it."""
    from sparsekit.model import hears, skeleton

    return hears(skeleton(folder))


def extractor(name: str, model: Any) -> dict[str, Any]:
    """What makes of sound what a family hears, at the tiny model's sizes."""
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES as NAMES

    bins = getattr(getattr(model.config, "encoder_config", model.config), "num_mel_bins", None) or 80
    sizes = {"feature_size": 1 if model.main_input_name == "input_values" else bins, "num_mel_bins": bins}
    sizes |= {"chunk_length": 1, "max_length": getattr(model.config, "max_length", None) or 64}
    kind = "SeamlessM4TFeatureExtractor" if name == "wav2vec2-bert" else NAMES[name]
    return {"feature_extractor_type": kind, "sampling_rate": 16_000, **sizes}


def pictures(folder: Path) -> Path:
    """A few small images of noise, in a folder for each of two classes."""
    from PIL import Image

    random = torch.Generator().manual_seed(0)
    for index in range(8):
        target = folder / str(index % 2) / f"{index}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (32, 32, 3), generator=random, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(target)
    return folder
