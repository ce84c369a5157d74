"""Cut models on disk: written so that plain transformers loads them where it can, and opened again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsekit.model import layouts
from sparsekit.model.beside import copy_beside
from sparsekit.model.checkpoint import Checkpoint
from sparsekit.model.discovery import find_blocks
from sparsekit.model.expert_forms import as_linears, join_experts, split_experts
from sparsekit.model.folders import locate
from sparsekit.model.hearing import hears
from sparsekit.model.loading import (
    auto_class,
    check_layers,
    image_processor,
    load_plain,
    plain_skeleton,
    plain_structure,
    read_tokenizer,
    refuse_lost,
    sound_reader,
)
from sparsekit.model.older import tell_older_readers
from sparsekit.model.resized import build_resized, resized_by
from sparsekit.model.resting import fill_outside, settle
from sparsekit.model.semi_structured import make_semi_structured
from sparsekit.model.structure.heads import BY_QUERY
from sparsekit.model.structure.shape import Shape
from sparsekit.model.tensors import Tensors, tied_names
from sparsekit.model.towers import same_tower
from sparsekit.model.vision import sees_images
from sparsekit.model.weights import Weights
from sparsekit.system import disk_errors, make_readable, sync

GENERATION = "generation_config.json"


def save_model(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    shape: Shape | None = None,
    *,
    source: Path | None = None,
    written: Path | None = None,
) -> Shape:
    """Write a model, cut or not, as a folder of safetensors with structure.json; an earlier one is replaced.

    The first of three layouts that can say what the model is:
    plain: its config can. `from_pretrained` of transformers loads it. All layers are equally wide.
    generated: a small modeling file can. `from_pretrained(..., trust_remote_code=True)` loads it, without sparsekit.
    own: `sparsekit.load` alone opens it; transformers answers that it does not know such a model.

    shape: `Shape.of(model, ...)`; None: nothing was cut out of it in earlier steps
    source: the checkpoint whose generation config is copied; None writes the model's own
    written: see `write_model`

    Returns:
        the shape with its layout and what loads it, as structure.json has it

    Raises:
        ValueError: the model is not what `shape` says.
        OSError: the disk is full or the folder cannot be written.
    """
    with as_linears(model):
        shape = shape or Shape.of(model)
        layout = layouts.choose_layout(model, shape)
    shape = replace(shape, layout=layout.name, load=layout.load)
    described = partial(_describe, layout=layout)

    def finish(aside: Path) -> None:
        described(aside)  # once more: the tokenizer came after it
        shape.write(aside)

    if written is None:
        weights: Any = partial(_all_weights, model, _cut_weights(model, layout))
    else:
        weights = None
    write_model(model, tokenizer, Path(folder), source=source, more=finish, weights=weights, written=written)
    return shape


def weights_in(folder: Path, model: Any, shape: Shape | None = None) -> Weights:
    """Where a model's weights are written block by block; `write_model`, or `save_model` with a shape, ends it.

    shape: of a model that structures were cut out of; None: of one that is whole
    """
    if shape is None:
        return Weights(folder, model)
    return _cut_weights(model, layouts.choose_layout(model, shape))(folder)


def _cut_weights(model: Any, layout: layouts.Layout) -> Callable[[Path], Weights]:
    # names as the model has them, which `load` reads, or as the family's files have them, where they differ
    options = {"original": layout.name == "plain", "zeros": layout.zeros, "describe": partial(_describe, layout=layout)}
    return partial(Weights, model=model, **options)  # type: ignore[arg-type]


def _describe(folder: Path, layout: layouts.Layout) -> None:
    for name, text in {"config.json": json.dumps(layout.config, indent=2) + "\n", **layout.files}.items():
        (folder / name).write_text(text, encoding="utf-8")


def _all_weights(model: Any, weights_in: Callable[[Path], Weights], folder: Path) -> None:
    """Write a model's weights at once."""
    weights_in(folder).lay_out(())


