"""Nothing is called verified that is not: damages of results, and of what a resumed run goes on from."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_run import KILLER, TINY, bits, fit, process, recipe

from sparsekit.cli import main
from sparsekit.maths import parse
from sparsekit.model import Checkpoint
from sparsekit.results import verify_run
from sparsekit.results.manifest import read_manifest, seal
from sparsekit.results.verification import _grouped, _negative_zeros
from sparsekit.run.lock import LOCK, locked
from sparsekit.system import pack

Damage = Callable[[Path], object]
LINEAR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished")
    done = fit(recipe(folder))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def tensors(change: Callable[[dict[str, torch.Tensor]], object], name: str = "model.safetensors") -> Damage:
    def damage(model: Path) -> None:
        found = load_file(model / name)
        change(found)
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, model / name, {"format": "pt"})

    return damage


def setting(file: str, **changes: object) -> Damage:
    def damage(model: Path) -> None:
        content = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(content | changes))

    return damage


def swapped(found: dict[str, torch.Tensor]) -> None:
    one, two = (f"model.layers.{index}.mlp.up_proj.weight" for index in (0, 1))
    found[one], found[two] = found[two], found[one]


def another_mask(found: dict[str, torch.Tensor]) -> None:
    groups = found[LINEAR].view(-1, 4)
    groups.copy_(groups[:, [1, 0, 3, 2]].clone())


def in_shards(model: Path, stray: bool) -> None:
    found = load_file(model / "model.safetensors")
    save_file(found, model / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(found, "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    if stray:
        shutil.copy(TINY / "model.safetensors", model / "model.safetensors")
    else:
        (model / "model.safetensors").unlink()


def add(name: str, text: str = "x") -> Damage:
    return lambda model: (model / name).write_text(text)


# damage of model/ -> what `verify MODEL --against SOURCE --pattern 2:4` says of the folder alone, without a manifest
DAMAGES: dict[str, tuple[Damage, str]] = {
    "a dense file beside good shards": (lambda model: in_shards(model, True), "does not read"),
    "a second file": (lambda m: save_file({"a": torch.ones(2)}, m / "b.safetensors"), "b.safetensors is a file"),
    "old weights": (add("pytorch_model.bin"), "pytorch_model.bin is a file of weights"),
    "weights in a folder below": (lambda m: ((m / "original").mkdir(), add("original/c.pth")(m)), "original/c.pth"),
    "an adapter": (add("adapter_config.json", "{}"), "an adapter on top of the weights"),
    "another tensor": (tensors(lambda t: t.update(tower=torch.ones(2))), "tower is stored and no tensor"),
    "a tensor twice": (
        tensors(lambda t: t.update({LINEAR.removeprefix("model."): t[LINEAR].clone()})),
        f"{LINEAR} is stored twice",
    ),
    "a tensor less": (tensors(lambda t: t.pop(LINEAR)), f"{LINEAR} is missing"),
    "flattened": (tensors(lambda t: t.update({LINEAR: t[LINEAR].flatten()})), "by the config"),
    "empty": (tensors(lambda t: t.update({LINEAR: t[LINEAR][:0]})), "by the config"),
    "complex": (tensors(lambda t: t.update({LINEAR: t[LINEAR].to(torch.complex64)})), "weights are real numbers"),
    "float8": (tensors(lambda t: t.update({LINEAR: t[LINEAR].to(torch.float8_e4m3fn)})), "float8_e4m3fn"),
    "a number that is none": (tensors(lambda t: t[LINEAR].view(-1)[1:2].fill_(float("nan"))), "NaN or Inf"),
    "an embedding": (tensors(lambda t: t["model.embed_tokens.weight"][0].add_(1)), "differs from"),
    "a norm": (tensors(lambda t: t["model.norm.weight"].mul_(2)), "model.norm.weight differs from"),
    "dense weights": (lambda model: shutil.copy(TINY / "model.safetensors", model), "is not 2:4"),
    "rope": (setting("config.json", rope_parameters={"rope_type": "default", "rope_theta": 7.0}), "rope_parameters"),
    "epsilon": (setting("config.json", rms_norm_eps=0.1), "rms_norm_eps is 0.1"),
    "activation": (setting("config.json", hidden_act="gelu"), 'hidden_act is "gelu"'),
    "window": (setting("config.json", max_position_embeddings=7), "max_position_embeddings is 7"),
    "dtype": (setting("config.json", dtype="float16"), "dtype"),
    "ties": (setting("config.json", tie_word_embeddings=False), "tie_word_embeddings"),
    "code": (setting("config.json", auto_map={"AutoModelForCausalLM": "evil.Model"}), "auto_map"),
    "quantization": (setting("config.json", quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "another type": (setting("config.json", model_type="mistral"), "model_type"),
    "no type": (setting("config.json", model_type="nonsense"), "nonsense"),
    "no layers": (setting("config.json", num_hidden_layers=0), "no repeated blocks"),
    "a million layers": (setting("config.json", num_hidden_layers=10**6), "num_hidden_layers: 1000000"),
    "layers as text": (setting("config.json", num_hidden_layers="4"), "num_hidden_layers: '4'"),
    "negative size": (setting("config.json", intermediate_size=-1), "can build"),
    "structure.json": (add("structure.json", "{}"), "does not describe a model"),
    "a chat template": (add("chat_template.jinja", "{{ 'evil' }}"), "chat_template"),
    "generation": (add("generation_config.json", '{"do_sample": true, "temperature": 9.0}'), "temperature"),
    "no config": (lambda model: (model / "config.json").unlink(), "it has no config.json"),
    "half a file": (lambda model: os.truncate(model / "model.safetensors", 5000), "damaged or truncated"),
}
# what the folder alone cannot tell, and the run's manifest does
UNSEEN: dict[str, Damage] = {
    "a wiped linear": tensors(lambda found: found[LINEAR].zero_()),
    "two linears for each other": tensors(swapped),
    "another mask": tensors(another_mask),
    "other kept weights": tensors(lambda found: found[LINEAR].mul_(3)),
    "shards": lambda model: in_shards(model, False),
    "masks": lambda model: tensors(lambda found: found.popitem(), "masks.safetensors")(model.parent),
    "no masks": lambda model: (model.parent / "masks.safetensors").unlink(),
    "the recipe": lambda model: (model.parent / "recipe.yaml").write_text("model: other\n"),
    "the report": lambda model: setting("report.json", verified=True, error={})(model.parent),
    "no report": lambda model: (model.parent / "report.json").unlink(),
    "a folder for a report": lambda model: (
        (model.parent / "report.json").unlink(),
        (model.parent / "report.json").mkdir(),
    ),
    "no model": lambda model: shutil.rmtree(model),
    "the page": lambda model: (model.parent / "report.html").write_text("good"),
    "the card": lambda model: (model / "README.md").write_text("the best model"),
    "a file more": add("notes.txt"),
    "a file more in an export": lambda m: (
        (m.parent / "model-x").mkdir(),
        (m.parent / "model-x" / "a").write_text("b"),
    ),
    "the claims": lambda model: setting("manifest.json", claims={"patterns": {}, "changed": [], "cast": False})(
        model.parent
    ),
    "the list": lambda model: setting("manifest.json", files={})(model.parent),
    "the digest": lambda model: setting("manifest.json", digest="0" * 64)(model.parent),
    "a later format": lambda model: setting("manifest.json", format=99)(model.parent),
    "no manifest, planted": lambda model: setting("manifest.json", told={}, seal="")(model.parent),
}


def said_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["verify", *arguments])
    printed = capsys.readouterr()
    return code, " ".join((printed.out + printed.err).split())


@pytest.mark.parametrize("name", DAMAGES)
def test_damages_of_a_model_are_seen_without_a_manifest(name, finished, tmp_path, capsys):
    damage, said = DAMAGES[name]
    model = Path(shutil.copytree(finished / "model", tmp_path / "copy"))
    assert said_of(capsys, str(model), "--against", str(TINY), "--pattern", "2:4")[0] == 0
    damage(model)
    code, text = said_of(capsys, str(model), "--against", str(TINY), "--pattern", "2:4")
    assert code in (1, 2) and said in text and "Traceback" not in text, text


@pytest.mark.parametrize("name", [*DAMAGES, *UNSEEN])
def test_damages_of_a_run_are_seen(name, finished, tmp_path, capsys):
    damage = UNSEEN[name] if name in UNSEEN else DAMAGES[name][0]
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    code, text = said_of(capsys, str(run), "--against", str(TINY))
    assert code == 0 and text.endswith("verified"), text
    damage(run / "model")
    code, text = said_of(capsys, str(run), "--against", str(TINY))
    assert code in (1, 2) and "Traceback" not in text, text


def test_another_source_is_seen(finished, tmp_path, capsys):
    other = Path(shutil.copytree(TINY, tmp_path / "other"))
    tensors(lambda found: found[LINEAR].mul_(1.5))(other)  # a linear that was pruned: its values may differ
    code, text = said_of(capsys, str(finished), "--against", str(other))
    assert code == 1 and "is not what the run began with: its weights are another" in text


def test_a_run_without_manifest_is_told_so(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "manifest.json").unlink()
    assert said_of(capsys, str(run))[0] == 1  # its report names one
    report = json.loads((run / "report.json").read_text())
    del report["manifest"]
    (run / "report.json").write_text(json.dumps(report))
    code, text = said_of(capsys, str(run), "--pattern", "2:4")
    assert (
        code == 0 and "NOT PROVED the run is of an earlier format" in text and text.endswith("could be compared holds")
    )
    for command in (["report", str(run)], ["compare", str(run)]):
        assert main(command) == 0


def test_the_digest_is_told_everywhere(finished):
    manifest = read_manifest(finished)
    assert manifest is not None
    digest = manifest["digest"]
    assert json.loads((finished / "report.json").read_text())["manifest"] == digest
    assert digest in (finished / "model" / "README.md").read_text()
    assert digest[:12] in (finished / "report.html").read_text()
    assert manifest["source"]["weights"] == Checkpoint(TINY).digest()
    seal(finished)
    assert not verify_run(finished).failures


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A new ed25519 key and its public part, as PEM files."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private, public = tmp_path / "key.pem", tmp_path / "public.pem"
    private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_a_signed_run(finished, tmp_path, keys, capsys):
    private, public = keys
    file = recipe(tmp_path)
    shutil.copytree(finished, tmp_path / "run")
    run = str(tmp_path / "run")
    code, text = said_of(capsys, run, "--key", str(public))
    assert code == 1 and "has no signed manifest" in text
    assert fit(file, "--resume", "--sign", str(private)).returncode == 0
    code, text = said_of(capsys, run, "--key", str(public))
    assert code == 0 and text.endswith("verified"), text
    assert said_of(capsys, run, "--key", str(private))[0] == 2  # not a public key
    (tmp_path / "run" / "manifest.sig").write_text("AAAA\n")
    code, text = said_of(capsys, run, "--key", str(public))
    assert code == 1 and "was not made with the key" in text
    missing = fit(file, "--resume", "--sign", str(tmp_path / "nowhere.pem"))
    assert missing.returncode == 2 and "holds no key that can be read" in missing.stderr


# What a resumed run goes on from


def damaged_state(tmp_path: Path, when: str, name: str, how: Callable[[Path], object]) -> Path:
    """A run killed at `when`, one file of its state damaged, and resumed with a warning."""
    file = recipe(tmp_path)
    killed = process(KILLER.replace("{how}", when), file)
    assert killed.returncode == -9, killed.stderr
    state = tmp_path / "run" / "blocks" / name
    assert state.is_file(), sorted(str(path) for path in (tmp_path / "run" / "blocks").rglob("*"))
    how(state)
    with pytest.warns(UserWarning, match="it is made again"):
        done = fit(file, "--resume")
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("00001.safetensors", flip),
        pytest.param("00000.safetensors", lambda file: os.truncate(file, 100), marks=pytest.mark.long),
        pytest.param("00000.safetensors.sha256", lambda file: file.unlink(), marks=pytest.mark.long),
        ("dense.json", lambda file: file.write_text(file.read_text().replace("1", "2"))),
    ],
)
def test_damaged_state_is_made_again(name, how, finished, tmp_path):
    run = damaged_state(tmp_path, "kill(walk.OneShot, '_solve', before=16)", name, how)
    assert bits(run) == bits(finished)
    reports = [json.loads((each / "report.json").read_text()) for each in (run, finished)]
    assert reports[0]["evaluation"] == reports[1]["evaluation"]


def test_a_source_whose_config_was_changed_is_not_gone_on_with(tmp_path):
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    file = recipe(tmp_path, model=source)
    assert process(KILLER.replace("{how}", "kill(walk.OneShot, '_solve', before=10)"), file).returncode == -9
    setting("config.json", rms_norm_eps=0.01)(source)
    done = fit(file, "--resume")
    assert done.returncode == 2 and "the source model's config is another" in done.stderr


def test_a_finished_run_that_lost_its_model_is_not_believed(finished, tmp_path):
    file = recipe(tmp_path)
    shutil.copytree(finished, tmp_path / "run")
    assert fit(file, "--resume").returncode == 0
    tensors(lambda found: found[LINEAR].zero_())(tmp_path / "run" / "model")
    done = fit(file, "--resume")
    assert done.returncode == 2 and "is not what the run left" in done.stderr
    shutil.rmtree(tmp_path / "run" / "model")
    assert fit(file, "--resume").returncode == 2
    (tmp_path / "run" / "report.json").unlink()  # as the sentence says
    done = fit(file, "--resume")
    assert done.returncode == 0 and bits(tmp_path / "run") == bits(finished)


def test_a_report_that_was_planted_early_does_not_end_a_run(finished, tmp_path):
    file = recipe(tmp_path)
    assert process(KILLER.replace("{how}", "kill(walk.OneShot, '_solve', before=10)"), file).returncode == -9
    shutil.copy(finished / "report.json", tmp_path / "run" / "report.json")
    done = fit(file, "--resume")
    assert done.returncode == 2 and "neither a manifest nor an end of the run" in done.stderr


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"recipe": []}',
        '{"verified": 3}',
        "null",
        '{"evaluation": {"pruned": {"perplexity": "low"}}}',
    ],
)
def test_a_malformed_report_is_told(content, finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    known = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps(known | content) if isinstance(content, dict) else content)
    for command in (
        ["report", str(run)],
        ["compare", str(run), str(finished)],
        ["verify", str(run)],
        ["bench", str(run), "--save", "--new", "1", "--repeat", "1", "--prompt", "4", "--batch", "1"],
    ):
        code = main(command)
        said = capsys.readouterr()
        if content in ("{}",) and command[0] in ("report", "bench"):
            continue  # an empty report has an empty page
        assert code in (1, 2) and "Traceback" not in said.err and "report.json" in said.err + said.out, (command, said)


def test_a_name_that_looks_like_markup_is_a_name(tmp_path):
    done = fit(recipe(tmp_path), "--set", f"output={tmp_path / 'a[/x][b]'}")
    assert done.returncode == 0, done.stderr
    assert "a[/x][b]" in "".join(done.stdout.split())


def test_records_without_an_answer_are_left_out(models):
    from sparsekit.model import load_tokenizer
    from sparsekit.train.records import example

    tokenizer = load_tokenizer(models / "tiny-llama")
    for record in ({"instruction": "a", "output": None}, {"instruction": None, "input": 3, "output": 4}):
        ids, labels = example(record, "instruction", tokenizer)
        assert len(ids) == len(labels) > 0


# One process a folder


def test_a_folder_is_held_by_one_process(tmp_path):
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["process"] == os.getpid()
        with (
            pytest.raises(ValueError, match=r"is being written by process \d+ on .*; wait for it"),
            locked(tmp_path / "run"),
        ):
            pass
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.parametrize("content", ["", '{"host": "HOST", "process": 999999999, "since": 1.0}'])
def test_a_lock_of_a_dead_process_is_taken_over(content, tmp_path):
    (tmp_path / LOCK).write_text(content.replace("HOST", socket.gethostname()))
    with pytest.warns(UserWarning, match="is gone; going on in its place"), locked(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_a_lock_of_another_host_is_respected(tmp_path):
    (tmp_path / LOCK).write_text('{"host": "elsewhere", "process": 1, "since": 1.0}')
    with pytest.raises(ValueError, match="process 1 on elsewhere"), locked(tmp_path):
        pass


def test_a_folder_that_a_killed_start_left_is_taken(finished, tmp_path):
    file = recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.12.part").write_text("{")
    (tmp_path / "run" / LOCK).write_text("")
    assert fit(file, "--resume").returncode == 0 and bits(tmp_path / "run") == bits(finished)


@pytest.mark.parametrize("name", ["masks.safetensors", "model/tokenizer.json", "model/config.json"])
def test_a_file_that_no_library_can_read_is_told_by_the_manifest(name: str, finished: Path, tmp_path: Path) -> None:
    """Files are hashed while tensors are looked at: whatever that makes of the damage, the manifest has the word."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    found = verify_run(copy, against=TINY)
    assert found.failures == [f"{name} is not what the run left"]


@pytest.mark.parametrize("text", ["1:2", "2:4", "4:8", "1:8", "2:3", "8:16"])
def test_groups_are_counted_in_packed_bits_as_in_the_weights(text):
    pattern, generator = parse(text), torch.Generator().manual_seed(1)
    weight = torch.randn(6, 3 * pattern.group, generator=generator)
    weight[~pattern.keep(weight.abs())] = 0
    assert _grouped(pack(weight.bool()), weight, pattern)
    for row, column in ((0, 0), (3, 3), (5, weight.shape[1] - 1)):
        spoiled = weight.clone()
        spoiled[row, column - column % pattern.group :][: pattern.group] = 1.0
        assert not _grouped(pack(spoiled.bool()), spoiled, pattern)


def test_negative_zeros_are_counted_from_the_bits():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        weight = torch.tensor([[1.0, -0.0, 0.0, -2.0, -0.0, -torch.finfo(dtype).tiny]], dtype=dtype)
        assert _negative_zeros(weight) == 2 and _negative_zeros(weight.abs()) == 0
