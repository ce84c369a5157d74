"""The repeated blocks of a model: found, not configured, for any transformer that calls them one after another."""

import copy
import inspect
import re
from collections import Counter
from collections.abc import Callable, Collection
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model.blocks import Block, decides, split_call
from sparsekit.model.expert_forms import split_experts
from sparsekit.model.hearing import given_sound, hears
from sparsekit.model.linears import CONVOLUTIONS, Linear, is_convolution, linears_of
from sparsekit.model.patched import beside_patches, given_patches
from sparsekit.model.tensors import tied_names
from sparsekit.model.towers import TOWERS, chosen_tower, tower_name
from sparsekit.model.vision import in_two_parts, perceives, sees_images

# by the forward pass of a family that is given less than it asks for
RAISED = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError)
# names of what follows an image encoder: asks for points (SAM), or merges patches for a language model (Qwen 3 VL)
PROMPTED = re.compile(
    r"(^|[.])(mask_decoder|prompt_encoder|memory_attention|memory_encoder|(deepstack_)?merger(s|_list))([.]|$)"
)
# of linears that are given positions (Swin 2)
POSITIONS = re.compile(r"(^|[._])position_bias([._]|$)")


class _Unlike(ValueError):
    """A block gives hidden states of another shape than it is given."""


def run_model(model: Any, given: Tensor, *, use_cache: bool = False) -> None:
    """One forward pass of tokens (sequences, length), of pixels or of sound, for the sake of what hooks see.

    Where a model has an encoder and a decoder, both read the same text. Of a model with a chosen tower that alone runs.
    """
    if hears(model):
        options = {"use_cache": use_cache} if in_two_parts(model) else {}
        chosen_tower(model)(**given_sound(model, given), **options)
        return
    model = chosen_tower(model)
    given = given.to(next((p.device for p in model.parameters() if not p.is_meta), given.device))
    if not given.is_floating_point():
        known = inspect.signature(model.forward).parameters  # encoders have no cache
        both = {"decoder_input_ids": given} if in_two_parts(model) else {}
        model(input_ids=given, **both, **({"use_cache": use_cache} if "use_cache" in known else {}))
        return
    if beside_patches(model):
        model(**given_patches(model, given.to(model.dtype)))
        return
    encode = getattr(model, "get_image_embeddings", model)  # what follows SAM's image encoder asks for points
    encode(pixel_values=given.to(model.dtype))


def find_blocks(model: nn.Module, convolutions: Collection[str] = ()) -> list[Block]:
    """The model's blocks: the list of modules that holds the most weight in linears.

    Of a model that reads text and sees images, or hears sound, too: the list of those that text goes through. Where
    there is an encoder and a decoder: the blocks of both, one after the other.

    convolutions: names of those that are to be linears. Each that is in no block is one of its own, behind all others

    Raises:
        ValueError: the model has no list of blocks with linears.
    """

    def weight(layers: nn.ModuleList) -> int:
        return sum(Linear("", m).weight.numel() for layer in layers for _, m in linears_of(layer))

    tower = tower_name(model)
    inside = f"{tower}." if tower else ""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and name.startswith(inside)]
    # a model of text and images is pruned in its text, one that cuts objects out in its image encoder
    others = PROMPTED if perceives(model) else TOWERS
    lists = [(name, m) for name, m in lists if not others.search(name.removeprefix(inside))]
    if in_two_parts(model):
        parts = [[item for item in lists if f".{part}." in f".{item[0]}."] for part in ("encoder", "decoder")]
        chosen = [[max(part, key=lambda item: weight(item[1]))] for part in parts if part]
    else:
        largest = max(lists, key=lambda item: weight(item[1]), default=("", nn.ModuleList()))
        chosen = [_stages(largest, lists, weight) if perceives(model) else [largest]]
    if not chosen or not all(sum(weight(layers) for _, layers in part) for part in chosen):
        raise ValueError(
            f"{type(model).__name__} has no repeated blocks: sparsekit needs a list of modules (nn.ModuleList) that "
            "hold linears, as every transformer in the transformers library has"
        )
    found: list[Block] = []
    for number, part in enumerate(chosen):
        for name, layers in part:
            for inner, layer in layers.named_children():
                home = f"{name}.{inner}"
                mine = {each.removeprefix(f"{home}.") for each in convolutions if each.startswith(f"{home}.")}
                found.append(Block(len(found), home, layer, mine))
                found[-1].part = number
    homes = tuple(f"{block.name}." for block in found)
    for name in convolutions:
        if not name.startswith(homes):
            found.append(Block(len(found), name, model.get_submodule(name), {""}))
            found[-1].number, found[-1].channels = None, 1
    return found


def _put_in_order(blocks: list[Block], names: Collection[str]) -> list[Block]:
    """The blocks in the order of these names, numbered by it; others are left out."""
    by_name = {block.name: block for block in blocks}
    ordered = [by_name[name] for name in names]
    for index, block in enumerate(ordered):
        block.index = index
    return ordered


