"""Convolutions that `targets` names are linears over unfolded patches, wherever in the model they are."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from test_hierarchical import FAMILIES
from torch import nn

import sparsekit
from sparsekit.cli import main
from sparsekit.model import Linear, adopt, discover, load_plain, named_convolutions
from sparsekit.model.linears import is_convolution, rows
from sparsekit.run.allocation import sample_input
from sparsekit.walk import BlockStream
from sparsekit.walk.agreement import check_walk

MODELS = Path(__file__).parent / "models"
TINY = MODELS / "tiny-sam"
NECK = ["vision_encoder.neck.conv1", "vision_encoder.neck.conv2"]


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(3, 5, 4, stride=2, padding=1),
        nn.Conv1d(3, 5, 4, padding="same"),
        nn.Conv2d(3, 5, (2, 3), stride=(1, 2), padding=(1, 0)),
        nn.Conv2d(3, 5, 4, stride=4, padding="valid"),
        nn.Conv2d(3, 5, 3, padding="same"),
        nn.Conv3d(3, 5, (2, 3, 2), stride=(2, 1, 2), padding=(0, 1, 1)),
    ],
    ids=str,
)
def test_a_convolution_is_a_linear_over_patches(module):
    module = module.double()
    inputs = torch.randn(2, 3, *[8, 9, 7][: module.weight.dim() - 2], dtype=torch.float64)
    linear, expected = Linear("conv", module), module(inputs).flatten(2).transpose(1, 2)
    assert is_convolution(module)
    assert torch.allclose(rows(module, inputs) @ linear.weight.T + module.bias, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(linear.stored(linear.weight), module.weight)
    assert linear.matrix(module.weight).data_ptr() == module.weight.data_ptr()
    linear.write(torch.zeros(linear.shape))
    assert not module.weight.any()


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Linear(4, 4),
    ],
)
def test_what_is_no_linear_over_patches(module):
    assert not is_convolution(module)


VIT = transformers.ViTConfig(
    image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
)
# (class, configuration, convolutions in the order of the forward pass)
WITH = {
    "vit": (transformers.ViTForImageClassification, VIT, ["vit.embeddings.patch_embeddings.projection"]),
    "segformer": (
        *FAMILIES["segformer"][:2],
        [
            "segformer.stages.0.patch_embeddings.proj",
            "segformer.stages.0.blocks.0.attention.sequence_reduction.sequence_reduction",
        ],
    ),
    "convnext": (
        *FAMILIES["convnext"][:2],
        [
            "convnext.embeddings.patch_embeddings",
            *(f"convnext.encoder.stages.{n}.downsampling_layer.1" for n in (1, 2, 3)),
        ],
    ),
}


@pytest.fixture(params=WITH)
def family(request):
    kind, config, names = WITH[request.param]
    torch.manual_seed(0)
    model = kind(config).eval()
    return model, torch.randn(3, *sample_input(model).shape[1:]), names


def of_whole(model, names, pixels):
    """The norm of each input of every convolution, unfolded by torch, in the model's own forward pass, in float64."""
    found, hooks = {}, []
    for name in names:
        module = model.get_submodule(name)

        def see(module, args, name=name):
            said = {"stride": module.stride, "padding": module.padding}
            patches = nn.functional.unfold(args[0].double(), module.kernel_size, **said)
            found[name] = patches.square().sum((0, 2)).sqrt()

        hooks.append(module.register_forward_pre_hook(see))
    with torch.no_grad():
        model(pixel_values=pixels)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("correction", ["prefix", "none", "model"])
def test_they_are_walked_where_the_forward_pass_comes_to_them(family, correction):
    model, pixels, named = family
    convolutions = [name for name in named_convolutions(model, ["convolution"]) if "decode_head" not in name]
    assert set(named) <= set(convolutions)
    plain = discover(model, sample_input(model))
    bare = type(model)(model.config).to("meta")
    found = discover(bare, sample_input(bare), convolutions=convolutions)
    blocks = adopt(model, found)
    assert [block.index for block in blocks] == list(range(len(blocks)))
    assert [block.name for block in blocks if block.number is not None] == [block.name for block in plain]
    assert [block.number for block in blocks if block.number is not None] == [block.number for block in plain]
    check_walk(model, blocks, pixels)
    expected = of_whole(model, convolutions, pixels)
    stream = BlockStream.over(model, blocks, pixels, batch=2, error_correction=correction)
    for block in stream:
        for names, stats in stream.statistics(block):
            for name in set(names) & expected.keys():
                wanted = expected.pop(name)
                assert torch.allclose(stats.gram.diag().double().sqrt(), wanted, rtol=1e-4, atol=1e-5), name
        stream.advance(block)
    stream.close()
    assert not expected


