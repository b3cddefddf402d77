"""`bbmoe list` and `bbmoe info`: what each name is, without breaking its description."""

from __future__ import annotations

import inspect
import itertools
import json
import re
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backdoorbench_moe.cli.terminal.docstring_text import docstring_of, reflow, summary
from backdoorbench_moe.config import build_spec
from backdoorbench_moe.engine.names import REGISTRIES
from backdoorbench_moe.kinds import KINDS

EVERY = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry.names()]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_the_docstring_is_found_without_an_import(kind, name) -> None:
    registry = REGISTRIES[kind]
    target = registry.candidate(name).target
    found = docstring_of(target)
    assert found is not None and inspect.cleandoc(found) == inspect.cleandoc(registry.lookup(name).__doc__)
    first = summary(found)
    assert first and "\n" not in first and not first.endswith(".")


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_part_is_described(bbmoe, kind, name) -> None:
    code, out, err = bbmoe("info", kind, name)
    assert (code, err) == (0, "") and out.startswith(f"{kind} {name} (")


def test_the_size_of_a_language_model_is_that_for_a_text(bbmoe) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    _, out, _ = bbmoe("info", "model", "llama", width=400)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4
    )
    parameters = LlamaForCausalLM(config).num_parameters()
    # Per token and layer: four projections, three of the MLP, and attention to 64 tokens twice; then the head.
    products = 64 * (4 * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 64 * 64) + 64 * 64)
    assert out.splitlines()[-1].startswith(f"{parameters:,} parameters and")
    assert out.splitlines()[-1].endswith(f"{products:,} multiply-adds for one text of 64 tokens")


@pytest.mark.parametrize(
    "target", ["backdoorbench_moe.triggers.warp:Nothing", "no_such_module:X", "json:X", "sys:X"]
)
def test_a_target_without_source_or_class_has_none(target) -> None:
    assert docstring_of(target) is None and summary(None) == ""


@pytest.mark.parametrize(
    ("docstring", "line"),
    [
        ("One. Two.", "One"),
        ("One\nline. Two.", "One line"),
        ("With 0.5 in it.\n\nMore.", "With 0.5 in it"),
        ("V-MoE (Riquelme et al., 2021). More.", "V-MoE (Riquelme et al., 2021)"),
        ("No full stop", "No full stop"),
        ("By e.g. a picture.", "By e.g. a picture"),
    ],
)
def test_the_summary_is_the_first_sentence(docstring, line) -> None:
    assert summary(docstring) == line


def test_list_says_what_each_name_is_and_where_a_third_party_comes_from(bbmoe) -> None:
    code, out, _ = bbmoe("list", width=400)
    assert code == 0
    listed = json.loads(bbmoe("list", "--json")[1])["parts"]
    assert len(listed) == len(EVERY) and all(part["summary"] for part in listed)
    for part in listed:
        cells = rf"(^|\s){re.escape(part['name'])}(:\S+)?\s+{re.escape(part['summary'])}(\s+\(|\s*$)"
        [line] = [line for line in out.splitlines() if re.search(cells, line)]
        origin = f"({part['package']} {part['version']})"
        assert (origin in line) == (part["package"] != "backdoorbench-moe")


@pytest.mark.parametrize(("kind", "name"), EVERY)
@pytest.mark.parametrize("width", [50, 80, 200])
def test_info_wraps_a_description_once(bbmoe, kind, name, width) -> None:
    """A paragraph's lines are full: the first word of the next line would not have fitted."""
    name = "timm:resnet18" if name == "timm" else name
    out = reflow(REGISTRIES[kind].lookup(name).__doc__, width)
    lines = out.splitlines()
    for line, after in itertools.pairwise(lines):
        assert len(line) <= width or " " not in line.strip()
        indent = len(after) - len(after.lstrip())
        if line.strip() and after.strip() and not indent and after[0] not in "-*" and line[-1] != ":":
            assert len(line) + 1 + len(after.split()[0]) > width
    words = REGISTRIES[kind].lookup(name).__doc__.split()
    assert out.split() == words


