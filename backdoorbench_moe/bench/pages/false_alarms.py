"""False alarms: what detectors flag in clean models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from backdoorbench_moe.bench.pages.found import Found
from backdoorbench_moe.bench.pages.leaderboard import Board, Setting, Value, setting_of
from backdoorbench_moe.bench.tables.statistic import interval_of
from backdoorbench_moe.ops.intervals import seeds_interval
from backdoorbench_moe.ops.metrics import mean_std, proportion
from backdoorbench_moe.records import Judged, Record

INPUT, SAMPLE, CLASS, EXPERT, MODEL = "input", "sample", "class", "expert", "model"
# What is judged, in the plural.
JUDGED = {
    INPUT: "inputs",
    SAMPLE: "training images",
    CLASS: "classes",
    EXPERT: "experts",
    MODEL: "models",
}


@dataclass(frozen=True)
class Alarms:
    """The false alarms of one judgement of a detector.

    Attributes:
        setting: Data, model and detector.
        suite: Label of the suite.
        about: What is judged, a key of `JUDGED`; "" if no run is finished.
        state: "finished", or why there is nothing to show.
        rate: Share of the judged items that are flagged, in percent; None without a finished run.
        judged: Number of items that each seed judges; for models, the number of seeds.
        alarmed: Number of seeds with a flagged class, expert or model; None for inputs and samples, a share of which
            is flagged by design.
        seeds: Number of finished runs.
        wanted: Number of runs of the cell.
        records: The record of each finished seed.
    """

    setting: Setting
    suite: str
    about: str
    state: str
    rate: Value | None
    judged: int
    alarmed: int | None
    seeds: int
    wanted: int
    records: Mapping[int, Found]


def false_alarms(board: Board) -> list[Alarms]:
    """Return the rows of all defended cells without an attack, one for each kind of judgement.

    Judgements about experts without a threshold are left out: a defense that chooses an expert always flags one.
    """
    found = []
    for results, cell in board.cells():
        if cell.spec.attacked or not cell.spec.defenses:
            continue
        records = board.records(results, cell)
        missing = Alarms(
            setting=setting_of(cell.spec),
            suite=results.suite.label,
            about="",
            state=results.state(cell),
            rate=None,
            judged=0,
            alarmed=None,
            seeds=len(records),
            wanted=results.suite.repeats,
            records=records,
        )
        abouts = dict.fromkeys(
            judged["about"] for each in records.values() for judged in _counted(each.record)
        )
        if not records:
            found.append(missing)
        found += [_measured(missing, about) for about in abouts]
    return found


def _measured(missing: Alarms, about: str) -> Alarms:
    """Return the row of one judgement of finished runs."""
    records = [each.record for each in missing.records.values()]
    counts = [count for record in records if (count := _flagged(about, record)) is not None]
    alarmed = sum(hits > 0 for hits, _ in counts) if about in (CLASS, EXPERT, MODEL) else None
    if about == MODEL:
        counts = [(sum(hits for hits, _ in counts), len(counts))]
    each = [asdict(proportion(hits, of)) for hits, of in counts]
    values = [row["value"] for row in each]
    judged = min(of for _, of in counts)
    rate = Value(mean_std(values)[0], interval_of(each, seeds_interval(values, judged)))
    return replace(missing, about=about, rate=rate, judged=judged, alarmed=alarmed)


def _counted(record: Record) -> list[Judged]:
    """Return the judgements whose alarms are counted; see `false_alarms`."""
    return [
        judged
        for judged in record.judgements
        if judged["about"] != EXPERT or (judged["threshold"] is not None and judged["scores"])
    ]


def _flagged(about: str, record: Record) -> tuple[int, int] | None:
    """Return how many items a judgement flags and how many it judges; None if the record does not have it."""
    found = [each for each in _counted(record) if each["about"] == about]
    if not found:
        return None
    if about == INPUT:
        rejected = record.metrics["fpr"]
        return round(rejected["value"] * rejected["n"] / 100), int(rejected["n"])
    if about == SAMPLE:
        # For samples, a record only has the number, and there is one judgement.
        return _number(found[0]["suspicious"]), int(record.data["train_images"])
    names = {name for each in found if not isinstance(each["suspicious"], int) for name in each["suspicious"]}
    if about == MODEL:
        return min(len(names), 1), 1
    experts = {name for each in found for name in each["scores"] or ()}
    return len(names), len(experts if about == EXPERT else record.data["classes"])


def _number(suspicious: list[str] | int) -> int:
    return suspicious if isinstance(suspicious, int) else len(suspicious)
