"""The report of an analysis: complete, accessible, self-contained, and drawn from its document alone."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image
from report_runs import document_of
from tiny import tiny_spec

from backdoorbench_moe.analysis.document import as_document, load_document, save_document, to_text
from backdoorbench_moe.analysis.facts import run_facts
from backdoorbench_moe.analysis.figures.training import draw_training
from backdoorbench_moe.analysis.report import (
    LIST,
    AnalysisReport,
    command,
    draw_report,
    draw_sections,
    make_report,
    page,
    save_report,
)
from backdoorbench_moe.engine.runner import run_attack
from backdoorbench_moe.errors import RecordError

VOID = {"meta", "br", "hr", "img", "link", "use", "path"}
EVIL = "<script>alert(1)</script>\"'&$x_1$"


class Page(HTMLParser):
    """Collects tags, ids, references, labels and the texts of some tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.labels: list[str] = []
        self.texts: dict[str, list[str]] = {"h1": [], "figcaption": [], "li": []}
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.references += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "action") and v]
        self.references += re.findall(r"url\((.*?)\)", values.get("style") or "")
        if tag == "svg":
            assert values["role"] == "img"
            self.labels.append(values["aria-label"])
        if tag in self.texts:
            self.texts[tag].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        for tag in self.texts:
            if tag in self.open:
                self.texts[tag][-1] += data


@pytest.fixture(params=["pmoe", "dense", pytest.param("deep", marks=pytest.mark.slow)])
def document(request) -> dict:
    return document_of(request.param)


@pytest.mark.slow
def test_the_page_is_self_contained(document) -> None:
    sections = draw_sections(document)
    report = make_report(document, sections)
    shown = Page(report.page)
    assert shown.open == [] and len(shown.ids) == len(set(shown.ids))
    inside = [one for one in shown.references if one.startswith("#")]
    assert {one[1:] for one in inside} <= set(shown.ids)
    assert all(one.startswith("data:image/png;base64,") for one in set(shown.references) - set(inside))
    assert not {"script", "link", "img", "iframe"} & set(shown.tags) and "@import" not in report.page
    # Every figure has a caption, an alternative text and a PNG file of the same name.
    plates = [plate for section in sections for plate in section.plates]
    assert shown.tags.count("figure") == len(plates) == len(report.figures) >= 7
    assert shown.labels == [plate.alt for plate in plates]
    assert shown.texts["figcaption"] == [plate.sentence for plate in plates]
    for plate in plates:
        assert plate.sentence.endswith(".") and len(plate.alt) > 60
        assert "nan" not in plate.sentence.lower().split() and "None" not in plate.sentence
        with Image.open(BytesIO(report.figures[plate.name])) as image:
            assert image.width == pytest.approx(200 * plate.width, abs=2)
            assert image.width < 200 * 9
    # Missing parts are listed with their reasons.
    for one in document["absent"]:
        assert f"{one['part']}: {one['reason']}" in shown.texts["li"]
    assert shown.texts["h1"] == [document["run"]["name"]]


@pytest.mark.slow
def test_light_dark_print_and_a_narrow_screen() -> None:
    text = draw_report(document_of("dense")).page
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    dark = style[1].split("@media (prefers-color-scheme: dark)")[1].split("@media")[0]
    for variable in ("--paper", "--ink", "--rule", "--line-0"):
        assert variable in dark
    assert style[1].count("@media print") == 3
    assert 'name="viewport" content="width=device-width' in text
    svgs = re.findall(r"<svg [^>]*>.*?</svg>", text, re.DOTALL)
    assert svgs and all("#1a1a1a" not in svg and "var(--ink)" in svg for svg in svgs)


@pytest.mark.slow
def test_the_same_bytes_from_a_document_that_was_written_and_read(tmp_path) -> None:
    document = document_of("dense")
    file = save_document(document, tmp_path / "new")
    assert file.read_text() == to_text(document)
    first, again = draw_report(document), draw_report(load_document(file))
    assert again == first


@pytest.mark.slow
def test_the_same_bytes_of_a_routed_model() -> None:
    document = document_of("pmoe")
    assert draw_report(document) == draw_report(json.loads(to_text(document)))


ANALYSIS = '{"schema_version": 1, "kind": "analysis"}'
RUN = '{"schema_version": 1, "kind": "analysis", "run": {}}'


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1, "kind": "suite"}', ANALYSIS, RUN])
def test_other_files_are_refused(tmp_path, text) -> None:
    (tmp_path / "analysis.json").write_text(text)
    with pytest.raises(RecordError, match=r"analysis .*analysis\.json: (damaged|expected an analysis)"):
        load_document(tmp_path / "analysis.json")
    with pytest.raises(RecordError, match="No such file"):
        load_document(tmp_path / "none.json")


