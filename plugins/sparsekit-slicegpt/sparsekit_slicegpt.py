"""SliceGPT: the residual stream is rotated to its principal directions, of which the smallest are cut off."""

import argparse
import json
import shutil
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sparsekit.contracts import share
from sparsekit.data import calibration_tokens
from sparsekit.measure import perplexity, perplexity_windows
from sparsekit.model import Block, Linear, discover, first_inputs, load_plain, load_tokenizer, locate
from sparsekit.model.structure import find_units
from torch import Tensor, nn

FAMILIES = ("llama", "mistral", "opt", "qwen2", "qwen3")
NAME = "sparsekit-slicegpt"  # the model_type in config.json
NORMS = (("input_layernorm", "post_attention_layernorm"), ("self_attn_layer_norm", "final_layer_norm"))


class Norm(nn.Module):
    """x / sqrt(sum x^2 / width + eps), where width is that of the model before it was sliced. Has no weights."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension, in float32 at least."""
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return (x * (x.square().sum(-1, keepdim=True) / self.width + self.eps).rsqrt()).to(hidden.dtype)


class Sliced(nn.Module):
    """A decoder layer between rotations: the shortcuts (in, out) carry the residual stream from one to the next."""

    def __init__(self, layer: nn.Module, norm: Norm, attention_shortcut: Tensor, mlp_shortcut: Tensor):
        super().__init__()
        self.norm, self.self_attn = norm, layer.self_attn
        parts = OrderedDict((name, getattr(layer, name, None)) for name in ("fc1", "activation_fn", "fc2"))
        self.mlp = layer.mlp if hasattr(layer, "mlp") else nn.Sequential(parts)  # type: ignore[arg-type]
        self.attention_type = getattr(layer, "attention_type", None)
        self.attention_shortcut, self.mlp_shortcut = nn.Parameter(attention_shortcut), nn.Parameter(mlp_shortcut)

    def attend(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the attention adds to the residual stream."""
        return self.self_attn(self.norm(hidden), *args, **kwargs)[0]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states (batch, length, size), of another size on the way out."""
        middle = hidden_states @ self.attention_shortcut + self.attend(hidden_states, *args, **kwargs)
        return middle @ self.mlp_shortcut + self.mlp(self.norm(middle))


@torch.no_grad()
def slicegpt(model: Any, tokens: Tensor, *, cut: str | float, batch: int = 8) -> None:
    """Slice a model in place: its residual stream keeps 1 - cut of its width, rounded down to a multiple of 8.

    The gains of norms go into the linears behind them, the means that a LayerNorm subtracts into those before it, and
    tied embeddings part. Then block after block, with what the sliced blocks before it give, the residual stream before
    each attention and MLP is rotated to its principal directions (float64) and cut. Only the last block gives the full
    width, so that the head stays whole.

    tokens: calibration text (sequences, length); batch: sequences at once
    cut: share of the width, such as "25%"; less of the parameters goes, because the shortcuts come in

    Source: Ashkboos et al. 2024, SliceGPT: Compress Large Language Models by Deleting Rows and Columns,
    arXiv:2401.15024.
    Memory: the whole model and the calibration text's hidden states, twice, where the model is.
    Raises ValueError for families other than LLaMA, Mistral, OPT (pre-norm) and Qwen.
    """
    width = _check(model)
    size = int((1 - share(cut)) * width) // 8 * 8
    if not size:
        raise ValueError(f"cut is {cut!r}, which leaves fewer than 8 of {width} directions; cut less")
    slice_to(model, tokens, size, batch=batch)


@torch.no_grad()
def slice_to(model: Any, tokens: Tensor, size: int, *, batch: int = 8, principal: bool = True) -> None:
    """The same for a given size of the residual stream. principal: false takes random directions, to compare with."""
    width = _check(model)
    blocks = discover(model, tokens[:1])
    parts = find_units(model, blocks, ["attention", "mlp"]).parts
    _fold(model, blocks, parts)
    turn = _Directions(width, principal)
    inputs = list(first_inputs(model, blocks, tokens, batch))
    q = turn(inputs)[:, :size]  # (width, size), from the model's own basis
    for embedding in _embeddings(model):
        _set(embedding, weight=embedding.weight.double() @ q)
    inputs = [(chunk.double() @ q).to(chunk) for chunk in inputs]
    layers = model.get_submodule(blocks[0].name.rpartition(".")[0])
    for block, attention, mlp in zip(blocks, parts[::2], parts[1::2], strict=True):
        layer = Sliced(block.module, getattr(*_last_norm(model)), torch.empty(0), torch.empty(0))
        q = _rotate(block, attention, layer, "attention_shortcut", inputs, q, lambda x: turn(x)[:, :size], layer.attend)
        last = block is blocks[-1]
        kept = width if last else size

        def after(hidden: Tensor, *_: Any, layer: Sliced = layer, **__: Any) -> Tensor:
            return layer.mlp(layer.norm(hidden))

        q = _rotate(block, mlp, layer, "mlp_shortcut", inputs, q, lambda x, kept=kept: turn(x)[:, :kept], after)
        layers[block.index] = layer
    head = model.get_output_embeddings()
    _set(head, weight=head.weight.double() @ q)


def _rotate(
    block: Block, part: Any, layer: Sliced, shortcut: str, inputs: list[Tensor], q: Tensor, turn: Any, add: Any
) -> Tensor:
    """Rotate and slice one part of a layer; `inputs` become what enters the next. Returns the new directions."""
    for name in part.inputs:
        _set(block.linears[name].module, weight=block.linears[name].weight.double() @ q)
    whole = []  # the stream behind the part, in the model's own basis
    for chunk in inputs:
        args, kwargs = block.arguments[len(chunk)]
        wide = torch.promote_types(chunk.dtype, torch.float32)
        whole.append((chunk.double() @ q.t() + add(chunk, *args, **kwargs)).to(wide))
    new = turn(whole)
    output = block.linears[part.output].module
    bias = output.bias
    _set(output, weight=new.t() @ output.weight.double())
    if bias is not None:
        _set(output, bias=bias.double() @ new)
    setattr(layer, shortcut, nn.Parameter((q.t() @ new).to(inputs[0])))
    inputs[:] = [(chunk.double() @ new).to(inputs[0]) for chunk in whole]
    return new


class _Directions:
    """Principal directions (width, width) of hidden states, the largest first; or random ones."""

    def __init__(self, width: int, principal: bool):
        self.width, self.principal = width, principal
        self.draw = torch.Generator().manual_seed(0)

    def __call__(self, chunks: Iterable[Tensor]) -> Tensor:
        if not self.principal:
            return torch.linalg.qr(torch.randn(self.width, self.width, generator=self.draw, dtype=torch.float64))[0]
        rows = (chunk.reshape(-1, self.width).double() for chunk in chunks)
        return torch.linalg.eigh(torch.stack([x.t() @ x for x in rows]).sum(0))[1].flip(1)


def save(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write a sliced model; `load` opens it, transformers answers that it does not know such a model."""
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    config = model.config.to_dict() | {"sliced_model_type": model.config.model_type, "model_type": NAME}
    (aside / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, aside / "model.safetensors")
    tokenizer.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def load(folder: str | Path) -> tuple[Any, Any]:
    """A sliced model and its tokenizer. Raises ValueError where the folder holds none."""
    import transformers

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder.is_dir() else {}
    if config.pop("model_type", None) != NAME:
        raise ValueError(f"{folder} holds no model that sparsekit-slicegpt has saved")
    settings = transformers.AutoConfig.for_model(config.pop("sliced_model_type"), **config)
    state = load_file(folder / "model.safetensors")
    model: Any = transformers.AutoModelForCausalLM.from_config(settings, dtype=next(iter(state.values())).dtype).eval()
    _check(model)
    blocks = discover(model, torch.zeros(1, 8, dtype=torch.long))
    layers = model.get_submodule(blocks[0].name.rpartition(".")[0])
    _replace_head_norm(model, _eps(blocks[0].module.get_submodule(_norms(blocks[0])[0])))
    for block in blocks:
        layers[block.index] = Sliced(block.module, getattr(*_last_norm(model)), torch.empty(0), torch.empty(0))
    for name, tensor in state.items():
        home, _, last = name.rpartition(".")
        _set(model.get_submodule(home), **{last: tensor})
    if lost := model.state_dict().keys() ^ state.keys():
        raise ValueError(f"{folder} lacks tensors of the model, or has others: {', '.join(sorted(lost)[:3])}")
    return model, load_tokenizer(folder)


def main() -> None:
    """The command line: MODEL OUTPUT --cut 25% [--source wikitext2 --samples 128 --length 2048]."""
    parser = argparse.ArgumentParser("sparsekit-slicegpt", description="Slice a model and save it.")
    parser.add_argument("model", help="a hub name or a folder")
    parser.add_argument("output", type=Path)
    parser.add_argument("--cut", default="25%", help="share of the residual stream's width")
    parser.add_argument("--source", default="wikitext2", help="calibration and test text, as in a recipe")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    given = parser.parse_args()
    try:
        model, tokenizer = load_plain(locate(given.model))
        size = model.config.get_text_config().vocab_size  # type: ignore[union-attr,operator]
        positions = getattr(model.config, "max_position_embeddings", None)
        settings = {"source": given.source, "samples": given.samples, "length": given.length, "seed": 0}
        tokens = calibration_tokens(settings, tokenizer, positions, size)
        tests = perplexity_windows({"perplexity": [given.source], "length": given.length}, tokenizer, positions)
        figures = [(perplexity(model, *tests.values()), sum(p.numel() for p in model.parameters()))]
        slicegpt(model, tokens, cut=given.cut)
        save(model, tokenizer, given.output)
        model, _ = load(given.output)
        figures.append((perplexity(model, *tests.values()), sum(p.numel() for p in model.parameters())))
    except ValueError as error:
        raise SystemExit(f"sparsekit-slicegpt: {error}") from error
    for name, (value, parameters) in zip(("dense", "sliced"), figures, strict=True):
        print(f"{name}: perplexity {value:.2f}, {parameters:,} parameters")
    print(f'sparsekit_slicegpt.load("{given.output}") opens it')


def _check(model: Any) -> int:
    """The width of the residual stream."""
    config = model.config
    odd = getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size
    if config.model_type not in FAMILIES or odd or not getattr(config, "do_layer_norm_before", True):
        raise ValueError(
            f"a model of type {config.model_type} cannot be sliced; {', '.join(FAMILIES)} with norms before attention "
            "and MLP can"
        )
    return int(config.hidden_size)


def _fold(model: Any, blocks: list[Block], parts: Iterable[Any]) -> None:
    """Norms without weights, whose gains, biases and means are in the linears around them; embeddings untied."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    home, name = _last_norm(model)
    final = getattr(home, name)
    centred = isinstance(final, nn.LayerNorm)
    parts = list(parts)
    for block, attention, mlp in zip(blocks, parts[::2], parts[1::2], strict=True):
        for norm, part in zip(_norms(block), (attention, mlp), strict=True):
            gain = block.module.get_submodule(norm)
            for linear in part.inputs:
                _absorb(block.linears[linear].module, gain)
            if centred:
                _centre(block.linears[part.output])
    _absorb(head, final)
    if centred:
        for embedding in _embeddings(model):
            weight = embedding.weight.double()
            _set(embedding, weight=weight - weight.mean(1, keepdim=True))
    _replace_head_norm(model, _eps(final))


def _absorb(linear: Any, norm: Any) -> None:
    """W (g n + b) = (W g) n + W b."""
    weight, shift = linear.weight.double(), getattr(norm, "bias", None)
    if shift is not None:
        bias = weight @ shift.double()
        _set(linear, bias=bias if linear.bias is None else linear.bias.double() + bias)
    _set(linear, weight=weight * norm.weight.double())


def _centre(linear: Linear) -> None:
    """Its outputs get mean 0, as a LayerNorm behind it would have them."""
    weight = linear.weight.double()
    _set(linear.module, weight=weight - weight.mean(0))
    bias: Any = linear.module.bias
    if bias is not None:
        _set(linear.module, bias=bias.double() - bias.double().mean())


def _set(module: Any, **tensors: Tensor) -> None:
    """Set parameters, in the dtype of those that were there, and the sizes that follow from them."""
    for name, tensor in tensors.items():
        old = getattr(module, name, None)
        dtype = module.weight.dtype if old is None else old.dtype
        setattr(module, name, nn.Parameter(tensor.detach().to(dtype).contiguous()))
    if "weight" in tensors and isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    if "weight" in tensors and isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]


def _embeddings(model: Any) -> list[Any]:
    return [module for module in model.base_model.modules() if isinstance(module, nn.Embedding)]


def _norms(block: Block) -> tuple[str, str]:
    return next(names for names in NORMS if hasattr(block.module, names[0]))


def _eps(norm: Any) -> float:
    return norm.eps if isinstance(norm, nn.LayerNorm | Norm) else norm.variance_epsilon


def _last_norm(model: Any) -> tuple[Any, str]:
    """The module that holds the norm before the head, and its name there."""
    home = getattr(model.base_model, "decoder", model.base_model)
    return home, "final_layer_norm" if hasattr(home, "final_layer_norm") else "norm"


def _replace_head_norm(model: Any, eps: float) -> None:
    setattr(*_last_norm(model), Norm(model.config.hidden_size, eps))
