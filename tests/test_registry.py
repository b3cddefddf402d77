"""Names to parts, and what a bad plug-in does: nothing to anybody else."""

from __future__ import annotations

import re
import sys
import types
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch
from third_party import bbmoe

from backdoorbench_moe import plugins, triggers
from backdoorbench_moe.errors import ConfigError, PluginError, UnknownNameError
from backdoorbench_moe.models import create_model
from backdoorbench_moe.plugins import INTERFACE
from backdoorbench_moe.registry import Registry
from backdoorbench_moe.triggers.base import Trigger

BASE = "backdoorbench_moe.triggers.base:Trigger"


class Dist:
    def __init__(self, name: str, interfaces: tuple[str, ...], version: str = "1.0") -> None:
        self.name, self.version = name, version
        self.entry_points = [
            EntryPoint(written, "module", "backdoorbench_moe.interface") for written in interfaces
        ]


def offer(
    monkeypatch: pytest.MonkeyPatch,
    *offers: tuple[str, str, str],
    interfaces: dict[str, tuple[str, ...]] | None = None,
) -> Registry[Trigger]:
    """A registry that sees these (package, name, target) beside the built-in square.

    interfaces: the versions that a package says it is written for.
    """
    points = []
    for package, name, target in (
        ("backdoorbench-moe", "square", "backdoorbench_moe.triggers.square:Square"),
        *offers,
    ):
        point = EntryPoint(name, target, "backdoorbench_moe.triggers")
        vars(point)["dist"] = Dist(package, (interfaces or {}).get(package, ()))
        points.append(point)
    monkeypatch.setattr(plugins, "entry_points", lambda **chosen: EntryPoints(points).select(**chosen))
    return Registry("trigger")


@pytest.fixture
def modules(tmp_path, monkeypatch) -> None:
    """Modules a third party might write."""
    head = "from backdoorbench_moe.triggers.base import Trigger\n"
    (tmp_path / "thirdparty_good.py").write_text(
        head
        + "class Good(Trigger):\n    def stamp(self, images):\n        return 1 - images\nclass Wrong: ...\n"
    )
    (tmp_path / "thirdparty_unfit.py").write_text(
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from pathlib import Path\n"
        + head
        + "class Unfinished(Trigger): ...\n"
        + "class Hinted(Unfinished):\n    stamp = abs\n    def __init__(self, *, at: Path | None = None): ...\n"
        + "class Bare(Unfinished):\n    stamp = abs\n    def __init__(self, *, size=1, seed=0): ...\n"
        + "class Odd(Unfinished):\n    stamp = abs\n    def __init__(self, *, at: list[int] = [], seed: int = 0): ...\n"
        + "class Seedless(Unfinished):\n    stamp = abs\n    def __init__(self, *, size: int = 1): ...\n"
        + "class Named(Unfinished):\n    stamp = abs\n    def __init__(self, *, name: str = '', seed: int = 0): ...\n"
        + "class Placed(Unfinished):\n    stamp = abs\n    def __init__(self, size, *, seed: int = 0): ...\n"
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


@pytest.mark.slow
@pytest.mark.parametrize("metadata", ["Metadata-Version: 2.1\n", None])
def test_a_package_without_name_and_version_hides_no_other(tmp_path, metadata) -> None:
    """As an interrupted `pip uninstall` leaves it."""
    info = tmp_path / "half-1.0.dist-info"
    info.mkdir()
    if metadata is not None:
        (info / "METADATA").write_text(metadata)
    (info / "entry_points.txt").write_text(
        "[backdoorbench_moe.triggers]\nhalf = half:Half\n[backdoorbench_moe.trigers]\nhalf = half:Half\n"
    )
    done = bbmoe("list", "triggers", path=[tmp_path])
    assert done.returncode == 0, done.stderr
    assert "square" in done.stdout and "half" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("thirdparty_broken:X", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("thirdparty_exits:X", "RuntimeError: no licence"),
        ("thirdparty_quits:X", "SystemExit: no terminal"),
        ("thirdparty_good:Missing", "has no attribute 'Missing'"),
        ("thirdparty_good:Wrong", "is not a subclass of"),
        ("nowhere_at_all:X", "No module named 'nowhere_at_all'"),
        ("thirdparty_unfit:Unfinished", "Unfinished does not define stamp"),
        (
            "thirdparty_unfit:Hinted",
            "the options of Hinted cannot be read: NameError: name 'Path' is not defined",
        ),
        (
            "thirdparty_unfit:Bare",
            "Bare: option 'size': expected an annotation of bool, int, .* and None, got none",
        ),
        ("thirdparty_unfit:Odd", "Odd: option 'at': expected an annotation of .*, got list"),
        ("thirdparty_unfit:Seedless", "Seedless does not take seed; expected it as a keyword-only option"),
        ("thirdparty_unfit:Named", "Named: option 'name': expected another name"),
        (
            "thirdparty_unfit:Placed",
            "Placed takes size as positional arguments; expected keyword-only options",
        ),
    ],
)
def test_a_broken_plugin_is_named_and_nothing_else_breaks(monkeypatch, modules, target, reason) -> None:
    registry = offer(monkeypatch, ("other", "bad", target))
    [(candidate, text)] = registry.broken().items()
    assert (candidate.package, candidate.name) == ("other", "bad")
    assert re.search(reason, text)
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