Named = tuple[str, nn.ModuleList]


def _stages(largest: Named, lists: list[Named], weight: Callable[[nn.ModuleList], int]) -> list[Named]:
    """The lists of blocks inside a list of stages (Swin, SegFormer), or the list itself where its items are blocks."""
    inside: dict[str, list[Named]] = {}
    for name, layers in lists:
        if name.startswith(f"{largest[0]}."):
            inside.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), []).append((name, layers))
    whole = weight(largest[1])
    main = [each for each in inside.values() if sum(weight(layers) for _, layers in each) > whole / 2]
    return main[-1] if main else [largest]


def parts_of(blocks: list[Block]) -> list[list[Block]]:
    """The blocks of each list that a model has: one, or an encoder's and a decoder's."""
    found: dict[int, list[Block]] = {}
    for block in blocks:
        found.setdefault(block.part, []).append(block)
    return list(found.values())


@torch.no_grad()
def discover(
    model: nn.Module, tokens: Tensor, *, routers: bool = False, convolutions: Collection[str] = ()
) -> list[Block]:
    """The model's blocks with their groups, seen in one forward pass of `tokens` (sequences, length), best a few.

    A vision model's are pixels (images, channels, height, width), or patches (images, patches, values) where its tower
    takes these, here and in `first_inputs`; of a model that hears, sound. Works on the meta device too. Linears that
    the pass does not reach are left as they are and named in `skipped`, and so are routers and gates. Fused experts
    become linears (`split_experts`).

    routers: whether routers and gates count as linears like all others
    convolutions: names of those that do (`is_convolution`). One outside of the blocks is walked through as a block of
        its own, where the forward pass comes to it.

    Raises:
        ValueError: no blocks, a block runs more than once in a forward pass, or gives hidden states of another shape.
    """
    split_experts(model)
    _refuse_shared(model)
    _refuse_rescaled(model)
    try:
        return _discover(model, tokens, routers, convolutions)
    except RAISED:
        if not any(parameter.is_meta for parameter in model.parameters()):
            raise
    # the forward pass depends on numbers, or cannot be run in this dtype: it is given others, zeros, which take no
    # memory before they are written to
    stand_in = copy.deepcopy(model)._apply(_zeros)
    try:
        found = _discover(stand_in, torch.zeros(tokens.shape, dtype=tokens.dtype), routers, convolutions)
    except RAISED as error:
        given = "images" if sees_images(model) else "sound" if hears(model) else "text"
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{type(model).__name__} cannot be run on {given} alone to see its linears ({reason}), so it is not pruned "
            "yet"
        ) from error
    return adopt(model, found)


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype)


def _refuse_shared(model: Any) -> None:
    """Raise ValueError where blocks share weights, each of which would prune them in its own way."""
    homes = tuple(f"{block.name}." for block in find_blocks(model))
    for copied, kept in tied_names(model).items():
        if copied.startswith(homes) and kept.startswith(homes):
            raise ValueError(
                f"blocks of {type(model).__name__} share weights ({kept} and {copied}), and each would prune them in "
                "its own way: such models are not pruned yet"
            )


def _refuse_rescaled(model: Any) -> None:
    """Raise ValueError for an RWKV that divides its weights while it runs: what is written is not what was read."""
    every = getattr(model.config, "rescale_every", 0) if hasattr(model, "config") else 0
    if every and len(find_blocks(model)) > every:
        raise ValueError(
            f"{type(model).__name__} divides its weights by 2 at every {every}th block while it runs (rescale_every): "
            "set rescale_every to 0 in its config.json, which computes the same, and run again"
        )