@pytest.mark.slow
def test_files_are_written_and_old_figures_removed(tmp_path) -> None:
    report = draw_report(document_of("dense"))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "routing.png").write_text("of an earlier analysis")
    (tmp_path / "figures" / LIST).write_text('["routing"]')
    (tmp_path / "figures" / "mine.txt").write_text("not ours")
    assert save_report(report, tmp_path).read_text(encoding="utf-8") == report.page
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert names == {f"{name}.png" for name in report.figures} | {"mine.txt", LIST}
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="output folder"):
        save_report(report, tmp_path / "file")


def test_only_figures_of_an_earlier_analysis_are_deleted(tmp_path) -> None:
    folder = tmp_path / "figures"
    save_report(AnalysisReport("<p>1</p>", {"history": b"1", "routing": b"1"}), tmp_path)
    (folder / "photo.png").write_bytes(b"mine")
    save_report(AnalysisReport("<p>2</p>", {"history": b"2"}), tmp_path)
    assert {file.name for file in folder.iterdir()} == {"history.png", "photo.png", LIST}
    assert (folder / "photo.png").read_bytes() == b"mine" and (folder / "history.png").read_bytes() == b"2"


@pytest.mark.parametrize(
    "written",
    [
        "",
        "{",
        "[" * 100_000,
        '"photo"',
        "7",
        '{"photo": 1}',
        '[["photo"], null, 7]',
        '["../photo", "../figures/photo", "", ".", "..", "/photo"]',
        b"\xff\xfe",
    ],
    ids=lambda written: str(written[:12]),
)
def test_a_damaged_or_hostile_list_of_figures_deletes_nothing(tmp_path, written) -> None:
    folder = tmp_path / "figures"
    folder.mkdir()
    mine = [folder / "photo.png", tmp_path / "photo.png"]
    for file in mine:
        file.write_bytes(b"mine")
    (folder / LIST).write_bytes(written if isinstance(written, bytes) else written.encode())
    save_report(AnalysisReport("<p></p>", {"history": b"1"}), tmp_path)
    assert all(file.read_bytes() == b"mine" for file in mine)
    assert json.loads((folder / LIST).read_text()) == ["history"]


@pytest.mark.slow
def test_names_are_escaped() -> None:
    document = copy.deepcopy(document_of("dense"))
    document["run"]["name"] = document["against"]["name"] = EVIL
    document["run"]["record"]["spec"]["model"]["option"] = EVIL
    document["run"]["record"]["data"]["classes"] = [EVIL]
    document["examples"]["labels"][0] = document["examples"]["names"][0] = EVIL
    document["examples"]["models"][0]["clean"]["predicted"][0] = EVIL
    document["absent"].append({"part": EVIL, "reason": EVIL})
    text = draw_report(document).page
    shown = Page(text)
    assert "script" not in shown.tags and shown.texts["h1"] == [EVIL]
    assert sum(EVIL in caption for caption in shown.texts["figcaption"]) == 1
    assert any(EVIL in label for label in shown.labels) and f"{EVIL}: {EVIL}" in shown.texts["li"]
    assert command(document).startswith("bbmoe analyze '<script>")


@pytest.mark.parametrize(
    ("attacked", "defenses", "said"),
    [
        (True, [], "This model is backdoored."),
        (True, ["a", "b"], "This model was backdoored and then defended with a, b."),
        (False, [], "This model was trained on clean data."),
        (False, ["a"], "This model was trained on clean data and then defended with a."),
        (None, [], "This model was imported. Whether it is backdoored is not known."),
        (
            None,
            ["a"],
            "This model was imported and then defended with a. Whether it is backdoored is not known.",
        ),
    ],
)
def test_it_says_what_the_model_is(attacked, defenses, said) -> None:
    document = copy.deepcopy(document_of("dense"))
    document["run"]["attacked"] = attacked
    document["run"]["record"]["spec"]["defenses"] = [{"name": name} for name in defenses]
    text = page(document, [])
    assert said in text
    assert ("backdoored." in text or "backdoored and" in text) == bool(attacked)


