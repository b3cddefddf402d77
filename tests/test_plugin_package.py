"""A real third-party package, installed separately; and packages that misbehave beside it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from third_party import ROOT, bbmoe, pip_install, put_package, python

EXAMPLE = ROOT / "plugins" / "bbmoe-example"
SETTINGS = {
    "dataset.train_images": 64,
    "dataset.test_images": 40,
    "model.widen_factor": 1,
    "model.moe_channels": 8,
    "model.expert_channels": 4,
}
TINY_RUN = [
    *("--recipe=paper", "--epochs=1", "--batch-size=32", "--precision=fp32", "--device=cpu", "--seed=3"),
    *("--no-twin", "--quiet", "--json"),
    *(f"--set={key}={value}" for key, value in SETTINGS.items()),
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder the example is installed into, without network; its sources are left as they are."""
    folder = tmp_path_factory.mktemp("plugins")
    source = shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    return pip_install(source, folder / "site")


@pytest.fixture(scope="module")
def bad_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages that fail on import, take a built-in's name, and are written for another interface."""
    folder = tmp_path_factory.mktemp("bad")
    for name, text, points in (
        (
            "broken-stripes",
            "raise RuntimeError('no licence found')\n",
            {"triggers": ["stripes = broken_stripes:Stripes"]},
        ),
        (
            "false-warp",
            "raise SystemExit('the false warp was imported')\n",
            {"triggers": ["warp = false_warp:Warp"]},
        ),
        (
            "old-noise",
            "raise RuntimeError('the old noise was imported')\n",
            {"interface": ["0 = old_noise"], "triggers": ["noise = old_noise:Noise"]},
        ),
    ):
        put_package(folder, name, modules={name.replace("-", "_"): text}, points=points)
    return folder


def attack(trigger: str, output: Path, *more: str, path: list[Path]) -> subprocess.CompletedProcess[str]:
    arguments = ["attack", f"--trigger={trigger}", f"--output={output}", *TINY_RUN, *more]
    return bbmoe(*arguments, path=path)


def test_it_attacks_and_defends(site, tmp_path) -> None:
    done = attack("sinusoid", tmp_path, "--applicator=random-tiles", path=[site])
    assert done.returncode == 0, done.stderr
    [run] = json.loads(done.stdout)["runs"]
    assert run["status"] == "finished" and run["spec"]["trigger"] == {"name": "sinusoid"}
    assert run["parts"]["trigger"]["amplitude"] == 20 / 255
    assert run["parts"]["applicator"] == {"share": 0.5, "patch_size": 4, "seed": 0}
    assert run["metrics"]["asr"]["n"] > 0 and 0 <= run["metrics"]["asr"]["value"] <= 100
    assert (Path(run["folder"]) / "model.safetensors").is_file()
    options = ["--defense=magnitude-pruning", "--set=epochs=0", "--set=clean_fraction=0.5"]
    done = bbmoe("defend", run["folder"], *options, "--quiet", "--json", path=[site])
    assert done.returncode == 0, done.stderr
    assert "pruned" in done.stdout and "magnitude-pruning" in done.stdout


def test_it_keeps_to_the_interface(site) -> None:
    """Its own tests pass."""
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", ROOT]
    done = python("-m", "pytest", "-vv", *options, EXAMPLE / "tests", path=[site])
    assert done.returncode == 0, done.stdout
    assert "test_four_columns_by_hand" in done.stdout


def test_all_are_listed_the_bad_ones_with_their_reasons(site, bad_site) -> None:
    done = bbmoe("list", "--json", path=[site, bad_site])
    assert done.returncode == 0, done.stderr
    listing = json.loads(done.stdout)
    rows = {(row["kind"], row["name"]): (row["package"], row["version"]) for row in listing["parts"]}
    for part in (("trigger", "sinusoid"), ("applicator", "random-tiles"), ("defense", "magnitude-pruning")):
        assert rows[part] == ("bbmoe-example", "0.1.0")
    assert rows["trigger", "warp"][0] == "backdoorbench-moe"
    assert not {("trigger", "stripes"), ("trigger", "noise")} & rows.keys()
    reasons = {(row["package"], row["version"], row["name"]): row["reason"] for row in listing["broken"]}
    assert reasons.keys() == {
        ("broken-stripes", "0.3", "stripes"),
        ("false-warp", "0.3", "warp"),
        ("old-noise", "0.3", "noise"),
    }
    assert "RuntimeError: no licence found" in reasons["broken-stripes", "0.3", "stripes"]
    assert "the name 'warp' is taken by backdoorbench-moe" in reasons["false-warp", "0.3", "warp"]
    assert "is written for interface 0" in reasons["old-noise", "0.3", "noise"]


def test_the_table_says_where_each_comes_from(site, bad_site) -> None:
    done = bbmoe("list", "triggers", path=[site, bad_site])
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    [place] = [place for place, line in enumerate(lines) if line.startswith("sinusoid ")]
    entry = lines[place:][: next((n for n, line in enumerate(lines[place:]) if "square " in line), 1)]
    assert " ".join(entry).endswith("(bbmoe-example 0.1.0)")
    assert any(line.startswith("broken: trigger noise (old-noise 0.3): ") for line in lines)


def test_info_describes_it(site) -> None:
    done = bbmoe("info", "defense", "magnitude-pruning", "--json", path=[site])
    info = json.loads(done.stdout)
    assert info["from"] == "bbmoe-example 0.1.0" and "smallest weights" in info["description"]
    assert info["options"]["ratio"] == {"type": "float", "default": 0.3}


def test_the_builtin_keeps_its_name_and_works_beside_them(site, bad_site, tmp_path) -> None:
    done = attack("warp", tmp_path, path=[bad_site, site])
    assert done.returncode == 0, done.stderr
    [run] = json.loads(done.stdout)["runs"]
    assert run["status"] == "finished" and run["parts"]["trigger"]["grid_size"] == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stripes", "'stripes' from broken-stripes 0.3 does not load: RuntimeError: no licence found"),
        ("noise", "'noise' from old-noise 0.3 is written for interface 0; this backdoorbench_moe has"),
    ],
)
def test_asking_for_a_broken_one_is_one_clear_line(bad_site, tmp_path, name, message) -> None:
    done = attack(name, tmp_path / "runs", path=[bad_site])
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert message in line
    assert not (tmp_path / "runs").exists()
