"""The command line: what it prints, what it exits with, and that a user never sees a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from commands import SIGNS

from backdoorbench_moe.collapse import MARK_LEGEND
from backdoorbench_moe.errors import BbmoeWarning, ConfigError

SMALL = [
    *("--dataset", "tiny", "--recipe", "paper", "--epochs", "1", "--batch-size", "32", "--precision", "fp32"),
    *("--set", "model.widen_factor=1", "--set", "model.moe_channels=8", "--set", "model.expert_channels=4"),
    *("--poison-rate", "0.25"),
]  # fmt: skip


def test_attack_prints_its_metrics_and_json_prints_nothing_else(bbmoe, tmp_path) -> None:
    code, out, err = bbmoe(
        "attack", *SMALL, "--trigger", "square", "--applicator", "image", "--output", tmp_path
    )
    assert code == 0
    assert "attack success rate (ASR)" in out and "run folder" in out
    assert "epoch 1/1" in err and "images/s" in err
    code, out, err = bbmoe(
        "attack", *SMALL, "--trigger", "square", "--applicator", "image", "--output", tmp_path, "--json"
    )
    assert code == 0 and "found finished" in err
    document = json.loads(out)
    metrics = document["runs"][0]["metrics"]
    assert document["summary"]["asr"]["mean"] == metrics["asr"]["value"]
    assert set(metrics) == {*("asr", "ba", "cad", "target_rate", "twin_asr", "twin_target_rate")}


def test_repeats_give_mean_deviation_and_every_seed(bbmoe, tmp_path) -> None:
    args = (
        "attack",
        *SMALL,
        "--trigger",
        "blend",
        "--repeats",
        2,
        "--no-twin",
        "--output",
        tmp_path,
        "--quiet",
    )
    code, out, err = bbmoe(*args, "--json")
    summary = json.loads(out)["summary"]["ba"]
    first, second = summary["seeds"]["0"], summary["seeds"]["1"]
    assert (code, err) == (0, "")
    assert summary["mean"] == pytest.approx((first + second) / 2)
    assert summary["std"] == pytest.approx(abs(first - second) / 2**0.5)
    assert "seed 1" in bbmoe(*args)[1]


def test_show(bbmoe, tmp_path) -> None:
    bbmoe("attack", *SMALL, "--trigger", "square", "--no-twin", "--output", tmp_path, "--quiet")
    [folder] = tmp_path.iterdir()
    code, out, _ = bbmoe("show", folder)
    assert code == 0 and "finished" in out and "clean accuracy (BA)" in out and "train accuracy" in out
    assert json.loads(bbmoe("show", folder, "--json")[1])["status"] == "finished"


def test_show_many_runs_is_one_table_to_paste(bbmoe, tmp_path) -> None:
    bbmoe("attack", *SMALL, "--trigger", "square", "--output", tmp_path, "--quiet")
    folders = sorted(tmp_path.iterdir())
    code, out, _ = bbmoe("show", *folders, "--markdown")
    lines = out.strip().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert code == 0 and len(table) == 2 + len(folders) and table == lines[: len(table)]
    # One epoch on 96 images teaches next to nothing: that is said once, below the table.
    marked = any("†" in line for line in table)
    assert lines[len(table) :] == (["", MARK_LEGEND] if marked else [])
    assert lines[0].startswith("| status | data") and set(lines[1]) <= set("|-: ")
    assert "square" in out and "clean" in out and "no trigger %" in lines[0]
    code, out, _ = bbmoe("show", *folders)
    assert code == 0 and ("near chance" in out) == marked
    assert out.startswith("all 2 runs: status finished, data tiny, model pmoe")
    assert "square" in out and "CAD" in out and "…" not in out


BAD = {
    "unknown model": (["--model", "pmoo"], "model: unknown 'pmoo'; did you mean 'pmoe'"),
    "unknown trigger": (["--trigger", "wrap"], "trigger: unknown 'wrap'; did you mean 'warp'"),
    "unknown applicator": (["--applicator", "pach"], "applicator: unknown 'pach'; did you mean 'patch'"),
    "unknown dataset": (["--dataset", "cifar"], "dataset: unknown 'cifar'; did you mean 'cifar10'"),
    "unknown recipe": (["--recipe", "papr"], "recipe: unknown 'papr'; did you mean 'paper'"),
    "rate over 1": (["--poison-rate", "1.5"], "poison.rate: expected a number in (0, 1], got 1.5"),
    "rate 0": (["--poison-rate", "0"], "poison.rate: expected a number in (0, 1], got 0"),
    "rate no number": (["--poison-rate", "lots"], "poison.rate: expected a number, got 'lots'"),
    "rate too small": (
        ["--poison-rate", "0.0001"],
        "poison.rate: 0.0001 of 96 images rounds down to 0 images",
    ),
    "target": (["--target", "3"], "poison.target: expected a class in 0..2, got 3"),
    "target name": (["--target", "blu"], "poison.target: class: unknown 'blu'; did you mean 'blue'"),
    "source": (["--source", "1,,2"], "--source: expected classes such as 1,2 or cat,dog, got '1,,2'"),
    "source name": (["--source", "1,grean"], "poison.source: class: unknown 'grean'; did you mean 'green'"),
    "source twice": (["--source", "1,green"], "poison.source: expected each class once, got (1, 1)"),
    "source has the target": (
        ["--source", "red,1"],
        "poison.source: expected classes other than the target 0",
    ),
    "rate is a percentage": (
        ["--poison-rate", "5"],
        "poison.rate: expected a number in (0, 1], got 5.0; for 5 percent write 5%",
    ),
    "patch size": (["--patch-size", "5"], "patch_size"),
    "patch size on image": (["--applicator", "image", "--patch-size", "4"], "unknown 'patch_size'"),
    "device": (["--device", "cuda:9"], "device: expected one of"),
    "precision": (["--precision", "fp8"], "precision: unknown 'fp8'"),
    "unknown key": (["--set", "train.epoch=3"], "train: key: unknown 'epoch'; did you mean 'epochs'"),
    "unknown option": (["--set", "trigger.strenth=3"], "unknown 'strenth'; did you mean 'strength'"),
    "huge images": (["--image-size", "100000"], "image_size"),
    "set": (["--set", "train.epochs"], "--set: expected dotted.key=value"),
    "config": (["--config", "none.yaml"], "config file none.yaml: No such file"),
    "repeats": (["--repeats", "0"], "--repeats: expected at least 1"),
    "too many repeats": (["--repeats", "99999999999"], "--repeats: expected at most 10000"),
    "missing data": (["--dataset", "cifar10", "--data-root", "/nowhere"], "/nowhere"),
    "no such flag": (["--trigggr", "warp"], "--trigger"),
    "no number": (["--epochs", "many"], "epochs"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line_and_exit_2(bbmoe, tmp_path, args, message) -> None:
    if "cuda:9" in args:
        import torch

        if torch.cuda.device_count() > 9:
            pytest.skip("this machine has that device")
    code, out, err = bbmoe("attack", *SMALL, *args, "--output", tmp_path / "runs", "--quiet")
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_an_output_that_cannot_be_written(bbmoe, tmp_path) -> None:
    (tmp_path / "runs").write_text("in the way")
    code, _, err = bbmoe("attack", *SMALL, "--output", tmp_path / "runs", "--quiet")
    assert code == 2 and "output folder" in err and err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output(bbmoe, tmp_path) -> None:
    (tmp_path / "runs").mkdir(mode=0o555)
    code, _, err = bbmoe("attack", *SMALL, "--output", tmp_path / "runs", "--quiet")
    assert code == 2 and "Permission denied" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["show", "/nowhere"], "expected a folder with a record.json"),
        (["atack"], "Did you mean 'attack'"),
        (["info", "model", "pmoe", "--set", "num_classes=3"], "option: unknown 'num_classes'"),
        (["info", "model", "pmoe", "--set", "model.expert=3"], "option: unknown 'expert'"),
        (["info", "model", "pmoe", "--set", "dataset.root=."], "option: unknown 'dataset'"),
        (["info", "trigger", "warp", "--set", "seed=3"], "--set: expected an option of a model"),
        (["info", "model", "pmoe", "--data-root", "."], "--data-root: expected a data set to go with it"),
        (
            ["info", "dataset", "folder", "--data-root", "/nowhere"],
            "/nowhere: expected a folder of class folders",
        ),
        (["info", "dataset", "folder", "--set", "image_size=3"], "option 'root' is required"),
        (["info", "trigger", "wrap"], "did you mean 'warp'"),
        (["info", "triger", "warp"], "did you mean 'trigger'"),
        (["list", "modles"], "did you mean 'model'"),
    ],
)
def test_other_commands_refuse_what_is_not_there(bbmoe, args, message) -> None:
    code, _, err = bbmoe(*args)
    assert code == 2 and message in err


def test_a_damaged_record_is_one_line(bbmoe, tmp_path) -> None:
    (tmp_path / "record.json").write_text('{"schema_version": 1')
    code, _, err = bbmoe("show", tmp_path)
    assert code == 2 and "damaged" in err and err.count("\n") == 1


def test_yaml_flags_and_settings_win_in_order(bbmoe, tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {lr: 0.3, epochs: 9}\npoison: {rate: 50%}\n")
    args = (
        "attack",
        *SMALL,
        "--config",
        file,
        "--lr",
        "0.2",
        "--set",
        "train.momentum=0.5",
        "--no-twin",
        "--json",
    )
    document = json.loads(bbmoe(*args, "--quiet", "--output", tmp_path / "runs")[1])
    spec = document["runs"][0]["spec"]
    assert (spec["train"]["lr"], spec["train"]["epochs"], spec["train"]["momentum"]) == (0.2, 1, 0.5)
    assert document["runs"][0]["poison"]["n"] == 24  # The flag's 25%, not the file's 50%.


def test_list_and_info(bbmoe) -> None:
    code, out, _ = bbmoe("list")
    assert code == 0
    assert all(name in out for name in ("warp", "patch", "pmoe", "timm:<architecture>", "signs"))
    names = [part["name"] for part in json.loads(bbmoe("list", "triggers", "--json")[1])["parts"]]
    assert {"square", "blend", "warp"} <= set(names)
    code, out, _ = bbmoe("info", "trigger", "warp")
    assert code == 0 and "grid_size" in out and "'bilinear' | 'truncate'" in out
    code, out, _ = bbmoe("info", "model", "pmoe", "--json")
    size = json.loads(out)["size"]
    assert size["parameters"] > 3_900_000 and size["multiply_adds"] > 100 * size["parameters"]
    assert "multiply-adds" in bbmoe("info", "model", "pmoe", "--set", "widen_factor=1")[1]


def test_info_lists_classes_by_number_and_name(bbmoe, tmp_path) -> None:
    for name in ("0", "2", "10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "empty.png").touch()
    code, out, _ = bbmoe("info", "dataset", "folder", "--data-root", tmp_path)
    assert code == 0 and [line.split() for line in out.splitlines()[-3:]] == [
        ["0", "0"],
        ["1", "2"],
        ["2", "10"],
    ]
    code, out, _ = bbmoe("info", "dataset", "folder")
    assert code == 0 and "--data-root" in out.splitlines()[-1]
    assert json.loads(bbmoe("info", "dataset", "folder", "--json")[1])["classes"] is None
    assert json.loads(bbmoe("info", "dataset", "gtsrb", "--json")[1])["classes"][14] == "stop"
    assert json.loads(bbmoe("info", "dataset", "tiny", "--json")[1])["classes"] == ["red", "green", "blue"]


def test_the_target_by_name_is_the_run_of_its_number(bbmoe, tmp_path) -> None:
    args = ["attack", *SMALL, "--trigger", "square", "--no-twin", "--output", tmp_path, "--source", "red,1"]
    code, out, err = bbmoe(*args, "--target", "Blue")
    assert code == 0
    assert (
        "3 classes: 0 (red), 1 (green), 2 (blue)" in err
        and "target: 2 (blue); source: 0 (red), 1 (green)" in err
    )
    code, again, err = bbmoe(*args, "--target", "2")
    assert code == 0 and "found finished" in err and again == out
    assert len(list(tmp_path.iterdir())) == 1


def test_a_rate_of_1_says_that_it_is_100_percent(bbmoe, tmp_path) -> None:
    args = ["attack", *SMALL, "--trigger", "square", "--no-twin", "--quiet", "--output", tmp_path, "--json"]
    with warnings.catch_warnings():
        warnings.simplefilter("always", BbmoeWarning)
        _, out, err = bbmoe(*args, "--poison-rate", "1")
    assert (
        err.startswith("bbmoe: warning: poison.rate: 1 means 100% of the training images")
        and err.count("\n") == 1
    )
    assert json.loads(out)["runs"][0]["poison"]["n"] == 96
    assert bbmoe(*args, "--poison-rate", "100%")[1] == out


COLD = """
import sys
from backdoorbench_moe import cli
sys.argv = ["bbmoe", *{args!r}]
try:
    cli.main()
