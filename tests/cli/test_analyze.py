"""`bbmoe analyze`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import Tiny, tiny_spec

from backdoorbench_moe import api
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.engine.runner import run_attack
from backdoorbench_moe.errors import BbmoeError

FAST = ("--carriers-images", "20")


@pytest.fixture
def victim(tmp_path) -> Run:
    """A finished run with its clean twin beside it."""
    return run_attack(tiny_spec(), output=tmp_path / "runs")[0]


def files_in(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


@pytest.mark.slow
def test_it_prints_a_screen_and_writes_document_figures_and_report(bbmoe, victim, tmp_path) -> None:
    before = files_in(tmp_path)
    code, out, err = bbmoe("analyze", victim.folder.path, *FAST, "--output", tmp_path / "new" / "place")
    assert code == 0 and f"analyzing {victim.folder.path.name}: routing" in err
    place = tmp_path / "new" / "place"
    document = json.loads((place / "analysis.json").read_text())
    assert document["run"]["name"] == victim.folder.path.name and document["images"]["test"] == 60
    assert document["against"]["name"] == victim.record.clean_twin
    for name in ("analysis.json", "report.html"):
        assert str(place / name) in out
    assert f"{document['capture'][0]['captured']['value']:.2f}" in out
    assert "who carries the backdoor" in out and "no probe: the run was made without --probe" in out
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80
    figures = {file.stem for file in (place / "figures").glob("*.png")}
    assert figures >= {"routing", "capture", "carriers", "shift-divergence", "pixels", "image-1", "history"}
    assert "This model is backdoored." in (place / "report.html").read_text(encoding="utf-8")
    # The run folder stays as it was.
    assert [file for file in files_in(tmp_path) if not file.startswith("new")] == before


@pytest.mark.slow
def test_json_and_the_run_folder_by_default(bbmoe, victim) -> None:
    code, out, err = bbmoe("analyze", victim.folder.path, *FAST, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((victim.folder.path / "analysis.json").read_text())
    assert (victim.folder.path / "report.html").is_file()
    # It is a run folder still, and can be analyzed again.
    assert load_run(victim.folder.path).record == victim.record
    report = (victim.folder.path / "report.html").read_bytes()
    assert bbmoe("analyze", victim.folder.path, *FAST, "--quiet")[0] == 0
    first, again = (
        text.split(b"analyzed in")[0] for text in (report, (victim.folder.path / "report.html").read_bytes())
    )
    assert first == again


@pytest.mark.slow
def test_chosen_images_and_files(bbmoe, victim, tmp_path) -> None:
    image = Tiny().load().test.images[7]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "seven.png")
    Image.new("RGB", (90, 50), (200, 10, 10)).save(tmp_path / "wide.jpg")
    chosen = f"7, {tmp_path / 'seven.png'},{tmp_path / 'wide.jpg'}"
    code, out, _ = bbmoe("analyze", victim.folder.path, *FAST, "--json", "--images", chosen)
    assert code == 0
    examples = json.loads(out)["examples"]
    assert examples["indices"] == [7, None, None]
    assert examples["names"] == ["test image 7", "seven.png", "wide.jpg"]
    assert examples["labels"] == ["green", None, None]
    # The same pixels are routed the same, whether they come from the data or from a file.
    for kind in ("clean", "triggered"):
        assert examples[kind][0] == examples[kind][1] != examples[kind][2]
        selected = examples["models"][0][kind]["layers"][0]["selected"]
        assert selected[0] == selected[1]
    page = (victim.folder.path / "report.html").read_text(encoding="utf-8")
    assert "Wide.jpg" in page and "of unknown class" in page


@pytest.mark.slow
def test_before_and_after_a_defense(bbmoe, victim) -> None:
    defended = api.defend(victim, "fine-tuning", clean_fraction=0.5, epochs=1)
    code, out, _ = bbmoe("analyze", defended.folder.path, "--against", victim.folder.path, *FAST, "--json")
    document = json.loads(out)
    assert code == 0 and document["against"]["name"] == victim.folder.path.name
    page = (defended.folder.path / "report.html").read_text(encoding="utf-8")
    assert "was backdoored and then defended with fine-tuning" in page and "Stages of the defense" in page
    assert "the backdoored model predicts" in page
    assert {one["part"]: one["reason"] for one in document["absent"]}["probe"].startswith(
        "the run is a defended"
    )


@pytest.mark.slow
def test_a_clean_run_under_the_trigger_of_the_other(bbmoe, victim) -> None:
    twin = victim.folder.path.parent / victim.record.clean_twin
    code, out, _ = bbmoe("analyze", twin, "--against", victim.folder.path, *FAST, "--json")
    document = json.loads(out)
    assert code == 0 and document["trigger_from"] == victim.folder.path.name
    # What the one analysis says of the twin, the other says, too.
    _, beside, _ = bbmoe("analyze", victim.folder.path, *FAST, "--json")
    assert document["capture"] == json.loads(beside)["findings_against"]["capture"]
    page = (twin / "report.html").read_text(encoding="utf-8")
    assert "This model was trained on clean data." in page
    assert f"with the trigger of {victim.folder.path.name}" in page
    alone = json.loads(bbmoe("analyze", twin, *FAST, "--json")[1])
    assert alone["capture"] is None and alone["images"]["triggered"] == 0
    page = (twin / "report.html").read_text(encoding="utf-8")
    assert "BA with one expert muted" in page and "capture: there is no trigger" in page
    assert not (twin / "figures" / "capture.png").exists()


@pytest.mark.slow
def test_a_probe_from_flag_to_report(bbmoe, tmp_path) -> None:
    flags = ["--dataset", "tiny", "--model", "pmoe", "--epochs", "2", "--probe", "4", "--trigger", "square"]
    sizes = ["widen_factor=1", "moe_channels=8", "expert_channels=4"]
    settings = [part for size in sizes for part in ("--set", f"model.{size}")]
    code, out, _ = bbmoe(
        "attack", *flags, *settings, "--applicator", "image", "--output", tmp_path, "--no-twin", "--json"
    )
    assert code == 0
    [record] = json.loads(out)["runs"]
    assert record["spec"]["probe"] == 4
    code, out, _ = bbmoe("analyze", record["folder"], *FAST, "--json")
    document = json.loads(out)
    assert code == 0 and len(document["probe"]["indices"]) == 4 and document["probe"]["epochs"] == [0, 1, 2]
    assert "Effect of the trigger over training" in (Path(record["folder"]) / "report.html").read_text(
        encoding="utf-8"
    )
    code, _, err = bbmoe("attack", *flags, "--set", "probe=-2", "--output", tmp_path / "no")
    assert (
        code == 2
        and "probe: expected a number of at least 0, got -2" in err
        and not (tmp_path / "no").exists()
    )


@pytest.mark.slow
def test_a_dense_model_shows_what_it_has(bbmoe, tmp_path) -> None:
    [run] = run_attack(tiny_spec(model={"name": "wide_resnet", "widen_factor": 1}), output=tmp_path)
    code, out, _ = bbmoe("analyze", run.folder.path, "--quiet")
    assert code == 0
    absent = "no routing, capture, shift, pixels, carriers, comparison, probe: the model 'wide_resnet' has no routing"
    assert " ".join(out.split()).count(absent) == 1
    figures = {file.stem for file in (run.folder.path / "figures").glob("*.png")}
    assert figures == {"history", *(f"image-{n}" for n in range(1, 7))}


BAD = {
    "no image": (["--images", "none.png"], "none.png: cannot be read as an image: No such file or directory\n"),
    "no picture": (["--images", "3,{text}"], "text.png: cannot be read as an image (UnidentifiedImageError"),
    "clear": (["--images", "{clear}"], "clear.png: expected an RGB, grey or palette image of 8 bits a channel without"),
    "images": (["--images", "60"], "images: expected test images in 0..59, or files, got 60"),
    "negative": (["--images", "-1"], "images: expected test images in 0..59, or files, got -1"),
    "empty": (["--images", "3,,4"], "--images: expected numbers of test images such as 3,17, or files"),
    "many": (["--images", ",".join("1" * 101)], "images: expected 1 to 100 images, got 101"),
    "carriers": (["--carriers-images", "0"], "carriers_images: expected at least 1, got 0"),
    "against": (["--against", "nothing"], "--against: run folder nothing: expected a folder with a record.json"),
    "device": (["--device", "gpu"], "device: expected"),
    "output": (["--output", "{text}"], "expected a folder"),
    "data root": (["--data-root", "x"], "--data-root (data_root=): expected none"),
}  # fmt: skip


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line_and_exit_2(bbmoe, victim, tmp_path, args, message) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGBA", (32, 32), (1, 2, 3, 4)).save(tmp_path / "clear.png")
    before = files_in(tmp_path)
    known = {name: tmp_path / f"{name}.png" for name in ("text", "clear")}
    given = [text.format(**known) for text in args]
    code, out, err = bbmoe("analyze", victim.folder.path, "--quiet", "--output", tmp_path / "new", *given)
    assert (code, out) == (2, "") and message in err and "Traceback" not in err and err.count("\n") == 1
    assert files_in(tmp_path) == before


@pytest.mark.slow
def test_runs_that_cannot_be_analyzed(bbmoe, victim, tmp_path) -> None:
    [other] = run_attack(
        tiny_spec(dataset={"name": "tiny", "salt": 1}), output=tmp_path / "other", twin=False
    )
    [dense] = run_attack(
        tiny_spec(model={"name": "wide_resnet", "widen_factor": 1}), output=tmp_path / "dense", twin=False
    )
    before = files_in(tmp_path)
    for against, message in (
        (other, "tiny: expected the data of the run"),
        (dense, "against: expected a model with the routed layers of"),
    ):
        code, _, err = bbmoe("analyze", victim.folder.path, "--against", against.folder.path, "--quiet")
        assert code == 2 and message in err and err.count("\n") == 1
    assert files_in(tmp_path) == before
    # A model of other classes than the data's.
    victim.record.data["classes"] = ["red", "green"]
    victim.folder.write(victim.record)
    code, _, err = bbmoe("analyze", victim.folder.path, "--quiet")
    assert code == 2 and err.count("\n") == 1 and "head" in err
    tensors, header = victim.folder.load_tensors()
    names = [name for name, tensor in tensors.items() if tensor.shape[:1] == (3,) and "head" in name]
    assert names
    cut = {name: tensor[:2].clone() if name in names else tensor for name, tensor in tensors.items()}
    victim.folder.save_model(cut, header)
    victim.record.model_sha256 = victim.folder.model_sha256
    victim.folder.write(victim.record)
    code, _, err = bbmoe("analyze", victim.folder.path, "--quiet")
    assert code == 2 and "expected the 2 classes that the model of run" in err and err.count("\n") == 1
    victim.record.status = "interrupted"
    victim.folder.write(victim.record)
    code, _, err = bbmoe("analyze", victim.folder.path, "--quiet")
    assert code == 2 and "expected a finished run, its status is 'interrupted'" in err
    assert files_in(tmp_path) == before


@pytest.mark.slow
def test_the_same_from_python(victim, tmp_path) -> None:
    analysis = api.analyze(victim, images=[3], carriers_images=20)
    assert analysis.examples.indices == (3,) and not (victim.folder.path / "analysis.json").exists()
    assert isinstance(analysis.findings.routing[0].frequency, torch.Tensor)
    again = api.analyze(victim.folder.path, images=[3], carriers_images=20, output=tmp_path / "out")
    assert again.findings.capture[0].captured == analysis.findings.capture[0].captured
    assert (tmp_path / "out" / "report.html").is_file()
    (tmp_path / "bad" / "report.html").mkdir(parents=True)
    with pytest.raises(BbmoeError, match=r"expected a file report\.html, found a folder"):
        api.analyze(victim, output=tmp_path / "bad")