def test_a_package_for_another_interface_is_refused_and_holds_no_name(monkeypatch, modules) -> None:
    registry = offer(
        monkeypatch,
        ("aa", "invert", "thirdparty_exits:X"),
        ("bb", "invert", "thirdparty_good:Good"),
        ("cc", "later", "thirdparty_exits:X"),
        interfaces={"aa": ("7",), "bb": ("1", str(INTERFACE)), "cc": ("8", "9")},
    )
    assert registry.names() == ["invert", "square"]
    assert type(registry.create("invert", {})).__module__ == "thirdparty_good"
    reasons = {c.package: text for c, text in registry.broken().items()}
    assert reasons == {
        "aa": "trigger 'invert' from aa 1.0 is written for interface 7; "
        f"this backdoorbench_moe has interface {INTERFACE}",
        "cc": "trigger 'later' from cc 1.0 is written for interface 8 or 9; "
        f"this backdoorbench_moe has interface {INTERFACE}",
    }
    for find in (registry.lookup, registry.check_name):
        with pytest.raises(PluginError, match=r"'later' from cc 1\.0 is written for interface 8 or 9"):
            find("later")
    assert "thirdparty_exits" not in sys.modules


def test_asking_for_a_name_that_only_a_refused_package_has_names_it(monkeypatch, modules) -> None:
    registry = offer(monkeypatch, ("aa", "invert", "thirdparty_good:Good"), interfaces={"aa": ("0",)})
    with pytest.raises(PluginError, match="interface 0"):
        registry.create("invert", {})
    with pytest.raises(UnknownNameError, match="did you mean 'square'"):
        registry.create("squares", {})


