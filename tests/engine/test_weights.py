"""Weights of others fitted to a model: what is renamed, converted, listed and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from backdoorbench_moe.engine.weights.fitting import fit_weights, head_names
from backdoorbench_moe.engine.weights.reading import Weights, read_weights
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.models import create_model

FILE = Path("weights.pt")


class Net(nn.Module):
    """A network whose state dict has parameters, statistics, and a mask with infinity in it."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, classes)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def components(self) -> dict[str, list[nn.Module]]:
        """The head."""
        return {"head": [self.head]}

    def prunable(self) -> dict[str, list[object]]:
        """Nothing."""
        return {}


def drawn(seed: int, classes: int = 3) -> Net:
    torch.manual_seed(seed)
    return Net(classes)


def fit(model: nn.Module, tensors: dict[str, torch.Tensor], **options: object) -> tuple[str, ...]:
    return fit_weights(model, Weights(FILE, tensors, {}), **options)


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "module.model."],
)
def test_prefixes_are_taken_off_and_said(prefix) -> None:
    source, model = drawn(0), drawn(1)
    notes = fit(model, {f"{prefix}{name}": t for name, t in source.state_dict().items()})
    assert same(model, source)
    assert notes == tuple(
        f"the prefix '{part}.' was removed from all names" for part in prefix.split(".")[:-1]
    )


def test_the_prefix_of_a_training_framework_is_taken_off_the_names_of_timm() -> None:
    torch.manual_seed(0)
    source = timm.create_model("resnet10t", num_classes=5)
    model = create_model("timm", architecture="resnet10t", num_classes=5, image_size=32, small_stem=False)
    [note] = fit(model, {f"model.{name}": tensor for name, tensor in source.state_dict().items()})
    assert "'model.'" in note and same(model, source)


def test_a_prefix_stays_if_the_names_do_not_fit_without_it_or_also_fit_with_it() -> None:
    model = nn.Sequential()
    model.net = nn.Sequential()
    model.net.net, model.other = nn.Linear(2, 2), nn.Linear(2, 2)
    for prefix, unexpected in (("head.", "head.what"), ("net.", "net.what")):
        tensors = {f"{prefix}what": torch.ones(1), f"{prefix}net.weight": torch.ones(2, 2)}
        with pytest.raises(RecordError, match=rf"unexpected: {unexpected}"):
            fit(model, tensors)


def test_a_prefix_that_only_some_names_have_stays() -> None:
    tensors = {f"module.{n}" if n.startswith("conv") else n: t for n, t in drawn(0).state_dict().items()}
    with pytest.raises(
        RecordError, match=r"2 missing: conv.weight, conv.bias; 2 unexpected: module.conv.weight"
    ):
        fit(drawn(1), tensors)


def test_a_model_whose_own_names_have_the_prefix_keeps_it() -> None:
    source, model = nn.Sequential(), nn.Sequential()
    source.module, model.module = nn.Linear(2, 2), nn.Linear(2, 2)
    assert fit(model, source.state_dict()) == () and same(model, source)


def test_all_misfits_are_counted_and_ten_are_listed() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(8)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {f"other.{n}": torch.zeros(1) for n in range(12)} | {"0.weight": torch.zeros(3, 2)}
    with pytest.raises(RecordError) as caught:
        fit(model, tensors)
    text = str(caught.value)
    assert "15 missing: 0.bias, 1.weight" in text and "and 5 more" in text and "7.bias" not in text
    assert "12 unexpected: other.0" in text and "and 2 more" in text
    assert "1 with another shape: 0.weight (expected 2x2, got 3x2)" in text and "\n" not in text
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_another_number_of_classes_draws_a_new_head_only_if_asked() -> None:
    source, model = drawn(0, classes=5), drawn(1)
    head = model.head.weight.clone()
    with pytest.raises(RecordError, match=r"2 with another shape: head.weight \(expected 3x4, got 5x4\)"):
        fit(model, source.state_dict())
    [note] = fit(model, source.state_dict(), head="auto")
    assert "randomly initialised" in note and "5x4 in the file and 3x4 in the model" in note
    assert torch.equal(model.head.weight, head) and torch.equal(model.conv.weight, source.conv.weight)


def test_a_head_that_fits_is_kept_unless_a_new_one_is_asked_for() -> None:
    source, model = drawn(0), drawn(1)
    head = model.head.weight.clone()
    [note] = fit(model, source.state_dict(), head="new")
    assert "as requested" in note and torch.equal(model.head.weight, head)
    assert fit(model, source.state_dict(), head="auto") == () and same(model, source)


def test_a_file_without_a_head_gets_a_new_one() -> None:
    tensors = {name: t for name, t in drawn(0).state_dict().items() if not name.startswith("head")}
    [note] = fit(drawn(1), tensors, head="auto")
    assert "the file has none" in note
    with pytest.raises(RecordError, match=r"2 missing: head\.weight, head\.bias"):
        fit(drawn(1), tensors)


