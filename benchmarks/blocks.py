"""Tables in the text of pages, drawn from committed records; `redraw.py` inserts them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import compress
from pathlib import Path

from audit_population import read_scores
from rich.console import Console
from small_tables import NAMES, RESULTS, crossed, markdown, results_of, small_table, whole_table, whole_text

from backdoorbench_moe.auditing.calibration import packaged
from backdoorbench_moe.auditing.population import error_cell, measure, set_thresholds, table, working
from backdoorbench_moe.bench.pages.claims import claims_tables, judge_all, read_claims
from backdoorbench_moe.bench.suites.paper import PaperTable
from backdoorbench_moe.bench.suites.suite import METRIC_COLUMNS, Cell, Layout, value_of
from backdoorbench_moe.bench.tables.layout import Place, build_sheet, label
from backdoorbench_moe.bench.tables.statistic import Statistic
from backdoorbench_moe.bench.tables.wording import key_name, number
from backdoorbench_moe.cli.show import read_shown
from backdoorbench_moe.cli.tables.runs import metrics_table
from backdoorbench_moe.cli.tables.show import markdown_table
from backdoorbench_moe.cli.tables.show_columns import choose_columns
from backdoorbench_moe.records import RunFolder

CLAIMS = Path("benchmarks") / "claims.yaml"
# ASR of a clean model, in percent, above which it is shown in the findings.
FOLLOWED = 20.0


def table1(root: Path) -> str:
    """Draw the ASR of Table 1, with the paper's in columns of its own, without rows that have no finished run."""
    folder = root / RESULTS / "badpatches-table1" / "small"
    sheet = build_sheet(results_of(root, folder))
    [table] = [table for table in sheet.tables if table.metric == "asr"]
    names = [*map(key_name, table.row_keys)]
    for column in table.columns:
        names += [column, "paper"]
    rows = []
    for labels, places in zip(table.rows, table.places, strict=True):
        if any(place.statistic for place in places):
            pairs = [(whole_text(place.statistic, 1), paper_text(place)) for place in places]
            rows.append([*labels, *(text for pair in pairs for text in pair)])
    return small_table(names, rows)


def paper_text(place: Place) -> str:
    """Format the published value of a place of a table."""
    return "–" if place.paper is None else number(place.paper)


GATE = {"gate.name": "top-k", "gate.balance": 0.01, "gate.noise": 1.0}
SQUARE = {"trigger.name": "square"}
# Attacks of `attack-groups` by their trigger.
GROUPS = {"warp": "WaNet, noise", "bpp": "BPP, noise", "square": "TaCT", "frequency": "CTRL"}
NOISE = {"none": "no noise images", "10%": "10% noise images"}
ALIGNED = {
    "none": "nothing",
    "align, scope=gates": "gates",
    "align, scope=gates+experts": "gates and experts",
}
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
BY_APPLICATOR = Layout("", ("trigger.name",), "applicator.name", no_trigger=False)


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


def after_defenses(root: Path, place: str, metric: str) -> str:
    """Draw a metric after every defense, for each model, on the image and in every patch."""
    return crossed(
        root, place, "defenses", lambda cell: label("defenses", value_of(cell.spec, "defenses")), metric
    )


def small_recipe(root: Path) -> str:
    """Draw what each recipe reaches with 10,000 images and 10 epochs."""
    keys = tuple(f"train.{key}" for key in ("optimizer", "lr", "momentum", "schedule"))
    layout = Layout("", keys, METRIC_COLUMNS, ("ba", "asr", "cad"), no_trigger=False)
    return whole_table(root, "small-recipe/small", layout)


def gtsrb(root: Path) -> str:
    """Draw the ASR of the square on GTSRB."""
    layout = replace(BY_APPLICATOR, rows=("poison.rate",), where=SQUARE)
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
    layout = Layout("", ("model.name", "defenses"), "poison.noise", no_trigger=False, where=SQUARE)
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


def poisoned_expert(root: Path) -> str:
    """Draw the effect of one poisoned expert of four on a mixture with the default gate."""
    layout = Layout(
        "", ("attack.name",), METRIC_COLUMNS, ("asr", "twin_asr", "overall"), no_trigger=False, where=GATE
    )
    return whole_table(root, "moevil-gates/signs", layout)


def claims(root: Path) -> str:
    """Draw the claims of the papers, the verdicts on them, and the commands for their numbers."""
    verdicts = list(judge_all(read_claims(root / CLAIMS), root / RESULTS))
    return claims_tables(verdicts, RESULTS)


def moevil(root: Path) -> str:
    """Draw the effect of attacks on an expert on a mixture with the default gate."""
    metrics = ("alone_asr", "asr", "twin_asr", "overall", "harm_share", "own_share")
    return default_gate(root, "signs", metrics)