def write_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    source: Path | None = None,
    more: Callable[[Path], Any] = lambda aside: None,
    weights: Callable[[Path], Any] | None = None,
    written: Path | None = None,
) -> None:
    """Write a model as transformers does, aside, and move it into place when all of it is on the disk.

    source: the checkpoint whose generation config and processors are copied; None writes the model's own
    more: writes further files into the folder that it is given
    weights: writes config and weights into it; None: as a checkpoint of its family has them
    written: a folder in which config and weights are already, as `Weights` makes it; it becomes `folder`

    Raises:
        OSError: the disk is full or the folder cannot be written; an earlier folder of that name is still there.
    """
    aside = written or folder.with_name(f".{folder.name}.part")
    if written is None:
        shutil.rmtree(aside, ignore_errors=True)
    try:
        with disk_errors(aside):
            if written is None:
                (weights or partial(_all_weights, model, partial(Weights, model=model)))(aside)
            tokenizer.save_pretrained(aside)
        if source is not None and (source / GENERATION).is_file():
            shutil.copyfile(source / GENERATION, aside / GENERATION)  # even if it is not valid
        elif source is None and (aside / GENERATION).is_file():
            model.generation_config.save_pretrained(aside)
        if source is not None:
            copy_beside(source, aside)
        more(aside)
        tell_older_readers(aside)
        for file in aside.rglob("*"):
            if file.is_file():
                make_readable(file)
            sync(file)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        sync(folder.parent)
    finally:
        if written is None:
            shutil.rmtree(aside, ignore_errors=True)


def load(
    folder: str | Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    sparse: bool = False,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any]:
    """The causal language model of a checkpoint, in eval mode, and its tokenizer.

    Any checkpoint that transformers loads, and all that sparsekit has cut; of these no code in the folder is run.

    folder: a folder, the folder of a run, or a hub name
    dtype: such as "bfloat16"; None keeps the checkpoint's
    device: where the model is put; None: in CPU memory, or with `sparse` on CUDA
    sparse: put torch's semi-structured tensors in place of weights that are 2:4, which sparse tensor cores multiply;
        for inference, on CUDA in half precision

    Raises:
        ValueError: there is no such checkpoint, a tensor is missing, damaged or of another shape; or `sparse` is asked
            of a model or a machine that cannot do it.
    """
    if sparse and device is None and not torch.cuda.is_available():
        raise ValueError("sparse=True is for CUDA, whose tensor cores multiply 2:4, and torch finds none here")
    model, reader = _loaded(folder, dtype, trust_remote_code)
    if device is not None or sparse:
        model.to(device or "cuda")
    if sparse:
        make_semi_structured(model)
    return model, reader


def _loaded(folder: str | Path, dtype: str | None, trust_remote_code: bool) -> tuple[nn.Module, Any]:
    folder = locate(str(folder))
    if resized_by(folder):
        resized = build_resized(folder)
        resized.to(getattr(torch, dtype) if dtype is not None else None)
        _with_generation(resized, folder)
        return resized, _tokenizer(folder, resized)
    shape = Shape.read(folder)
    if shape is None or shape.layout == "plain":
        plain, tokenizer = load_plain(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        return _counted(plain, shape), tokenizer
    if dtype is not None:
        shape = replace(shape, config=shape.config | {"dtype": dtype})
    model: Any = shape.build()
    join_experts(model)
    _fill(model, Checkpoint(folder), model.dtype if dtype else None)
    _with_generation(model, folder)
    return model, _tokenizer(folder, model)


def _with_generation(model: Any, folder: Path) -> None:
    if (folder / GENERATION).is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)


