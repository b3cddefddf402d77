"""Audit a population of clean and attacked models, and calibrate the audit on it.

    bbmoe bench run audit --output runs/audit                # 40 attacked models, pmoe and wide_resnet
    bbmoe bench run audit-clean --output runs/audit          # 20 clean ones
    bbmoe bench run audit-merged --scale signs --output runs/audit         # 20 attacked mixtures
    bbmoe bench run audit-clean-merged --scale signs --output runs/audit   # 10 clean ones
    python benchmarks/audit_population.py runs/audit [MORE FOLDERS ...] --budget 3600

Audits every finished, undefended run in the folders that was trained from data or merged from experts; a mixture
together with its base, if the base's folder is next to it.
The results are written to `benchmarks/results/audit`: `audits/<run>/`, `scores.csv`, and separate calibrations and
tables for mixtures of merged experts (`calibration-merged.json`, `table-merged.md`) and for all other models
(`calibration.json`, `table.md`). Finished audits are skipped, so the script can be interrupted and repeated. With
--budget, it stops before the next model when the time is up, and exits with 3.

    python benchmarks/audit_population.py --scores benchmarks/results/audit/scores.csv --output DIR

recalibrates on existing scores without auditing. With folders as well, the audited models are added to these scores.

Thresholds are computed from the clean models with even seeds, the published errors from the models with odd seeds. To
use the thresholds, copy the calibrations to `backdoorbench_moe/auditing/`, or pass one to `bbmoe audit --calibration`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import torch

from backdoorbench_moe.auditing.audit import run_audit
from backdoorbench_moe.auditing.calibration import FILE, MERGED_FILE
from backdoorbench_moe.auditing.checks import CHECKS, find_checks
from backdoorbench_moe.auditing.document import to_text
from backdoorbench_moe.auditing.opening import open_run_subject, with_store
from backdoorbench_moe.auditing.population import Member, calibrate, scores_of, table
from backdoorbench_moe.engine.device import environment
from backdoorbench_moe.engine.graph import NodeKind, kind_of
from backdoorbench_moe.engine.run import Run, load_run
from backdoorbench_moe.errors import BbmoeError
from backdoorbench_moe.process.allocator import keep_freed_memory
from backdoorbench_moe.records import write_atomically

OUTPUT = Path(__file__).parent / "results" / "audit"
# The columns of scores.csv before the scores.
FACTS = ("run", "dataset", "model", "attack", "asr", "seed")


def find_runs(folders: Sequence[Path]) -> Iterator[Run]:
    """Yield the finished models in run folders, or in folders of run folders, sorted by name, each once."""
    paths = {record.parent.name: record.parent for folder in folders for record in _records(folder)}
    for name in sorted(paths):
        run = load_run(paths[name])
        kind = NodeKind.DEFENDED if run.spec.defenses else kind_of(run.spec)
        if (
            run.record.status == "finished"
            and kind in (NodeKind.TRAINED, NodeKind.MIXTURE)
            and not is_part(run)
        ):
            yield run


def is_part(run: Run) -> bool:
    """Whether the model is only part of others: a base with a policy, from which experts are tuned."""
    return run.spec.mixture is None and bool(run.spec.policy)


def _records(folder: Path) -> list[Path]:
    own = folder / "record.json"
    return [own] if own.is_file() else sorted(folder.glob("*/record.json"))


def member_of(run: Run, scores: dict[str, float]) -> Member:
    """Return the member of the population for a run."""
    spec, attack, asr = run.spec, "", None
    if spec.attacked:
        parts = [spec.attack, spec.trigger, spec.applicator]
        names = [part.name for part in parts if part is not None and part.name != "data-poisoning"]
        attack, asr = " ".join(names), run.record.metrics.get("asr", {}).get("value")
    model = "merged" if kind_of(spec) is NodeKind.MIXTURE else spec.model.name
    return Member(run.folder.path.name, spec.dataset.name, model, attack, asr, spec.seed, scores)


def base_of(run: Run) -> Run | None:
    """Return the run from which a mixture's experts were tuned, if its folder is next to it; None for other models."""
    names = [each["run"] for each in run.record.inputs if each["role"] == "base"]
    folders = [run.folder.path.resolve().parent / name for name in names]
    return next((load_run(folder) for folder in folders if (folder / "record.json").is_file()), None)


