"""The table of metrics: every key described, open names, and near names for typing errors."""

from __future__ import annotations

import subprocess
import sys

import pytest

from backdoorbench_moe.errors import UnknownNameError
from backdoorbench_moe.metrics import METRICS, metric, sort_metrics


def test_every_metric_has_a_name_a_unit_and_a_direction() -> None:
    for key, one in METRICS.items():
        assert metric(key) == one
        assert one.name and one.short and one.unit in ("%", "percentage points", "s")
        # Only what describes another model has no direction, and shares of the gates for clean images.
        other = key.startswith("twin_") or key in ("expert_ba", "benign_ba", "alone_asr")
        assert (one.better is None) == (other or key in ("own_share", "clean_share"))
    assert (
        len({one.name for one in METRICS.values()})
        == len({one.short for one in METRICS.values()})
        == len(METRICS)
    )
    assert {key for key, one in METRICS.items() if one.better == "lower"} == {
        "asr", "target_rate", "cad", "asr_over_tuning", "unsafe", "harm_share",
        "fpr", "class_fpr", "sample_fpr", "seconds",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("key", "label", "heading"),
    [
        ("asr", "attack success rate (ASR)", "ASR"),
        ("target_rate", "target rate without the trigger", "no trigger"),
        ("task/2.ba", "clean accuracy (BA) of task/2", "task/2 BA"),
        ("pruned.asr", "attack success rate (ASR) after pruned", "pruned ASR"),
        ("pruned.task/2.ba", "clean accuracy (BA) of task/2 after pruned", "pruned task/2 BA"),
        ("pruned.seconds", "time after pruned", "pruned seconds"),
    ],
)
def test_qualified_keys_are_described(key, label, heading) -> None:
    found = metric(key)
    assert (found.key, found.label, found.heading) == (key, label, heading)
    assert found.base == key.rpartition(".")[2]
    assert (found.unit, found.better) == (METRICS[found.base].unit, METRICS[found.base].better)
    assert found.title == f"{label}, {found.unit}"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("acc", "^metric: unknown 'acc'"),
        ("asrr", "metric: unknown 'asrr'; did you mean .*'asr'"),
        ("pruned.asrr", r"metric 'pruned\.asrr': unknown 'asrr'; did you mean .*'asr'"),
        ("task/2.", r"metric 'task/2\.': unknown ''"),
        (".asr", r"metric: unknown '\.asr'"),
        ("a..asr", r"unknown 'a\.\.asr'"),
        ("", "unknown ''"),
        ("ASR", "unknown 'ASR'"),
    ],
)
def test_unknown_metrics_are_refused_with_near_names(key, message) -> None:
    with pytest.raises(UnknownNameError, match=message):
        metric(key)


def test_a_records_metrics_in_the_tables_order_with_unknown_ones_by_their_key() -> None:
    keys = ["cad", "brightness", "pruned.asr", "task/2.ba", "asr", "task/10.ba", "ba"]
    found = sort_metrics(keys)
    assert [one.key for one in found] == [
        "ba", "asr", "cad", "pruned.asr", "task/10.ba", "task/2.ba", "brightness"
    ]  # fmt: skip
    assert (found[-1].label, found[-1].unit, found[-1].better) == ("brightness", "", None)


def test_the_table_loads_no_torch() -> None:
    code = "import sys, backdoorbench_moe.metrics; print('torch' in sys.modules, 'scipy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
