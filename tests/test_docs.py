"""The pages of docs/: their code runs, their commands are taken, the plug-in page makes a package that works."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import re
import shlex
import signal
import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import third_party
import torch
import yaml
from command_lines import parse

import backdoorbench_moe
from backdoorbench_moe.attacks.training_control import ControlledBatch
from backdoorbench_moe.bench.running.queue import read_queue
from backdoorbench_moe.bench.suites.paper import load_paper
from backdoorbench_moe.bench.suites.reading import list_suites, parse_suite
from backdoorbench_moe.bench.tables.layout import build_sheet
from backdoorbench_moe.bench.tables.results import ResultSet
from backdoorbench_moe.config import PoisonSpec
from backdoorbench_moe.errors import BbmoeWarning
from backdoorbench_moe.models import list_models

OWN = "backdoorbench-moe"
DOCS = Path(__file__).parents[1] / "docs"
PAGES = {path.relative_to(DOCS / "pages").as_posix(): path for path in (DOCS / "pages").rglob("*.md")}
FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)
FEW_IMAGES = ["--set", "dataset.train_images=60", "--set", "dataset.test_images=40", "--epochs", "1"]
SMALL_MODEL = [
    "--set",
    "model.widen_factor=1",
    "--set",
    "model.moe_channels=8",
    "--set",
    "model.expert_channels=4",
]
# In one process, for torch takes seconds to import: what the commands print, the models attacked, the page's test.
USE_IT = """
import json, pathlib, runpy, sys
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from click.testing import CliRunner

import backdoorbench_moe as bbmoe
from backdoorbench_moe import defenses
from backdoorbench_moe.cli import bbmoe as command

given = json.load(sys.stdin)
found = {"commands": [], "attacks": []}
for arguments in given["commands"]:
    result = CliRunner().invoke(command, arguments)
    found["commands"].append([arguments[0], result.exit_code, result.output])
for model, options in given["models"].items():
    if model in bbmoe.list_models():
        for applicator in ("image", "patch"):
            [run] = bbmoe.attack(
                model={"name": model, **options}, trigger="checker", applicator=applicator, device="cpu",
                dataset={"name": "signs", "train_images": 60, "test_images": 40}, train={"epochs": 1},
                precision="fp32", twin=False, output="runs",
            )
            found["attacks"].append([model, applicator, run.record.status])
low_loss = runpy.run_path(given["package"] + "/low_loss.py")["LowLoss"]
defenses.registry.register("low-loss")(low_loss)
judgements = bbmoe.defend(run, "low-loss", share=0.1, output="runs").record.judgements
found["judged"] = [[judgement["about"], judgement["suspicious"]] for judgement in judgements]
with redirect_stdout(StringIO()) as printed:
    runpy.run_path(given["package"] + "/use.py")
found["use"] = printed.getvalue()
half = runpy.run_path(given["package"] + "/left_half.py")["LeftHalf"]()
found["half"] = half(torch.zeros(1, 1, 1, 4), lambda images: images + 1).flatten().tolist()
options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", given["package"]]
with redirect_stdout(StringIO()):
    found["own tests"] = int(pytest.main([*options, given["package"] + "/tests"]))
pathlib.Path("found.json").write_text(json.dumps(found))
"""
MODELS = {
    "pmoe": {"widen_factor": 1, "moe_channels": 8, "expert_channels": 4},
    "wide_resnet": {"widen_factor": 1},
    # Where plugins/bbmoe-vmoe is installed.
    "vmoe": {"depth": 2, "embed_dim": 16, "num_heads": 2, "num_experts": 4},
}


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Language, title and text of every code block of a page."""
    return FENCE.findall(PAGES[page].read_text(encoding="utf-8"))


