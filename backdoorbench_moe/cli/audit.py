"""`bbmoe audit`: check a model for signs of a backdoor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.streams import echo
from backdoorbench_moe.cli.terminal.threads import CoreUsage, threads_option, use_threads
from backdoorbench_moe.durations import parse_budget
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.paths import check_output


@click.command("audit")
@click.argument("run", type=PATH, metavar="RUN")
@click.option(
    "--images", type=PATH, metavar="DIR",
    help="Folder of clean images; 100 are enough.  [the run's test images]",
)  # fmt: skip
@click.option("--no-images", is_flag=True, help="Run only the checks that need no images.")
@click.option(
    "--base", type=PATH, metavar="RUN2", help="Run of the base model that the experts were fine-tuned from."
)
@click.option(
    "--checks",
    metavar="NAME,..",
    help="Run only these checks; earlier results of other checks are kept.  [all]",
)
@click.option(
    "--calibration",
    type=PATH,
    metavar="FILE",
    help="Thresholds calibrated on your own models.  [the built-in ones]",
)
@click.option(
    "--budget",
    metavar="TIME",
    help="Time limit, such as 90s, 9m or 1h30m; skip checks that would exceed it.",
)
@click.option(
    "--output", type=PATH, metavar="DIR", help="Folder for audit.json and report.html.  [RUN/audit]"
)
@click.option("--fail-on-signs", is_flag=True, help="Exit with 1 if there are signs of a backdoor.")
@click.option("--data-root", metavar="DIR", help="Folder with the data set.  [that of RUN]")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.  [the run's]")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print audit.json, and nothing else.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.pass_context
def command(
    context: click.Context,
    *,
    run: Path,
    images: Path | None,
    no_images: bool,
    base: Path | None,
    checks: str | None,
    calibration: Path | None,
    budget: str | None,
    output: Path | None,
    fail_on_signs: bool,
    data_root: str | None,
    device: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check the model of the finished run in folder RUN for signs of a backdoor.

    The audit does not use the run's attack, trigger or poisoned images. The verdict is "signs of a backdoor", "no sign
    found" or "not tested", with the three strongest reasons. No audit can prove that a model is clean.

    The results of each check are saved in the output folder. An interrupted audit therefore resumes where it stopped,
    and the report includes the results of checks from earlier calls. An audit with other images or another base does
    not overwrite the first one; it is written to RUN/audit-ID.

    The estimated time is printed before the checks start; it depends on the model, the image size and the number of
    classes. With --budget, checks that would take too long are reported as not tested; a later call can run them.
    """
    usage = CoreUsage.now()
    seconds = None if budget is None else parse_budget(budget)
    if images is not None and no_images:
        raise ConfigError("--no-images: expected no --images with it")
    names = None if checks is None else [name.strip() for name in checks.split(",") if name.strip()]
    from backdoorbench_moe.auditing.calibration import load
    from backdoorbench_moe.auditing.checks import find_checks
    from backdoorbench_moe.auditing.document import as_document, to_text
    from backdoorbench_moe.auditing.opening import open_run_subject
    from backdoorbench_moe.auditing.place import FOLDER, audit_into
    from backdoorbench_moe.auditing.save import FILES
    from backdoorbench_moe.auditing.verdict import SIGNS
    from backdoorbench_moe.cli.tables.audit import print_audit
    from backdoorbench_moe.cli.terminal.progress import make_observer
    from backdoorbench_moe.engine.run import load_run

    chosen, known = find_checks(names), None if calibration is None else load(calibration)
    opened = load_run(run)
    folder = opened.folder.path
    use_threads(threads, usage, device or opened.spec.device)
    check_output(*((folder / FOLDER, "RUN") if output is None else (output, "--output")), FILES)
    given: dict[str, Any] = {"images": images, "base": base, "data_root": data_root, "device": device}
    audit, files = audit_into(
        open_run_subject(opened, with_images=not no_images, **given),
        output=output,
        parameter="--output",
        run=folder,
        observer=make_observer(quiet=quiet or as_json),
        name=folder.name,
        checks=chosen,
        calibration=known,
        budget=seconds,
    )
    if as_json:
        echo(to_text(as_document(audit)), nl=False)
    else:
        print_audit(audit, files)
    if fail_on_signs and audit.verdict.level == SIGNS:
        context.exit(1)
