"""Vision models of several stages: what lies between two blocks is carried along, and the walk is the model's own."""

import pytest
import torch
import transformers
from test_images import digits, recipe_of  # noqa: F401 (a fixture)
from test_run import fit

from sparsekit.model import discover
from sparsekit.run.allocation import sample_input
from sparsekit.train import reconstruct
from sparsekit.walk import BlockStream, weights_and_norms
from sparsekit.walk.agreement import check_walk

FOUR = {"hidden_sizes": [16, 32, 32, 64], "depths": [2, 1, 1, 2]}
HEADS = {"num_attention_heads": [1, 2, 2, 4]}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 3}
HIERA = {"image_size": [64, 64], "patch_stride": [4, 4], "embed_dim": 16, "depths": [1, 2, 1, 1]}
SAM2 = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 16,
    "num_attention_heads": 1,
    "image_size": [64, 64],
    "blocks_per_stage": [1, 2, 2, 1],
    "embed_dim_per_stage": [16, 32, 64, 128],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [8, 4, 14, 7],
    "global_attention_blocks": [4],
    "window_positional_embedding_background_size": [4, 4],
    "patch_stride": [4, 4],
}
DECODER = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32}


def sam2() -> transformers.Sam2Config:
    sizes = {"backbone_channel_list": [128, 64, 32, 16], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
    return transformers.Sam2Config(
        vision_config={"backbone_config": SAM2, "fpn_hidden_size": 32, **sizes},
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16},
        mask_decoder_config=DECODER,
    )


# (class, configuration, blocks, those with something before them, those that change the shape themselves)
FAMILIES = {
    "swin": (transformers.SwinForImageClassification, transformers.SwinConfig(**SWIN), 4, [2], []),
    "swinv2": (
        transformers.Swinv2ForImageClassification,
        transformers.Swinv2Config(**SWIN | {"window_size": 4}),
        4,
        [2],
        [],
    ),
    "segformer": (
        transformers.SegformerForSemanticSegmentation,
        transformers.SegformerConfig(**FOUR, **HEADS, decoder_hidden_size=32),
        6,
        [2, 3, 4],
        [],
    ),
    "pvt": (
        transformers.PvtForImageClassification,
        transformers.PvtConfig(**FOUR, **HEADS, image_size=64),
        6,
        [2, 3, 4],
        [],
    ),
    "convnext": (
        transformers.ConvNextForImageClassification,
        transformers.ConvNextConfig(**FOUR, image_size=64),
        6,
        [2, 3, 4],
        [],
    ),
    "hiera": (
        transformers.HieraForImageClassification,
        transformers.HieraConfig(**HIERA, num_heads=[1, 2, 4, 8]),
        5,
        [],
        [1, 3, 4],
    ),
    "sam2": (transformers.Sam2Model, sam2(), 6, [], [1, 3, 5]),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    kind, config, *expected = FAMILIES[request.param]
    torch.manual_seed(0)
    model = kind(config).eval()
    pixels = torch.randn(3, *sample_input(model).shape[1:])
    return model, pixels, discover(model, sample_input(model)), expected


def own_norms(model, blocks, pixels) -> dict[str, torch.Tensor]:
    """The norm of each input of every linear, seen in the model's own forward pass, in float64."""
    found, hooks = {}, []
    for block in blocks:
        for name, linear in block.linears.items():

            def see(_, args, name=name):
                found[name] = args[0].double().reshape(-1, args[0].shape[-1]).square().sum(0).sqrt()

            hooks.append(linear.module.register_forward_pre_hook(see))
    with torch.no_grad():
        getattr(model, "get_image_embeddings", model)(pixel_values=pixels)
    for hook in hooks:
        hook.remove()
    return found


def test_the_walk_is_the_models_own(family):
    model, pixels, blocks, (count, bridged, scaled) = family
    assert len(blocks) == count
    assert [block.index for block in blocks if block.bridged] == bridged
    assert [block.index for block in blocks if block.scale] == scaled
    check_walk(model, blocks, pixels)  # raises where it is not
    expected = own_norms(model, blocks, pixels)
    for name, _, norms in weights_and_norms(model, blocks, pixels, batch=2):
        assert torch.allclose(norms.double(), expected.pop(name), rtol=1e-4, atol=1e-5), name
    assert not expected


@pytest.mark.parametrize("correction", ["prefix", "sequential", "none", "block", "model"])
def test_every_correction_sees_the_dense_inputs_where_nothing_is_pruned(family, correction):
    model, pixels, blocks, _ = family
    expected = own_norms(model, blocks, pixels)
    stream = BlockStream.over(model, blocks, pixels, batch=2, error_correction=correction)
    for block in stream:
        for names, stats in stream.statistics(block):
            for name in names:
                assert torch.allclose(stats.gram.diag().double().sqrt(), expected[name], rtol=1e-4, atol=1e-5), name
        stream.advance(block)
    stream.close()


def test_every_block_is_trained_whatever_it_does_to_the_shape(family):
    """Blocks that halve the image and widen it, maps with channels first; its dense outputs are the target."""
    model, pixels, blocks, _ = family
    stream = BlockStream.over(model, blocks, torch.cat([pixels, pixels + 0.1]), batch=2, error_correction="none")
    for block in stream:
        inputs = [chunk.clone() for chunk in stream.inputs]
        targets = [block(chunk) for chunk in stream.inputs]
        if targets[0].dim() == 4:
            width = targets[0].shape[block.channels]
            assert width in {linear.shape[0] for linear in block.linears.values()}
        masks = {}
        for name, linear in block.linears.items():
            masks[name] = linear.weight.abs() > linear.weight.abs().median()
            linear.write_pruned(linear.weight * masks[name])
        found = reconstruct(block, stream.inputs, targets, masks=masks, epochs=2, held_out=0.34)
        assert found["before"] > 0 and found["after"] <= found["before"]
        for index, chunk in enumerate(inputs):
            assert torch.equal(stream.inputs[index], chunk)
            stream.inputs[index] = targets[index]
    stream.close()


@pytest.mark.parametrize("stages", ["[sparsegpt]", "[{lamp: {epochs: 1}}]"])
def test_a_swin_is_pruned_proved_and_opened(tmp_path, digits, stages):  # noqa: F811
    torch.manual_seed(0)
    config = transformers.SwinConfig(**SWIN, num_labels=10)
    transformers.SwinForImageClassification(config).save_pretrained(tmp_path / "swin")
    size = {"height": 32, "width": 32}
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    ViTImageProcessorPil(size=size).save_pretrained(tmp_path / "swin")
    file = recipe_of(tmp_path, digits, "run", "2:4", stages)
    done = fit(file, "--set", f"model={tmp_path / 'swin'}", "calibration.samples=8", "evaluate={}")
    assert done.returncode == 0, done.stderr
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model")
    blocks = discover(model, sample_input(model))
    for block in blocks:
        for linear in block.linears.values():
            assert (linear.weight.reshape(-1, 4) == 0).sum(1).ge(2).all()


def test_structures_of_such_models_are_refused(tmp_path, digits):  # noqa: F811
    config = transformers.PvtConfig(**FOUR, **HEADS, image_size=64, architectures=["PvtForImageClassification"])
    transformers.PvtForImageClassification(config).save_pretrained(tmp_path / "pvt")
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "pvt")
    file = recipe_of(tmp_path, digits, "run", "2:4", "[{wanda-sp: {remove: 20%}}]")
    done = fit(file, "--set", f"model={tmp_path / 'pvt'}", "evaluate={}", "pattern=null")
    assert done.returncode == 2 and "stages of different widths" in " ".join(done.stderr.split())
