"""`bbmoe plugin`: what it writes works as written, and what it checks is told apart."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console
from third_party import bbmoe, pip_install, put_package, python

from backdoorbench_moe import scaffold
from backdoorbench_moe.cli import bbmoe as command
from backdoorbench_moe.cli.plugin.check import _print_failures
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.kinds import KINDS
from backdoorbench_moe.plugins import INTERFACE
from backdoorbench_moe.scaffold import plan_package, write_package
from backdoorbench_moe.testing.check import Failure, PartCheck

# One process for the fixtures' sake.
pytestmark = pytest.mark.xdist_group("plugin")

BAD_PARTS = """
from backdoorbench_moe.triggers.base import Trigger


class Writes(Trigger):
    def stamp(self, images):
        images[..., 0, 0] = 1 - images[..., 0, 0]
        return images.clone()


class NoTrigger:
    pass


class Fine(Trigger):
    def stamp(self, images):
        return 1 - images
"""


BAD_OTHERS = """
import torch
from torch import nn

from backdoorbench_moe.applicators.base import Applicator
from backdoorbench_moe.data.base import Dataset, ImageSet
from backdoorbench_moe.data.signs import Signs
from backdoorbench_moe.defenses.base import Defense, DefenseResult


class Idle(Applicator):
    def apply(self, images, trigger):
        return images.clone()


class Mixes(nn.Module):
    def __init__(self, *, num_classes=10, image_size=32):
        super().__init__()
        self.head = nn.Linear(3 * image_size**2, num_classes)

    def forward(self, images):
        return self.head((images - images.mean(0)).flatten(1))


class Unseeded(Defense):
    def defend(self, task):
        with torch.no_grad():
            next(task.model.parameters()).add_(torch.rand(()))
        return DefenseResult("shaken", task.model)


class Misnamed(Dataset):
    def read(self):
        images = Signs(train_images=40, test_images=20).read()
        return ImageSet("other", images.train, images.test, images.classes)
"""


def check(package: str, site: Path, *more: str) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    done = bbmoe("plugin", "check", package, "--json", *more, path=[site])
    assert done.stdout, done.stderr
    return json.loads(done.stdout), done


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with a part of every kind, as written."""
    return write_package(plan_package("bbmoe-my-idea", KINDS), tmp_path_factory.mktemp("written"))


