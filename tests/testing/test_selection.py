"""Which parts the conformance tests run over, and how those of a table of gates are judged."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest
import torch
from third_party import put_package, python

from backdoorbench_moe.moe.routed import RoutedModel, Routing
from backdoorbench_moe.testing.making import ranked, tiny_options
from backdoorbench_moe.testing.selection import REFERENCE_MODELS, Selection, kind_of

PARTS = """
from backdoorbench_moe.applicators.base import Applicator
from backdoorbench_moe.models.wide_resnet import WideResNet
from backdoorbench_moe.triggers.base import Trigger


class Negative(Trigger):
    def stamp(self, images):
        return 1 - images


class Whole(Applicator):
    def apply(self, images, trigger):
        return trigger(images)


class Mine(WideResNet):
    pass
"""
PRINT = """
from backdoorbench_moe.testing.selection import Selection
s = Selection("ONE.parts")
print(sorted(s.rows(("applicator", "trigger"))))
print(s.rows(("defense", "model"))[0][1], {model for _, model in s.rows(("defense", "model"))})
print(s.rows(("model",)), s.rows(("dataset",)), Selection("other-parts").rows(("trigger",)))
"""


@pytest.mark.slow
def test_a_package_is_tested_with_builtins_and_not_with_what_is_broken_or_anothers(tmp_path) -> None:
    points = {
        "triggers": ["negative = one_parts:Negative", "gone = one_parts:Gone"],
        "applicators": ["whole = one_parts:Whole"],
        "models": ["mine = one_parts:Mine"],
    }
    put_package(tmp_path, "one-parts", modules={"one_parts": PARTS}, points=points)
    other = {"triggers": ["anothers = one_parts:Negative"]}
    put_package(tmp_path, "other-parts", modules={}, points=other)
    done = python("-c", PRINT, path=[tmp_path])
    assert done.returncode == 0, done.stderr
    pairs, models, rest = done.stdout.splitlines()
    points = entry_points(group="backdoorbench_moe.triggers")
    own = {point.name for point in points if point.dist.name == "backdoorbench-moe"}
    builtin = [("whole", trigger) for trigger in (*own, "negative")]
    ours = {("image", "negative"), ("patch", "negative"), *builtin}
    assert pairs == str(sorted(ours))
    assert models == "mine {'mine'}"
    assert rest == "[('mine',)] [] [('anothers',)]"


def test_without_a_package_all_is_tested() -> None:
    everything = Selection(None)
    assert {("image", "warp"), ("patch", "square")} <= {*everything.rows(("applicator", "trigger"))}
    assert {(name,) for name in ("pmoe", "timm", "vgg16_bn")} <= {*everything.rows(("model",))}
    defended = {model for _, model in everything.rows(("defense", "model"))}
    assert defended >= {*REFERENCE_MODELS} and "vgg16_bn" not in defended
    routed = everything.rows(("model",), RoutedModel)
    assert ("pmoe",) in routed and ("vgg16_bn",) not in routed


def test_fixtures_name_their_kind() -> None:
    kinds = [
        kind_of(name) for name in ("trigger_name", "model_name", "name", "trigger", "file_name", "_name")
    ]
    assert kinds == ["trigger", "model", None, None, None, None]


def test_a_name_that_says_an_option_leaves_it_out_of_the_small_ones() -> None:
    assert tiny_options("model", "timm") == {"architecture": "test_resnet"}
    assert tiny_options("model", "timm:test_vit") == {}
    assert tiny_options("trigger", "warp") == {}


@pytest.mark.parametrize(
    ("selected", "by_experts", "by_patches"),
    [
        # Gates of two experts (rows) over three patches: .5 .3 .2 and .6 .9 .3.
        ([[1, 0, 0], [0, 1, 0]], True, False),
        ([[0, 0, 0], [1, 0, 1]], False, True),
        ([[0, 1, 0], [1, 0, 1]], False, False),
        ([[0, 0, 0], [1, 1, 1]], True, True),
        ([[1, 1, 1], [1, 1, 1]], True, True),
    ],
)
def test_ranks_by_hand(selected: list[list[int]], by_experts: bool, by_patches: bool) -> None:
    gates = torch.tensor([[[0.5, 0.3, 0.2], [0.6, 0.9, 0.3]]])
    routing = Routing("moe", gates, torch.tensor([selected], dtype=torch.bool))
    assert ranked(routing, 2) == by_experts
    assert ranked(routing, 1) == by_patches
