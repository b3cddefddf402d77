"""A real third-party package, installed separately; and packages that misbehave beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    command = [*pip, *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def bad_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As pip leaves them: one package that fails on import, and one that takes a built-in's name."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "broken_stripes.py").write_text("raise RuntimeError('no licence found')\n")
    (folder / "false_warp.py").write_text("raise SystemExit('the false warp was imported')\n")
    for package, entry in (
        ("broken-stripes", "stripes = broken_stripes:Stripes"),
        ("false-warp", "warp = false_warp:Warp"),
    ):
        info = folder / f"{package.replace('-', '_')}-0.3.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.3\n")
        (info / "entry_points.txt").write_text(f"[backdoorbench_moe.triggers]\n{entry}\n")
    return folder


def python(*arguments: object, path: list[Path], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run this Python with `path` on its module search path."""
    search = os.pathsep.join(map(str, [*path, *filter(None, [os.environ.get("PYTHONPATH")])]))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": search},
    )


def attack(trigger: str, output: Path, *, path: list[Path]) -> subprocess.CompletedProcess[str]:
    arguments = ["attack", f"--trigger={trigger}", f"--output={output}", *TINY_RUN]
    return python("-m", "backdoorbench_moe", *arguments, path=path)


def test_it_attacks(site, tmp_path) -> None:
    done = attack("sinusoid", tmp_path, path=[site])
    assert done.returncode == 0, done.stderr
    [run] = json.loads(done.stdout)["runs"]
    assert run["status"] == "finished" and run["spec"]["trigger"] == {"name": "sinusoid"}
    assert run["parts"]["trigger"]["frequency"] == 6
    assert run["metrics"]["asr"]["n"] > 0 and 0 <= run["metrics"]["asr"]["value"] <= 100
    assert (Path(run["folder"]) / "model.safetensors").is_file()


def test_it_keeps_to_the_interface(site) -> None:
    """Its own tests pass."""
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", ROOT]
    done = python("-m", "pytest", "-vv", *options, EXAMPLE / "tests", path=[site])
    assert done.returncode == 0, done.stdout
    assert "test_four_columns_by_hand" in done.stdout


def test_all_are_listed_the_bad_ones_with_their_reasons(site, bad_site) -> None:
    done = python("-m", "backdoorbench_moe", "list", "triggers", "--json", path=[site, bad_site])
    assert done.returncode == 0, done.stderr
    listing = json.loads(done.stdout)
    example = {"kind": "trigger", "name": "sinusoid", "package": "bbmoe-example", "version": "0.1.0"}
    assert example in listing["parts"]
    packages = {row["name"]: row["package"] for row in listing["parts"]}
    assert packages["warp"] == "backdoorbench-moe" and "stripes" not in packages
    reasons = {(row["package"], row["version"], row["name"]): row["reason"] for row in listing["broken"]}
    assert reasons.keys() == {("broken-stripes", "0.3", "stripes"), ("false-warp", "0.3", "warp")}
    assert "RuntimeError: no licence found" in reasons["broken-stripes", "0.3", "stripes"]
    assert "the name 'warp' is taken by backdoorbench-moe" in reasons["false-warp", "0.3", "warp"]


def test_the_builtin_keeps_its_name_and_works_beside_them(site, bad_site, tmp_path) -> None:
    done = attack("warp", tmp_path, path=[bad_site, site])
    assert done.returncode == 0, done.stderr
    [run] = json.loads(done.stdout)["runs"]
    assert run["status"] == "finished" and run["parts"]["trigger"]["grid_size"] == 4


def test_asking_for_a_broken_one_is_one_clear_line(bad_site, tmp_path) -> None:
    done = attack("stripes", tmp_path / "runs", path=[bad_site])
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert "'stripes' from broken-stripes 0.3 does not load: RuntimeError: no licence found" in line
    assert not (tmp_path / "runs").exists()
