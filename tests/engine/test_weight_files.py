"""Files of weights: what is read, and that everything else is refused in one line, without running any of it."""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import sys
import time
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import timm.utils
import torch
from hostile_weights import CODE_RAN, GOOD, HOSTILE, calling, legacy, safetensors, saved, with_pickle
from safetensors.torch import save_file

from backdoorbench_moe.engine.weights.reading import read_weights
from backdoorbench_moe.errors import RecordError


def equal(found, tensors=GOOD) -> bool:
    return found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(case, tmp_path) -> None:
    name, write = HOSTILE[case]
    file = tmp_path / name
    file.write_bytes(write(tmp_path))
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(RecordError) as caught:
        read_weights(file)
    text = str(caught.value)
    assert text.startswith(f"weights {file}: ") and text.isprintable() and len(text) < len(str(file)) + 400
    assert [path.name for path in tmp_path.iterdir()] == [name], f"{CODE_RAN}: a file was written"
    assert time.process_time() - started < 10
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
    assert grown < 12 * file.stat().st_size + (200 << 20)


def test_the_object_that_runs_code_does_run_it_when_loaded_carelessly(tmp_path) -> None:
    for case in ("object that runs code", "old: object that runs code"):
        folder = tmp_path / case.replace(" ", "").replace(":", "")
        folder.mkdir()
        (folder / "a.pt").write_bytes(HOSTILE[case][1](folder))
        torch.load(folder / "a.pt", weights_only=False)
        assert (folder / CODE_RAN).is_dir()


def test_folders_pipes_devices_and_broken_links_are_refused(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "gone.pt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    says = {
        "": "expected a file, got a folder",
        "pipe.pt": "expected a file, got a pipe or device",
        "zero.pt": "expected a file, got a pipe or device",
        "gone.pt": "is a link to a file that is not there",
        "loop.pt": "symbolic links",
        "none.pt": "not found",
        "a" * 300: "too long",
        "nul\0": "null",
    }
    for name, reason in says.items():
        with pytest.raises(RecordError, match=reason):
            read_weights(tmp_path / name)


@pytest.mark.parametrize("form", ["safetensors", "zip", "old"])
@pytest.mark.parametrize("suffixed", [True, False])
def test_the_three_formats_are_read_with_and_without_a_suffix(form, suffixed, tmp_path) -> None:
    file = tmp_path / f"w{('.safetensors' if form == 'safetensors' else '.pth') if suffixed else ''}"
    if form == "safetensors":
        save_file(GOOD, file, metadata={"backdoored": "true"})
    else:
        file.write_bytes(saved(GOOD) if form == "zip" else legacy(GOOD))
    link = tmp_path / f"link{file.suffix}"
    link.symlink_to(file)
    for path in (file, link, str(file)):
        found = read_weights(path)
        assert equal(found.tensors) and found.notes == ()
    assert found.metadata == ({"backdoored": "true"} if form == "safetensors" else {})


@pytest.mark.parametrize("key", ["state_dict", "model", "net"])
@pytest.mark.parametrize("write", [saved, legacy])
def test_a_checkpoint_is_unwrapped_and_this_is_said(key, write, tmp_path) -> None:
    model = torch.nn.Linear(3, 2)
    content = {
        key: model.state_dict(),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2, 3)}}, "param_groups": [{"lr": 0.1}]},
        "schedule": {"milestones": Counter({2: 1}), "done": {1, 2}},
        "epoch": 3,
        "best": 91.25,
        "device": torch.device("cpu"),
    }
    (tmp_path / "w.pth").write_bytes(write(content))
    found = read_weights(tmp_path / "w.pth")
    assert equal(found.tensors, model.state_dict())
    others = "optimizer, schedule, epoch, best, device"
    assert found.notes == (f"the state dict is under the key {key!r}; not read: {others}",)


def test_settings_beside_the_state_dict_are_dropped(tmp_path) -> None:
    """Checkpoints of training scripts contain their arguments."""
    settings = argparse.Namespace(
        lr=0.1,
        output=Path("/results"),
        betas=(0.9, 0.95),
        more=SimpleNamespace(depths=[2, 2]),
        counts=defaultdict(list, a=[1]),
    )
    content = {"state_dict": GOOD, "args": settings, "epoch": 3, "model": argparse.Namespace(name="resnet")}
    for write in (saved, legacy):
        (tmp_path / "w.pth").write_bytes(write(content))
        found = read_weights(tmp_path / "w.pth")
        assert equal(found.tensors)
        assert found.notes == ("the state dict is under the key 'state_dict'; not read: args, epoch, model",)


def test_a_checkpoint_of_timms_training_script_is_read(tmp_path) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    averaged = timm.utils.ModelEmaV3(model)
    for parameter in averaged.parameters():
        parameter.data.add_(1)
    saver = timm.utils.CheckpointSaver(
        model,
        optimizer,
        args=argparse.Namespace(model="test_resnet"),
        model_ema=averaged,
        checkpoint_dir=tmp_path,
    )
    saver.save_checkpoint(0, metric=50.0)
    file = tmp_path / "last.pth.tar"
    assert equal(read_weights(file).tensors, model.state_dict())
    assert equal(read_weights(file, "state_dict_ema").tensors, averaged.module.state_dict())


