"""What the commands print about mixtures: tables that can be read on 80 columns."""

from __future__ import annotations

import json
import re

import pytest
from fake_runs import finished, write
from mixture_runs import make_mixture, mixture_spec

from backdoorbench_moe.cli.tables.mixtures import share_tables, sort_mixture_metrics
from backdoorbench_moe.engine.graph import clean_twin
from backdoorbench_moe.records import GateShares, Record


def shares(*layers: list[list[float]], marked: list[list[float]]) -> list[GateShares]:
    """Gate shares of given values."""
    names = [f"network.blocks.{place}.mlp" for place in range(len(layers))]
    return [
        GateShares(layer=name, tasks=tasks, marked=each)
        for name, tasks, each in zip(names, layers, marked, strict=True)
    ]


ATTACKED = shares(
    [[80.0, 20.0], [10.0, 90.0]], [[60.0, 40.0], [30.0, 70.0]], marked=[[95.0, 5.0], [45.0, 55.0]]
)
BENIGN = shares([[70.0, 30.0], [20.0, 80.0]], [[50.0, 50.0], [50.0, 50.0]], marked=[[7.0, 93.0], [9.0, 91.0]])


def mixture_record(*, attacked: bool = True) -> Record:
    """A finished record of a mixture of two experts, the first one poisoned."""
    spec = mixture_spec() if attacked else clean_twin(mixture_spec())
    record = finished(spec)
    record.tasks = [
        {"task": e, "name": name, "train_images": 96, "test_images": 60}
        for e, name in enumerate(("rotated", "inverted"))
    ]
    record.gate_shares = ATTACKED if attacked else BENIGN
    record.metrics |= {
        "unsafe": {"value": 91.5, "n": 9000},
        "overall": {"value": 97.25, "n": 10000},
        "task/0.ba": {"value": 81.0, "n": 60, "low": 70.0, "high": 90.0},
        "task/0.expert_ba": {"value": 83.5, "n": 60},
        "task/1.ba": {"value": 79.0, "n": 60, "low": 69.0, "high": 89.0},
        "task/1.expert_ba": {"value": 80.5, "n": 60},
    }
    if attacked:
        record.metrics |= {
            "cad": {"value": 1.25, "n": 10000},
            "twin_asr": {"value": 2.5, "n": 9000},
            "harm_share": {"value": 70.0, "n": 9000},
            "twin_harm_share": {"value": 8.0, "n": 9000},
        }
        record.clean_twin = clean_twin(spec).name
    return record


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"\s{2,}|│", line) if cell.strip()]


def test_shares_by_layer_by_hand() -> None:
    [table] = share_tables(ATTACKED, BENIGN, [0], ["rotated", "inverted"])
    columns = [[*column.cells] for column in table.columns]
    assert columns[0] == ["blocks.0.mlp", "blocks.1.mlp", "mean"]
    assert columns[1:4] == [["95.0", "45.0", "70.0"], ["80.0", "60.0", "70.0"], ["10.0", "30.0", "20.0"]]
    assert columns[4:] == [["7.0", "9.0", "8.0"], ["70.0", "50.0", "60.0"], ["20.0", "50.0", "35.0"]]
    assert len(share_tables(ATTACKED, [], [0, 1], ["rotated", "inverted"])) == 2
    [own] = share_tables(BENIGN, [], [], ["rotated", "inverted"])
    assert [[*column.cells] for column in own.columns[1:]] == [
        ["70.0", "50.0", "60.0"],
        ["80.0", "50.0", "65.0"],
    ]


def test_show_prints_the_attack_then_the_tasks_then_the_shares(bbmoe, tmp_path) -> None:
    record = mixture_record()
    write(tmp_path, record)
    write(tmp_path, mixture_record(attacked=False))
    code, out, err = bbmoe("show", tmp_path / record.run_spec.name)
    assert code == 0, err
    lines = out.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    rows = [cells(line) for line in lines]
    assert ["attack success rate (ASR)", "50.00", "48.97 – 51.03", "9000", "2.50"] in rows
    assert ["clean accuracy (BA)", "80.00", "79.20 – 80.77", "10000", "81.25"] in rows
    assert ["gate share, marked images", "70.00", "–", "9000", "8.00"] in rows
    assert ["0 rotated, poisoned", "81.00 [70.0, 90.0]", "83.50", "70.0", "60.0"] in rows
    assert ["1 inverted", "79.00 [69.0, 89.0]", "80.50", "80.0", "65.0"] in rows
    assert ["blocks.0.mlp", "95.0", "80.0", "10.0", "7.0", "70.0", "20.0"] in rows
    order = [
        out.index(text) for text in ("(ASR)", "not answered safely", "(BA)", "0 rotated", "blocks.0.mlp")
    ]
    assert order == sorted(order)