def load_resting(
    folder: str | Path, *, like: Any = None, dtype: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The same model with its blocks on disk: each is empty until it is filled (see `resting`).

    like: another copy of it, of which a tower may be chosen: the same is of this one, and its blocks rest alone
    A model whose width between blocks was changed is in memory as a whole.

    Raises:
        ValueError: see `load`.
    """
    folder = Path(locate(str(folder)))
    if resized_by(folder):
        return load(folder, dtype=dtype, trust_remote_code=trust_remote_code)[0]
    shape = Shape.read(folder)
    if shape is None or shape.layout == "plain":
        model: Any = _counted(plain_structure(folder, dtype=dtype, trust_remote_code=trust_remote_code), shape)
    else:
        model = replace(shape, config=shape.config | ({"dtype": dtype} if dtype is not None else {})).build()
        _with_generation(model, folder)
    split_experts(model)
    same_tower(model, like)
    stored = Tensors(Checkpoint(folder), model)
    refuse_lost(folder, model, stored.missing)
    blocks = find_blocks(model)
    fill_outside(model, blocks, stored)
    for block in blocks:
        settle(block, stored)
    return model  # type: ignore[no-any-return]


def skeleton(folder: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The structure of any checkpoint on the meta device: `checkpoint.skeleton`, for cut ones too.

    Raises:
        ValueError: see `checkpoint.skeleton`; or structure.json does not describe a model.
    """
    if resized_by(folder):
        return build_resized(Path(folder), weights=False)
    check_layers(Path(folder))
    shape = Shape.read(folder)
    if shape is None or shape.layout == "plain":
        model = _counted(plain_skeleton(Path(folder), trust_remote_code=trust_remote_code), shape)
        split_experts(model)
        return model
    return shape.build("meta")


def _counted(model: nn.Module, shape: Shape | None) -> nn.Module:
    """A model that says how its heads are counted, if some were cut out of it."""
    if shape is not None:
        setattr(model, BY_QUERY, shape.queries)
    return model


def loading_code(folder: str | Path) -> str:
    """The lines of Python that load a checkpoint, for a model card."""
    shape = Shape.read(folder)
    if (shape is not None and shape.layout == "own") or resized_by(folder):
        return f'import sparsekit\nmodel, tokenizer = sparsekit.load("{folder}")'
    opens = auto_class(Path(folder))
    loader = opens.__name__
    if loader != "AutoModelForCausalLM" and getattr(opens, "main_input_name", "pixel_values") != "pixel_values":
        return (
            f"from transformers import AutoTokenizer, {loader}\n"
            f'model = {loader}.from_pretrained("{folder}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
        )
    if loader != "AutoModelForCausalLM":
        return (
            f"from transformers import AutoImageProcessor, {loader}\n"
            f'model = {loader}.from_pretrained("{folder}")\n'
            f'processor = AutoImageProcessor.from_pretrained("{folder}")'
        )
    trust = ", trust_remote_code=True" if shape is not None and shape.layout == "generated" else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder}"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}"{trust})'
    )


def opened(folder: str | Path, *, trust_remote_code: bool = False) -> Tensors:
    """A checkpoint's tensors by the names of its model, read one at a time.

    Raises:
        ValueError: the folder is no checkpoint, is damaged, or is of a model that cannot be built.
    """
    stored = Checkpoint(folder)
    return Tensors(stored, skeleton(stored.folder, trust_remote_code=trust_remote_code))


def _tokenizer(folder: Path, model: Any) -> Any:
    if sees_images(model):
        return image_processor(folder)
    if hears(model):
        return sound_reader(folder)
    return read_tokenizer(folder, model.config)


def _fill(model: Any, stored: Checkpoint, dtype: torch.dtype | None) -> None:
    """Give a model that was built its weights. dtype: of those of floating point; None: as they are stored."""
    copies = tied_names(model)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in copies or name in stored}
    refuse_lost(stored.folder, model, [name for name in wanted if name not in stored])
    for name, tensor in wanted.items():
        if stored.shape(name) != tuple(tensor.shape):
            raise ValueError(
                f"{stored.folder}: {name} has shape {stored.shape(name)}, by structure.json {tuple(tensor.shape)}"
            )
    weights = stored.tensors(wanted)
    if dtype is not None:
        weights = {name: weight.to(dtype) if weight.is_floating_point() else weight for name, weight in weights.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise ValueError(f"{stored.folder} has no {empty[0]}, and its config does not tell it either")