def test_what_a_package_lacks_is_named(monkeypatch, modules, tmp_path) -> None:
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    needs = ["torch>=2", "no-such-thing>=1.2", "another_one ; extra == 'test'"]
    lines = ["Metadata-Version: 2.1", "Name: other", "Version: 1.0", *(f"Requires-Dist: {n}" for n in needs)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    registry = offer(
        monkeypatch, ("other", "bad", "thirdparty_broken:X"), ("other", "no", "thirdparty_exits:X")
    )
    missing, exits = (registry.fault(c) for c in registry.offers() if not c.builtin)
    advice = "other requires packages that are not installed: no-such-thing"
    assert missing.endswith(f"'a_module_that_is_not_there'; {advice}")
    assert exits.endswith("RuntimeError: no licence")


def test_unknown_names_get_near_ones() -> None:
    with pytest.raises(UnknownNameError, match="trigger: unknown 'wrap'; did you mean 'warp'"):
        triggers.create_trigger("wrap")


def test_registering_from_running_code(modules) -> None:
    registry = Registry("trigger")

    @registry.register("mine")
    class Mine(Trigger):
        def stamp(self, images):
            return images.clone()

    assert "mine" in registry.names()
    assert isinstance(registry.create("mine", {"seed": 4}), Mine)
    with pytest.raises(ConfigError, match="already taken"):
        registry.register("mine")(Mine)
    with pytest.raises(ConfigError, match="is not a subclass"):
        registry.register("other")(int)  # type: ignore[type-var]
    registry.unregister("mine")
    assert "mine" not in registry.names()


def test_a_part_has_to_take_what_it_is_given() -> None:
    registry = Registry("trigger")
    registry.given = ("canvas",)

    class Fixed(Trigger):
        def stamp(self, images):
            return images.clone()

    with pytest.raises(ConfigError, match=r"^trigger 'fixed': Fixed does not take canvas$"):
        registry.register("fixed")(Fixed)

    @registry.register("open")
    class Open(Fixed):
        def __init__(self, *, seed: int = 0, **anything: object) -> None:
            super().__init__(seed=seed)

    assert isinstance(registry.create("open", {"seed": 1}, {"canvas": 4}), Open)


class Picky(Trigger):
    """A part whose author did not use ConfigError, and whose name takes a number: "picky:4"."""

    name_argument = "size"

    def __init__(self, *, size: int = 4, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if size % 2:
            raise ValueError("size must be even\nsee the manual")
        self.size = size

    def stamp(self, images):
        return images.clone()


@pytest.fixture
def picky(monkeypatch):
    monkeypatch.setitem(sys.modules, "thirdparty_picky", types.SimpleNamespace(Picky=Picky))
    return offer(monkeypatch, ("other", "picky", "thirdparty_picky:Picky"))


def test_what_the_constructor_of_a_plugin_raises_is_one_line_that_names_the_package(picky) -> None:
    with pytest.raises(PluginError) as caught:
        picky.create("picky", {"size": 3})
    assert str(caught.value) == (
        "trigger 'picky' from other 1.0: cannot be built with these options: ValueError: size must be even"
    )
    assert isinstance(caught.value.__cause__, ValueError)


def test_errors_of_the_file_system_and_our_own_are_raised_as_they_are(picky, monkeypatch) -> None:
    for error in (FileNotFoundError("gone"), ConfigError("size: no")):
        monkeypatch.setattr(Picky, "__init__", raising(error))
        with pytest.raises(type(error)) as caught:
            picky.create("picky", {})
        assert caught.value is error


def raising(error: Exception):
    def init(self, *, size: int = 4, seed: int = 0) -> None:
        raise error

    return init


def test_a_model_that_does_not_fit_into_memory_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        create_model("pmoe", widen_factor=1, num_experts=10**9)
    asked = "it asked for 2,384.2 GiB at once"
    assert str(caught.value) == f"model 'pmoe': does not fit into memory with these options; {asked}"


@pytest.mark.parametrize("experts", [10**9 + 1, 2**60, 10**30])
def test_a_size_that_no_memory_holds_is_refused_before_the_model_is_built(experts) -> None:
    with pytest.raises(
        ConfigError, match=f"num_experts: expected an integer of at most 1000000000, got {experts}$"
    ):
        create_model("pmoe", num_experts=experts)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (MemoryError(), ""),
        (MemoryError("Unable to allocate 8.00 PiB for an array"), "; it asked for 8,388,608.0 GiB at once"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0"),
            "; it asked for 0.5 GiB at once",
        ),
        (
            RuntimeError("can't allocate memory: you tried to allocate 3221225472 bytes. Error"),
            ".* 3.0 GiB at once",
        ),
    ],
)
def test_a_failed_allocation_is_no_fault_of_the_plugin(picky, monkeypatch, error, asked) -> None:
    monkeypatch.setattr(Picky, "__init__", raising(error))
    message = f"^trigger 'picky': does not fit into memory with these options{asked}$"
    with pytest.raises(ConfigError, match=message) as caught:
        picky.create("picky", {})
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("size", ["x", "4"])
def test_what_follows_a_name_is_checked_as_its_option_is(picky, size) -> None:
    with pytest.raises(
        ConfigError, match=rf"^trigger 'picky:{size}': size: expected an integer, got '{size}'"
    ):
        picky.create(f"picky:{size}", {})


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("name_argument", "sise"),
        ("name_argument", ["size"]),
        ("data_options", property(lambda self: ("size",))),
        ("data_options", "size"),
        ("data_options", 3),
    ],
)
def test_class_attributes_that_name_no_options_are_refused(picky, monkeypatch, attribute, value) -> None:
    monkeypatch.setattr(Picky, attribute, value, raising=False)
    with pytest.raises(PluginError, match=rf"^trigger 'picky' from other 1.0: Picky: {attribute}: expected"):
        picky.lookup("picky")


def test_options_of_a_part_are_checked() -> None:
    with pytest.raises(
        UnknownNameError, match="trigger 'warp': option: unknown 'gridsize'; did you mean 'grid_size'"
    ):
        triggers.create_trigger("warp", gridsize=2)
    with pytest.raises(ConfigError, match="trigger 'square': does not take ':big' after its name"):
        triggers.create_trigger("square:big")


def test_a_group_whose_name_is_misspelt_is_named(monkeypatch) -> None:
    points = [
        EntryPoint("one", "thirdparty_good:Good", group)
        for group in (
            "backdoorbench_moe.trigger",
            "backdoorbench-moe.models",
            "backdoorbench_moe.triggers",
            "backdoorbench_moe.checks",
            "backdoorbench_moextra.triggers",
            "other",
        )
    ]
    for point in points:
        vars(point)["dist"] = Dist("some", ())

    def entry_points(**chosen: str) -> EntryPoints:
        return EntryPoints(points).select(**chosen)

    monkeypatch.setattr(plugins, "entry_points", entry_points)
    with pytest.raises(
        UnknownNameError, match=r"^trigger: unknown 'two'; .*; see `bbmoe list` for broken plug-ins$"
    ):
        Registry("trigger").check_name("two")
    known = ", ".join(plugins.OWN_GROUPS)
    assert [(candidate.origin, reason) for candidate, reason in plugins.strays()] == [
        ("some 1.0", "unknown group 'backdoorbench-moe.models'; did you mean 'backdoorbench_moe.models'?"),
        ("some 1.0", f"unknown group 'backdoorbench_moe.checks'; known: {known}"),
        ("some 1.0", "unknown group 'backdoorbench_moe.trigger'; did you mean 'backdoorbench_moe.triggers'?"),
    ]
