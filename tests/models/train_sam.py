"""Train the tiny segmentation model of this folder: `python tests/models/train_sam.py`. See README.md."""

import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from drawings import SIZE, drawing
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

HERE = Path(__file__).parent
BATCH, POINTS, DECAY = 16, 4, 0.02
CYCLES = [(5000, 2e-3, False), (4500, 1e-3, True)]  # steps, rate, and whether boxes ask too, in a quarter of them
HELD_OUT = range(900_000, 900_200)  # seeds of the drawings that are measured and never trained on
MEAN, SPREAD = 127.5, 63.75


def config() -> transformers.SamConfig:
    """SAM's own parts, small: windowed and global blocks, relative positions, 16 x 16 patches of 4 x 4 pixels."""
    return transformers.SamConfig(
        vision_config={
            "hidden_size": 72,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": 4,
            "window_size": 6,  # 16 patches are padded to 18, as 64 are to 70 in the large ones
            "global_attn_indexes": [2, 5],
            "output_channels": 48,
            "num_pos_feats": 24,
            "initializer_range": 0.1,
        },
        prompt_encoder_config={"hidden_size": 48, "image_size": SIZE, "patch_size": 4, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 48,
            "mlp_dim": 96,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 48,
        },
        initializer_range=0.1,  # 0.02, for hundreds of channels, would let next to nothing through these
    )


def batch(seeds: range, random: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (images, 3, 64, 64), points (images, POINTS, 1, 2) as x and y, and the masks they ask for."""
    pixels, points, masks = [], [], []
    for seed in seeds:
        picture, found = drawing(seed)
        pixels.append(torch.from_numpy((picture.astype(np.float32) - MEAN) / SPREAD).permute(2, 0, 1))
        chosen = found[random.integers(0, len(found), POINTS)]
        inside = [np.argwhere(mask)[random.integers(0, mask.sum())][::-1].copy() for mask in chosen]
        points.append(torch.from_numpy(np.stack(inside)).float()[:, None])
        masks.append(torch.from_numpy(chosen).float())
    return torch.stack(pixels), torch.stack(points), torch.stack(masks)


def box(masks: Tensor) -> Tensor:
    """Left, top, right, bottom of each mask (..., 4)."""
    across, down = masks.amax(-2), masks.amax(-1)  # columns, rows in which there is any of it
    place = torch.arange(SIZE, dtype=masks.dtype)
    first = [torch.where(seen > 0, place, torch.inf).amin(-1) for seen in (across, down)]
    last = [torch.where(seen > 0, place, -1).amax(-1) for seen in (across, down)]
    return torch.stack([*first, *last], -1)


def overlap(logits: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of each mask."""
    both, either = ((logits > 0) & (masks > 0)).sum((-1, -2)), ((logits > 0) | (masks > 0)).sum((-1, -2))
    return both / either.clamp_min(1)


def cost(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy and the Dice loss of each mask."""
    entropy = binary_cross_entropy_with_logits(logits, masks, reduction="none").mean((-1, -2))
    share = logits.sigmoid()
    dice = 1 - (2 * (share * masks).sum((-1, -2)) + 1) / (share.sum((-1, -2)) + masks.sum((-1, -2)) + 1)
    return entropy + dice


@torch.no_grad()
def measure(model: transformers.SamModel) -> float:
    """Mean intersection over union on the held-out drawings, a random point of a shape as prompt."""
    model.eval()
    random, found = np.random.default_rng(0), []
    for start in range(HELD_OUT.start, HELD_OUT.stop, BATCH):
        pixels, points, masks = batch(range(start, min(start + BATCH, HELD_OUT.stop)), random)
        out = model(pixel_values=pixels, input_points=points, multimask_output=False)
        found.append(overlap(out.pred_masks[:, :, 0], masks).flatten())
    model.train()
    return float(torch.cat(found).mean())


def train(model: transformers.SamModel, random: np.random.Generator, steps: range, rate: float, boxes: bool) -> None:
    """One cycle of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(steps), pct_start=0.1)
    model.train()
    for step in steps:
        pixels, points, masks = batch(range(step * BATCH, (step + 1) * BATCH), random)
        asked = {"input_boxes": box(masks)} if boxes and step % 4 == 1 else {"input_points": points}
        out = model(pixel_values=pixels, multimask_output=step % 4 == 3, **asked)
        costs = cost(out.pred_masks, masks[:, :, None].expand_as(out.pred_masks))
        real = overlap(out.pred_masks.detach(), masks[:, :, None])
        # of several masks the best one is trained, as Segment Anything has it
        loss = costs.min(-1).values.mean() + mse_loss(out.iou_scores, real)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 249:
            print(step + 1, f"{loss.item():.4f} {measure(model):.4f}", flush=True)


def main() -> None:
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    model = transformers.SamModel(config())
    with torch.no_grad():  # Segment Anything's frequencies of positions; transformers starts with wilder ones
        model.shared_image_embedding.positional_embedding.copy_(torch.randn(2, 24))
    began, done = time.monotonic(), 0
    for steps, rate, boxes in CYCLES:
        train(model, random, range(done, done + steps), rate, boxes)
        done += steps
    figures = {"parameters": model.num_parameters(), "seconds": round(time.monotonic() - began)}
    figures |= {"iou": measure(model), "python": platform.python_version()}
    figures |= {library.__name__: library.__version__ for library in (torch, transformers, np)}
    print(json.dumps(figures, indent=1))
    folder = HERE / "tiny-sam"
    model.eval().save_pretrained(folder)
    processor = SamImageProcessorPil(
        size={"longest_edge": SIZE},
        pad_size={"height": SIZE, "width": SIZE},
        mask_size={"longest_edge": SIZE},
        mask_pad_size={"height": SIZE, "width": SIZE},
        image_mean=[MEAN / 255] * 3,
        image_std=[SPREAD / 255] * 3,
    )
    transformers.SamProcessor(processor).save_pretrained(folder)


if __name__ == "__main__":
    main()