def audit(run: Run, folder: Path, names: Sequence[str] | None, device: str | None) -> dict[str, float]:
    """Audit a run and return its scores; a finished audit is loaded."""
    subject, store = with_store(open_run_subject(run, base=base_of(run), device=device), folder)
    found = run_audit(
        subject, name=run.folder.path.name, store=store, checks=find_checks(names), calibrated=False
    )
    found.save(folder)
    return scores_of(json.loads((folder / "audit.json").read_text(encoding="utf-8")))


def save_scores(members: Sequence[Member], file: Path) -> None:
    """Write one row per model, with a column for each check."""
    keys = sorted({key for member in members for key in member.scores})
    rows = [[*FACTS, *keys]]
    for each in members:
        scores = [f"{each.scores[key]:.6g}" if key in each.scores else "" for key in keys]
        asr = "" if each.asr is None else f"{each.asr:.2f}"
        rows.append([each.name, each.dataset, each.model, each.attack, asr, str(each.seed), *scores])

    def put(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as out:
            csv.writer(out, lineterminator="\n").writerows(rows)

    write_atomically(file, put)


def read_scores(file: Path) -> list[Member]:
    """Read a file written by `save_scores`."""
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    return [
        Member(
            row["run"],
            row["dataset"],
            row["model"],
            row["attack"],
            float(row["asr"]) if row["asr"] else None,
            int(row["seed"]),
            {key: float(value) for key, value in row.items() if key not in FACTS and value},
        )
        for row in rows
    ]


def main() -> int:
    """Audit, calibrate and write. The exit code is 1 if an audit failed, and 3 if the budget was used up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="folders of run folders")
    parser.add_argument("--scores", type=Path, help="a scores.csv of models audited earlier")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--checks", help=f"names of checks, from {','.join(check.name for check in CHECKS)}")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if not options.folders and options.scores is None:
        parser.error("expected folders of run folders, or --scores")
    options.output.mkdir(parents=True, exist_ok=True)
    earlier = [] if options.scores is None else read_scores(options.scores)
    if not options.folders:
        return write_calibration(earlier, options.output)
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    names = options.checks.split(",") if options.checks else None
    started, code, members = time.monotonic(), 0, []
    for run in find_runs(options.folders):
        name = run.folder.path.name
        if time.monotonic() - started > options.budget:
            print("the budget is used up; repeat the command to continue", flush=True)
            return 3
        try:
            members.append(
                member_of(run, audit(run, options.output / "audits" / name, names, options.device))
            )
        except BbmoeError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            code = 1
            continue
        print(f"{len(members)}: {name}, after {time.monotonic() - started:.0f} s", flush=True)
    audited = {each.name for each in members}
    members = [*(each for each in earlier if each.name not in audited), *members]
    save_scores(members, options.output / "scores.csv")
    return write_calibration(members, options.output) or code


def write_calibration(members: Sequence[Member], output: Path) -> int:
    """Calibrate on mixtures and on all other models, and write and print the tables.

    Returns:
        1 if a population is too small, otherwise 0, even if there are no members of one kind.
    """
    commit, code = environment(torch.device("cpu"), "fp32")["git_commit"], 0
    for part in (FILE, MERGED_FILE):
        kind = [each for each in members if (each.model == "merged") == (part == MERGED_FILE)]
        if not kind:
            continue
        try:
            document = calibrate(kind, commit=commit, date=date.today().isoformat())
        except ValueError as error:
            print(f"{error}; {part} was not written", file=sys.stderr)
            code = 1
            continue
        texts = {
            part: to_text(document),
            part.replace("calibration", "table").replace(".json", ".md"): table(document),
        }
        for file, text in texts.items():
            write_atomically(output / file, lambda path, text=text: path.write_text(text, encoding="utf-8"))
        print(table(document))
    return code


if __name__ == "__main__":
    sys.exit(main())
