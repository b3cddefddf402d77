"""An exception in the code of a plug-in is described in one line that names the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from suites import tiny_suite
from third_party import bbmoe, put_package
from tiny import tiny_spec
from torch import nn

from backdoorbench_moe import models, plugins
from backdoorbench_moe.bench.running.run import check
from backdoorbench_moe.engine.runner import Runner, run_attack
from backdoorbench_moe.errors import BbmoeError, ConfigError, PluginError
from backdoorbench_moe.plugins import Candidate, describe_error, raised_in

RAISES = """\
from backdoorbench_moe.triggers.base import Trigger


class Raises(Trigger):
    def stamp(self, images):
        return images * {}["strength"]
"""


def caught(code: str, module: str) -> Exception:
    """Run code as that of a module, and return the exception that it raises."""
    try:
        exec(compile(code, f"/somewhere/{module}.py", "exec"), {"__name__": module})
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the package `raising` known, with a trigger in its module `raising.parts`."""
    part = Candidate("trigger", "raises", "raising.parts:Raises", "bbmoe-raising", "0.3")
    monkeypatch.setattr(plugins, "discover", lambda kind: [part] if kind == "trigger" else [])


class Tuples(nn.Module):
    """Returns more than the logits."""

    def __init__(self, *, num_classes: int = 10, image_size: int = 32) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, images):
        return self.head(images.mean((2, 3))), images


class FewClasses(Tuples):
    """Ignores the number of classes."""

    def forward(self, images):
        return self.head(images.mean((2, 3)))[:, :2]


class Fixed(Tuples):
    """Has nothing to train."""

    def __init__(self, *, num_classes: int = 10, image_size: int = 32) -> None:
        super().__init__()
        self.head.requires_grad_(False)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Tuples, r"expected logits \(2, 3\) of 2 images and 3 classes, got tuple"),
        (FewClasses, r"expected logits \(2, 3\) of 2 images and 3 classes, got \(2, 2\)"),
        (Fixed, "expected parameters to train, got none"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_anything_is_written(kind, message, tmp_path) -> None:
    models.registry.register("misfit")(kind)
    try:
        with pytest.raises(PluginError, match=f"model 'misfit': {message}"):
            run_attack(tiny_spec(model="misfit"), output=tmp_path)
    finally:
        models.registry.unregister("misfit")
    assert not list(tmp_path.iterdir())


CODE = "def stamp():\n    return {}['strength']\n\n\nstamp()\n"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("module", "file"), [("raising.parts", "raising.parts.py"), ("raising", "raising.py")]
)
def test_the_function_the_package_and_the_line_are_named(module: str, file: str) -> None:
    place = f"stamp of bbmoe-raising 0.3, {file}:2"
    assert raised_in(caught(CODE, module)) == place
    assert describe_error(caught(CODE, module)) == f"KeyError: 'strength' (raised in {place})"


@pytest.mark.usefixtures("installed")
def test_what_the_package_calls_is_attributed_to_it() -> None:
    assert raised_in(caught("import json\njson.loads('{')\n", "raising")) == (
        "<module> of bbmoe-raising 0.3, raising.py:2"
    )


@pytest.mark.usefixtures("installed")
def test_other_errors_are_not_attributed_to_a_package() -> None:
    assert describe_error(caught(CODE, "raising_more")) == "KeyError: 'strength'"


@pytest.mark.usefixtures("installed")
def test_a_deliberate_error_is_its_message() -> None:
    code = "from backdoorbench_moe.errors import ConfigError\nraise ConfigError('strength: too large')\n"
    error = caught(code, "raising")
    assert isinstance(error, ConfigError) and describe_error(error) == "strength: too large"


@pytest.mark.usefixtures("installed")
def test_a_part_that_raises_while_a_suite_is_checked_is_named_with_its_run(tmp_path, monkeypatch) -> None:
    suite, error = tiny_suite(), caught(CODE, "raising.parts")

    def check_run(self: Runner, spec: object) -> None:
        raise error

    monkeypatch.setattr(Runner, "check", check_run)
    with pytest.raises(BbmoeError) as raised:
        check(suite, suite.runs(), tmp_path)
    assert str(raised.value).startswith("suite tiny: tiny-pmoe-")
    assert str(raised.value).endswith(f": {describe_error(error)}")
    error = caught(CODE, "ours")
    with pytest.raises(KeyError):
        check(suite, suite.runs(), tmp_path)


@pytest.mark.slow
def test_a_part_that_raises_ends_a_command_with_one_line(tmp_path: Path) -> None:
    points = {"triggers": ["raises = raising:Raises"]}
    put_package(tmp_path, "bbmoe-raising", modules={"raising": RAISES}, points=points)
    done = bbmoe("preview", "--trigger", "raises", "--output", tmp_path / "grid.png", path=[tmp_path])
    said = "KeyError: 'strength' (raised in Raises.stamp of bbmoe-raising 0.3, raising.py:6)"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"bbmoe: error: {said}" and "Traceback" not in done.stderr