def test_half_a_head_is_not_taken_for_none() -> None:
    tensors = {name: t for name, t in drawn(0).state_dict().items() if name != "head.bias"}
    with pytest.raises(RecordError, match=r"1 missing: head\.bias"):
        fit(drawn(1), tensors, head="auto")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats_are_converted_and_said(dtype) -> None:
    source, model = drawn(0), drawn(1)
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in source.state_dict().items()}
    [note] = fit(model, tensors)
    assert str(dtype) in note and model.conv.weight.dtype == torch.float32
    assert torch.equal(model.conv.weight, source.conv.weight.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_a_parameter_that_is_no_float_is_refused(dtype) -> None:
    tensors = {**drawn(0).state_dict(), "conv.bias": torch.ones(4, dtype=dtype)}
    with pytest.raises(RecordError, match=f"conv.bias: expected torch.float32, got {dtype}"):
        fit(drawn(1), tensors)


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("conv.bias", torch.nan, True),
        ("conv.bias", torch.inf, True),
        ("norm.running_var", torch.inf, True),
        ("mask", torch.nan, True),
        ("mask", -torch.inf, False),
    ],
)
def test_values_must_be_finite_except_in_masks(name, value, refused) -> None:
    tensors = {key: tensor.clone() for key, tensor in drawn(0).state_dict().items()}
    tensors[name][1] = value
    if refused:
        with pytest.raises(RecordError, match=f"{name}: expected finite numbers"):
            fit(drawn(1), tensors)
    else:
        fit(drawn(1), tensors)


def test_counters_of_batch_norms_may_be_missing() -> None:
    tensors = {name: t for name, t in drawn(0).state_dict().items() if "num_batches" not in name}
    model = drawn(1)
    assert fit(model, tensors) == () and int(model.norm.num_batches_tracked) == 0


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_convnext"])
def test_a_file_of_timm_itself_fits_and_gives_the_same_logits(architecture, tmp_path) -> None:
    torch.manual_seed(0)
    source = timm.create_model(architecture, num_classes=6, img_size=160) if "vit" in architecture else None
    source = (source or timm.create_model(architecture, num_classes=6)).eval()
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "own.pth")
    options = {"small_stem": False} if architecture == "test_resnet" else {}
    model = create_model(f"timm:{architecture}", num_classes=6, image_size=160, **options).eval()
    notes = fit_weights(model, read_weights(tmp_path / "own.pth"))
    assert notes == ("the state dict is under the key 'state_dict'; not read: epoch",)
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(model(images), source(images))
    assert fit(model, model.state_dict()) == ()


def test_names_are_shown_as_in_the_file() -> None:
    tensors = timm.create_model("test_resnet", num_classes=3).state_dict()
    tensors["total_ops"] = tensors.pop("fc.bias")
    model = create_model("timm:test_resnet", num_classes=3)
    with pytest.raises(RecordError, match=r"1 missing: fc\.bias; 1 unexpected: total_ops$"):
        fit_weights(model, Weights(Path("w.pt"), tensors, {}, ()))


def test_a_smaller_stem_than_the_published_one_is_named() -> None:
    published = timm.create_model("resnet18", num_classes=3).state_dict()
    small = create_model("timm:resnet18", num_classes=3, image_size=32)
    with pytest.raises(RecordError, match=r"model\.small_stem=false keeps it"):
        fit_weights(small, Weights(Path("w.pt"), published, {}, ()))
    same = create_model("timm:resnet18", num_classes=3, image_size=32, small_stem=False)
    fit_weights(same, Weights(Path("w.pt"), published, {}, ()))


@pytest.mark.parametrize("name", ["pmoe", "wide_resnet", "preact_resnet18", "vgg16_bn", "convnext"])
def test_every_model_of_ours_says_which_weights_are_its_head(name) -> None:
    model = create_model(name)
    heads = head_names(model)
    assert heads and all(model.state_dict()[each].shape[0] == 10 for each in heads)


@pytest.mark.parametrize(("count", "kept"), [(3.0, 3), (70000.0, 0), (2.5, None), (float("nan"), None)])
def test_counters_that_were_cast_with_all_weights(count, kept) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    given = {name: value.half() for name, value in model.state_dict().items()}
    given["0.num_batches_tracked"] = torch.tensor(count).half()  # 70000 becomes infinite.
    if kept is None:
        with pytest.raises(
            RecordError, match=r"0\.num_batches_tracked: expected torch.int64, got torch.float16"
        ):
            fit(model, given)
        return
    assert fit(model, given) == ("weights of type torch.float16 were converted to torch.float32",)
    assert model.state_dict()["0.num_batches_tracked"].item() == kept


def test_values_that_are_refused_are_named_as_in_the_file() -> None:
    for value, message in (
        (torch.full((3,), torch.nan), "expected finite numbers"),
        (torch.ones(3, dtype=torch.int64), "expected torch.float32, got torch.int64"),
    ):
        tensors = timm.create_model("test_resnet", num_classes=3).state_dict() | {"fc.bias": value}
        with pytest.raises(RecordError, match=rf": fc\.bias: {message}"):
            fit(create_model("timm:test_resnet", num_classes=3), tensors)
