"""Tables of models after defenses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from backdoorbench_moe.bench.suites.suite import METRIC_COLUMNS, Layout, value_of
from backdoorbench_moe.bench.tables.layout import label

from .drawing import BY_APPLICATOR, NAMES, RESULTS, crossed, results_of, small_table, whole_table

NOISE = {"none": "no noise images", "10%": "10% noise images"}
# Tuning and distillation with tiles, and what they are compared with; labels of `standard-defenses`.
TILES = (
    "none",
    "fine-tuning",
    "fine-tuning, epochs=40",
    "fine-tuning, epochs=240",
    "neural-cleanse, applicator=patch",
    "tile-tuning",
    "tile-distillation",
    "tile-distillation, share=0",
)


def after_defenses(root: Path, place: str, metric: str) -> str:
    """Draw a metric after every defense, for each model, on the image and in every patch."""
    return crossed(
        root, place, "defenses", lambda cell: label("defenses", value_of(cell.spec, "defenses")), metric
    )


def fine_pruning(root: Path) -> str:
    """Draw the ASR before and after fine-pruning at a ratio of 20%."""
    layout = replace(BY_APPLICATOR, rows=("defenses",))
    return whole_table(root, "badpatches-table3/small", layout, ["none", *NAMES])


def defended(root: Path) -> str:
    """Draw the ASR after every defense of a pMoE."""
    layout = replace(BY_APPLICATOR, rows=("defenses",), where={"model.name": "pmoe"})
    return whole_table(root, "defenses/small", layout)


def knowing(root: Path) -> str:
    """Draw the ASR after tuning, for attacks with and without noise images."""
    layout = Layout(
        "", ("model.name", "defenses"), "poison.noise", no_trigger=False, where={"trigger.name": "square"}
    )
    return whole_table(root, "knowing-attacker/quick", layout, names=NOISE)


def defended_by(root: Path, place: str, model: str, applicator: str, metric: str = "asr") -> str:
    """Draw a metric of every trigger after every defense, for a model, on the image or in every patch."""
    where = {"model.name": model, "applicator.name": applicator}
    layout = Layout("", ("defenses",), "trigger.name", (metric,), no_trigger=False, where=where)
    return whole_table(root, place, layout)


def run_counts(root: Path, place: str) -> str:
    """Draw how many defended runs of a suite are finished, for each model, applicator and seed."""
    results = results_of(root, root / RESULTS / place)
    finished: dict[tuple[str, str], dict[int, list[bool]]] = {}
    for spec in results.suite.runs():
        if spec.applicator is not None and spec.defenses:
            of_model = finished.setdefault((spec.model.name, spec.applicator.name), {})
            of_model.setdefault(spec.seed, []).append(results.record(spec) is not None)
    seeds = [*dict.fromkeys(spec.seed for spec in results.suite.runs())]
    rows = [
        [model, NAMES[applicator], *(f"{sum(done[seed])} of {len(done[seed])}" for seed in seeds)]
        for (model, applicator), done in sorted(finished.items())
    ]
    return small_table(["model", "trigger", *(f"seed {seed}" for seed in seeds)], rows)


def tiles(root: Path, metric: str) -> str:
    """Draw a metric after tuning and distillation with random tiles, and after what they are compared with."""
    where = {"model.name": "pmoe", "applicator.name": "patch"}
    layout = Layout("", ("defenses",), "trigger.name", (metric,), no_trigger=False, where=where)
    return whole_table(root, "standard-defenses/small", layout, TILES)


def removal(root: Path) -> str:
    """Draw what it costs to remove the backdoor of every patch at scale medium."""
    layout = Layout("", ("trigger.name", "defenses"), METRIC_COLUMNS, ("asr", "ba", "ra"), no_trigger=False)
    return whole_table(root, "removal/medium", layout)


# Tables of `defended_by`: the results folder, the model, the applicator and the metric of each.
DEFENDED_BY = {
    "defended-pmoe-patch": ("standard-defenses/quick", "pmoe", "patch", "asr"),
    "defended-pmoe-image": ("standard-defenses/quick", "pmoe", "image", "asr"),
    "defended-dense-patch": ("standard-defenses/quick", "wide_resnet", "patch", "asr"),
    "defended-dense-image": ("standard-defenses/quick", "wide_resnet", "image", "asr"),
    "defended-vmoe": ("standard-vmoe/quick", "vmoe", "patch", "asr"),
    "defended-vmoe-auroc": ("standard-vmoe/quick", "vmoe", "patch", "auroc"),
    "cifar10-pmoe-patch": ("standard-defenses/small", "pmoe", "patch", "asr"),
    "cifar10-pmoe-patch-ba": ("standard-defenses/small", "pmoe", "patch", "ba"),
    "cifar10-pmoe-image": ("standard-defenses/small", "pmoe", "image", "asr"),
    "cifar10-dense-patch": ("standard-defenses/small", "wide_resnet", "patch", "asr"),
    "cifar10-dense-image": ("standard-defenses/small", "wide_resnet", "image", "asr"),
    "cifar10-vmoe-patch": ("standard-vmoe/small", "vmoe", "patch", "asr"),
    "cifar10-vmoe-patch-ba": ("standard-vmoe/small", "vmoe", "patch", "ba"),
    "cifar10-vmoe-patch-auroc": ("standard-vmoe/small", "vmoe", "patch", "auroc"),
    "cifar10-vmoe-image": ("standard-vmoe/small", "vmoe", "image", "asr"),
    "expert-forms": ("expert-forms/small", "pmoe", "patch", "asr"),
    "expert-forms-ba": ("expert-forms/small", "pmoe", "patch", "ba"),
}
RUN_COUNTS = {
    "runs-small": "standard-defenses/small",
    "runs-quick": "standard-defenses/quick",
    "runs-vmoe-small": "standard-vmoe/small",
    "runs-vmoe-quick": "standard-vmoe/quick",
}

BLOCKS: dict[str, Callable[[Path], str]] = {
    "fine-pruning": fine_pruning,
    "removal": removal,
    "defended": defended,
    "defenses-asr": partial(after_defenses, place="defenses/small", metric="asr"),
    "defenses-ba": partial(after_defenses, place="defenses/small", metric="ba"),
    "transformer-defenses-asr": partial(after_defenses, place="transformer-defenses/small", metric="asr"),
    "transformer-defenses-ba": partial(after_defenses, place="transformer-defenses/small", metric="ba"),
    "knowing": knowing,
    "tiles-asr": partial(tiles, metric="asr"),
    "tiles-ba": partial(tiles, metric="ba"),
    **{
        name: partial(defended_by, place=place, model=model, applicator=applicator, metric=metric)
        for name, (place, model, applicator, metric) in DEFENDED_BY.items()
    },
    **{name: partial(run_counts, place=place) for name, place in RUN_COUNTS.items()},
}