@pytest.mark.slow
def test_metrics_history_settings_and_stages_are_the_records() -> None:
    document = copy.deepcopy(document_of("pmoe"))
    record = document["run"]["record"]
    record["stages"] = [
        {"name": "before", "metrics": {"ba": {"value": 12.345, "n": 9}}, "seconds": 0.0},
        {"name": "pruned", "metrics": {"ba": {"value": 1, "n": 9, "low": 0.5, "high": 2}}, "seconds": 3.25},
    ]
    [history, *_] = draw_training(document)
    text = page(document, [])
    for name in ("ba", "asr", "cad"):
        assert f"{document['run']['metrics'][name]['value']:.2f}" in text
    assert "12.35" in text or "12.34" in text
    assert "1.00 [0.5, 2.0]" in text and "3.2" in text
    for key, value in (("train.lr", "0.1"), ("poison.rate", "0.25"), ("model.moe_channels", "8")):
        assert f'<th scope="row">{key}</th><td>{value}</td>' in text
    assert record["environment"]["packages"]["torch"] in text and record["data"]["digest"] in text
    assert (
        f"loss {record['history'][0]['loss']:.3f} to {record['history'][1]['loss']:.3f}" in history.sentence
    )


def test_the_target_rate_without_the_trigger_stands_beside_asr() -> None:
    document = copy.deepcopy(document_of("pmoe"))
    metrics = document["run"]["metrics"]
    metrics.pop("target_rate", None)
    assert '<th scope="row">target rate without the trigger</th><td>–</td>' in page(document, [])
    metrics["target_rate"] = {"value": 21.26, "n": 40, "low": 11.5, "high": 36.0}
    text = page(document, [])
    assert '<th scope="row">target rate without the trigger</th><td>21.26 [11.5, 36.0]</td>' in text
    assert "without the trigger it already predicts the target class for 21.26% of the same images" in text


@pytest.mark.parametrize(("value", "low", "near"), [(10.0, 9.4, True), (66.0, 65.1, False)])
def test_a_model_near_chance_is_named_in_the_first_lines_and_marked(value, low, near) -> None:
    document = copy.deepcopy(document_of("pmoe"))
    run, document["against"] = document["run"], None
    run["record"]["data"] |= {"classes": [str(n) for n in range(10)], "chance": 10.0}
    ba = {"value": value, "n": 10000, "low": low, "high": value + 0.6}
    run["metrics"]["ba"] = ba
    run["record"]["near_chance"] = None  # As in an older record.
    run["record"]["stages"] = [{"name": "pruned", "metrics": {"ba": ba}, "seconds": 1.0}]
    text = page(document, [])
    assert (f"The model is near chance (BA {value:.2f}%, chance 10.00%)" in text) is near
    assert (f"<td>{value:.2f} [{low}, {value + 0.6:.1f}] †</td>" in text) is near
    assert ('<th scope="row">pruned †</th>' in text) is near
    asr = run["metrics"]["asr"]
    assert (f"<td>{asr['value']:.2f} [{asr['low']:.1f}, {asr['high']:.1f}] †</td>" in text) is near
    assert ("† The clean accuracy is near chance" in text) is near


def test_a_document_is_plain(tmp_path) -> None:
    document = document_of("pmoe")
    assert json.loads(to_text(document)) == document
    assert as_document.__doc__ and set(document["run"]["record"]) >= {"spec", "history", "environment"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ""),
        ({"images": None, "carriers_images": 2000}, ""),
        ({"images": [3, 17], "carriers_images": 20}, " --images 3,17 --carriers-images 20"),
        ({"images": [0, "my picture.png"], "carriers_images": 2000}, " --images '0,my picture.png'"),
    ],
)
def test_the_command_repeats_the_analysis(options, words) -> None:
    document = copy.deepcopy(document_of("dense"))
    document["options"] = options
    both = f"bbmoe analyze {document['run']['name']} --against {document['against']['name']}"
    assert command(document) == f"{both}{words}"
    del document["options"]  # As in an older document.
    assert command(document) == both


def test_an_older_document_is_read_with_todays_names(tmp_path) -> None:
    document = copy.deepcopy(document_of("pmoe"))
    carriers = document["carriers"]
    older = {**document, "carriers": {**carriers, "clean_called_wanted": carriers["target_rate"]}}
    del older["carriers"]["target_rate"]
    assert load_document(save_document(older, tmp_path)) == document


def test_it_does_not_say_where_the_data_lie(tmp_path) -> None:
    [run] = run_attack(tiny_spec(train={"epochs": 1}), output=tmp_path, twin=False)
    run.record.spec["dataset"] = {"name": "tiny", "root": "/home/somebody/data"}
    known = run_facts(run).record
    assert known["spec"] == {**run.record.spec, "dataset": {"name": "tiny"}}
