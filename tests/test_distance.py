"""The distance between the masks of runs, by hand-made structure.json and masks.safetensors and by real small runs."""

import io
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from test_compare import report, run
from test_structural_run import recipe

from sparsekit import cli
from sparsekit.results import board_markdown, leaderboard, show_board
from sparsekit.results.comparison import read_run
from sparsekit.results.distance import Gap, cells, distances, notes
from sparsekit.system import pack

REST = {"version": 1, "layout": "plain", "load": "", "parameters": 0, "biases": [], "changed": [], "config": {}}


def cut(folder: Path, layers: dict[int, tuple[int, int]], *, source: str = "m", digest: str | None = None) -> str:
    """A run that keeps of each of 4 layers the heads and channels in these bits, of 4 and 8; others are gone."""
    found = report()
    found["sparsity"]["per_linear"] = {}
    found["model"]["name"] = source
    if digest:
        found["fingerprint"] = {"model": digest}
    found["structure"] = {"removed": [0.1], "layers": list(layers), "source_layers": 4}
    path = run(folder, found)
    entries = []
    for layer, (heads, channels) in layers.items():
        entry: dict[str, Any] = {"layer": layer}
        for kind, bits, of in (("heads", heads, 4), ("channels", channels, 8)):
            entry |= {kind: [bits.bit_count(), of], f"{kind}_kept": hex(bits)}
        entries.append(entry)
    (folder / "model" / "structure.json").write_text(json.dumps({"layers": entries, **REST}))
    return path


def pruned(folder: Path, masks: dict[str, torch.Tensor]) -> str:
    found = report()
    found["sparsity"]["per_linear"] = {name: {"parameters": mask.numel()} for name, mask in masks.items()}
    path = run(folder, found)
    save_file({name: pack(mask) for name, mask in masks.items()}, folder / "masks.safetensors")
    return path


def between(*paths: str) -> list[dict[str, Any]]:
    return distances([read_run(path) for path in paths])


def test_random_masks_are_as_far_apart_as_expected() -> None:
    """All pairs of masks that keep 2 and 3 of 5, one by one."""
    pairs = [(set(a), set(b)) for a in combinations(range(5), 2) for b in combinations(range(5), 3)]
    mean = sum(len(a ^ b) for a, b in pairs) / len(pairs)
    assert Gap.of(0, 2, 3, 5).random == pytest.approx(mean) == pytest.approx(2.6)


def test_units_by_hand(tmp_path: Path) -> None:
    full = (0xF, 0xFF)
    one = cut(tmp_path / "a", {0: full, 1: (0b0011, 0x0F), 2: full, 3: full})
    two = cut(tmp_path / "b", {0: full, 1: (0b0110, 0x3C), 3: (0b0111, 0xFF)})  # layer 2 is gone
    [found] = between(one, two)
    assert found["runs"] == [one, two] and "why" not in found
    heads, channels, layers = (found["masks"][kind] for kind in ("heads", "channels", "layers"))
    assert heads["units"] == 16 and heads["distance"] == (2 + 4 + 1) / 16
    assert heads["each"] == {"0": [0, 0], "1": [0.5, 0.5], "2": [1, 1], "3": [0.25, 0.25]}
    assert heads["random"] == (2 + 4 + 1) / 16  # 2 of 4 against 2 of 4; all against none; all against 3
    assert channels["units"] == 32 and channels["distance"] == (4 + 8) / 32 and channels["random"] == (4 + 8) / 32
    assert layers == {"distance": 0.25, "random": 0.25, "units": 4, "each": {}}


def test_the_distance_is_zero_to_itself_and_one_to_the_opposite(tmp_path: Path) -> None:
    one = cut(tmp_path / "a", dict.fromkeys(range(4), (0b0101, 0x0F)))
    same = cut(tmp_path / "b", dict.fromkeys(range(4), (0b0101, 0x0F)))
    other = cut(tmp_path / "c", dict.fromkeys(range(4), (0b1010, 0xF0)))
    found = between(one, same, other)
    assert [each["masks"]["heads"]["distance"] for each in found] == [0, 1, 1]
    assert [each["masks"]["channels"]["distance"] for each in found] == [0, 1, 1]
    assert all(each["masks"]["heads"]["random"] == 0.5 and "layers" not in each["masks"] for each in found)


def test_layers_alone(tmp_path: Path) -> None:
    one = cut(tmp_path / "a", dict.fromkeys((0, 1, 2), (0xF, 0xFF)))
    two = cut(tmp_path / "b", dict.fromkeys((0, 1), (0xF, 0xFF)))  # the last one is gone in both: their reports know
    [found] = between(one, two)
    assert found["masks"] == {"layers": {"distance": 0.25, "random": (3 * 2 + 2 * 1) / 16, "units": 4, "each": {}}}