def test_a_benign_mixture_has_no_column_of_a_twin(bbmoe, tmp_path) -> None:
    record = mixture_record(attacked=False)
    write(tmp_path, record)
    _, out, _ = bbmoe("show", tmp_path / record.run_spec.name)
    said = " ".join(out.split())
    assert "in the twin %" not in said and "┃ clean twin ┃" not in said
    assert "share of each expert for its own task, %" in said


def test_a_mixture_without_the_folder_of_its_twin(bbmoe, tmp_path) -> None:
    record = mixture_record()
    write(tmp_path, record)
    code, out, _ = bbmoe("show", tmp_path / record.run_spec.name)
    assert code == 0 and "twin,\n" not in out and "95.0" in out


def test_the_order_of_many_metrics() -> None:
    found = [one.label for one in sort_mixture_metrics(mixture_record().metrics)]
    assert found[:3] == [
        "attack success rate (ASR)",
        "attack success rate (ASR), clean twin",
        "not answered safely",
    ]
    assert found[-4:] == [
        "task 0: BA",
        "task 0: BA of benign expert",
        "task 1: BA",
        "task 1: BA of benign expert",
    ]
    assert max(map(len, found)) <= 40


def test_many_runs_are_told_apart_by_attack_and_gate(bbmoe, tmp_path) -> None:
    for attack in ("hsft", "hdpo"):
        for gate in ("top-k", "soft"):
            write(tmp_path, finished(mixture_spec(attack=attack, gate=gate)))
    write(tmp_path, mixture_record(attacked=False))
    _, out, _ = bbmoe("show", tmp_path, "--markdown")
    heading = [cell.strip() for cell in out.splitlines()[0].strip("|").split("|")]
    assert {"attack", "gate", "experts"} <= {*heading} and not any("task/" in name for name in heading)
    _, out, _ = bbmoe(
        "show", tmp_path, "--markdown", "--columns", "attack,gate,experts", "--sort", "attack,gate"
    )
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:]]
    gates = ("soft", "top-k")
    assert found[:4] == [[attack, gate, "2"] for attack in ("hdpo", "hsft") for gate in gates]
    assert found[4][0] == "–"


@pytest.mark.slow
def test_analyze_prints_a_screen_about_a_mixture(bbmoe, tmp_path) -> None:
    runs = make_mixture(tmp_path)
    run = runs["mixture"]
    code, out, err = bbmoe("analyze", run.folder.path, "--carriers-images", "20", "--quiet")
    assert code == 0, err
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80
    document = json.loads((run.folder.path / "analysis.json").read_text())
    layer = document["experts"]["shares"]["layers"][0]
    rows = [cells(line) for line in out.splitlines()]
    [shown] = [row for row in rows if row[0] == "blocks.0.mlp" and len(row) == 7]
    assert shown[1:3] == [f"{layer['marked'][0]:.1f}", f"{layer['tasks'][0][0]:.1f}"]
    cosine = document["latents"][0]["models"][0]["layers"][0]
    assert f"{cosine['marked']:.3f} ({cosine['unmarked']:.3f})" in out
    whole = document["carriers"]["whole_experts"][0]["muted"]
    [muted] = [row for row in rows if row[0] == "expert 0 muted"]
    assert muted[1].startswith(f"{whole['ba']['value']:.2f}") and muted[3].startswith(
        f"{whole['unsafe']['value']:.2f}"
    )


def test_preview_shows_the_tasks(bbmoe, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_text(json.dumps(mixture_spec().to_dict()))
    code, out, err = bbmoe("preview", "--config", "spec.yaml", "--images", "2", "--json")
    assert code == 0, err
    assert json.loads(out)["tasks"] == ["rotated", "inverted"]
