"""`bbmoe show` of many runs: columns, order, status, and a table that fits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fake_runs import finished, part_suite, write

from backdoorbench_moe.config import PartSpec, RunSpec, build_spec
from backdoorbench_moe.engine.graph import clean_twin
from backdoorbench_moe.records import Record

MODELS = ("pmoe", "wide_resnet", "timm:vit_tiny_patch16_224", "preact_resnet18")
DEFENSES = (None, "fine-pruning", "routing-strip", "expert-reset")
TRIGGERS = ("warp", {"name": "square", "size": 2}, {"name": "blend", "ratio": 0.35})


def many(output: Path, *, same_model: bool = False) -> list[Record]:
    """Runs of all kinds: clean, attacked, defended, filtered; finished, failed, interrupted."""
    records = []
    for number in range(12):
        defense = DEFENSES[number % 4]
        spec = build_spec(
            {
                "dataset": "cifar10",
                "model": MODELS[0 if same_model else number % 4],
                "trigger": TRIGGERS[number % 3],
                "poison": {"rate": (0.005, 0.02, 0.1)[number % 3]},
                "defenses": [] if defense is None else [{"name": defense, "clean_fraction": 0.1}],
                "seed": number,
            }
        )
        spec = spec if number % 5 else clean_twin(spec)
        record = finished(spec, ba=7000 + 100 * number, asr=9000 - 700 * number)
        if defense == "routing-strip" and spec.defenses:
            for name in ("auroc", "tpr", "fpr"):
                record.metrics[name] = {"value": 90.0 + number, "n": 100, "low": 80.0, "high": 99.0}
        if number == 7:
            record.status, record.error = "failed", "ran out of memory"
        if number == 8:
            record.status, record.metrics = "running", {}  # Nobody holds its folder: it was killed.
        write(output, record)
        records.append(record)
    return records


def rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table without its heading."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()[2:]]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("same_model", [False, True])
def test_no_word_is_broken_and_no_line_too_long(bbmoe, tmp_path, width, same_model) -> None:
    records = many(tmp_path, same_model=same_model)
    code, out, _ = bbmoe("show", tmp_path, width=width)
    assert code == 0
    table = [line for line in out.splitlines() if not line.startswith(("all ", "failed:"))]
    assert max(map(len, table)) <= width
    words = set(re.findall(r"[^\s,]+", out))
    for record in records:
        spec = record.run_spec
        shown = [spec.model.name, *(part.name for part in spec.defenses)]
        shown += [f"{metric['value']:.2f}" for metric in record.metrics.values()]
        assert set(shown) <= words
    # A broken word would leave a piece that is no word of the table.
    assert not {"prunin", "g", "patch16_22", "4", "routing-stri"} & (words - {"4", "g"})


def test_status_and_all_metrics_are_shown(bbmoe, tmp_path) -> None:
    records = many(tmp_path)
    code, out, _ = bbmoe(
        "show", tmp_path, "--markdown", "--columns", "run,status,ba,asr,ra,auroc,tpr,fpr,cad"
    )
    assert code == 0
    found = {row[0]: row[1:] for row in rows(out)}
    assert len(found) == len({record.run_spec.name for record in records})
    for record in records:
        status, *metrics = found[record.run_spec.name]
        assert status == ("interrupted" if record.status == "running" else record.status)
        for name, text in zip(("ba", "asr", "ra", "auroc", "tpr", "fpr", "cad"), metrics, strict=True):
            metric = record.metrics.get(name)
            assert text.split(" ")[0] == ("–" if metric is None else f"{metric['value']:.2f}")
    assert "ran out of memory" in bbmoe("show", tmp_path)[1]


def test_what_is_equal_is_said_once(bbmoe, tmp_path) -> None:
    many(tmp_path, same_model=True)
    lines = bbmoe("show", tmp_path, width=200)[1].splitlines()
    assert lines[0].startswith("all 12 runs: ") and "data cifar10" in lines[0] and "model pmoe" in lines[0]
    assert "cifar10" not in "".join(lines[1:2])
    assert "seed" in lines[1] and "AUROC %" in lines[1]


@pytest.mark.parametrize("extra", [[], ["--markdown"]])
def test_runs_that_differ_only_in_what_is_no_column_show_their_folders(bbmoe, tmp_path, extra) -> None:
    for probe in (0, 8):
        write(tmp_path, finished(build_spec({"probe": probe}), ba=9000, asr=9000))
    folders = {path.name for path in tmp_path.iterdir()}
    code, out, _ = bbmoe("show", tmp_path, *extra, width=200)
    assert code == 0 and folders <= set(out.split())
    write(tmp_path / "seeds", finished(build_spec({"seed": 0}), ba=9000, asr=9000))
    write(tmp_path / "seeds", finished(build_spec({"seed": 1}), ba=9000, asr=9000))
    code, out, _ = bbmoe("show", tmp_path / "seeds", *extra, width=200)
    assert code == 0 and "signs-" not in out


def headings(text: str) -> list[str]:
    """The headings of a Markdown table."""
    return [cell.strip() for cell in text.splitlines()[0].strip("|").split("|")]


@pytest.mark.parametrize(
    ("first", "second", "columns"),
    [
        ({"train": {"lr": 0.1}}, {"train": {"lr": 0.2}, "seed": 1}, {"train.lr": ["0.1", "0.2"]}),
        ({}, {"train": {"accumulate": 4}}, {"train.accumulate": ["1", "4"]}),
        ({}, {"model": {"name": "pmoe", "experts": 4}}, {"model.experts": ["–", "4"]}),
        ({"poison": {"target": 1}}, {"poison": {"target": 2}}, {"poison.target": ["1", "2"]}),
        ({}, {"dataset": {"root": "/data"}, "device": "cpu", "recipe": "paper"}, None),
        ({}, {"model": {"name": "wide_resnet", "depth": 16}}, {}),
    ],
)
def test_other_settings_that_differ_are_columns(bbmoe, tmp_path, first, second, columns) -> None:
    keys = {"recipe": "quick", "seed": 0}
    for number, values in enumerate((first, second)):
        write(tmp_path / str(number), finished(build_spec({**keys, **values}), ba=9000, asr=9000))
    code, out, _ = bbmoe("show", tmp_path / "0", tmp_path / "1", "--markdown")
    assert code == 0
    if columns is None:  # Other settings of the recipes differ, but neither the path nor the device is shown.
        assert not {"dataset.root", "device", "recipe"} & set(headings(out))
        return
    found = dict(zip(headings(out), zip(*rows(out), strict=True), strict=True))
    assert {key: list(value) for key, value in found.items() if "." in key} == columns


def test_a_clean_twin_adds_no_columns(bbmoe, tmp_path) -> None:
    spec = build_spec({"poison": {"target": 3}, "probe": 4})
    for each in (spec, clean_twin(spec)):
        write(tmp_path, finished(each, ba=9000))
    assert not [name for name in headings(bbmoe("show", tmp_path, "--markdown")[1]) if "." in name]


def test_the_number_of_further_differing_settings_is_said(bbmoe, tmp_path) -> None:
    train = {
        "lr": 0.2,
        "momentum": 0.5,
        "weight_decay": 0.1,
        "batch_size": 64,
        "gamma": 0.2,
        "clip_grad": 1.0,
    }
    for values in ({}, train):
        write(tmp_path, finished(build_spec({"train": values}), ba=9000, asr=9000))
    for extra in ([], ["--markdown"]):
        out = bbmoe("show", tmp_path, *extra, width=200)[1]
        assert (
            out.splitlines()[-1]
            == "2 more settings differ, such as train.gamma; --columns prints chosen ones"
        )
    assert "differ" not in bbmoe("show", tmp_path, "--columns", "seed")[1]


def test_metrics_that_no_run_has_are_no_columns(bbmoe, tmp_path) -> None:
    for seed in range(2):
        write(tmp_path, finished(build_spec({"seed": seed})))
    heading = bbmoe("show", tmp_path, width=200)[1].splitlines()[1].split()
    assert heading == ["seed", "BA", "%", "ASR", "%", "no", "trigger", "%"], (
        "which shows that it was not measured"
    )


@pytest.mark.parametrize(
    "key", ["asr", "-asr", "ba,-seed", "-auroc", "model,ba", "poison.rate,-ba", "timing.n"]
)
def test_sorted_by_columns_with_what_is_missing_last(bbmoe, tmp_path, key) -> None:
    """Against Python's own sort, key by key from the last."""
    records = many(tmp_path)
    for number, record in enumerate(records):
        record.timing["n"] = (number * 7) % 12
        write(tmp_path, record)

    def value(record: Record, name: str) -> object:
        spec = record.run_spec
        known = {"seed": spec.seed, "model": spec.model.name, "poison.rate": spec.poison.rate}
        known |= {"timing.n": record.timing["n"]}
        return known.get(name, record.metrics.get(name, {}).get("value"))

    want = sorted(records, key=lambda record: record.run_spec.name)  # As the folder lists them.
    for one in reversed(key.split(",")):
        name = one.removeprefix("-")
        there = [record for record in want if value(record, name) is not None]
        there.sort(key=lambda record: value(record, name), reverse=one != name)
        want = there + [record for record in want if value(record, name) is None]
    _, out, _ = bbmoe("show", tmp_path, "--markdown", "--columns", "run", f"--sort={key}")
    assert [row[0] for row in rows(out)] == [record.run_spec.name for record in want]
    documents = json.loads(bbmoe("show", tmp_path, "--json", "--sort", key)[1])
    assert [each["digest"] for each in documents] == [record.digest for record in want]