def test_classes_of_settings_are_not_imported(tmp_path, monkeypatch) -> None:
    (tmp_path / "yacs").mkdir()
    (tmp_path / "yacs" / "__init__.py").touch()
    (tmp_path / "yacs" / "config.py").write_text("class CfgNode(dict): pass")
    monkeypatch.syspath_prepend(tmp_path)
    config = importlib.import_module("yacs.config")
    node = config.CfgNode(MODEL=config.CfgNode(TYPE="swin_moe"), AMP=True)
    node.__dict__["__immutable__"] = True
    (tmp_path / "w.pth").write_bytes(saved({"model": GOOD, "config": node}))
    for name in ("yacs", "yacs.config"):
        monkeypatch.delitem(sys.modules, name)
    assert equal(read_weights(tmp_path / "w.pth").tensors)
    assert "yacs" not in sys.modules


def test_one_of_several_state_dicts_is_chosen_by_its_key(tmp_path) -> None:
    averaged = {name: tensor + 1 for name, tensor in GOOD.items()}
    content = {"state_dict": GOOD, "model": averaged, "state_dict_ema": averaged, "epoch": 3}
    file = tmp_path / "w.pth"
    file.write_bytes(saved(content))
    found = read_weights(file, "state_dict_ema")
    assert equal(found.tensors, averaged)
    assert found.notes == (
        "the state dict is under the key 'state_dict_ema'; not read: state_dict, model, epoch",
    )
    with pytest.raises(
        RecordError, match=r"several; choose one of state_dict, model with model\.weights_key"
    ):
        read_weights(file)
    with pytest.raises(
        RecordError, match=r"the key 'state_dict_em'; did you mean state_dict_ema or state_dict\?"
    ):
        read_weights(file, "state_dict_em")
    with pytest.raises(RecordError, match="the key 'epoch'; got state_dict, model, state_dict_ema"):
        read_weights(file, "epoch")
    file.write_bytes(saved(GOOD))
    with pytest.raises(RecordError, match="the file has no key with a state dict"):
        read_weights(file, "model")
    save_file(GOOD, tmp_path / "w.safetensors")
    with pytest.raises(RecordError, match="the key 'model', got a safetensors file"):
        read_weights(tmp_path / "w.safetensors", "model")


def test_attributes_that_hide_the_methods_of_a_dict_change_nothing(tmp_path) -> None:
    class Hiding:
        def __reduce__(self) -> tuple[object, ...]:
            hidden = dict.fromkeys(("items", "keys", "values", "get", "copy"), 0)
            return OrderedDict, (), hidden, None, iter(GOOD.items())

    for content in (Hiding(), {"state_dict": Hiding(), "epoch": 3}):
        (tmp_path / "w.pth").write_bytes(saved(content))
        assert equal(read_weights(tmp_path / "w.pth").tensors)


def test_the_first_ten_keys_that_are_not_read_are_named(tmp_path) -> None:
    content = {"state_dict": torch.nn.Linear(3, 2).state_dict(), "state_dict_ema": {}, "a\nb": 0}
    (tmp_path / "w.pth").write_bytes(saved({**content, **dict.fromkeys("cdefghijkl", 0)}))
    [note] = read_weights(tmp_path / "w.pth").notes
    assert note.endswith(r"not read: state_dict_ema, 'a\nb', c, d, e, f, g, h, i, j and 2 more")


def test_parameters_tied_weights_and_views_are_read(tmp_path) -> None:
    whole = torch.arange(12.0)
    tensors = OrderedDict(
        a=torch.nn.Parameter(torch.ones(2)), b=whole[:6].view(2, 3), c=whole[:6].view(2, 3), d=whole[::2]
    )
    for write in (saved, legacy):
        (tmp_path / "w.pt").write_bytes(write(tensors))
        assert equal(read_weights(tmp_path / "w.pt").tensors, tensors)


def test_a_file_that_changes_while_it_is_mapped_is_not_written_to(tmp_path) -> None:
    file = tmp_path / "w.pt"
    file.write_bytes(before := saved(GOOD))
    read_weights(file).tensors["a"].fill_(7)
    assert file.read_bytes() == before


def test_reading_imports_no_module_that_a_file_names(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    (tmp_path / "a.pt").write_bytes(with_pickle(calling("evil_module", "OrderedDict")))
    with pytest.raises(RecordError, match=r"evil_module\.OrderedDict, not only tensors"):
        read_weights(tmp_path / "a.pt")
    assert "evil_module" not in sys.modules


def test_a_header_of_many_tensors_is_read(tmp_path) -> None:
    header = {
        f"layer.{n}.weight": {"dtype": "F32", "shape": [1], "data_offsets": [4 * n, 4 * n + 4]}
        for n in range(2_000)
    }
    (tmp_path / "w.safetensors").write_bytes(safetensors(header, bytes(8_000)))
    assert len(read_weights(tmp_path / "w.safetensors").tensors) == 2_000


def test_tuples_that_a_checkpoint_uses_again_are_read(tmp_path) -> None:
    """Parameter groups of an optimizer often share their settings."""
    betas = (0.9, (0.5, 0.999))
    content = {"model": GOOD, "groups": [{"betas": betas, "range": (0, 10)} for _ in range(10_000)]}
    for name, written in (("a.pt", saved(content)), ("b.pt", legacy(content))):
        (tmp_path / name).write_bytes(written)
        assert equal(read_weights(tmp_path / name).tensors)


def test_a_file_that_was_cut_off_is_called_incomplete(tmp_path) -> None:
    file = tmp_path / "cut.pth"
    file.write_bytes(saved(GOOD)[:-100])
    with pytest.raises(RecordError, match=r"cut\.pth: seems to be incomplete or damaged: "):
        read_weights(file)
