"""Models that hear are pruned: encoders of sound, Whisper's encoder and decoder, and what they hear is measured."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sparsekit
from sparsekit.cli import main
from sparsekit.data import sounds
from sparsekit.measure.listening import spelled, word_errors
from sparsekit.measure.metrics import Preparation, Subject
from sparsekit.model import Heard, discover, hears, sample_sound, skeleton, sound_reader
from tests.matrix.towers import recordings, save

soundfile = pytest.importorskip("soundfile")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random models, and a folder of noise with words."""
    folder = tmp_path_factory.mktemp("hearing")
    for name, task in {"whisper": "speech", "hubert": "ctc"}.items():
        save(task, name, folder / name)
    recordings(folder / "sounds")
    return {each.name: each for each in folder.iterdir()}


def recipe(places: dict[str, Path], name: str, output: Path, **more: object) -> dict[str, object]:
    """A few seconds of sound."""
    return {
        "model": str(places[name]),
        "pattern": "2:4",
        "calibration": {"source": "sounds", "path": str(places["sounds"]), "samples": 4, "seconds": 1},
        "stages": ["sparsegpt"],
        "output": str(output),
        **more,
    }


@pytest.mark.parametrize(
    ("name", "part", "inside"),
    [
        ("whisper", "encoder", ("model.encoder.",)),
        ("whisper", "decoder", ("model.decoder.",)),
        pytest.param("whisper", None, ("model.encoder.", "model.decoder."), marks=pytest.mark.long),
        ("hubert", None, ("hubert.encoder.",)),
    ],
)
def test_what_is_asked_is_pruned(
    places: dict[str, Path], name: str, part: str | None, inside: tuple[str, ...], tmp_path: Path
) -> None:
    """Its linears have the pattern, all else is the source's bit for bit, and what the model hears is measured."""
    metrics = [{"sound-features": {"path": str(places["sounds"]), "seconds": 1, "limit": 2}}]
    more = {"evaluate": {"metrics": metrics}} | ({"prune": part} if part else {})
    result = sparsekit.fit(recipe(places, name, tmp_path / "run", **more), quiet=True)
    assert result.verified and result.report["sparsity"]["total"] == 0.5
    pruned = result.report["sparsity"]["per_linear"]
    assert {next(each for each in inside if linear.startswith(each)) for linear in pruned} == set(inside)
    before, after = (load_file(place / "model.safetensors") for place in (places[name], tmp_path / "run" / "model"))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert before.keys() == after.keys() and changed == {f"{linear}.weight" for linear in pruned}
    figures = result.report["evaluation"]
    assert figures["dense"]["figures"]["sounds cosine"]["value"] == pytest.approx(1, abs=1e-5)
    assert (figures["pruned"]["figures"]["sounds cosine of places"]["value"] < 0.9999) == (part != "decoder")
    assert (tmp_path / "run" / "model" / "preprocessor_config.json").is_file()
    assert main(["verify", str(tmp_path / "run")]) == 0


def test_a_decoder_is_given_what_was_said(places: dict[str, Path], tmp_path: Path) -> None:
    """With other words the decoder's weights are others, the encoder's the same; without any only the encoder goes."""
    silent = tmp_path / "silent"
    recordings(silent)
    other = tmp_path / "other"
    recordings(other)
    (silent / "metadata.csv").unlink()
    text = (other / "metadata.csv").read_text().replace("what was said", "nothing that anybody had")
    (other / "metadata.csv").write_text(text)
    found = []
    for number, place in enumerate((places["sounds"], other)):
        given = recipe(places, "whisper", tmp_path / str(number))
        given["calibration"] = given["calibration"] | {"path": str(place)}  # type: ignore[operator]
        sparsekit.fit(given, quiet=True)
        found.append(load_file(tmp_path / str(number) / "model" / "model.safetensors"))
    same = {name for name, tensor in found[0].items() if torch.equal(tensor, found[1][name])}
    pruned = {name for name, tensor in found[0].items() if 2 * int((tensor == 0).sum()) == tensor.numel()}
    cross_values = {name for name in pruned if "encoder_attn.v_proj" in name or "encoder_attn.k_proj" in name}
    assert {name for name in pruned if name.startswith("model.encoder.")} | cross_values <= same
    assert not any(name in same for name in pruned if name.startswith("model.decoder.") and "fc" in name)
    given = recipe(places, "whisper", tmp_path / "run")
    given["calibration"] = given["calibration"] | {"path": str(silent)}  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"what is said in \d.wav of silent is not known: give the folder"):
        sparsekit.fit(given, quiet=True)
    assert sparsekit.fit(given | {"prune": "encoder"}, quiet=True).verified


def test_blocks_train(places: dict[str, Path], tmp_path: Path) -> None:
    """`lamp` goes through an encoder of sound."""
    assert sparsekit.fit(
        recipe(places, "hubert", tmp_path / "run", stages=[{"lamp": {"epochs": 1}}]), quiet=True
    ).verified