def test_only_one_source_has_distances(tmp_path: Path) -> None:
    layers = dict.fromkeys(range(4), (0b0101, 0x0F))
    paths = [
        cut(tmp_path / "a", layers, digest="1"),
        cut(tmp_path / "b", layers, source="the/same", digest="1"),  # the same bits under another name
        cut(tmp_path / "c", layers, digest="2"),
        cut(tmp_path / "d", layers),  # an older report: the name decides
        cut(tmp_path / "e", layers, source="n"),
    ]
    found = {"".join(Path(path).name for path in each["runs"]): each.get("why") for each in between(*paths)}
    other = "other source models"
    assert found == {
        "ab": None,
        "ac": "source models of one name with other weights",
        "ad": None,
        "ae": other,
        "bc": other,
        "bd": other,
        "be": other,
        "cd": None,
        "ce": other,
        "de": other,
    }
    assert all(("masks" in each) != ("why" in each) for each in between(*paths))


def test_what_goes_on_from_a_run_has_that_runs_source(tmp_path: Path) -> None:
    layers = dict.fromkeys(range(4), (0b0101, 0x0F))
    first, other = (cut(tmp_path / name, layers, digest=name) for name in "ab")
    later = cut(tmp_path / "c", layers, digest="of what the first left")
    found = json.loads((tmp_path / "c" / "report.json").read_text())
    found["recipe"]["from"] = first
    (tmp_path / "c" / "report.json").write_text(json.dumps(found))
    assert "masks" in between(first, later)[0]
    assert between(other, later)[0]["why"] == "source models of one name with other weights"