GOOGLE = """
    Summary of it.

    A paragraph that is
    wrapped.

    Args:
        size: Side in pixels,
            and more of it.
        ratio (float): In [0, 1].
        *rest, **more: Others.

    Returns:
        A tensor of
        a shape.

    - an item
      of two lines
    - another
"""


def test_sections_and_lists_keep_their_form() -> None:
    assert reflow(GOOGLE, 40) == textwrap.dedent(
        """\
        Summary of it.

        A paragraph that is wrapped.

        Args:
            size: Side in pixels, and more of
                it.
            ratio (float): In [0, 1].
            *rest, **more: Others.

        Returns:
            A tensor of a shape.

        - an item of two lines
        - another"""
    )


@given(
    st.lists(st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=8), min_size=1, max_size=4)
)
def test_wrapping_twice_is_wrapping_once(paragraphs) -> None:
    text = "\n\n".join(" ".join(words) for words in paragraphs)
    assert reflow(reflow(text, 17), 30) == reflow(text, 30)


@pytest.mark.parametrize("model", ["pmoe", "wide_resnet", "vgg16_bn"])
@pytest.mark.parametrize("recipe", ["quick", "paper"])
def test_a_model_is_shown_with_the_recipes_values_as_attack_uses_them(bbmoe, model, recipe) -> None:
    info = json.loads(bbmoe("info", "model", model, "--recipe", recipe, "--json")[1])
    assert info["recipe"]["options"] == build_spec({"recipe": recipe, "model": model}).model.options
    if not info["recipe"]["options"]:
        assert info["recipe"]["size"] == info["size"]
        return
    given = [word for key, value in info["recipe"]["options"].items() for word in ("--set", f"{key}={value}")]
    asked = json.loads(bbmoe("info", "model", model, *given, "--json")[1])
    assert asked["size"] == info["recipe"]["size"] != info["size"]
    _, out, _ = bbmoe("info", "model", model, "--recipe", recipe)
    [line] = [line for line in out.splitlines() if line.startswith("widen_factor")]
    assert line.split()[2:] == [
        "10" if model == "pmoe" else str(info["options"]["widen_factor"]["default"]),
        str(info["recipe"]["options"]["widen_factor"]),
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["info", "trigger", "warp", "--recipe", "quick"], "--recipe: expected KIND model"),
        (["info", "model", "pmoe", "--recipe", "qick"], "recipe: unknown 'qick'; did you mean 'quick'"),
    ],
)
def test_a_recipe_that_is_none_is_refused(bbmoe, args, message) -> None:
    code, _, err = bbmoe(*args)
    assert code == 2 and message in err


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", [("--help",), ("list", "--help"), ("info", "--help"), ("plugin", "--help")])
def test_help_texts_name_every_kind(bbmoe, kind, words) -> None:
    code, out, _ = bbmoe(*words, width=100)
    assert code == 0
    text = " ".join(out.split())
    assert kind in text or f"{kind.replace('dataset', 'data set')}s" in text


@pytest.mark.parametrize(
    "words",
    [
        ("trigger", "warp", "--image-size", "64"),
        ("dataset", "cifar10", "--num-classes", "3"),
        ("model", "llama", "--num-classes", "3"),
    ],
)
def test_sizes_of_images_are_refused_where_there_are_none(bbmoe, words) -> None:
    code, _, said = bbmoe("info", *words)
    assert code == 2 and f"{words[2]}: expected an image model to go with it, got {words[3]}" in said


def test_options_may_begin_with_the_kind(bbmoe) -> None:
    words = ["info", "model", "wide_resnet", "--json", "--set"]
    plain = bbmoe(*words, "widen_factor=2")
    assert plain[0] == 0 and bbmoe(*words, "model.widen_factor=2") == plain
