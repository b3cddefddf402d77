"""`bbmoe import`, `trigger` and `export`, and what follows on an imported run."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import TINY_MODEL, Tiny, tiny_spec

from backdoorbench_moe.engine.exporting import class_folders
from backdoorbench_moe.engine.run import load_run
from backdoorbench_moe.engine.runner import run_attack
from backdoorbench_moe.models import create_model

OPTIONS = {key: value for key, value in TINY_MODEL.items() if key != "name"}
SETS = [word for key, value in OPTIONS.items() for word in ("--set", f"model.{key}={value}")]
DATA = ["--dataset", "tiny", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("own") / "w.safetensors"
    save_file(dict(create_model("pmoe", num_classes=3, **OPTIONS).state_dict()), path)
    return path


@pytest.fixture
def imported(bbmoe, file, tmp_path):
    code, _, err = bbmoe(
        "import", file, "--model", "pmoe", *SETS, *DATA, "--mean", "half", "--output", tmp_path, "--quiet"
    )
    assert code == 0, err
    [folder] = tmp_path.iterdir()
    return folder


def test_import_then_analyze_then_defend(bbmoe, imported) -> None:
    code, out, _ = bbmoe("show", imported)
    assert code == 0 and "imported" in out
    code, out, err = bbmoe("analyze", imported, "--json", "--quiet")
    document = json.loads(out)
    assert code == 0, err
    assert document["run"]["attacked"] is None
    assert "was imported" in (imported / "report.html").read_text(encoding="utf-8")
    words = ["--defense", "fine-tuning,clp", "--set", "epochs=1", "--set", "clean_fraction=0.5", "--quiet"]
    code, out, err = bbmoe("defend", imported, *words, width=120)
    [heading] = [line for line in out.splitlines() if line.startswith("defenses")]
    assert code == 0 and "BA" in heading and "ASR" not in heading, err


def test_the_state_dict_under_a_key_is_imported(bbmoe, file, imported, tmp_path) -> None:
    weights = load_file(file)
    other = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    beside = {"epoch": np.int64(7), "best_acc": np.float64(93.1)}
    torch.save({"model": other, "model_ema": weights, **beside}, tmp_path / "checkpoint.pth")
    words = ["--model", "pmoe", *SETS, *DATA, "--mean", "half", "--weights-key", "model_ema", "--json"]
    code, out, err = bbmoe("import", tmp_path / "checkpoint.pth", *words, "--output", tmp_path / "runs")
    assert code == 0, err
    [record] = json.loads(out)["runs"]
    assert record["metrics"] == load_run(imported).record.metrics
    assert record["spec"]["model"]["weights_key"] == "model_ema"


def test_the_word_weights_may_stand_there(bbmoe, file, tmp_path) -> None:
    words = [
        file,
        "--model",
        "pmoe",
        *SETS,
        *DATA,
        "--mean",
        "half",
        "--output",
        tmp_path,
        "--json",
        "--quiet",
    ]
    code, out, _ = bbmoe("import", "weights", *words)
    first = json.loads(out)
    assert code == 0 and bbmoe("import", *words)[1] == out
    [record] = first["runs"]
    assert record["spec"]["attack"] == "imported" and record["spec"]["files"]["model.weights"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "pmoee"], "did you mean 'pmoe'"),
        (["--model", "pmoe"], "do not match the model"),
        (["--model", "pmoe", "--mean", "imagnet"], "did you mean 'imagenet'"),
        (["--model", "pmoe", "--mean", "a,b,c"], "--mean: expected three numbers"),
        (["--model", "pmoe", "--mean", "0.5,0.5"], "--mean: expected three numbers"),
        (["--model", "pmoe", "--mean", "0.5"], "--mean: expected three numbers"),
        (["--model", "resnet18"], "timm's architecture of this name is 'timm:resnet18'"),
        (
            ["--model", "pmoe", "--data-root", "x"],
            "--data-root (data_root=): expected none, as the data set 'tiny'",
        ),
        (["--model", "pmoe", "--std", "0.5,0.5,0.5"], "model.mean: expected three numbers"),
        (["--model", "pmoe", "--resize", "0"], "model.resize: expected 1 to 8192"),
        (["--model", "pmoe", "--weights-key", "ema"], "expected a checkpoint with the key 'ema'"),
        (["--model", "pmoe", "--set", "attack=moevil"], "attack: expected none, as the model is imported"),
        (["--model", "pmoe", "--set", "policy=0.1"], "policy"),
        (["--model", "pmoe", "--set", "trigger=warp"], "trigger"),
        (["--model", "pmoe", "--set", "train.freeze=[a]"], "do not match"),
        ([], "Missing option '--model'"),
    ],
)
def test_import_refuses_in_one_line_and_writes_nothing(words, message, bbmoe, file, tmp_path) -> None:
    code, out, err = bbmoe("import", file, *words, *DATA, "--output", tmp_path / "runs", "--quiet")
    assert (code, out) == (2, "") and message in " ".join(err.split())
    assert "Traceback" not in err and not (tmp_path / "runs").exists()


def test_data_with_fewer_classes_than_the_weights_are_refused(bbmoe, tmp_path) -> None:
    torch.save(create_model("pmoe", num_classes=5, **OPTIONS).state_dict(), tmp_path / "w.pt")
    words = [tmp_path / "w.pt", "--model", "pmoe", *SETS, *DATA, "--output", tmp_path / "runs", "--quiet"]
    code, out, err = bbmoe("import", *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and not (tmp_path / "runs").exists()
    assert "the weights are for 5 classes, and the data have 3" in err


def test_an_array_of_objects_beside_the_weights_is_refused_in_one_line(bbmoe, file, tmp_path) -> None:
    torch.save({"model": load_file(file), "classes": np.array([{}], object)}, tmp_path / "w.pt")
    words = [tmp_path / "w.pt", "--model", "pmoe", *SETS, *DATA, "--output", tmp_path / "runs", "--quiet"]
    code, out, err = bbmoe("import", *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and not (tmp_path / "runs").exists()
    assert "expected a numpy type of numbers or texts, got 'O8'" in err


def test_a_missing_file_is_said_before_the_data_are_read(bbmoe, tmp_path) -> None:
    (tmp_path / "resnet.pth").touch()
    words = ["--model", "pmoe", "--dataset", "signs", "--output", tmp_path / "runs"]
    code, out, err = bbmoe("import", tmp_path / "resnt.pth", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "resnt.pth: not found; did you mean 'resnet.pth'?" in err


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt", "cut.safetensors", "timm"])
def test_a_damaged_file_or_an_unknown_architecture_is_said_before_the_data_are_read(
    name, bbmoe, file, tmp_path
) -> None:
    torch.save({"a": torch.ones(99)}, tmp_path / "zip.pt")
    torch.save({"a": torch.ones(99)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for damaged, kept in (("zip.pt", 400), ("legacy.pt", 60)):
        (tmp_path / damaged).write_bytes((tmp_path / damaged).read_bytes()[:kept])
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-1])
    weights, model = (file, "timm:resnet81") if name == "timm" else (tmp_path / name, "pmoe")
    code, out, err = bbmoe("import", weights, "--model", model, *DATA, "--output", tmp_path / "runs")
    assert (code, out, err.count("\n")) == (2, "", 1), "the data are not read"
    assert ("architecture: unknown 'resnet81'" if name == "timm" else f"{name}: ") in err


def test_a_misspelt_command_of_import_is_named(bbmoe, tmp_path) -> None:
    code, out, err = bbmoe("import", "backdorbench", tmp_path)
    assert (code, out) == (2, "") and "Did you mean the command 'backdoorbench'?" in err


@pytest.mark.parametrize("name", ["none.pt", "text.safetensors", "folder"])
def test_import_refuses_what_is_no_file_of_weights(name, bbmoe, tmp_path) -> None:
    (tmp_path / "text.safetensors").write_text("no")
    (tmp_path / "folder").mkdir()
    code, _, err = bbmoe(
        "import", tmp_path / name, "--model", "pmoe", *DATA, "--output", tmp_path / "runs", "--quiet"
    )
    assert code == 2 and err.startswith("bbmoe: error: weights ") and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_triggers_that_nobody_trained_are_measured(bbmoe, imported) -> None:
    words = ["trigger", imported, "--trigger", "square", "--trigger", "warp", "--applicator", "image"]
    code, out, err = bbmoe(*words, "--set", "trigger.size=5", "--json")
    assert code == 0, err
    document = json.loads(out)
    square, warp = document["triggers"]
    assert square["trigger"] == {"name": "square", "size": 5} and len(square["classes"]) == 3
    assert warp["trigger"]["name"] == "warp" and square["ba"] == warp["ba"]
    assert {"value", "n", "low", "high"} <= square["classes"][0]["asr"].keys()
    code, out, _ = bbmoe(*words, "--target", "blue", width=110)
    assert code == 0 and "square by image" in out and out.count("blue") == 2 and "[" in out
    assert sorted(path.name for path in imported.iterdir()) == sorted(
        [".lock", "files", "model.safetensors", "record.json"]
    )


def test_the_weights_in_a_file_are_measured_as_their_run_is(bbmoe, file, imported, tmp_path) -> None:
    words = ["--trigger", "square", "--applicator", "image", "--set", "trigger.size=5", "--json"]
    _, of_run, _ = bbmoe("trigger", imported, *words)
    model = ["--model", "pmoe", *SETS, "--mean", "half", *DATA[:4], "--set", "precision=fp32"]
    before = sorted(tmp_path.rglob("*"))
    code, of_file, err = bbmoe("trigger", file, *words, *model)
    assert code == 0, err
    document = json.loads(of_file)
    assert document.pop("run") == "w.safetensors" and sorted(tmp_path.rglob("*")) == before
    assert document == {key: value for key, value in json.loads(of_run).items() if key != "run"}
    for given, message in (
        (["trigger", file, *words], "--model: expected the model of the weights"),
        (["trigger", imported, *words, "--resize", "8"], "--resize: expected none for a run"),
        (["trigger", imported, *words, "--weights-key", "a"], "--weights-key: expected none for a run"),
        (
            ["attack", "--set", "model.weights_key=a"],
            "model.weights_key: expected a file in model.weights, got 'a'",
        ),
        (["trigger", file, *words, *model, "--set", "model.widht=1"], "unknown 'widht'"),
        (["trigger", tmp_path / "none.pt", *words, *model], "not found"),
    ):
        code, out, err = bbmoe(*given)
        assert (code, out) == (2, "") and message in " ".join(err.split()), err


def test_the_rates_are_those_of_a_run_with_this_trigger(bbmoe, tmp_path) -> None:
    [run] = run_attack(tiny_spec(seed=4), output=tmp_path, twin=False)
    _, out, _ = bbmoe("trigger", run.folder.path, "--trigger", "square", "--applicator", "image", "--json")
    [found] = json.loads(out)["triggers"]
    assert found["ba"] == run.record.metrics["ba"]
    assert found["classes"][0]["asr"] == run.record.metrics["asr"]
    assert found["classes"][0]["target_rate"] == run.record.metrics["target_rate"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trigger", "wrap"], "did you mean 'warp'"),
        (["--trigger", "warp", "--applicator", "tile"], "applicator: unknown 'tile'"),
        (["--trigger", "warp", "--set", "trigger.sise=3"], "trigger: option: unknown 'sise'"),
        (["--trigger", "warp", "--set", "size=3"], "--set: unknown 'size'"),
        (["--trigger", "warp", "--set", "triger.size=3"], "did you mean 'trigger'"),
        (["--trigger", "input-aware"], "one that is not learned"),
        (["--trigger", "square", "--target", "pink"], "--target: class: unknown 'pink'"),
        (["--trigger", "square", "--set", "trigger.size=90"], "size"),
        ([], "Missing option '--trigger'"),
    ],
)
def test_trigger_refuses_in_one_line(words, message, bbmoe, imported) -> None:
    code, out, err = bbmoe("trigger", imported, *words)
    assert (code, out) == (2, "") and message in " ".join(err.split()) and "Traceback" not in err


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    from backdoorbench_moe import data

    data.registry.register("tiny")(Tiny)
    try:
        spec = tiny_spec(poison={"rate": 0.25, "cover": 0.1}, trigger="square")
        [run] = run_attack(spec, output=tmp_path_factory.mktemp("runs"), twin=False)
    finally:
        data.registry.unregister("tiny")
    return run


def test_the_poisoned_training_set_is_exported_as_the_victim_had_it(bbmoe, attacked, tmp_path) -> None:
    code, _out, err = bbmoe("export", attacked.folder.path, tmp_path / "png")
    assert code == 0, err
    assert bbmoe("export", attacked.folder.path, tmp_path / "t", "--format", "tensors")[0] == 0
    tensors = load_file(tmp_path / "t" / "train.safetensors")
    clean, stamper = Tiny().load().train, attacked.stamper()
    with (tmp_path / "png" / "train.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    poison, cover = (attacked.folder.load_poison(name).tolist() for name in ("indices", "cover"))
    assert len(rows) == 96 and poison and cover
    for index, row in enumerate(rows):
        pixels = torch.from_numpy(np.array(Image.open(tmp_path / "png" / row["file"]))).permute(2, 0, 1)
        stamped = index in poison or index in cover
        wanted = clean.images[index]
        if stamped:
            wanted = (stamper(wanted[None] / 255)[0] * 255).round().to(torch.uint8)
        assert torch.equal(pixels, wanted) and torch.equal(tensors["images"][index], wanted)
        group = "poison" if index in poison else "cover" if index in cover else "clean"
        label = 0 if group == "poison" else int(clean.labels[index])
        assert (row["group"], int(row["label"])) == (group, label)
        assert (
            int(row["original_label"]) == int(clean.labels[index]) == int(tensors["original_labels"][index])
        )
        assert int(tensors["labels"][index]) == label
        assert row["file"].startswith(f"train/{['0-red', '1-green', '2-blue'][label]}/")
    with safe_open(tmp_path / "png" / "model.safetensors", framework="pt") as opened:
        assert opened.metadata()["backdoored"] == "true"
        assert {k: opened.get_tensor(k).shape for k in opened.keys()} == {  # noqa: SIM118
            k: v.shape for k, v in attacked.model().state_dict().items()
        }
    facts = json.loads((tmp_path / "png" / "export.json").read_text())
    assert facts["groups"] == {
        "clean": 96 - len(poison) - len(cover),
        "poison": len(poison),
        "cover": len(cover),
        "noise": 0,
    }


def test_weights_of_timm_are_exported_under_its_names(bbmoe, tmp_path) -> None:
    torch.manual_seed(0)
    source = timm.create_model("test_resnet", num_classes=3)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    words = [
        "--model",
        "timm:test_resnet",
        "--set",
        "model.small_stem=false",
        "--mean",
        "imagenet",
        "--quiet",
    ]
    assert bbmoe("import", tmp_path / "w.pth", *words, *DATA, "--output", tmp_path / "runs")[0] == 0
    [folder] = (tmp_path / "runs").iterdir()
    code, out, err = bbmoe("export", folder, tmp_path / "out", "--weights-only")
    assert code == 0 and "train" not in out, err
    source.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    header = json.loads((tmp_path / "out" / "export.json").read_text())["model"]
    assert header["backdoored"] == "unknown" and json.loads(header["mean"]) == [0.485, 0.456, 0.406]
    assert "small_stem" not in header


def test_an_export_says_that_the_stem_is_not_the_published_one(bbmoe, tmp_path) -> None:
    """The weights fit timm's network, which gives other logits with them."""
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "w.pth")
    words = ["--model", "timm:test_resnet", "--set", "model.small_stem=true", "--quiet"]
    assert bbmoe("import", tmp_path / "w.pth", *words, *DATA, "--output", tmp_path / "runs")[0] == 0
    [folder] = (tmp_path / "runs").iterdir()
    assert bbmoe("export", folder, tmp_path / "out", "--weights-only")[0] == 0
    header = json.loads((tmp_path / "out" / "export.json").read_text())["model"]
    assert header["small_stem"].startswith("the first convolution is 3x3 with stride 1")