def test_a_convolution_that_other_paths_end_in_is_refused():
    """The head of SegFormer sees what all stages give, which no walk from block to block carries."""
    kind, config, _ = WITH["segformer"]
    model = kind(config).eval()
    pixels = torch.randn(2, *sample_input(model).shape[1:])
    blocks = discover(model, sample_input(model), convolutions=["decode_head.linear_fuse"])
    with pytest.raises(ValueError, match=r"decode_head.linear_fuse is given more than .* name it in `ignore`"):
        check_walk(model, blocks, pixels)


def test_what_a_model_of_sound_begins_with():
    """Whisper's two convolutions of time, before its first layer."""
    config = transformers.WhisperConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        max_source_positions=100,
        num_mel_bins=8,
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    sound = sample_input(model)
    blocks = discover(model, sound, convolutions=named_convolutions(model, ["convolution"]))
    assert [block.name.rpartition("encoder.")[2] for block in blocks[:3]] == ["conv1", "conv2", "layers.0"]
    assert [block.part for block in blocks] == [0, 0, 0, 0, 1]
    check_walk(model, blocks, sound + torch.randn(sound.shape) if sound.is_floating_point() else sound)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    pytest.importorskip("PIL.Image")
    sys.path.insert(0, str(MODELS))
    from drawings import write_drawings

    found = tmp_path_factory.mktemp("drawings")
    write_drawings(found, range(900_000, 900_016))
    return found


def recipe(drawn: Path, output: Path, stages: list, **given) -> dict:
    said = {
        "model": str(TINY),
        "pattern": "2:4",
        "targets": ["attention", "mlp", "convolution"],
        "calibration": {"source": "images", "path": str(drawn / "images"), "samples": 8, "batch": 2},
        "stages": stages,
        "evaluate": {"samples": False},
        "output": str(output),
    }
    return said | given


@pytest.mark.parametrize(
    "stages", [["sparsegpt", {"finetune": {"steps": 2, "batch": 2}}], [{"lamp": {"epochs": 2}}]], ids=str
)
def test_sam_is_pruned_with_its_patches_and_its_neck(tmp_path, drawn, stages):
    result = sparsekit.fit(recipe(drawn, tmp_path / "run", stages), quiet=True)
    assert result.verified
    model, dense = load_plain(tmp_path / "run" / "model")[0], load_plain(TINY)[0]
    for name in ["vision_encoder.patch_embed.projection", *NECK]:
        weight, before = model.get_submodule(name).weight, dense.get_submodule(name).weight
        assert weight.shape == before.shape
        assert (weight.reshape(-1, 4) == 0).sum(1).eq(2).all(), name
        kept = sparsekit.masks(tmp_path / "run")[name]
        assert torch.equal(kept.reshape(weight.shape), weight != 0)
    told = {**dense.state_dict()}
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, told[name])}
    assert not any(name.startswith(("mask_decoder", "prompt_encoder")) for name in moved)
    assert main(["verify", str(tmp_path / "run")]) == 0


def test_they_are_left_as_they_are_unless_they_are_named(tmp_path, drawn):
    sparsekit.fit(recipe(drawn, tmp_path / "run", ["wanda"], targets=None), quiet=True)
    assert not sparsekit.masks(tmp_path / "run").keys() & set(NECK)


def test_one_alone(tmp_path, drawn):
    sparsekit.fit(recipe(drawn, tmp_path / "run", ["sparsegpt"], targets=["neck.conv2"]), quiet=True)
    assert [*sparsekit.masks(tmp_path / "run")] == NECK[1:]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["model"]["name"] == str(TINY)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"pattern": {"mlp": "2:4", "convolution": "50%"}, "targets": None}, "unless `targets` names them"),
        ({"stages": [{"wanda-sp": {"remove": "30%"}}, "wanda"]}, "targets name convolutions"),
        ({"targets": ["projecton"]}, "did you mean `projection`"),
    ],
)
def test_what_is_refused_in_advance(tmp_path, drawn, given, said):
    with pytest.raises(ValueError, match=said):
        sparsekit.fit(recipe(drawn, tmp_path / "run", ["wanda"]) | given, quiet=True)


def test_convolutions_of_groups_are_refused_by_name(tmp_path):
    kind, config, _ = WITH["convnext"]
    model = kind(config)
    from sparsekit.run.selection import _known

    with pytest.raises(ValueError, match="convolutions of groups"):
        _known(model, discover(model, sample_input(model)), "targets", ["dwconv"])