def texts(root: Path) -> str:
    """Draw the effect of attacks on an expert on a mixture of language models with the default gate."""
    return default_gate(root, "tasks", ("alone_asr", "asr", "unsafe", "twin_unsafe", "overall", "harm_share"))


def texts_poisoned(root: Path) -> str:
    """Draw the ASR over the number of poisoned experts: for texts, for images, and the paper's."""
    layout = Layout("", ("mixture.poisoned", "defenses"), METRIC_COLUMNS, ("asr",), no_trigger=False)
    text, images = (harm(root, f"moevil-poisoned/{scale}", layout) for scale in ("tasks", "signs"))
    return small_table(
        ["poisoned", "aligned", "texts", "images", "paper: Llama"],
        [
            [
                poisoned,
                ALIGNED.get(defense, defense),
                whole_text(ours),
                whole_text(images[poisoned, defense][0]),
                paper,
            ]
            for (poisoned, defense), (ours, paper) in text.items()
        ],
    )


def texts_tokens(root: Path) -> str:
    """Draw the ASR over the tokens whose latents are aligned: for texts, and the paper's."""
    layout = Layout("", ("attack.tokens", "attack.k"), METRIC_COLUMNS, ("asr",), no_trigger=False)
    found = harm(root, "moevil-answer-tokens/tasks", layout)
    rows = [[*labels, whole_text(ours), paper] for labels, (ours, paper) in found.items()]
    return small_table(["tokens", "k", "texts", "paper: Llama"], rows)


def harm(root: Path, place: str, layout: Layout) -> dict[tuple[str, ...], tuple[Statistic | None, str]]:
    """Return the ASR of each row of a suite on mixtures, and the paper's as text."""
    folder = root / RESULTS / place
    results = results_of(root, folder)
    [table] = build_sheet(replace(results, suite=replace(results.suite, tables=(layout,)))).tables
    return {
        tuple(labels): (ours.statistic, "–" if paper.shape is None else number(paper.shape, 0))
        for labels, (ours, paper) in zip(table.rows, table.places, strict=True)
    }


def default_gate(root: Path, scale: str, metrics: tuple[str, ...]) -> str:
    """Draw metrics of attacks on an expert for mixtures with the default gate."""
    folder = root / RESULTS / "moevil-gates" / scale
    layout = Layout("", ("attack.name",), METRIC_COLUMNS, metrics, no_trigger=False, where=GATE)
    results = results_of(root, folder)
    measured = replace(results, suite=replace(results.suite, tables=(layout,)), paper=PaperTable())
    [table] = build_sheet(measured).tables
    rows = zip(table.rows, table.places, strict=True)
    lines = [[*labels, *(whole_text(place.statistic, 1) for place in places)] for labels, places in rows]
    return markdown([["attack", *table.columns], ["---", *["--:"] * len(metrics)], *lines])


def first_look(root: Path) -> str:
    """Draw the runs of the first look as `bbmoe show --markdown` does."""
    folders = sorted(file.parent for file in (root / RESULTS / "first-look").glob("*/record.json"))
    runs = [read_shown(folder) for folder in folders]
    return markdown_table(choose_columns(None, runs, intervals=True), runs) + "\n"


def audit(root: Path) -> str:
    """Draw how well the checks of an audit separate the population on which they are calibrated."""
    return _audited(merged=False)


def audit_merged(root: Path) -> str:
    """Draw the same for mixtures of merged experts."""
    return _audited(merged=True)


def _audited(*, merged: bool) -> str:
    calibration = packaged(merged=merged)
    assert calibration is not None
    return table(calibration.document)


