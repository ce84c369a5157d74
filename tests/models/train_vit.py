"""Train the tiny vision model of this folder: `python tests/models/train_vit.py`. See README.md."""

import json
import platform
import time
from pathlib import Path

import sklearn
import torch
import transformers
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

HERE = Path(__file__).parent
EPOCHS, BATCH, RATE, DECAY, SMOOTHING, DROPOUT = 240, 64, 2e-3, 0.05, 0.05, 0.1


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Images (n, 1, 8, 8) from -1 to 1 as the processor makes them of a file, labels (n,), and which are test images:
    every fourth."""
    found = load_digits()
    values = (torch.tensor(found.images).float() / 16 * 255).round() / 255
    return (values[:, None] - 0.5) / 0.5, torch.tensor(found.target), torch.arange(len(values)) % 4 == 3


@torch.no_grad()
def accuracy(model: transformers.PreTrainedModel, images: Tensor, labels: Tensor) -> float:
    """Share of images whose likeliest class is right."""
    return float((model.eval()(pixel_values=images).logits.argmax(-1) == labels).float().mean())


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels, test = digits()
    names = [str(digit) for digit in range(10)]
    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=8,
        patch_size=2,
        num_channels=1,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        hidden_dropout_prob=DROPOUT,
    )
    model = transformers.ViTForImageClassification(config)
    own, right = images[~test], labels[~test]
    steps = len(own) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * steps)
    began = time.monotonic()
    for _ in range(EPOCHS):
        model.train()
        for chosen in torch.randperm(len(own)).split(BATCH)[:steps]:
            moved = torch.roll(own[chosen], tuple(torch.randint(-1, 2, (2,)).tolist()), (2, 3))  # by a pixel at most
            loss = cross_entropy(model(pixel_values=moved).logits, right[chosen], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    figures = {"parameters": model.num_parameters(), "seconds": round(time.monotonic() - began)}
    figures |= {"test_accuracy": accuracy(model, images[test], labels[test])}
    figures |= {"python": platform.python_version()}
    figures |= {library.__name__: library.__version__ for library in (torch, transformers, sklearn)}
    print(json.dumps(figures, indent=1))
    folder = HERE / "tiny-vit"
    model.eval().save_pretrained(folder)
    processor = ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    )
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
