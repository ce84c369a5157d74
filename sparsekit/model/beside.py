"""What lies beside the weights of a checkpoint and goes with them: how images are read, what stands behind a model."""

import shutil
from pathlib import Path

from sparsekit.model.checkpoint import modules_behind

# how a model of text and images reads its images: as it was
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")

# of sentence-transformers: the modules behind the model, whose folders it names, and how they are used
SENTENCES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


def copy_beside(source: Path, folder: Path) -> None:
    """Copy what says how a model reads images, and what sentence-transformers puts behind a model, as they are."""
    for name in PROCESSORS:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)
    for name in modules_behind(source):
        shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
    for name in SENTENCES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