@pytest.fixture(scope="module")
def site(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which it is installed."""
    folder = tmp_path_factory.mktemp("site")
    return pip_install(shutil.copytree(written, folder / "source"), folder / "site")


@pytest.fixture(scope="module")
def bad_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages that misbehave, each in its own way."""
    folder = tmp_path_factory.mktemp("bad")
    triggers = [
        "writes = bad_parts:Writes",
        "no-trigger = bad_parts:NoTrigger",
        "warp = bad_parts:Fine",
        "fine = bad_parts:Fine",
        "lacks = bad_lacks:Lacks",
    ]
    put_package(
        folder,
        "bbmoe-bad",
        modules={
            "bad_parts": BAD_PARTS,
            "bad_others": BAD_OTHERS,
            "bad_lacks": "import a_module_that_is_not_there\n",
        },
        points={
            "triggers": triggers,
            "applicators": ["idle = bad_others:Idle"],
            "models": ["mixes = bad_others:Mixes"],
            "defenses": ["unseeded = bad_others:Unseeded"],
            "datasets": ["misnamed = bad_others:Misnamed"],
        },
        requires=["torch", "no-such-thing>=2"],
    )
    put_package(
        folder,
        "bbmoe-later",
        modules={"later_parts": "raise RuntimeError('imported')\n"},
        points={"interface": ["9 = later_parts"], "triggers": ["later = later_parts:Later"]},
    )
    ends = (
        BAD_PARTS
        + "\n\nimport os\n\n\nclass Ends(Trigger):\n    def stamp(self, images):\n        os._exit(0)\n"
        + "\n\nclass Stops(Trigger):\n    def stamp(self, images):\n        raise KeyboardInterrupt\n"
    )
    put_package(
        folder,
        "bbmoe-ends",
        modules={"ends_parts": ends},
        points={
            "triggers": ["ends = ends_parts:Ends", "fine-idea = ends_parts:Fine", "stops = ends_parts:Stops"]
        },
    )
    hangs = (
        BAD_PARTS
        + "\n\nclass Hangs(Trigger):\n    def stamp(self, images):\n        while True:\n            pass\n"
    )
    put_package(
        folder,
        "bbmoe-hangs",
        modules={"hangs_parts": hangs},
        points={"triggers": ["hangs = hangs_parts:Hangs"]},
    )
    put_package(folder, "no-parts", modules={}, points={})
    return folder


@pytest.mark.slow
def test_what_new_writes_passes_the_conformance_tests(site: Path) -> None:
    report, done = check("bbmoe-my-idea", site)
    assert done.returncode == 0 and report["passes"], done.stdout
    assert [(part["kind"], part["name"], part["result"]) for part in report["parts"]] == [
        (kind, "my-idea", "passes") for kind in KINDS
    ]
    assert all(part["passed"] >= 5 and not part["failed"] for part in report["parts"])


@pytest.mark.slow
def test_what_new_writes_passes_its_own_tests(site: Path, written: Path) -> None:
    options = ["-c", "/dev/null", "--rootdir", written, "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = python("-m", "pytest", *options, written / "tests", path=[site])
    assert done.returncode == 0 and "29 passed" in done.stdout, done.stdout


@pytest.mark.slow
def test_check_names_every_fault_and_tests_the_rest(bad_site: Path) -> None:
    report, done = check("BBMOE_bad", bad_site)
    assert done.returncode == 1 and not report["passes"]
    assert (report["package"], report["version"]) == ("bbmoe-bad", "0.3")
    parts = {part["name"]: part for part in report["parts"]}
    results = {name: part["result"] for name, part in parts.items()}
    broken = dict.fromkeys(("no-trigger", "warp", "lacks"), "broken")
    fails = dict.fromkeys(("writes", "idle", "mixes", "unseeded", "misnamed"), "fails")
    assert results == {"fine": "passes", **fails, **broken}, "what is fine is not blamed for idle"
    assert "is not a subclass of backdoorbench_moe.triggers.base:Trigger" in parts["no-trigger"]["reason"]
    assert "the name 'warp' is taken by backdoorbench-moe" in parts["warp"]["reason"]
    reason = parts["lacks"]["reason"]
    assert "'lacks' from bbmoe-bad 0.3 does not load: ModuleNotFoundError" in reason
    assert reason.endswith(
        "'a_module_that_is_not_there'; bbmoe-bad requires packages that are not installed: no-such-thing"
    )
    failures = {failure["test"]: failure for failure in parts["writes"]["failures"]}
    written = failures["test_shape_type_and_range"]
    assert "Writes: writes into its input; expected a changed copy" in written["reason"]
    [idle] = [each for each in parts["idle"]["failures"] if each["test"] == "test_shape_type_and_range"]
    assert idle["reason"] == "AssertionError: nothing was stamped"
    assert idle["line"].startswith("test_") and "assert not torch.equal(stamped, images)" in idle["line"]
    found = {name: {failure["test"] for failure in part["failures"]} for name, part in parts.items()}
    assert parts["fine"]["passed"] > 50
    assert found["idle"] >= {"test_the_trigger_is_applied", "test_shape_type_and_range"}
    assert "test_images_do_not_mix_in_evaluation" in found["mixes"]
    assert "test_the_seed_decides" in found["unseeded"]
    assert found["misnamed"] == {"test_both_splits_are_valid"}


def test_another_interface_is_refused_without_an_import(bad_site: Path) -> None:
    done = bbmoe("plugin", "check", "bbmoe-later", path=[bad_site])
    assert done.returncode == 1, done.stderr
    text = " ".join(done.stdout.split())
    assert "bbmoe-later 0.3, interface 9" in text
    assert "trigger later broken: trigger 'later' from bbmoe-later 0.3 is written for interface 9; " in text
    assert f"has interface {INTERFACE}" in text


@pytest.mark.slow
def test_a_part_that_ends_python_is_named(bad_site: Path) -> None:
    report, done = check("bbmoe-ends", bad_site)
    assert done.returncode == 1
    parts = {part["name"]: part for part in report["parts"]}
    assert {name: part["result"] for name, part in parts.items()} == {
        "ends": "fails",
        "stops": "fails",
        "fine-idea": "passes",
    }
    for name, code in (("ends", 0), ("stops", 2)):
        reason = f"Python ended (exit code {code}); the remaining tests of trigger {name} were not run"
        assert parts[name]["failures"][-1]["reason"] == reason
    assert parts["fine-idea"]["passed"] > 50, "the others are tested"


@pytest.mark.slow
def test_a_part_that_hangs_is_named(bad_site: Path) -> None:
    report, done = check("bbmoe-hangs", bad_site, "--timeout=2")
    assert done.returncode == 1
    [part] = report["parts"]
    assert part["result"] == "fails" and part["failed"] == 1
    assert part["failures"][-1]["reason"] == (
        "not over after 2 s; the remaining tests of trigger hangs were not run"
    )


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("bbmoe-laterr", "package: unknown 'bbmoe-laterr'; did you mean 'bbmoe-later'"),
        ("no-parts", "package 'no-parts': registers nothing; expected entry points in one of"),
        (str(Path(__file__).parent), "first: pip install"),
        ("", "package: unknown ''"),
    ],
)
def test_what_cannot_be_checked_is_one_line(bad_site: Path, package: str, message: str) -> None:
    done = bbmoe("plugin", "check", package, path=[bad_site])
    [line] = done.stderr.splitlines()
    assert done.returncode == 2 and not done.stdout
    assert message in line


