"""Names to parts, and what a bad plug-in does: nothing to anybody else."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch

from backdoorbench_moe import plugins, triggers
from backdoorbench_moe.errors import ConfigError, PluginError, UnknownNameError
from backdoorbench_moe.registry import Registry
from backdoorbench_moe.triggers.base import Trigger

BASE = "backdoorbench_moe.triggers.base:Trigger"


class Dist:
    def __init__(self, name: str, version: str = "1.0") -> None:
        self.name, self.version = name, version


def offer(monkeypatch: pytest.MonkeyPatch, *offers: tuple[str, str, str]) -> Registry[Trigger]:
    """A registry that sees these (package, name, target) beside the built-in square."""
    points = []
    for package, name, target in (
        ("backdoorbench-moe", "square", "backdoorbench_moe.triggers.square:Square"),
        *offers,
    ):
        point = EntryPoint(name, target, "backdoorbench_moe.triggers")
        vars(point)["dist"] = Dist(package)
        points.append(point)
    monkeypatch.setattr(plugins, "entry_points", lambda group: EntryPoints(points))
    return Registry("trigger", BASE)


@pytest.fixture
def modules(tmp_path, monkeypatch) -> None:
    """Modules a third party might write."""
    head = "from backdoorbench_moe.triggers.base import Trigger\n"
    (tmp_path / "thirdparty_good.py").write_text(
        head
        + "class Good(Trigger):\n    def stamp(self, images):\n        return 1 - images\nclass Wrong: ...\n"
    )
    (tmp_path / "thirdparty_broken.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "thirdparty_exits.py").write_text("raise RuntimeError('no licence')\n")
    (tmp_path / "thirdparty_quits.py").write_text("import sys\nsys.exit('no terminal')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("thirdparty_")]:
        del sys.modules[name]


def test_builtins_and_plugins_are_found_by_the_same_lookup(monkeypatch, modules) -> None:
    registry = offer(monkeypatch, ("other", "invert", "thirdparty_good:Good"))
    assert registry.names() == ["invert", "square"]
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(registry.create("invert", {})(images), 1 - images)
    assert registry.broken() == {}


def test_looking_names_up_imports_nothing(monkeypatch, modules) -> None:
    registry = offer(monkeypatch, ("other", "bad", "thirdparty_broken:X"))
    assert registry.check_name("bad") == "bad"
    assert "thirdparty_broken" not in sys.modules


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("thirdparty_broken:X", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("thirdparty_exits:X", "RuntimeError: no licence"),
        ("thirdparty_quits:X", "SystemExit: no terminal"),
        ("thirdparty_good:Missing", "has no attribute 'Missing'"),
        ("thirdparty_good:Wrong", "is no subclass of"),
        ("nowhere_at_all:X", "No module named 'nowhere_at_all'"),
    ],
)
def test_a_broken_plugin_is_named_and_nothing_else_breaks(monkeypatch, modules, target, reason) -> None:
    registry = offer(monkeypatch, ("other", "bad", target))
    [(candidate, text)] = registry.broken().items()
    assert (candidate.package, candidate.name) == ("other", "bad")
    assert reason in text
    with pytest.raises(PluginError, match=r"'bad' from other 1\.0"):
        registry.create("bad", {})
    assert registry.create("square", {}) is not None


def test_a_taken_name_stays_with_the_builtin_or_the_first_package(monkeypatch, modules) -> None:
    registry = offer(
        monkeypatch,
        ("zz", "invert", "thirdparty_good:Good"),
        ("aa", "square", "thirdparty_good:Good"),
        ("bb", "invert", "thirdparty_good:Good"),
    )
    assert type(registry.create("square", {})).__module__ == "backdoorbench_moe.triggers.square"
    assert {c.package: text for c, text in registry.broken().items()} == {
        "aa": "the name 'square' is taken by backdoorbench-moe 1.0",
        "zz": "the name 'invert' is taken by bb 1.0",
    }


def test_unknown_names_get_near_ones() -> None:
    with pytest.raises(UnknownNameError, match="trigger: unknown 'wrap'; did you mean 'warp'"):
        triggers.create_trigger("wrap")


def test_registering_from_running_code(modules) -> None:
    registry = Registry("trigger", BASE)

    @registry.register("mine")
    class Mine(Trigger):
        def stamp(self, images):
            return images.clone()

    assert "mine" in registry.names()
    assert isinstance(registry.create("mine", {"seed": 4}), Mine)
    with pytest.raises(ConfigError, match="already taken"):
        registry.register("mine")(Mine)
    with pytest.raises(ConfigError, match="is no subclass"):
        registry.register("other")(int)  # type: ignore[type-var]
    registry.unregister("mine")
    assert "mine" not in registry.names()


def test_options_of_a_part_are_checked() -> None:
    with pytest.raises(
        UnknownNameError, match="trigger 'warp': option: unknown 'gridsize'; did you mean 'grid_size'"
    ):
        triggers.create_trigger("warp", gridsize=2)
    with pytest.raises(ConfigError, match="trigger 'square': takes no ':big' behind its name"):
        triggers.create_trigger("square:big")
