"""Whatever changed under a run's name: it is not taken for the answer."""

from __future__ import annotations

import sys

import pytest
from tiny import tiny_spec

import backdoorbench_moe as bbmoe
from backdoorbench_moe import defenses, triggers
from backdoorbench_moe.config import PartSpec
from backdoorbench_moe.engine import names
from backdoorbench_moe.engine.run import load_run
from backdoorbench_moe.engine.runner import run_attack, run_defense
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.plugins import Candidate
from backdoorbench_moe.triggers.square import Square

TUNING = PartSpec("fine-tuning", {"clean_fraction": 0.5, "epochs": 1})


def test_a_replaced_model_file_is_refused(tmp_path) -> None:
    [run] = run_attack(tiny_spec(), output=tmp_path, twin=False)
    tensors, header = run.folder.load_tensors()
    tensors["head.bias"] += 1
    run.folder.save_model(tensors, header)
    for use in (
        run.model,
        lambda: run_attack(tiny_spec(), output=tmp_path, twin=False),
        lambda: run_defense(load_run(run.folder.path), TUNING),
    ):
        with pytest.raises(RecordError, match="was replaced after the run was finished"):
            use()


@pytest.mark.slow
def test_the_net_numbers_that_are_not_the_records_are_refused(tmp_path) -> None:
    """Whatever the reason: here a record of before model files were hashed, whose file was replaced."""
    [run] = run_attack(tiny_spec(train={"epochs": 20, "batch_size": 8}), output=tmp_path, twin=False)
    tensors, header = run.folder.load_tensors()
    tensors["head.bias"][0] += 1e6
    run.folder.save_model(tensors, header)
    run.record.model_sha256 = None
    run.folder.write(run.record)
    with pytest.raises(RecordError, match=r"(BA|ASR) in its record is .* but now it is (33\.33|100\.00)% of"):
        run_defense(load_run(run.folder.path), TUNING)
    with pytest.raises(RecordError, match=r"(BA|ASR) in its record is"):
        bbmoe.analyze(run.folder.path)
    assert [path.name for path in tmp_path.iterdir()] == [run.folder.path.name], "nothing was written"
    # Another precision gives other numbers anyway.
    run.record.environment["precision"] = "bf16"
    run.folder.write(run.record)
    assert run_defense(load_run(run.folder.path), TUNING).record.status == "finished"


def test_a_run_that_was_made_with_another_default_is_refused(tmp_path, monkeypatch) -> None:
    [run] = run_attack(tiny_spec(trigger={"name": "square"}), output=tmp_path, twin=False)
    side = run.record.parts["trigger"]["size"]
    monkeypatch.setitem(Square.__init__.__kwdefaults__, "size", side + 1)
    expected = (
        rf"made with other defaults: trigger.size was {side}, and is now {side + 1}; delete it or use another"
    )
    with pytest.raises(RecordError, match=expected):
        run_attack(tiny_spec(trigger={"name": "square"}), output=tmp_path, twin=False)
    given = run_attack(tiny_spec(trigger={"name": "square", "size": side}), output=tmp_path, twin=False)
    assert given[0].folder.path != run.folder.path
    monkeypatch.undo()
    [found] = run_attack(tiny_spec(trigger={"name": "square"}), output=tmp_path, twin=False)
    assert found.folder.path == run.folder.path


def test_a_defended_run_that_was_made_with_another_default_is_refused(tmp_path, monkeypatch) -> None:
    [run] = run_attack(tiny_spec(), output=tmp_path, twin=False)
    defended = run_defense(run, TUNING)
    tuning = defenses.registry.lookup("fine-tuning").__init__.__kwdefaults__
    name, value = next((name, value) for name, value in tuning.items() if isinstance(value, str))
    assert defended.record.parts["defense"][name] == value
    defended.record.parts["defense"][name] = "other"
    defended.folder.write(defended.record)
    with pytest.raises(RecordError, match=rf"defense.{name} was other, and is now {value}"):
        run_defense(run, TUNING)


CODE = """
from backdoorbench_moe.triggers.square import Square


class Mark(Square):
    pass
"""