def test_any_key_of_a_spec_or_record_is_a_column(bbmoe, tmp_path) -> None:
    record = finished(build_spec({"train": {"lr": 0.05}, "trigger": {"name": "blend", "ratio": 0.3}}))
    record.metrics["ba"]["low"] = 79.25
    write(tmp_path, record)
    columns = "train.lr,trigger.ratio,environment.device,metrics.ba.low,timing.train_seconds"
    _, out, _ = bbmoe("show", tmp_path, "--columns", columns, "--markdown")
    assert rows(out) == [["0.05", "0.3", "cpu", "79.25", "60.5"]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--columns", "asrr"], "column: unknown 'asrr'; did you mean 'asr'"),
        (["--columns", "train.lrr"], "column: unknown 'train.lrr'; did you mean 'train.lr'"),
        (["--sort", "-sed"], "column: unknown 'sed'; did you mean 'seed'"),
        (["--columns", "ba,,asr"], "--columns: expected names of columns"),
    ],
)
def test_unknown_columns_are_refused(bbmoe, tmp_path, args, message) -> None:
    many(tmp_path)
    code, out, err = bbmoe("show", tmp_path, *args)
    assert (code, out) == (2, "") and message in err


def test_a_damaged_run_of_a_folder_is_named_and_the_others_are_shown(bbmoe, tmp_path) -> None:
    specs = [build_spec({"seed": seed}) for seed in range(2)]
    for spec in specs:
        write(tmp_path, finished(spec, asr=5000))
    folders = [tmp_path / spec.name for spec in specs]
    (folders[0] / "record.json").write_text("{", encoding="utf-8")
    code, out, err = bbmoe("show", tmp_path, "--json")
    assert code == 0 and json.loads(out)["spec"]["seed"] == 1
    assert err.startswith("left out: ") and str(folders[0]) in err and err.count("\n") == 1
    # A run that is named itself must be readable.
    code, out, err = bbmoe("show", folders[1], folders[0])
    assert (code, out) == (2, "") and str(folders[0]) in err


