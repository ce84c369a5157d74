"""Train the tiny language models of this folder: `python tests/models/train.py llama` (`opt`, `moe`). See README.md."""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparsekit.data import Corpus
from sparsekit.data.corpora import python_docs

HERE = Path(__file__).parent
CONTEXT = 128
SEED = 0
SIZES = {"vocab_size": 768, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


def tokenizer(documents: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE. No token is added to a text, so a window is nothing but text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|end|>", "<|pad|>"]
    bpe.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=SIZES["vocab_size"], special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special[0], eos_token=special[0], pad_token=special[1], model_max_length=256
    )


def build(family: str, width: int, layers: int) -> transformers.PreTrainedModel:
    """A model with fresh weights, fp32."""
    torch.manual_seed(SEED)
    if family == "llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **SIZES,
                hidden_size=width,
                intermediate_size=width * 5 // 2,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            )
        )
    if family == "moe":
        return transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                **SIZES,
                hidden_size=width,
                intermediate_size=width * 5 // 2,
                moe_intermediate_size=width * 3 // 8,
                num_experts=16,
                num_experts_per_tok=2,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=width // 4,
                norm_topk_prob=True,
                output_router_logits=True,  # the loss has the term that evens out the experts' tokens
                router_aux_loss_coef=0.01,  # with the family's 0.001 a quarter of the experts is hardly used
                tie_word_embeddings=True,
            )
        )
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **SIZES,
            hidden_size=width,
            word_embed_proj_dim=width,
            ffn_dim=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            activation_function="relu",
            do_layer_norm_before=True,
            dropout=0.0,
            layerdrop=0.0,
        )
    )


def encode(corpus: Corpus, tok: transformers.PreTrainedTokenizerFast) -> Tensor:
    return torch.tensor(tok.backend_tokenizer.encode(corpus.separator.join(corpus.documents)).ids)  # (tokens,)


@torch.no_grad()
def perplexity(model: transformers.PreTrainedModel, tokens: Tensor) -> float:
    """Non-overlapping windows, tail dropped, exp of the mean loss of the CONTEXT - 1 predictions of each."""
    model.eval()
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [model(input_ids=part, labels=part).loss for part in windows.split(1)]
    model.train()
    return float(torch.stack(losses).mean().exp()) if losses else math.nan


@torch.no_grad()
def unigram(train: Tensor, test: Tensor) -> float:
    """Perplexity of the token frequencies of the training text, each count raised by one."""
    counts = torch.bincount(train, minlength=SIZES["vocab_size"]).double() + 1
    return float(cross_entropy(counts.log().expand(len(test), -1), test).exp())


def train(model: transformers.PreTrainedModel, tokens: Tensor, test: Tensor, args: argparse.Namespace) -> None:
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": args.decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98))
    warm = args.steps // 20

    def rate(step: int) -> float:
        done = (step - warm) / (args.steps - warm)
        return (step + 1) / warm if step < warm else 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    draw = torch.Generator().manual_seed(SEED)
    model.train()
    for step in range(args.steps):
        starts = torch.randint(len(tokens) - CONTEXT + 1, (args.batch,), generator=draw)
        batch = torch.stack([tokens[i : i + CONTEXT] for i in starts.tolist()])  # (batch, CONTEXT)
        noise = torch.randint(SIZES["vocab_size"], batch.shape, generator=draw)
        noisy = torch.where(torch.rand(batch.shape, generator=draw) < args.noise, noise, batch)
        loss = model(input_ids=noisy, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if args.watch and (step + 1) % args.watch == 0:
            print(step + 1, round(loss.item(), 3), round(perplexity(model, test), 2), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("family", choices=["llama", "opt", "moe"])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, help="1200 for llama and moe, 3000 for opt, which learns more slowly")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--decay", type=float, default=0.3)
    parser.add_argument("--noise", type=float, default=0.1, help="share of input tokens replaced, against overfitting")
    parser.add_argument("--watch", type=int, default=0, help="print the held-out perplexity every so many steps")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.steps = args.steps or {"llama": 1200, "opt": 3000, "moe": 1200}[args.family]
    torch.set_num_threads(1)  # the result depends on it, and two would wait for each other on a busy machine
    torch.use_deterministic_algorithms(True)

    calibration, held_out = python_docs("calibration"), python_docs("test")
    tok = tokenizer(list(calibration.documents))
    tokens, test = encode(calibration, tok), encode(held_out, tok)
    model = build(args.family, args.width, args.layers)
    figures = {"parameters": model.num_parameters(), "tokens": len(tokens), "test_tokens": len(test)}
    figures |= {"unigram": unigram(tokens, test), "untrained": perplexity(model, test)}
    began = time.monotonic()
    train(model, tokens, test, args)
    figures |= {"seconds": round(time.monotonic() - began), "trained": perplexity(model, test)}
    figures |= {"training_text": perplexity(model, tokens[: 64 * CONTEXT])}
    versions = {"python": platform.python_version()}
    versions |= {library.__name__: library.__version__ for library in (torch, transformers, tokenizers)}
    print(json.dumps(figures | versions, indent=1))
    folder = args.output or HERE / f"tiny-{args.family}"
    if args.family == "moe":
        model.config.output_router_logits = False
    model.save_pretrained(folder)
    tok.save_pretrained(folder)


if __name__ == "__main__":
    main()