def test_without_pytest_check_says_what_to_install(bad_site: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, sys; find = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name == 'pytest' else find(name, *rest); "
        "from backdoorbench_moe.cli import main; sys.argv = ['bbmoe', 'plugin', 'check', 'bbmoe-bad']; main()"
    )
    done = python("-c", code, path=[bad_site])
    assert done.returncode == 2
    assert done.stderr == "bbmoe: error: pytest is not installed: pip install 'backdoorbench-moe[plugin]'\n"


def test_new_writes_a_trigger_and_says_what_to_do_next(tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["plugin", "new", "bbmoe-stripes", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "bbmoe-stripes"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        *("README.md", "pyproject.toml", "setup.cfg", "tests/test_trigger.py"),
        *("bbmoe_stripes/__init__.py", "bbmoe_stripes/trigger.py"),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["bbmoe-stripes"]
    assert f"wrote {folder}\n" in done.output and "  bbmoe plugin check bbmoe-stripes\n" in done.output
    assert "stripes = bbmoe_stripes.trigger:StripesTrigger" in (folder / "setup.cfg").read_text()


def test_the_next_steps_can_be_pasted(tmp_path: Path) -> None:
    (tmp_path / "my work").mkdir()
    output = str(tmp_path / "my work")
    done = CliRunner().invoke(command, ["plugin", "new", "bbmoe-stripes", "--output", output, "--json"])
    install, _, test = (shlex.split(step) for step in json.loads(done.output)["next"])
    assert Path(install[-1]) == Path(output, "bbmoe-stripes") and Path(test[-1]).is_dir()


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        (["trigger", "defense"], "(`--set trigger.NAME=VALUE`);"),
        (["defense"], "(`bbmoe defend RUN --defense shake --set NAME=VALUE`);"),
    ],
)
def test_the_readme_says_how_an_option_is_set(kinds: list[str], says: str) -> None:
    files = dict(scaffold.render_package(plan_package("bbmoe-shake", kinds)))
    assert f"its options on the command line\n{says}" in files["README.md"]


@pytest.mark.parametrize(
    "name", ["Stripes", "my_stripes", "-a", "a--b", "a-", "3d", "../x", "a/b", "", "straße", "class", "a\n"]
)
def test_names_pip_or_python_would_not_take_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="name: expected lower case letters"):
        plan_package(name)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("json", "trigger", "there is a module json"),
        ("pytest", "trigger", "a package of that name is installed"),
        ("bbmoe-warp", "trigger", "the trigger 'warp' is taken by backdoorbench-moe"),
        ("bbmoe-fine-pruning", "defense", "the defense 'fine-pruning' is taken"),
        ("bbmoe-wide-resnet", "model", "the model 'wide_resnet' is taken"),
    ],
)
def test_names_that_are_taken_are_refused(name: str, kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_package(name, [kind])


def test_a_part_may_have_the_name_of_one_of_another_kind() -> None:
    assert plan_package("bbmoe-warp", ["defense"]).class_name("defense") == "WarpDefense"
    assert plan_package("bbmoe-2d").class_name("trigger") == "Bbmoe2dTrigger"


def test_an_unknown_kind_gets_near_ones() -> None:
    with pytest.raises(UnknownNameError, match="--kind: unknown 'defence'; did you mean 'defense'"):
        plan_package("bbmoe-stripes", ["defence"])


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "bbmoe-stripes").mkdir()
    with pytest.raises(ConfigError, match="expected to write a new folder, but it exists"):
        write_package(plan_package("bbmoe-stripes"), tmp_path)
    assert list((tmp_path / "bbmoe-stripes").iterdir()) == []
    with pytest.raises(ConfigError, match="--output: expected an existing folder"):
        write_package(plan_package("bbmoe-stripes"), tmp_path / "nowhere")


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(plan: object) -> Any:
        yield "setup.cfg", "text"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scaffold, "render_package", fill)
    with pytest.raises(ConfigError, match="cannot be written: No space left"):
        write_package(plan_package("bbmoe-stripes"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_fails_for_one_reason_is_told_once() -> None:
    failures = [
        Failure("test_a", 2, 5, "test_a[4-4]", "it is red", "test_it.py:3: assert blue"),
        Failure("test_b", 1, 1, "test_b", "it is late", ""),
        Failure("test_c", 3, 3, "test_c[x]", "it is red", "test_it.py:9: assert blue"),
    ]
    console = Console(file=StringIO(), width=200)
    _print_failures(console, PartCheck("trigger", "dot", "fails", failures=failures))
    assert console.file.getvalue().splitlines() == [
        "trigger dot fails test_a in 2 of 5 cases",
        "  it is red",
        "  test_it.py:3: assert blue",
        "  first: test_a[4-4]",
        "  for the same reason: test_c",
        "trigger dot fails test_b",
        "  it is late",
    ]