@pytest.mark.parametrize("name", ["whisper", "hubert"])
def test_the_structure_is_found_without_weights(places: dict[str, Path], name: str) -> None:
    """On the meta device, from a little silence."""
    model = skeleton(places[name])
    assert hears(model)
    blocks = discover(model, sample_sound(model))
    assert len(blocks) == (6 if name == "whisper" else 4) and all(block.linears for block in blocks)


def test_sound_is_read_as_it_is(places: dict[str, Path], tmp_path: Path) -> None:
    """Other rates are resampled, channels are averaged, and the extractor's own features come out."""
    wave = torch.sin(torch.arange(48_000) / 48_000 * 2 * torch.pi * 440)
    soundfile.write(tmp_path / "a.wav", torch.stack([wave, 0 * wave], 1).numpy(), 48_000)
    reader = sound_reader(places["hubert"])
    heard = sounds("test", path=str(tmp_path), seconds=1).heard([0], reader.extractor)
    slow = torch.sin(torch.arange(16_000) / 16_000 * 2 * torch.pi * 440) / 2
    own = reader.extractor([slow.numpy()], sampling_rate=16_000, return_tensors="pt")["input_values"]
    assert heard.shape == own.shape == (1, 16_000)
    torch.testing.assert_close(heard[:, 500:-500], own[:, 500:-500], rtol=0, atol=1e-2)


def test_words_that_are_wrong(places: dict[str, Path]) -> None:
    """Of all files together: errors over words, as torchmetrics counts them."""
    from torchmetrics.text import WordErrorRate

    model, reader = sparsekit.load(places["whisper"])
    found = sounds("test", path=str(places["sounds"]))
    [figure] = word_errors(Preparation(reader, model.config), path=str(places["sounds"]), limit=3, new=8)(
        Subject(model, reader)
    ).values()
    rate = WordErrorRate()
    for index in (0, 2, 5):
        tokens = model.generate(
            input_features=found.heard([index], reader.extractor), max_new_tokens=8, do_sample=False
        )
        said = reader.tokenizer.decode(tokens[0], skip_special_tokens=True)
        words = [
            "".join(c if c.isalnum() or c in "_'" else " " for c in text.lower())
            for text in (said, *found.said([index]))
        ]
        rate.update([" ".join(words[0].split())], [" ".join(words[1].split())])
    assert figure.value == pytest.approx(float(rate.compute())) and figure.count == 3 and figure.better == "lower"


def test_letters_are_spelled_as_ctc_does(tmp_path: Path) -> None:
    """Of equal ones in a row one, and none of the blanks between two that are both meant: by its own tokenizer too."""
    from transformers import Wav2Vec2CTCTokenizer

    vocabulary = {
        letter: index for index, letter in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", "H", "E", "L", "O"])
    }
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    own = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))

    class Plain:
        pad_token_id = 0

        def decode(self, tokens: list[int]) -> str:
            return "".join([*vocabulary][token] for token in tokens)

    heard = torch.tensor([0, 5, 5, 6, 0, 7, 7, 0, 7, 8, 8, 0])
    assert spelled(heard, own) == spelled(heard, Plain()) == "HELLO"


def test_a_pair_is_sliced_together() -> None:
    """Sound and words stay side by side."""
    pair = Heard(torch.randn(4, 3), torch.arange(8).view(4, 2))
    assert len(pair[1::2]) == 2 and pair[1::2].said.tolist() == [[2, 3], [6, 7]]
    assert pair.shape == (4, 3) and pair.is_floating_point() and len(pair.numpy()) == 20


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"calibration": {"source": "python-docs"}}, "gives no sound: give calibration"),
        ({"calibration": {"seconds": 60}}, "are shorter than 60 seconds"),
        ({"calibration": {"samples": 99}}, "has 8 files, fewer than `samples`, 99"),
        ({"calibration": {"path": "nowhere"}}, "`nowhere` is no folder"),
        ({"stages": [{"wanda-sp": {"remove": 0.3}}], "pattern": None}, "language models, and HubertForCTC hears"),
        ({"evaluate": {"perplexity": ["python-docs"]}}, "HubertForCTC hears: leave it out, and measure by"),
        ({"evaluate": {"accuracy": ["PATH"]}}, "sees no images"),
        ({"prune": "decoder"}, "HubertForCTC is of one part"),
    ],
)
def test_mistakes(places: dict[str, Path], more: dict[str, object], said: str, tmp_path: Path) -> None:
    """One sentence, before anything is pruned."""
    given = recipe(places, "hubert", tmp_path / "run")
    sound = given["calibration"]
    given |= json.loads(json.dumps(more).replace("PATH", str(places["sounds"])))
    if "source" not in given["calibration"]:  # type: ignore[operator]
        given["calibration"] = sound | given["calibration"]  # type: ignore[operator]
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        sparsekit.fit(given, quiet=True)