def audit_transfer(root: Path) -> str:
    """Draw the errors of thresholds from the models of one data set, on the models of each data set."""
    scores = read_scores(root / RESULTS / "audit" / "scores.csv")
    members = working([each for each in scores if each.model != "merged"])
    names = sorted({each.dataset for each in members}, reverse=True)
    lines = [
        "| thresholds from | measured on | clean models | false alarms | attacked models | detected | AUROC |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for source in (*([name] for name in names), names):
        thresholds = set_thresholds([each for each in members if each.dataset in source])
        for name in names:
            others = [each for each in members if each.dataset == name]
            if name in source:
                others = [each for each in others if not each.calibrates]
            cells = _errors(measure(others, thresholds)["verdict"])
            lines.append(f"| {' and '.join(source)} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _errors(verdict: dict[str, dict[str, float] | None]) -> list[str]:
    """Return the cells of a verdict's errors."""
    cells = []
    for key in ("false_alarms", "detected"):
        found = verdict[key]
        cells += ["0" if found is None else f"{found['n']:.0f}", error_cell(found)]
    return [*cells, error_cell(verdict["auroc"])]


def demo(root: Path) -> str:
    """Draw what `make demo` prints at the end, from the record of such a run."""
    [folder] = (root / RESULTS / "demo").glob("*-warp-patch-*")
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(metrics_table(RunFolder(folder).read()))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    shown = "".join(f"{line.rstrip()}\n" for line in lines)
    return f"```\n{shown}run folder: runs/{folder.name}\n```\n"


BLOCKS: dict[str, Callable[[Path], str]] = {
    "table1": table1,
    "moevil": moevil,
    "texts": texts,
    "texts-poisoned": texts_poisoned,
    "texts-tokens": texts_tokens,
    "stamping": partial(stamping, scale="small"),
    "stamping-medium": partial(stamping, scale="medium"),
    "attacks": partial(attacks, scale="quick"),
    "twins": twins,
    "attack-groups": partial(attack_groups, scale="quick"),
    "attack-groups-small": partial(attack_groups, scale="small"),
    "attacks-small": partial(attacks, scale="small"),
    "small-recipe": small_recipe,
    "gtsrb": gtsrb,
    "dense": dense,
    "transformers": transformers,
    "fine-pruning": fine_pruning,
    "defended": defended,
    "defenses-asr": partial(after_defenses, place="defenses/small", metric="asr"),
    "defenses-ba": partial(after_defenses, place="defenses/small", metric="ba"),
    "transformer-defenses-asr": partial(after_defenses, place="transformer-defenses/small", metric="asr"),
    "transformer-defenses-ba": partial(after_defenses, place="transformer-defenses/small", metric="ba"),
    "defended-pmoe-patch": partial(
        defended_by, place="standard-defenses/quick", model="pmoe", applicator="patch"
    ),
    "defended-pmoe-image": partial(
        defended_by, place="standard-defenses/quick", model="pmoe", applicator="image"
    ),
    "defended-dense-patch": partial(
        defended_by, place="standard-defenses/quick", model="wide_resnet", applicator="patch"
    ),
    "defended-dense-image": partial(
        defended_by, place="standard-defenses/quick", model="wide_resnet", applicator="image"
    ),
    "cifar10-pmoe-patch": partial(
        defended_by, place="standard-defenses/small", model="pmoe", applicator="patch"
    ),
    "cifar10-pmoe-patch-ba": partial(
        defended_by, place="standard-defenses/small", model="pmoe", applicator="patch", metric="ba"
    ),
    "cifar10-pmoe-image": partial(
        defended_by, place="standard-defenses/small", model="pmoe", applicator="image"
    ),
    "cifar10-dense-patch": partial(
        defended_by, place="standard-defenses/small", model="wide_resnet", applicator="patch"
    ),
    "cifar10-dense-image": partial(
        defended_by, place="standard-defenses/small", model="wide_resnet", applicator="image"
    ),
    "defended-vmoe": partial(defended_by, place="standard-vmoe/quick", model="vmoe", applicator="patch"),
    "cifar10-vmoe-patch": partial(defended_by, place="standard-vmoe/small", model="vmoe", applicator="patch"),
    "cifar10-vmoe-patch-ba": partial(
        defended_by, place="standard-vmoe/small", model="vmoe", applicator="patch", metric="ba"
    ),
    "cifar10-vmoe-patch-auroc": partial(
        defended_by, place="standard-vmoe/small", model="vmoe", applicator="patch", metric="auroc"
    ),
    "defended-vmoe-auroc": partial(
        defended_by, place="standard-vmoe/quick", model="vmoe", applicator="patch", metric="auroc"
    ),
    "cifar10-vmoe-image": partial(defended_by, place="standard-vmoe/small", model="vmoe", applicator="image"),
    "expert-forms": partial(defended_by, place="expert-forms/small", model="pmoe", applicator="patch"),
    "expert-forms-ba": partial(
        defended_by, place="expert-forms/small", model="pmoe", applicator="patch", metric="ba"
    ),
    "runs-small": partial(run_counts, place="standard-defenses/small"),
    "runs-quick": partial(run_counts, place="standard-defenses/quick"),
    "runs-vmoe-small": partial(run_counts, place="standard-vmoe/small"),
    "runs-vmoe-quick": partial(run_counts, place="standard-vmoe/quick"),
    "knowing": knowing,
    "tiles-asr": partial(tiles, metric="asr"),
    "tiles-ba": partial(tiles, metric="ba"),
    "removal": removal,
    "poisoned-expert": poisoned_expert,
    "claims": claims,
    "first-look": first_look,
    "audit": audit,
    "audit-merged": audit_merged,
    "audit-transfer": audit_transfer,
    "demo": demo,
}
