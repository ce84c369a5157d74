"""What other libraries call the things that a recipe says, for answers to those who come from there."""

from collections.abc import Collection

PRUNING, PEFT, TRAINING = "of other pruning tools", "peft's word", "of transformers' and trl's trainers"
# a word of theirs -> whose it is, the key or option here, and what to write
WORDS: dict[str, tuple[str, str, str]] = {
    "sparsity": (PRUNING, "pattern", 'pattern: "50%"'),
    "sparsity_ratio": (PRUNING, "pattern", 'pattern: "50%"'),
    "sparsity_type": (PRUNING, "pattern", 'pattern: "2:4"'),
    "mask_structure": (PRUNING, "pattern", 'pattern: "2:4"'),
    "prunen": (PRUNING, "pattern", 'pattern: "2:4", where n of m stay'),
    "prunem": (PRUNING, "pattern", 'pattern: "2:4", where n of m stay'),
    "pruning_ratio": (PRUNING, "remove", 'remove: "25%"'),
    "dampening_frac": (PRUNING, "damping", "damping: 0.01"),
    "percdamp": (PRUNING, "damping", "damping: 0.01"),
    "block_size": (PRUNING, "block", "block: 128"),
    "blocksize": (PRUNING, "block", "block: 128"),
    "modifiers": (PRUNING, "stages", "stages: [sparsegpt]"),
    "recipe": (PRUNING, "stages", "stages: [sparsegpt]"),
    "dataset": (PRUNING, "source", "source: c4"),
    "dataset_id": (PRUNING, "source", "{source: hub, id: NAME}"),
    "nsamples": (PRUNING, "samples", "samples: 128"),
    "num_calibration_samples": (PRUNING, "samples", "samples: 128"),
    "max_seq_length": (PRUNING, "length", "length: 2048"),
    "seqlen": (PRUNING, "length", "length: 2048"),
    "wbits": (PRUNING, "bits", "bits: 4"),
    "num_bits": (PRUNING, "bits", "bits: 4"),
    "group_size": (PRUNING, "group", "group: 128"),
    "output_dir": (TRAINING, "output", "output: runs/mine"),
    "save_path": (PRUNING, "output", "output: runs/mine"),
    "model_name_or_path": (TRAINING, "model", "model: NAME"),
    "r": (PEFT, "rank", "rank: 8"),
    "lora_r": (PEFT, "rank", "rank: 8"),
    "lora_alpha": (PEFT, "alpha", "alpha: 16"),
    "lora_dropout": (PEFT, "dropout", "dropout: 0.05"),
    "target_modules": (PEFT, "targets", "targets: [q_proj, v_proj]"),
    "max_steps": (TRAINING, "steps", "steps: 100"),
    "num_train_epochs": (TRAINING, "tokens", "tokens: 300000, over all steps"),
    "per_device_train_batch_size": (TRAINING, "batch", "batch: 4"),
    "gradient_accumulation_steps": (TRAINING, "accumulate", "accumulate: 4"),
    "warmup_ratio": (TRAINING, "warmup", "warmup: 0.1"),
    "lr": (TRAINING, "learning_rate", "learning_rate: 0.0001"),
    "gradient_checkpointing": (TRAINING, "checkpointing", "checkpointing: true"),
    "bf16": (TRAINING, "trainer", "trainer: {precision: bf16-mixed}"),
}
# methods of packages that are not among those installed with sparsekit
PACKAGES = {
    "admm": "sparsekit-admm",
    "bonsai": "sparsekit-bonsai",
    "dsnot": "sparsekit-dsnot",
    "maskllm": "sparsekit-maskllm",
    "ria": "sparsekit-ria",
    "slicegpt": "sparsekit-slicegpt",
}


def said_elsewhere(name: str, valid: Collection[str]) -> str:
    """What a word of another library is here, or whose package a method is in: the end of a sentence; empty: neither.

    name: with underscores. valid: what could be said in its place
    """
    if name in PACKAGES:
        package = PACKAGES[name]  # on no index: a name there would be a stranger's
        return f"which is in the package {package}: in a clone of sparsekit, pip install ./plugins/{package}"
    whose, here, line = WORDS.get(name, ("", "", ""))
    return f"which is {whose}: here write `{line}`" if here in valid else ""
