"""What goes between the computer and a card while blocks are walked over: chunks of activations, and arguments once."""

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM

from sparsekit.maths import parse
from sparsekit.model import discover
from sparsekit.solvers.sparsegpt import sparsegpt
from sparsekit.walk import BlockStream, OneShot, Walk

CHUNKS = 6


@pytest.fixture
def walk(models, counting, card):
    """Walks over tiny-llama on the card and gives the counts."""

    def run(chunks=CHUNKS):
        model = AutoModelForCausalLM.from_pretrained(models / "tiny-llama").eval()
        tokens = torch.randint(0, 700, (chunks, 32), generator=torch.Generator().manual_seed(0))
        blocks = discover(model, tokens[:1])
        stream = BlockStream.over(model, blocks, tokens)
        pruner = OneShot(sparsegpt, dict.fromkeys([name for b in blocks for name in b.linears], parse("2:4")))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(accelerator="card", max_epochs=1, enable_model_summary=False, callbacks=[pruner], **quiet)
        with counting() as counts:
            trainer.fit(Walk(stream), stream)
        stream.close()
        return counts

    return run


def by(counter, file: str) -> int:
    return sum(count for line, count in counter.items() if line.startswith(file))


def test_chunks_that_fit_on_the_card_stay_there(walk):
    counts = walk()
    assert by(counts.to_card, "model/carried.py") == 2 * CHUNKS  # those that enter the first block, in its two passes
    assert by(counts.from_card, "system/activations.py") == 0


def test_chunks_that_do_not_fit_are_copied_once_a_pass(walk, monkeypatch):
    monkeypatch.setattr("sparsekit.walk.stream.room_on", lambda device: 0)
    counts = walk()
    assert by(counts.to_card, "model/carried.py") == (2 + 2 + 2 + 1) * CHUNKS  # the last block's outputs nobody needs
    assert by(counts.from_card, "system/activations.py") == 3 * CHUNKS


def test_arguments_of_blocks_are_copied_once_a_block(walk):
    counts = walk()
    assert by(counts.to_card, "model/blocks.py") <= 4 * (9 + 4)  # four blocks: nine parameters, and their arguments


def test_more_text_is_no_more_waiting(walk):
    assert walk(CHUNKS).syncs == walk(2 * CHUNKS).syncs
