"""Tables of attacks on models that are trained whole: BadPatches and the standard attacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import compress
from pathlib import Path

from backdoorbench_moe.bench.suites.suite import METRIC_COLUMNS, Cell, Layout
from backdoorbench_moe.bench.tables.layout import Place, build_sheet
from backdoorbench_moe.bench.tables.wording import key_name, number

from .drawing import BY_APPLICATOR, RESULTS, crossed, results_of, small_table, whole_table, whole_text

# ASR of a clean model, in percent, above which it is shown in the findings.
FOLLOWED = 20.0
# Attacks of `attack-groups` by their trigger.
GROUPS = {"warp": "WaNet, noise", "bpp": "BPP, noise", "square": "TaCT", "frequency": "CTRL"}


def over_rates(root: Path, place: str) -> str:
    """Draw the ASR over the poisoning rate, with the paper's in columns of its own.

    Rows and triggers without a finished run are left out.
    """
    sheet = build_sheet(results_of(root, root / RESULTS / place))
    [table] = [table for table in sheet.tables if table.metric == "asr"]
    run = [any(row[column].statistic for row in table.places) for column in range(len(table.columns))]
    names = [*map(key_name, table.row_keys)]
    for column in compress(table.columns, run):
        names += [column, "paper"]
    rows = []
    for labels, places in zip(table.rows, table.places, strict=True):
        if any(place.statistic for place in places):
            pairs = [(whole_text(each.statistic, 1), paper_text(each)) for each in compress(places, run)]
            rows.append([*labels, *(text for pair in pairs for text in pair)])
    return small_table(names, rows)


def paper_text(place: Place) -> str:
    """Format the published value of a place of a table."""
    return "–" if place.paper is None else number(place.paper)


def stamping(root: Path, scale: str) -> str:
    """Draw the ASR of Table 1 at 0.5%, on the image and in every patch."""
    return whole_table(
        root, f"badpatches-table1/{scale}", replace(BY_APPLICATOR, where={"poison.rate": 0.005})
    )


def attacks(root: Path, scale: str, metric: str = "asr") -> str:
    """Draw a metric of every attack of `standard-attacks` for both models, on the image and in every patch."""

    def row(cell: Cell) -> str:
        spec = cell.spec
        assert spec.trigger is not None
        how = ", clean labels" if spec.poison.labels == "clean" else ", 1%" if spec.poison.cover else ""
        return f"{spec.trigger.name}{how}"

    return crossed(root, f"standard-attacks/{scale}", "trigger", row, metric)


def attack_groups(root: Path, scale: str) -> str:
    """Draw the ASR of the attacks of `attack-groups` for both models, on the image and in every patch."""

    def row(cell: Cell) -> str:
        assert cell.spec.trigger is not None
        return GROUPS[cell.spec.trigger.name]

    return crossed(root, f"attack-groups/{scale}", "attack", row, "asr")


def twins(root: Path) -> str:
    """Draw the ASR of the clean twins of `standard-attacks`, without triggers that none of them follows."""
    head, rule, *rows = attacks(root, "small", "twin_asr").splitlines(keepends=True)
    folder = root / RESULTS / "standard-attacks" / "small"
    results = results_of(root, folder)
    followed = set()
    for record in results.finished():
        rate = results.value(record.run_spec, "twin_asr")
        if rate is not None and rate > FOLLOWED and record.run_spec.trigger is not None:
            followed.add(record.run_spec.trigger.name)
    names = [row.split("|")[1].partition(",")[0].strip() for row in rows]
    return "".join((head, rule, *compress(rows, (name in followed for name in names))))


def small_recipe(root: Path) -> str:
    """Draw what each recipe reaches with 10,000 images and 10 epochs."""
    keys = tuple(f"train.{key}" for key in ("optimizer", "lr", "momentum", "schedule"))
    layout = Layout("", keys, METRIC_COLUMNS, ("ba", "asr", "cad"), no_trigger=False)
    return whole_table(root, "small-recipe/small", layout)


def gtsrb(root: Path) -> str:
    """Draw the ASR of the square on GTSRB."""
    layout = replace(BY_APPLICATOR, rows=("poison.rate",), where={"trigger.name": "square"})
    return whole_table(root, "badpatches-table2/small", layout)


def dense(root: Path) -> str:
    """Draw the ASR of the warp against dense models."""
    where = {"poison.rate": 0.02, "trigger.name": "warp"}
    return whole_table(
        root, "dense-baselines/small", replace(BY_APPLICATOR, rows=("model.name",), where=where)
    )


def transformers(root: Path) -> str:
    """Draw the ASR of the warp against transformers."""
    layout = replace(BY_APPLICATOR, rows=("model.name",), where={"trigger.name": "warp"})
    return whole_table(root, "transformers/small", layout)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "table1": partial(over_rates, place="badpatches-table1/small"),
    "table1-medium": partial(over_rates, place="badpatches-table1/medium"),
    "table2": partial(over_rates, place="badpatches-table2/small"),
    "table2-medium": partial(over_rates, place="badpatches-table2/medium"),
    "stamping": partial(stamping, scale="small"),
    "stamping-medium": partial(stamping, scale="medium"),
    "small-recipe": small_recipe,
    "gtsrb": gtsrb,
    "dense": dense,
    "transformers": transformers,
    "attacks": partial(attacks, scale="quick"),
    "attacks-small": partial(attacks, scale="small"),
    "attack-groups": partial(attack_groups, scale="quick"),
    "attack-groups-small": partial(attack_groups, scale="small"),
    "twins": twins,
}