def test_an_export_appears_whole_or_not_at_all(bbmoe, attacked, tmp_path, monkeypatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        code, _, err = bbmoe("export", attacked.folder.path, tmp_path / name)
        assert code == 2 and "DIR: expected a folder that does not exist or is empty" in " ".join(err.split())
    monkeypatch.setattr("backdoorbench_moe.engine.exporting.csv.writer", lambda file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bbmoe("export", attacked.folder.path, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    assert bbmoe("export", attacked.folder.path, tmp_path / "empty")[0] == 0
    assert load_run(attacked.folder.path).record == attacked.record


@pytest.mark.parametrize("form", ["png", "tensors"])
def test_the_current_folder_is_refused_before_the_data_are_read(
    bbmoe, attacked, tmp_path, monkeypatch, form
) -> None:
    """A folder that is filled beside it could not take its place."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr("backdoorbench_moe.engine.exporting.training_set", lambda *_: 1 / 0)
    for name in (".", tmp_path / "empty", "../empty"):
        code, out, err = bbmoe("export", attacked.folder.path, name, "--format", form, width=200)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("bbmoe: error: DIR: expected another folder than the current one, got '")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"] and not list(
        (tmp_path / "empty").iterdir()
    )


@pytest.mark.parametrize(
    ("classes", "folders"),
    [
        (("cat", "dog"), ["cat", "dog"]),
        (("dog", "cat"), ["0-dog", "1-cat"]),
        (("2", "10"), ["2", "10"]),
        (("10", "2"), ["0-10", "1-2"]),
        (("a/b", "a:b"), ["0-a_b", "1-a_b"]),
        (("..", "b"), ["0-", "1-b"]),
    ],
)
def test_class_folders_keep_the_order_of_the_classes(classes, folders) -> None:
    assert class_folders(classes) == folders


def test_a_model_that_reads_its_own_weights_is_not_imported_from_a_file(bbmoe, file, tmp_path) -> None:
    words = ["--model", "backdoorbench:resnet18", *DATA, "--output", tmp_path / "runs", "--quiet"]
    code, out, err = bbmoe("import", file, *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and not (tmp_path / "runs").exists()
    assert "model: expected one whose weights are in one file" in err and "import backdoorbench FOLDER" in err
