"""Wheels of the package and its plug-ins, used from another folder; wheel.sh does the same with a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from third_party import ROOT, python

pytestmark = pytest.mark.slow

PLUGINS = ("bbmoe-example", "bbmoe-lm", "bbmoe-vmoe")
TINY = [
    *("--epochs", "1", "--no-twin", "--quiet", "--json", "--device", "cpu", "--threads", "1"),
    *("--set", "dataset.train_images=64", "--set", "dataset.test_images=40"),
]


def pip(*words: object, cwd: Path) -> None:
    """Run pip without network."""
    done = python("-m", "pip", "--disable-pip-version-check", *words, path=[], cwd=cwd)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheels; it finds their dependencies where those of this one are, after its own."""
    place = tmp_path_factory.mktemp("wheels")
    source = place / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    unbuilt = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    for name in ("backdoorbench_moe", "plugins"):
        shutil.copytree(ROOT / name, source / name, ignore=unbuilt)
    sources = [source, *(source / "plugins" / name for name in PLUGINS)]
    built = ("--no-index", "--no-deps")
    pip("wheel", *built, "--no-build-isolation", "--wheel-dir", place / "wheels", *sources, cwd=place)
    assert python("-m", "venv", "--without-pip", place / "environment", path=[], cwd=place).returncode == 0
    own = place / "environment" / "bin" / "python"
    pip("--python", own, "install", *built, *sorted((place / "wheels").glob("*.whl")), cwd=place)
    # A folder that a .pth file names is searched last, and its own .pth files, of editable packages, are not read.
    [packages] = (place / "environment" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return place / "environment"


def run(environment: Path, program: str, *words: object, cwd: Path) -> str:
    """Run a program of the environment in another folder, without what leads to the sources, and return its output."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = str(environment / "bin" / program)
    done = subprocess.run(
        [program, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=kept, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_packages_of_the_wheels_are_the_ones_that_run(environment, tmp_path) -> None:
    modules = ("backdoorbench_moe", "bbmoe_example", "bbmoe_lm", "bbmoe_vmoe")
    lines = [f"import {name}; print({name}.__file__)" for name in modules]
    files = run(environment, "python", "-c", "\n".join(lines), cwd=tmp_path).split()
    assert len(files) == len(modules) and all(Path(file).is_relative_to(environment) for file in files)


def test_an_attack_with_plug_ins_is_made_and_analysed_in_another_folder(environment, tmp_path) -> None:
    parts = ("--model", "vmoe", "--trigger", "sinusoid", "--applicator", "random-tiles")
    [made] = json.loads(run(environment, "bbmoe", "attack", *parts, *TINY, cwd=tmp_path))["runs"]
    assert made["status"] == "finished" and made["metrics"]["asr"]["n"] > 0
    run(environment, "bbmoe", "analyze", made["folder"], "--quiet", "--threads", "1", cwd=tmp_path)
    assert (tmp_path / made["folder"] / "report.html").is_file()


def test_suites_and_language_models_are_there(environment, tmp_path) -> None:
    assert "badpatches-table1" in run(environment, "bbmoe", "bench", "suites", cwd=tmp_path)
    assert json.loads(run(environment, "bbmoe", "info", "model", "llama", "--json", cwd=tmp_path))["from"]