finally:
    heavy = [name for name in ("torch", "kornia", "timm", "scipy", "matplotlib", "numpy") if name in sys.modules]
    print("heavy:", heavy, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--help"], 0),
        (["list", "splitters"], 0),  # Parts of other packages would be imported, to be checked.
        (["attack", "--help"], 0),
        (["attack", "--trigger", "wrap"], 2),
        (["defend", "--help"], 0),
        (["defend", "run", "--defense", "fine-prune"], 2),
    ],
)
def test_answers_that_need_no_torch_come_without_it(args, code) -> None:
    program = COLD.format(args=args)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert result.returncode == code, result.stderr
    assert "heavy: []" in result.stderr


@pytest.mark.slow
def test_an_attack_comes_without_what_only_detectors_and_analyses_need(tmp_path) -> None:
    args = ["attack", *SIGNS, "--epochs", "1", "--no-twin", "--output", str(tmp_path)]
    program = (
        COLD.format(args=args) + '    print("scipy.stats" in sys.modules, "scipy.optimize" in sys.modules)\n'
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_help_comes_after_commands_were_imported(bbmoe) -> None:
    """A command's module is an attribute of the package: `cli.list` must not take the place of list."""
    assert bbmoe("list", "datasets")[0] == 0
    code, out, _ = bbmoe("--help")
    assert code == 0 and "attack" in out


@pytest.fixture
def imports(monkeypatch) -> list[dict[str, object]]:
    """The options of every call of `import_backdoorbench`, which imports nothing here."""
    given: list[dict[str, object]] = []

    def import_backdoorbench(_: Path, **options: object) -> None:
        given.append(options)
        raise ConfigError("nothing to import")

    monkeypatch.setattr("backdoorbench_moe.interop.importing.import_backdoorbench", import_backdoorbench)
    return given


def test_an_import_of_backdoorbench_takes_the_normalisations_of_other_imports(
    bbmoe, tmp_path, imports
) -> None:
    words = ("import", "backdoorbench", tmp_path, "--quiet")
    bbmoe(*words, "--mean", "half")
    bbmoe(*words, "--mean", "0,0.5,1", "--std", "1,2,3")
    bbmoe(*words)
    half = (0.5, 0.5, 0.5)
    assert [each["normalisation"] for each in imports] == [(half, half), ([0, 0.5, 1], [1, 2, 3]), None]
    for flags, said in (
        (("--mean", "0,0"), "--mean: expected three numbers"),
        (("--mean", "0,0,0"), "model.std: expected three numbers"),
        (("--mean", "hlaf"), "did you mean 'half'"),
    ):
        code, _, err = bbmoe(*words, *flags)
        assert code == 2 and said in err and err.count("\n") == 1
    assert len(imports) == 3


def test_options_of_the_data_set_reach_the_import(bbmoe, tmp_path, imports) -> None:
    given, words = imports, ("import", "backdoorbench", tmp_path, "--quiet")
    bbmoe(*words, "--set", "dataset.train_images=100", "--set", "dataset.salt=2")
    bbmoe(*words)
    assert [each["data_options"] for each in given] == [{"train_images": 100, "salt": 2}, {}]
    for setting in ("model.x=1", "x=1"):
        code, out, err = bbmoe(*words, "--set", "dataset.train_images=100", "--set", setting)
        assert code == 2 and out == "" and err.count("\n") == 1
        assert (
            "--set: expected dataset.KEY=VALUE" in err and setting.partition(".")[0].partition("=")[0] in err
        )
    assert len(given) == 2