def commands() -> list[tuple[str, str]]:
    """Every `bbmoe` command in an untitled block of a page, with its page and without its comment."""
    return [
        (page, line.partition("#")[0].strip())
        for page in sorted(PAGES)
        for language, title, text in blocks(page)
        if not language and not title
        for line in text.splitlines()
        if line.startswith("bbmoe ")
    ]


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plug-in page's files in a folder of their own, installed without network, and what using them gave."""
    folder = tmp_path_factory.mktemp("written")
    package, site = folder / "bbmoe-checker", folder / "site"
    for _, title, text in blocks("plugin.md"):
        if title:
            (package / title).parent.mkdir(parents=True, exist_ok=True)
            (package / title).write_text(text, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--disable-pip-version-check"]
    install = [*pip, "--no-deps", "--no-build-isolation", "--target", str(site), str(package)]
    done = subprocess.run(install, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    search = os.pathsep.join(map(str, [site, Path(backdoorbench_moe.__file__).parents[1]]))
    given = {"commands": plug_in_commands(), "models": MODELS, "package": str(package)}
    done = subprocess.run(
        [sys.executable, "-c", USE_IT],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "found.json").read_text())


def plug_in_commands() -> list[list[str]]:
    """The plug-in page's commands as they stand there, the attacks on fewer images and a smaller model."""
    lines = [shlex.split(line)[1:] for page, line in commands() if page == "plugin.md"]
    small = [*FEW_IMAGES, *SMALL_MODEL, "--no-twin", "--device", "cpu"]
    return [
        [*words, *small] if words[0] == "attack" else words
        for words in lines
        if words[:2] != ["plugin", "new"]
    ]


@pytest.mark.slow
@pytest.mark.xdist_group("plug-in-page")
def test_the_written_trigger_attacks_each_model_on_the_image_and_by_patch(used) -> None:
    models = [model for model in MODELS if model in list_models() or model != "vmoe"]
    want = [[model, where, "finished"] for model in models for where in ("image", "patch")]
    assert used["attacks"] == want


@pytest.mark.slow
@pytest.mark.xdist_group("plug-in-page")
def test_the_written_defense_judges_a_tenth_of_60_training_images(used) -> None:
    assert used["judged"] == [["sample", 6]]


@pytest.mark.slow
@pytest.mark.xdist_group("plug-in-page")
def test_the_commands_of_the_plug_in_page_work(used) -> None:
    named = [name for name, *_ in used["commands"]]
    assert named.count("attack") == 3 and {"list", "info", "preview", "plugin"} <= set(named)
    for name, code, output in used["commands"]:
        assert code == 0 and "checker" in output, f"{name}: {output}"


@pytest.mark.slow
@pytest.mark.xdist_group("plug-in-page")
def test_the_written_test_passes_and_the_written_use_prints_the_fields(used) -> None:
    assert used["own tests"] == 0 and used["half"] == [1.0, 1.0, 0.0, 0.0]
    # Tiles of 8x8 in four fields along a side: of two pixels each.
    light, dark = "0.6000, 0.6000", "0.4000, 0.4000"
    rows = [f"[{light}, {dark}]"] * 2 + [f"[{dark}, {light}]"] * 2
    assert re.findall(r"\[0[^\]]*\]", used["use"]) == rows


@pytest.mark.slow
def test_the_written_attack_on_an_expert_conforms(tmp_path) -> None:
    [text] = [text for _, title, text in blocks("plugin.md") if title == "close_by.py"]
    points = {"interface": ["2 = close_by"], "attacks": ["close-by = close_by:CloseBy"]}
    third_party.put_package(tmp_path, "bbmoe-close-by", modules={"close_by": text}, points=points)
    done = third_party.bbmoe("plugin", "check", "bbmoe-close-by", "--json", path=[tmp_path])
    assert done.returncode == 0, done.stdout + done.stderr
    [part] = json.loads(done.stdout)["parts"]
    assert (part["name"], part["result"], part["failed"]) == ("close-by", "passes", 0) and part["passed"] > 10


def test_the_written_disguise_adds_the_distance_of_the_means() -> None:
    """Features are the red and the green of one pixel; class 2 is the target."""
    [text] = [text for _, title, text in blocks("plugin.md") if title == "disguise.py"]
    space: dict[str, Any] = {"__name__": "disguise"}
    exec(compile(text, "disguise.py", "exec"), space)
    attack = space["Disguise"](poison=PoisonSpec(rate=0.5, target=2), pull=10.0)
    colours = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.5, 0.5], [0.0, 0.5]])
    images = torch.cat([colours, torch.zeros(4, 1)], 1).view(4, 3, 1, 1)
    labels = torch.tensor([2, 2, 2, 0])
    model = SimpleNamespace(extract_features=lambda images: images[:, :2, 0, 0])
    usual = torch.zeros(4, 3), torch.tensor(1.0)
    batch = ControlledBatch(images, labels, images, labels, 2, 0, lambda _: usual)
    # The means are (0.5, 0) with the trigger, and (0.5, 0.5) of the one clean image of class 2.
    logits, loss = attack.loss(model, batch)
    assert logits is usual[0] and loss.item() == pytest.approx(1.0 + 10 * 0.25)
    # Without a triggered image, or without a clean one of the target, there is no distance.
    for poison, truth in ((0, labels), (2, torch.zeros_like(labels))):
        batch = ControlledBatch(images, truth, images, truth, poison, 0, lambda _: usual)
        assert attack.loss(model, batch)[1].item() == 1.0


@pytest.mark.parametrize(("page", "line"), commands())
def test_the_commands_take_the_flags_they_are_shown_with(page, line) -> None:
    """Each is parsed by its own click command; what it would do is tested elsewhere."""
    parse(line)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_tables_that_a_page_links_to_have_the_command_that_draws_them_from_the_records(page) -> None:
    linked = set(
        re.findall(r"benchmarks/(results/[\w/-]+)/table\.md", PAGES[page].read_text(encoding="utf-8"))
    )
    drawn = {
        line.rpartition("--from benchmarks/")[2].split()[0]
        for where, line in commands()
        if where == page and line.startswith("bbmoe bench table ") and "--from benchmarks/" in line
    }
    assert linked <= drawn