def _discover(model: nn.Module, tokens: Tensor, routers: bool, convolutions: Collection[str]) -> list[Block]:
    blocks = find_blocks(model, convolutions)
    keep: list[Tensor] = []  # inputs stay alive, so that no two of them share an address
    hooks = []
    runs: Counter[str] = Counter()  # in the order in which they ran
    left: list[tuple[Block, tuple[int, ...]]] = []  # the block before, and the shape of what it gave

    def ran(block: Block, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        runs[block.name] += 1
        block.tuple_length = len(out) if isinstance(out, tuple | list) else 0
        block.passes = tuple(n for n in range(1, block.tuple_length) if isinstance(out[n], Tensor))
        before, after = split_call(args, kwargs)[0], out[0] if isinstance(out, tuple | list) else out
        shapes = [tuple(getattr(each, "shape", ("none",))) for each in (before, after)]
        if shapes[0] != shapes[1]:
            known = block.number is None or sees_images(model)
            if not known or len(shapes[0]) != len(shapes[1]):
                raise _Unlike(
                    f"{block.name} turns hidden states {shapes[0]} into {shapes[1]}, so what enters a block is not "
                    "what the one before it gives: such models cannot be pruned block by block"
                )
            block.scale = tuple(Fraction(new, old) for old, new in zip(shapes[0][1:], shapes[1][1:], strict=True))
        # beside a convolution that is a block of its own there is always something
        alone = bool(left) and None in (block.number, left[-1][0].number)
        block.bridged = alone or (sees_images(model) and bool(left) and left[-1][1] != shapes[0])
        block.part = left[-1][0].part if alone and block.number is None else block.part
        widths = {linear.shape[0] for linear in block.linears.values()}
        if len(shapes[1]) == 4 and shapes[1][-1] not in widths and shapes[1][1] in widths:
            block.channels = 1  # ConvNeXt
        left.append((block, shapes[1]))

    def reached(block: Block, name: str, seen: dict[Any, list[str]], inputs: Tensor) -> None:
        keep.append(inputs)
        patches = name if isinstance(block.linears[name].module, CONVOLUTIONS) else ""  # its own
        key = (
            inputs.untyped_storage()._cdata,
            inputs.storage_offset(),
            inputs._version,
            inputs.shape[-1],
            patches,
        )
        if key not in seen:
            seen[key] = []
            block.groups.append(seen[key])
        seen[key].append(name)

    for block in blocks:
        hooks.append(
            block.module.register_forward_hook(lambda _, *call, block=block: ran(block, *call), with_kwargs=True)
        )
        seen: dict[Any, list[str]] = {}
        for name, linear in block.linears.items():
            hooks.append(
                linear.module.register_forward_pre_hook(
                    lambda _, args, block=block, name=name, seen=seen: reached(block, name, seen, args[0])
                )
            )
    for block in blocks:
        block.watch(True)
    try:
        run_model(model, tokens, use_cache=True)
    except _Unlike:
        raise
    except ValueError as error:  # of the family's own forward pass
        raise RuntimeError(str(error)) from error
    finally:
        for handle in hooks:
            handle.remove()
        for block in blocks:
            block.watch(False)
    once = [block for block in blocks if block.number is not None or runs[block.name] == 1]
    for block in blocks:
        if block.number is None and (count := runs[block.name]) != 1:
            said = f"runs {count} times in a forward pass" if count else "the forward pass here does not reach"
            once[0].skipped[block.name] = f"a convolution that {said}"
    if None in {block.number for block in once}:
        once.sort(key=lambda block: [*runs, block.name].index(block.name))
    blocks = _put_in_order(once, [block.name for block in once])
    for block in blocks:
        if runs[block.name] != 1:
            raise ValueError(f"{block.name} runs {runs[block.name]} times in a forward pass; it must run exactly once")
        _alone_if_repeated(block)
        found = {name for group in block.groups for name in group}
        for name in block.linears.keys() - found:
            block.skipped[name] = "not reached by the forward pass that looks for linears"
        for name in filter(POSITIONS.search, found):
            block.skipped[name] = "it makes biases of positions, and no hidden states go through it"
        for name in () if routers else filter(decides, found):
            block.skipped[name] = "it decides where tokens go, or how much passes"
        block.keep_only(found - block.skipped.keys())
        for name, parameter in block.module.named_parameters():
            if parameter.dim() > 2 and f"{block.name}.{name}".removesuffix(".weight") not in block.linears:
                home = name.rpartition(".")[0]
                module = block.module.get_submodule(home)
                if isinstance(module, CONVOLUTIONS):
                    why = "that `targets` does not name" if is_convolution(module) else "of groups, or dilated"
                    block.skipped.setdefault(f"{block.name}.{home}", f"a convolution {why}")
                else:
                    block.skipped[f"{block.name}.{name}"] = f"{parameter.dim()} dimensions, in no form that is known"
    return blocks


def _alone_if_repeated(block: Block) -> None:
    """Give linears that run several times in a block, on different inputs, groups of their own, where they run last."""
    runs = Counter(name for group in block.groups for name in group)
    block.calls = {name: count for name, count in runs.items() if count > 1}
    alone = []
    for group in reversed(block.groups):
        mine = [name for name in group if name in block.calls]
        alone += [[name] for name in mine if [name] not in alone]
        group[:] = [name for name in group if name not in block.calls]
        alone += [group] if group else []
    block.groups = alone[::-1]


def adopt(model: nn.Module, known: list[Block]) -> list[Block]:
    """The blocks of `model` with the groups that were discovered in another copy of it, such as its skeleton."""
    split_experts(model)
    convolutions = [n for other in known for n, each in other.linears.items() if isinstance(each.module, CONVOLUTIONS)]
    blocks = _put_in_order(find_blocks(model, convolutions), [other.name for other in known])
    for block, other in zip(blocks, known, strict=True):
        block.linears = {name: block.linears[name] for name in other.linears}
        block.groups, block.calls, block.skipped = other.groups, other.calls, other.skipped
        block.tuple_length, block.passes = other.tuple_length, other.passes
        block.fixed, block.scale, block.bridged = other.fixed, other.scale, other.bridged
        block.part, block.channels = other.part, other.channels
    return blocks