@pytest.mark.parametrize("package", [True, False])
def test_plug_in_code_edited_without_a_new_version(tmp_path, monkeypatch, package) -> None:
    home, module = tmp_path / "site", "some_marks" if package else "more_marks"
    file = home / module / "inner.py" if package else home / f"{module}.py"
    file.parent.mkdir(parents=True)
    if package:
        (file.parent / "__init__.py").touch()
    file.write_text(CODE)
    monkeypatch.syspath_prepend(str(home))
    target = f"{module}.inner:Mark" if package else f"{module}:Mark"
    candidate = Candidate("trigger", "mark", target, "some-marks", "0.1.0")
    monkeypatch.setitem(triggers.registry._found[0], "mark", candidate)
    spec = tiny_spec(trigger="mark")
    [run] = run_attack(spec, output=tmp_path / "runs", twin=False)
    assert set(run.record.environment["sources"]) == {"some-marks", "dataset tiny"}
    assert run_attack(spec, output=tmp_path / "runs", twin=False)[0].record == run.record
    file.write_text(CODE + "# edited\n")
    with pytest.raises(
        RecordError, match="the code of some-marks has changed since it was made; delete it or use"
    ):
        run_attack(spec, output=tmp_path / "runs", twin=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)


def test_a_registered_part_edited_in_the_same_session(tmp_path, monkeypatch) -> None:
    """As in a notebook, where the cell that defines the part is run again."""
    source = "class Mark(Square):\n    def __init__(self, *, seed: int = 0):\n        super().__init__(size=SIZE)\n"
    spec = tiny_spec(trigger="mark")

    def define(size: int) -> None:
        file = tmp_path / f"cell{size}.py"
        file.write_text(source.replace("SIZE", str(size)))
        names_there = {"Square": Square}
        exec(compile(file.read_text(), str(file), "exec"), names_there)
        monkeypatch.setitem(triggers.registry._local, "mark", names_there["Mark"])

    define(2)
    [run] = run_attack(spec, output=tmp_path / "runs", twin=False)
    assert set(run.record.environment["sources"]) == {"trigger mark", "dataset tiny"}
    define(2)
    assert run_attack(spec, output=tmp_path / "runs", twin=False)[0].record == run.record
    define(3)
    with pytest.raises(RecordError, match="the code of trigger mark has changed since it was made"):
        run_attack(spec, output=tmp_path / "runs", twin=False)


def test_a_finished_run_whose_plug_in_was_edited_is_neither_defended_nor_analysed(
    tmp_path, monkeypatch
) -> None:
    (tmp_path / "own_mark.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    candidate = Candidate("trigger", "mark", "own_mark:Mark", "own-mark", "0.1.0")
    monkeypatch.setitem(triggers.registry._found[0], "mark", candidate)
    [run] = run_attack(tiny_spec(trigger="mark"), output=tmp_path / "runs", twin=False)
    (tmp_path / "own_mark.py").write_text(CODE + "# edited\n")
    opened = load_run(run.folder.path)
    for use in (opened.model, opened.stamper, opened.attack, lambda: run_defense(opened, TUNING)):
        with pytest.raises(RecordError, match="the code of own-mark has changed since it was made"):
            use()


def test_the_hash_of_code_is_one_of_names_and_contents(tmp_path, monkeypatch) -> None:
    (tmp_path / "some_code").mkdir()
    for name in ("__init__.py", "a.py"):
        (tmp_path / "some_code" / name).write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    first = names._hash_code(["some_code"])
    (tmp_path / "some_code" / "a.py").rename(tmp_path / "some_code" / "b.py")
    assert names._hash_code(["some_code"]) != first


def test_every_module_that_parts_of_a_package_come_from_is_hashed(tmp_path, monkeypatch) -> None:
    for name in ("one_mark", "other_mark"):
        (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    trigger = Candidate("trigger", "one_mark", "one_mark:Mark", "two-modules", "0.1.0")
    monkeypatch.setitem(triggers.registry._found[0], "one_mark", trigger)
    defense = Candidate("defense", "guard", "other_mark:Mark", "two-modules", "0.1.0")
    monkeypatch.setitem(defenses.registry._found[0], "guard", defense)
    spec = tiny_spec(trigger="one_mark", defenses=["guard"])
    first = names.plugin_sources(spec)
    assert set(first) == {"two-modules", "dataset tiny"}
    for name in ("one_mark", "other_mark"):
        (tmp_path / f"{name}.py").write_text(CODE + f"# {name} edited\n")
        now = names.plugin_sources(spec)
        assert now != first
        first = now