@pytest.mark.slow
# Pages of benchmarks open runs of their suites, which take long.
@pytest.mark.parametrize(
    "page", sorted(page for page in PAGES if page != "plugin.md" and not page.startswith("benchmarks/"))
)
def test_python_on_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            # A page's small network may happen to be better with another normalisation.
            warnings.filterwarnings("ignore", "model.mean: with the mean", BbmoeWarning)
            for language, _, text in blocks(page):
                if language == "python":
                    exec(compile(text, page, "exec"), space)
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_the_suite_on_its_page_is_read_and_has_every_defense_of_ours(tmp_path) -> None:
    [(_, title, text), (_, queue, entries)] = [
        block for block in blocks("your-suite.md") if block[1].endswith(".yaml")
    ]
    suite = parse_suite(yaml.safe_load(text), title.removesuffix(".yaml"), None)
    used = {part.name for cell in suite.cells for part in cell.spec.defenses}
    ours = {
        point.name
        for point in entry_points(group="backdoorbench_moe.defenses")
        if point.dist.name == OWN and "marked" not in point.load().needs
    }
    assert used == ours and len(suite.cells) == len(ours) + 2
    build_sheet(ResultSet(suite, {}, load_paper(suite)))
    (tmp_path / queue).write_text(entries)
    assert len(read_queue(tmp_path / queue)) == 3
    for _, _, text in [block for block in blocks("your-suite.md") if block[0] == "yaml" and not block[1]]:
        parse_suite({**yaml.safe_load(text), "title": "part", "version": 1}, "part", None)


def test_the_reference_names_every_optional_protocol() -> None:
    """Every protocol of models that something asks for, found in the source."""
    modules = ("moe.structure", "models.base")
    found = {
        f"backdoorbench_moe.{name}.{key}"
        for name in modules
        for key, value in vars(importlib.import_module(f"backdoorbench_moe.{name}")).items()
        if getattr(value, "_is_protocol", False) and value.__module__ == f"backdoorbench_moe.{name}"
    }
    text = "".join(PAGES[page].read_text(encoding="utf-8") for page in ("api/interfaces.md", "api/moe.md"))
    assert len(found) >= 4
    assert found <= set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def test_the_page_of_the_suites_lists_every_built_in_one() -> None:
    text = PAGES["reproduce.md"].read_text(encoding="utf-8")
    rows = "".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    assert sorted(re.findall(r"`([\w-]+)`", rows)) == list_suites()


def test_all_pages_are_in_the_navigation() -> None:
    def names(entry: object) -> list[str]:
        if isinstance(entry, dict):
            return [name for item in entry.values() for name in names(item)]
        return [name for item in entry for name in names(item)] if isinstance(entry, list) else [str(entry)]

    settings = yaml.safe_load((DOCS / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(names(settings["nav"])) == sorted(PAGES)


def test_the_reference_has_every_public_name() -> None:
    text = "".join(PAGES[page].read_text(encoding="utf-8") for page in PAGES if page.startswith("api/"))
    shown = re.findall(r"^::: backdoorbench_moe\.(?:\w+\.)*(\w+)$", text, re.MULTILINE)
    assert sorted(set(backdoorbench_moe.__all__) - {"__version__"} - set(shown)) == []


def test_contributing_lists_the_rooms_of_the_import_contract() -> None:
    root = DOCS.parent
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    whole, *inner = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [re.sub(r"backdoorbench_moe\.|[()]", "", layer) for layer in whole["layers"]]
    assert "\n".join(["```", *layers, "```"]) in text
    assert len(inner) == 3
    for contract in inner:
        [room] = contract["containers"]
        line = " / ".join(contract["layers"])
        assert re.search(
            rf"^{room.removeprefix('backdoorbench_moe.')}: +{re.escape(line)}$", text, re.MULTILINE
        ), line


def shown_docstrings() -> dict[str, str]:
    """The docstrings that the reference shows, by dotted name: of what its pages name, and of the public members."""
    found = {}
    for page, path in PAGES.items():
        names = re.findall(r"^::: ([\w.]+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert names or not page.startswith("api/"), page
        for name in names:
            shown = pkgutil.resolve_name(name)
            members = [
                (f"{name}.{key}", value)
                for key, value in vars(shown).items()
                if not key.startswith("_")
                and getattr(value, "__module__", "").startswith("backdoorbench_moe")
            ]
            found |= {key: inspect.getdoc(value) or "" for key, value in [(name, shown), *members]}
    return found


def find_tags(text: str) -> list[str]:
    """What Markdown would take for an HTML tag, and so not show: angle brackets around a name, outside of code."""
    return re.findall(r"</?[A-Za-z][^<>]*>", re.sub(r"`[^`]*`", "", text))


def test_the_reference_shows_all_of_a_docstring() -> None:
    docstrings = shown_docstrings()
    assert {"backdoorbench_moe.attack", "backdoorbench_moe.Trigger.stamp"} <= docstrings.keys()
    assert not {name: tags for name, text in docstrings.items() if (tags := find_tags(text))}


def test_a_tag_in_a_docstring_is_found() -> None:
    assert find_tags("See `timm:<name>`, or timm:<architecture>, where 0 < x and y > 1.") == [
        "<architecture>"
    ]
