"""`bbmoe analyze`: analyse how a run's model routes, and which experts carry the backdoor."""

from __future__ import annotations

from pathlib import Path

import click

from backdoorbench_moe.cli.params import PATH
from backdoorbench_moe.cli.terminal.streams import echo
from backdoorbench_moe.cli.terminal.threads import CoreUsage, threads_option, use_threads
from backdoorbench_moe.errors import ConfigError, naming
from backdoorbench_moe.paths import expand


@click.command("analyze")
@click.argument("run", type=PATH, metavar="RUN")
@click.option("--against", type=PATH, metavar="RUN2", help="Run to compare with.  [the clean twin]")
@click.option(
    "--images", metavar="N|FILE,..",
    help="Images to draw patch maps of: numbers of test images, or image files.  [one from each of six classes]",
)  # fmt: skip
@click.option(
    "--carriers-images", type=int, default=2000, show_default=True, metavar="N",
    help="Number of images or texts, at most, on which muted and patched experts are evaluated.",
)  # fmt: skip
@click.option(
    "--output", type=PATH, metavar="DIR", help="Folder for analysis.json, report.html and figures/.  [RUN]"
)
@click.option("--data-root", metavar="DIR", help="Folder with the data set.  [that of RUN]")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.  [the run's]")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print analysis.json, and nothing else.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    *,
    run: Path,
    against: Path | None,
    images: str | None,
    carriers_images: int,
    output: Path | None,
    data_root: str | None,
    device: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Analyse the model of the finished run in folder RUN on the test set.

    The analysis shows which patches are routed to which expert, whether experts receive the patches that the trigger
    changed, how the trigger changes the routing, whether experts prefer bright patches, and which experts carry the
    backdoor. For a run with --probe, it also shows how the routing changed during training. For a dense model, it omits
    the parts about routing. For a run on texts, it shows the gate shares, the latents, which experts answer harmful
    queries, and example answers.

    The results are written to analysis.json, figures/*.png, and report.html, a self-contained page.
    """
    usage = CoreUsage.now()
    chosen = None if images is None else _images(images)
    from backdoorbench_moe.analysis.analyze import analyze_run
    from backdoorbench_moe.analysis.document import as_document, to_text
    from backdoorbench_moe.analysis.save import check_output, save_analysis
    from backdoorbench_moe.cli.tables.analysis import print_analysis
    from backdoorbench_moe.cli.terminal.progress import make_observer
    from backdoorbench_moe.engine.run import load_run

    opened, other = load_run(run), None
    if against is not None:
        with naming("--against"):
            other = load_run(against)
    use_threads(threads, usage, device or opened.spec.device)
    place = opened.folder.path if output is None else output
    check_output(place)
    analysis = analyze_run(
        opened,
        against=other,
        images=chosen,
        carriers_images=carriers_images,
        data_root=data_root,
        device=device,
        observer=make_observer(quiet=quiet or as_json),
    )
    files = save_analysis(analysis, place)
    if as_json:
        echo(to_text(as_document(analysis)), nl=False)
    else:
        print_analysis(analysis, files)


def _images(text: str) -> list[int | Path]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError.expected("--images", "numbers of test images such as 3,17, or files", text)
    return [int(part) if part.removeprefix("-").isdecimal() else expand(part) for part in parts]
