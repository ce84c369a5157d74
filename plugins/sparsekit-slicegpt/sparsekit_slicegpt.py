"""SliceGPT: the residual stream is rotated to its principal directions, of which the smallest are cut off."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import torch
from sparsekit.contracts import Context, Effect, Share, declares, share
from sparsekit.model import Block, Linear, discover, find_blocks, first_inputs
from sparsekit.model.structure import find_units
from torch import Tensor, nn

FAMILIES = ("llama", "mistral", "opt", "qwen2", "qwen3")
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


@declares(Effect(resizes=True, moves=True, start="dense"))
@torch.no_grad()
def slicegpt(context: Context, *, cut: Share = "25%") -> None:
    """Slice the model: its residual stream keeps 1 - cut of its width, rounded down to a multiple of 8.

    The gains of norms go into the linears behind them, the means that a LayerNorm subtracts into those before it, and
    tied embeddings part. Then block after block, with what the sliced blocks before it give, the residual stream before
    each attention and MLP is rotated to its principal directions (float64) and cut. Only the last block gives the full
    width, so that the head stays whole.

    cut: share of the width, such as "25%"; less of the parameters goes, because the shortcuts come in

    Source: Ashkboos et al. 2024, SliceGPT: Compress Large Language Models by Deleting Rows and Columns,
    arXiv:2401.15024.
    Memory: the whole model and the calibration text's hidden states, twice, on the device. No other stage may follow,
    and `sparsekit.load` alone opens the result. Raises ValueError for families other than LLaMA, Mistral, Qwen and OPT
    (with norms before).
    """
    model = context.model
    width = _check(model)
    size = int((1 - Fraction(repr(share(cut)))) * width) // 8 * 8  # in floats 80 % of 640 would leave 127.99...
    if not size:
        raise ValueError(f"cut is {cut!r}, which leaves fewer than 8 of {width} directions; cut less")
    before = sum(parameter.numel() for parameter in model.parameters())
    model.to(context.device)
    slice_to(model, context.tokens.to(context.device), size, batch=context.batch)
    after = sum(parameter.numel() for parameter in model.parameters())
    context.notes["slicegpt"] = {"width": [size, width], "parameters": [after, before]}


def rebuild(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Make a fresh model of the family the sliced one that these tensors are of."""
    _check(model)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.empty_like(head.weight))  # tied embeddings have parted
    model.config.tie_word_embeddings = False
    blocks = find_blocks(model)
    layers = model.get_submodule(blocks[0].name.rpartition(".")[0])
    _replace_head_norm(model, _eps(blocks[0].module.get_submodule(_norms(blocks[0])[0])))
    for block in blocks:
        layers[block.index] = Sliced(block.module, getattr(*_last_norm(model)), torch.empty(0), torch.empty(0))
    for name, tensor in tensors.items():
        home, _, last = name.rpartition(".")
        module = model.get_submodule(home)
        if last in dict(module.named_buffers(recurse=False)):
            module.register_buffer(last, tensor)
        else:
            _set(module, like=tensor, **{last: tensor})


slicegpt.rebuild = rebuild  # type: ignore[attr-defined]  # how what it made is opened again


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
        gram: Any = 0.0  # one matrix, whatever the number of chunks
        for chunk in chunks:
            rows = chunk.reshape(-1, self.width).double()
            gram = gram + rows.t() @ rows
        return torch.linalg.eigh(gram)[1].flip(1)


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


def _set(module: Any, like: Tensor | None = None, **tensors: Tensor) -> None:
    """Set parameters, in the dtype of those that were there (or of `like`), and the sizes that follow from them."""
    for name, tensor in tensors.items():
        old = like if like is not None else getattr(module, name, None)
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