def test_a_folder_without_runs_is_refused(bbmoe, tmp_path) -> None:
    code, _, err = bbmoe("show", tmp_path)
    assert code == 2 and "expected a record.json in it" in err


def test_single_words_wider_than_the_terminal_do_not_stop_it(bbmoe, tmp_path) -> None:
    many(tmp_path)
    assert bbmoe("show", tmp_path, "--columns", "run,asr", width=20)[0] == 0


def test_markup_in_a_name_is_text(bbmoe, tmp_path) -> None:
    spec = RunSpec(trigger=PartSpec("blend", {"image": "[red]x[/red].png"}))
    write(tmp_path, finished(spec))
    write(tmp_path, finished(part_suite().cells[0].spec))
    assert "image=[red]x[/red].png" in bbmoe("show", tmp_path, width=200)[1]


def test_markup_in_a_path_is_text(bbmoe, tmp_path) -> None:
    record = finished(build_spec({"dataset": {"name": "cifar10", "root": "/sets[v2]/[/b][red]"}}))
    record.clean_twin = "twin[v2][/b]"
    write(tmp_path, record)
    code, out, _ = bbmoe("show", tmp_path / record.run_spec.name, width=200)
    assert code == 0
    assert all(path in out for path in ("/sets[v2]/[/b][red]", record.clean_twin))


