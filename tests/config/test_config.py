"""Specs: merging, checking, digests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backdoorbench_moe.config import (
    PoisonSpec,
    RunSpec,
    build_spec,
    chain_settings,
    load_yaml,
    merge,
    parse_setting,
    spec_from_dict,
)
from backdoorbench_moe.engine.graph import clean_twin, needs
from backdoorbench_moe.errors import BbmoeWarning, ConfigError, UnknownNameError


def test_layers_win_in_order() -> None:
    spec = build_spec(
        {"train": {"lr": 0.3, "epochs": 4}}, {"train": {"lr": 0.2}}, chain_settings(["train.lr=0.1"])
    )
    assert (spec.train.lr, spec.train.epochs) == (0.1, 4)


def test_recipe_gives_the_model_its_options_and_flags_win_over_it() -> None:
    spec = build_spec({"recipe": "quick", "model": {"name": "pmoe", "widen_factor": 5}})
    assert spec.model.options == {
        "widen_factor": 5,
        "moe_channels": 16,
        "expert_channels": 16,
        "bn_momentum": 0.1,
    }
    assert build_spec({"recipe": "quick", "model": "vgg16_bn"}).model.options == {}


def test_paper_recipe_is_the_papers() -> None:
    train = build_spec({"recipe": "paper"}).train
    assert (train.epochs, train.batch_size, train.lr, train.momentum, train.weight_decay, train.schedule) == (
        25, 128, 0.1, 0.0, 0.0, "constant",
    )  # fmt: skip
    assert build_spec({"recipe": "paper"}).model.options == {}


def test_options_of_the_default_data_set_need_no_name() -> None:
    dataset = build_spec({"dataset": {"train_images": 64}}).dataset
    assert (dataset.name, dataset.options) == ("signs", {"train_images": 64})


def test_another_name_drops_the_options_of_the_first() -> None:
    merged = merge({"trigger": {"name": "warp", "strength": 1.0}}, {"trigger": {"name": "square", "size": 2}})
    assert merged == {"trigger": {"name": "square", "size": 2}}


def test_digest_changes_with_what_decides_the_numbers_only() -> None:
    spec = build_spec({})
    same = [{"dataset": {"name": "signs", "root": "/elsewhere"}}, {"device": "cpu"}]
    other = [{"seed": 1}, {"poison": {"rate": 0.2}}, {"train": {"epochs": 7}}, {"precision": "fp32"}]
    assert {build_spec(layer).digest for layer in same} == {spec.digest}
    assert len({build_spec(layer).digest for layer in other} | {spec.digest}) == 5


def test_attacks_on_the_same_model_share_their_clean_twin() -> None:
    one, two = build_spec({"trigger": "warp"}), build_spec({"trigger": "square", "poison": {"rate": "1%"}})
    assert clean_twin(one) == clean_twin(two)
    assert one.attacked and not clean_twin(one).attacked


def test_spec_survives_its_dict() -> None:
    spec = build_spec(
        {"poison": {"source": [1, 2], "labels": "dirty"}, "trigger": {"name": "blend", "ratio": 0.3}}
    )
    assert spec_from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("rate", "images", "count"),
    [
        (0.0001, 50_000, 5),
        (0.0001, 39_209, 3),
        (0.29, 100, 29),
        (0.07, 100, 7),
        (1.0, 17, 17),
        (0.01, 199, 1),
    ],
)
def test_count_is_the_floor_in_exact_arithmetic(rate: float, images: int, count: int) -> None:
    assert PoisonSpec(rate=rate).count(images) == count


@given(st.integers(1, 10_000), st.integers(1, 100_000))
def test_count_never_exceeds_the_rate(per_myriad: int, images: int) -> None:
    spec = PoisonSpec(rate=per_myriad / 10_000)
    if per_myriad * images < 10_000:
        with pytest.raises(ConfigError, match="rounds down to 0 images"):
            spec.count(images)
    else:
        assert spec.count(images) == per_myriad * images // 10_000


BAD = [
    ({"poison": {"rate": 0}}, r"poison\.rate: expected a number in \(0, 1\], got 0"),
    (
        {"poison": {"rate": 1.5}},
        r"poison\.rate: expected a number in \(0, 1\], got 1.5; for 1.5 percent write 1.5%",
    ),
    ({"poison": {"rate": 101}}, r"poison\.rate: expected a number in \(0, 1\], got 101.0$"),
    ({"poison": {"rate": -0.1}}, r"poison\.rate"),
    ({"poison": {"rate": float("nan")}}, r"poison\.rate"),
    ({"poison": {"rate": "much"}}, r"poison\.rate: expected a number, got 'much'"),
    ({"poison": {"rate": True}}, r"poison\.rate: expected a number, got True"),
    ({"poison": {"target": -1}}, r"poison\.target"),
    ({"poison": {"target": "-1"}}, r"poison\.target: expected a class number of at least 0, got -1"),
    ({"poison": {"target": 1.5}}, r"poison\.target: expected an integer or a string, got 1.5"),
    ({"poison": {"target": True}}, r"poison\.target: expected an integer or a string, got True"),
    ({"poison": {"source": [1, 1]}}, r"poison\.source"),
    ({"poison": {"source": [1, "1"]}}, r"poison\.source: expected each class once, got \(1, 1\)"),
    ({"poison": {"source": ["cat", "cat"]}}, r"poison\.source: expected each class once"),
    ({"poison": {"source": "cat"}}, r"poison\.source: expected a list, got 'cat'"),
    ({"poison": {"labels": "dirt"}}, r"poison\.labels: unknown 'dirt'; did you mean 'dirty'"),
    ({"poison": {"mapping": "all-to-all", "labels": "clean"}}, r"poison\.mapping"),
    ({"poisson": {}}, r"unknown 'poisson'; did you mean 'poison'"),
    ({"train": {"epoch": 3}}, r"train: key: unknown 'epoch'; did you mean 'epochs'"),
    ({"train": {"accumulate": 0}}, r"train\.accumulate: expected an integer from 1 to 1000000, got 0"),
    ({"train": {"epochs": -1}}, r"train\.epochs: expected an integer from 0 to 100000, got -1"),
    ({"train": {"epochs": 10**24}}, r"train\.epochs: expected an integer from 0 to 100000, got 10{24}$"),
    ({"train": {"batch_size": 10**9}}, r"train\.batch_size: expected an integer from 1 to 1000000, got"),
    (
        {"train": {"epochs": 0}},
        r"train\.epochs: expected at least 1, as the model has no initial weights, got 0",
    ),
    (
        {"train": {"epochs": 0}, "model": {"name": "pmoe", "weights": "a.safetensors"}},
        r"train\.epochs: expected at least 1, as the attack needs training, got 0",
    ),
    ({"train": {"epochs": 2.5}}, r"train\.epochs: expected an integer, got 2.5"),
    ({"train": {"lr": float("inf")}}, r"train\.lr"),
    ({"train": 3}, r"train: expected a mapping, got 3"),
    ({"model": 7}, r"model: expected a name"),
    ({"model": {"name": [1]}}, r"model.name: expected a string"),
    ({"dataset": None}, r"dataset: expected a name"),
    ({"recipe": "papr"}, r"recipe: unknown 'papr'; did you mean 'paper'"),
    ({"precision": "fp16"}, r"precision: unknown 'fp16'"),
    ({"seed": -1}, r"seed: expected a number from 0 to 4294967295, got -1"),
    ({"seed": 2**32}, r"seed: expected a number from 0 to 4294967295, got 4294967296"),
    ({"trigger": None}, r"trigger and applicator: expected both or neither"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[str(values) for values, _ in BAD])
def test_bad_values_name_the_key_and_what_was_expected(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_spec({"trigger": "warp", "applicator": "patch"}, values)


@pytest.mark.parametrize("text", ["novalue", "=3", "a..b=1", "a.=1", "a=[1"])
def test_bad_settings(text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_setting(text)


def test_settings_are_typed_by_yaml() -> None:
    assert chain_settings(["a.b=1", "a.c=x", "a.d=[1, 2]", "e=null"]) == {
        "a": {"b": 1, "c": "x", "d": [1, 2]},
        "e": None,
    }


def test_on_and_off_are_texts_and_keys_and_true_and_false_are_booleans(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("{on: routing, off: yes, y: [no, On, true, False, TRUE]}")
    assert load_yaml(file) == {"on": "routing", "off": "yes", "y": ["no", "On", True, False, True]}


def test_yaml_files(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: wide_resnet\npoison: {rate: 1%}\n")
    spec = build_spec(load_yaml(file))
    assert isinstance(spec, RunSpec)
    assert (spec.model.name, spec.poison.rate) == ("wide_resnet", 0.01)
    file.write_text("a: [1,\nb: 3")
    message = (
        r"not valid YAML: while parsing a flow sequence at line 1, column 4: expected ',' or '\]', "
        r"but got '<stream end>' at line 2, column 5$"
    )
    with pytest.raises(ConfigError, match=message):
        load_yaml(file)
    file.write_text("just text")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_yaml(file)
    with pytest.raises(ConfigError, match="No such file"):
        load_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "value",
    ["2020-01-01", "2020-13-45", "!!binary aGVsbG8=", "!!set {a, b}", "!!int x", "&a [*a]", "[" * 9999],
)
def test_yaml_that_is_no_plain_value_is_refused(tmp_path, value) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_setting(f"model.widen_factor={value}")
    (tmp_path / "run.yaml").write_text(f"model: {{widen_factor: {value}}}")
    with pytest.raises(ConfigError, match="config file"):
        load_yaml(tmp_path / "run.yaml")


@pytest.mark.parametrize("key", ["a" + 900 * ".a", "trigger" + 120 * ".a"])
def test_settings_with_too_many_dots_are_refused(key) -> None:
    with pytest.raises(ConfigError, match=r"--set .*nested deeper than 100 levels"):
        build_spec(parse_setting(f"{key}=1"))


def test_a_setting_may_have_as_many_levels_as_can_be_merged() -> None:
    settings = parse_setting("a" + 98 * ".a" + "=[1]")
    assert merge(settings, settings) == settings


def test_a_few_lines_of_yaml_that_stand_for_billions_of_values_are_refused(tmp_path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join(9 * [f'*a{n - 1}'])}]" for n in range(1, 30)]
    file, whole = tmp_path / "bomb.yaml", "\n".join(lines)
    # Neither as a mapping nor as a list, which is no config file and must not be printed.
    for text in (whole, f"[{{{', '.join(lines)}}}]"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="more than 1,000,000 values"):
            load_yaml(file)
    file.write_text("\n".join(lines[:4]))
    assert len(load_yaml(file)["a3"]) == 9


def test_a_list_that_contains_itself_is_refused(tmp_path) -> None:
    file = tmp_path / "loop.yaml"
    file.write_text("a: &a [1, *a]")
    with pytest.raises(ConfigError, match="nested deeper than 100 levels"):
        load_yaml(file)


@pytest.mark.parametrize("rate", ["1/0%", "abc%", "nan%", "%", "1e9999999999%"])
def test_a_percentage_that_is_none_is_refused(rate) -> None:
    with pytest.raises(ConfigError, match=r"poison\.rate: expected a number"):
        build_spec({"poison": {"rate": rate}})


def test_more_than_all_images_is_refused_as_it_was_written() -> None:
    with pytest.raises(ConfigError, match=r"poison\.rate: expected at most 100%, got '101%'"):
        build_spec({"poison": {"rate": "101%"}})


@pytest.mark.parametrize("percent", [0.01, 0.07, 1, 2.5, 29, 58, 100])
def test_a_percentage_is_exact(percent) -> None:
    digits = f"{round(percent * 100):d}"  # in hundredths of a percent
    assert build_spec({"poison": {"rate": f" {percent} %"}}).poison.rate == float(f"{digits}e-4")


def test_a_bare_1_is_all_images_and_says_so() -> None:
    with pytest.warns(BbmoeWarning, match=r"poison\.rate: 1 means 100% .* write 1% for one percent"):
        spec = build_spec(chain_settings(["poison.rate=1"]))
    assert spec.poison.rate == 1.0 and spec.poison.count(17) == 17
    for meant in ("1.0", "100%"):  # Nothing to say: BbmoeWarning is an error in the tests.
        assert build_spec(chain_settings([f"poison.rate={meant}"])) == spec
    assert spec_from_dict(spec.to_dict()) == spec


def test_a_class_in_digits_is_its_number_however_it_is_written() -> None:
    numbered = build_spec({"poison": {"target": 3, "source": [1, 2]}})
    written = build_spec({"poison": {"target": "3", "source": ["1", "02"]}})
    assert written == numbered and written.digest == numbered.digest


@pytest.mark.parametrize("poison", [{"target": "cat"}, {"source": ["cat"]}])
def test_a_class_by_name_has_no_digest_before_the_data_number_it(poison) -> None:
    spec = build_spec({"poison": poison})
    assert spec_from_dict(spec.to_dict()) == spec
    for key in ("digest", "name"):
        with pytest.raises(
            ConfigError, match=r"poison\.(target|source): expected a class number .* got 'cat'"
        ):
            getattr(spec, key)
    assert clean_twin(spec).digest == clean_twin(build_spec({})).digest


def test_yaml_runs_no_code(tmp_path) -> None:
    file, trap = tmp_path / "run.yaml", tmp_path / "trap"
    file.write_text(f"model: !!python/object/apply:os.mkdir ['{trap}']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_yaml(file)
    assert not trap.exists()


def test_unknown_name_error_lists_what_is_known() -> None:
    error = UnknownNameError("trigger", "wrap", ["warp", "blend"])
    assert error.suggestions == ["warp"]
    assert "did you mean 'warp'? known: blend, warp" in str(error)


FINE_PRUNING = {"name": "fine-pruning", "ratio": 0.2}


def test_a_defended_run_is_the_victims_spec_and_its_defenses() -> None:
    victim, spec = build_spec({}), build_spec({"defenses": ["fine-tuning", FINE_PRUNING]})
    assert spec_from_dict(spec.to_dict()) == spec
    assert needs(spec)["parent"] == build_spec(chain_settings(["defenses=[fine-tuning]"]))
    assert needs(needs(spec)["parent"])["parent"] == victim and needs(victim) == {}
    assert len({victim.digest, spec.digest, needs(spec)["parent"].digest}) == 3
    assert "-fine-tuning-fine-pruning-s0-" in spec.name
    assert clean_twin(spec) == clean_twin(victim)


def test_an_undefended_run_says_nothing_of_defenses() -> None:
    spec = build_spec({"defenses": []})
    assert "defenses" not in spec.to_dict() and spec == build_spec({})


@pytest.mark.parametrize(
    ("defenses", "message"),
    [
        ("fine-pruning", r"defenses: expected a list of names, .* got 'fine-pruning'"),
        ({"0": FINE_PRUNING}, "defenses: expected a list of names"),
        ([3], r"defenses\[0\]: expected a name, or a mapping with the key 'name', got 3"),
        ([FINE_PRUNING, None], r"defenses\[1\]: expected a name"),
        ([{"ratio": 0.1}], r"defenses\[0\]: expected a name"),
        ([{"name": 3}], r"defenses\[0\]\.name: expected a string, got 3"),
    ],
)
def test_what_is_no_list_of_defenses_is_refused(defenses, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_spec({"defenses": defenses})


def test_a_key_that_stands_twice_is_refused_and_a_merged_one_is_not(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  lr: 0.1\n  epochs: 2\n  lr: 0.2\n")
    with pytest.raises(ConfigError, match=r"run.yaml: not valid YAML: 'lr' twice .*line 4"):
        load_yaml(file)
    file.write_text(
        "- &a {lr: 1}\n- &b\n  <<: *a\n  lr: 2\n- {<<: *b, lr: 3}\n".replace("- &a", "x:\n- &a", 1)
    )
    assert load_yaml(file) == {"x": [{"lr": 1}, {"lr": 2}, {"lr": 3}]}


@pytest.mark.parametrize(
    "rates",
    [{"rate": 0.1, "cover": 0.95}, {"rate": 1.0, "noise": 0.01}, {"rate": 0.4, "cover": 0.4, "noise": 0.4}],
)
def test_the_groups_must_leave_room_for_each_other(rates) -> None:
    """A cover group of 95% leaves no room for 10% of poisons."""
    sum_of = r"poison\.rate, poison\.cover and poison\.noise: expected .* a sum of at most 1, got "
    with pytest.raises(ConfigError, match=sum_of):
        build_spec({"poison": rates})
    build_spec(
        {"poison": {"rate": 0.1, "cover": 0.2, "noise": 0.7}}
    )  # As floats they are a little more than 1.


@pytest.mark.parametrize("group", ["rate", "cover", "noise"])
def test_without_an_attack_no_group_has_images(group) -> None:
    with pytest.raises(ConfigError, match=rf"poison\.{group}: expected 0, as there is no attack, got 0\.1"):
        build_spec({"attack": None, "poison": {group: 0.1}})