def test_weights_by_hand(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    masks = [
        {
            "a": torch.rand(5, 7, generator=draw) < share,  # 35 bits: five of the last byte mean nothing
            "b": torch.rand(16, 9, generator=draw) < share,
            f"only{share}": torch.ones(3, 3, dtype=torch.bool),
        }
        for share in (0.3, 0.6, 0.6)
    ]
    found = between(*(pruned(tmp_path / name, each) for name, each in zip("xyz", masks, strict=True)))
    for told, (one, two) in zip(found, combinations(masks, 2), strict=True):
        differ, random, both = 0.0, 0.0, [name for name in one if name in two]
        for name in both:
            differ += float((one[name] != two[name]).sum())
            p, q = one[name].double().mean(), two[name].double().mean()
            random += float((p * (1 - q) + q * (1 - p)) * one[name].numel())
        units = sum(one[name].numel() for name in both)
        weights = told["masks"]["weights"]
        assert weights["units"] == units and weights["each"].keys() == set(both)
        assert weights["distance"] == pytest.approx(differ / units, abs=1e-12)
        assert weights["random"] == pytest.approx(random / units, abs=1e-12)


def test_weights_that_have_no_distance(tmp_path: Path) -> None:
    mask = {"a": torch.ones(4, 4, dtype=torch.bool)}
    one, lost, other = (pruned(tmp_path / name, mask) for name in ("a", "lost", "other"))
    (tmp_path / "lost" / "masks.safetensors").unlink()
    smaller = cut(tmp_path / "cut", dict.fromkeys(range(4), (0b0101, 0x0F)))
    found = json.loads((tmp_path / "cut" / "report.json").read_text())
    found["sparsity"]["per_linear"] = {"a": {"parameters": 16}}
    (tmp_path / "cut" / "report.json").write_text(json.dumps(found))
    far = pruned(tmp_path / "far", {"z": torch.ones(4, 4, dtype=torch.bool)})
    assert between(one, lost)[0]["why"] == "masks.safetensors is missing"
    assert between(one, smaller)[0]["why"] == "other units are left"
    assert between(one, far)[0]["why"] == "other linears were pruned"
    (tmp_path / "cut" / "model" / "structure.json").unlink()
    assert between(one, smaller)[0]["why"] == "model/structure.json is missing"
    (tmp_path / "other" / "masks.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"masks.safetensors of .*other is damaged"):
        between(one, other)


def test_a_cut_run_and_a_pruned_one_share_no_table(tmp_path: Path) -> None:
    one = cut(tmp_path / "a", dict.fromkeys(range(4), (0b0101, 0x0F)))
    two = pruned(tmp_path / "b", {"a": torch.ones(4, 4, dtype=torch.bool)})
    assert between(one, two) == []
    assert "masks of" not in board_markdown(leaderboard([one, two]))


def test_the_table(tmp_path: Path) -> None:
    layers = dict.fromkeys(range(4), (0b0101, 0x0F))
    paths = [cut(tmp_path / "a", layers), cut(tmp_path / "b", {**layers, 3: (0b1111, 0xF0)})]
    paths.append(cut(tmp_path / "c", layers, source="[n]"))
    board = leaderboard(paths)
    names = dict(zip(paths, "abc", strict=True))
    assert cells(board["distances"], names) == [
        ["masks of", "heads", "channels"],
        ["a, b", "12.50% (50.00%)", "25.00% (50.00%)"],
    ]
    said = "no distance between masks: other source models (a, c; b, c)"
    assert notes(board["distances"], names)[1:] == [said]
    plain, terminal = Console(file=io.StringIO(), width=70), Console(file=io.StringIO(), width=150, force_terminal=True)
    for console in (plain, terminal):
        show_board(board, console)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "12.50% (50.00%)" in text and "[n]" in text and said in text
        assert "normalised Hamming distance" in text
    assert "| a, b | 12.50% (50.00%) | 25.00% (50.00%) |" in board_markdown(board)
    without = board_markdown(leaderboard(paths[1:]))
    assert "no distance between masks: other source models (b, c)" in without and "Hamming" not in without
    many = [{"runs": [str(one), str(two)], "why": "w"} for one, two in combinations(range(5), 2)]
    [note] = notes(many, {str(number): str(number) for number in range(5)})
    assert note.endswith("w (0, 1; 0, 2; 0, 3; 0, 4 and 6 more)")


def test_real_runs_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two methods on one model; the distance is that of the kept rows, found in the stored weights themselves."""
    from test_run import fit

    from sparsekit.model import Checkpoint

    folders = []
    for name, stages in (("one", '{wanda-sp: {remove: "30%"}}'), ("two", '{llm-pruner: {remove: "30%"}}')):
        (tmp_path / name).mkdir()
        done = fit(recipe(tmp_path / name, stages))
        assert done.returncode == 0, done.stderr
        folders.append(tmp_path / name / "run")
    file = tmp_path / "board.json"
    capsys.readouterr()
    assert cli.main(["compare", *map(str, folders), "--json", str(file)]) == 0
    assert "masks of" in capsys.readouterr().out
    [found] = json.loads(file.read_text())["distances"]
    source = Checkpoint(Path(__file__).parent / "models" / "tiny-llama")
    for kind, linear in (("channels", "mlp.up_proj"), ("heads", "self_attn.k_proj")):
        differ = random = units = 0.0
        for layer in range(4):
            name = f"model.layers.{layer}.{linear}.weight"
            dense = source.tensor(name)
            rows = [Checkpoint(folder / "model").tensor(name) for folder in folders]
            kept = [(dense[:, None] == each[None]).all(-1).any(1) for each in rows]
            of = report_of(folders[0])["structure"]["blocks"][layer][kind][1]
            kept = [each.view(of, -1).all(1) for each in kept]
            differ += float((kept[0] != kept[1]).sum())
            first, second = (float(each.sum()) for each in kept)
            random += (first * (of - second) + second * (of - first)) / of
            units += of
        told = found["masks"][kind]
        assert told["distance"] == pytest.approx(differ / units) and told["units"] == units
        assert told["random"] == pytest.approx(random / units)
    assert 0 < found["masks"]["channels"]["distance"] < found["masks"]["channels"]["random"]
    for folder in folders:
        structure = report_of(folder)["structure"]
        assert structure["source_layers"] == 4 and structure["total"] == pytest.approx(structure["removed"][0])
        model = Checkpoint(folder / "model")
        for layer, block in enumerate(structure["blocks"]):
            counted = [
                sum(each.tensor(name).numel() for name in each if name.startswith(f"model.layers.{layer}."))
                for each in (model, source)
            ]
            assert block["parameters"] == counted
        assert "MLP channels, % kept of each layer" in (folder / "report.html").read_text()


def test_a_run_that_goes_on_counts_from_the_dense_model(tmp_path: Path) -> None:
    """Heads, channels and a layer go; then a run that trains what is left. All three tell the same of what is left."""
    from test_run import fit

    stages = '{wanda-sp: {remove: "30%"}}, {block-influence: {remove: "25%"}}'
    assert fit(recipe(tmp_path, stages)).returncode == 0
    (tmp_path / "on").mkdir()
    file = recipe(tmp_path / "on", "{lora: {steps: 2, rank: 2, length: 64}}")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([f"from: {tmp_path / 'run'}", *lines[1:]]))
    done = fit(file)
    assert done.returncode == 0, done.stderr
    first, later = (report_of(folder / "run")["structure"] for folder in (tmp_path, tmp_path / "on"))
    assert first["source_layers"] == 4 and len(first["layers"]) == 3
    for key in ("source_layers", "layers", "blocks", "parameters", "total"):
        assert first[key] == later[key], key
    one, two = first["removed"]
    assert first["total"] == pytest.approx(1 - (1 - one) * (1 - two)) and later["removed"] == []
    gone = 1 - first["parameters"]["pruned"] / first["parameters"]["dense"]  # of all parameters
    assert leaderboard([str(tmp_path / "on" / "run")])["runs"][0]["values"]["removed"] == gone
    [found] = between(str(tmp_path / "run"), str(tmp_path / "on" / "run"))
    assert {kind: each["distance"] for kind, each in found["masks"].items()} == {"heads": 0, "channels": 0, "layers": 0}


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())