def test_metrics_of_any_name_are_columns(bbmoe, tmp_path) -> None:
    """Of a part of the data, of a stage, of a plug-in, of the twin, and the time; each run has its own, or a dash."""
    plain, pruned = (finished(build_spec({"seed": seed}), ba=8000, asr=4500) for seed in range(2))
    other = {"value": 12.5, "n": 100}
    plain.metrics |= {"task/2.ba": other, "cad": {"value": 1.25, "n": 10000}, "of_a_plugin": other}
    pruned.stages = [{"name": "pruned", "metrics": {"asr": other}, "seconds": 2.5}]
    pruned.timing["defense_seconds"] = 7.5
    for record in (plain, pruned):
        write(tmp_path, record)
    wanted = {
        "task/2.ba": ["12.50", "–"],
        "of_a_plugin": ["12.50", "–"],
        "twin_ba": ["81.25", "–"],
        "pruned.asr": ["–", "12.50"],
        "seconds": ["60.50", "7.50"],
        "pruned.seconds": ["–", "2.50"],
    }
    code, out, err = bbmoe("show", tmp_path, "--sort", "seed", "--markdown", "--columns", ",".join(wanted))
    assert code == 0, err
    assert [list(column) for column in zip(*rows(out), strict=True)] == list(wanted.values())
    _, out, _ = bbmoe("show", tmp_path, "--sort=-task/2.ba", "--markdown", "--columns", "seed")
    assert rows(out) == [["0"], ["1"]]
    heading = bbmoe("show", tmp_path, "--markdown")[1].splitlines()[0]
    assert "| task/2 BA % |" in heading and "| of_a_plugin |" in heading
    assert "seconds" not in heading and "twin" not in heading


def test_a_stage_near_chance_is_marked_and_explained(bbmoe, tmp_path) -> None:
    """The run is not: after the stage it was tuned."""
    record = finished(build_spec({}), ba=8000)
    bad = {"ba": {"value": 50.0, "n": 10000}, "asr": {"value": 100.0, "n": 9000}}
    record.stages = [{"name": "pruned", "metrics": bad, "seconds": 1.0}]
    write(tmp_path, record)
    _, out, _ = bbmoe("show", tmp_path, "--markdown", "--columns", "asr,pruned.asr")
    assert rows(out)[0] == ["50.00 [49.0, 51.0]", "100.00 †"] and "† The clean accuracy is near chance" in out
    _, out, _ = bbmoe("show", tmp_path, "--markdown", "--columns", "asr")
    assert "†" not in out
