"""What `make docs` makes from the package and from committed records: pictures, reports and tables of the site.

mkdocs calls `on_files` and `on_page_markdown`. A page says where a table goes with `<!-- made: NAME -->`. Files that
are made, or copied from benchmarks/, are below `made/` on the site.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import entry_points
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from backdoorbench_moe.analysis.document import load_document
from backdoorbench_moe.analysis.report import draw_report
from backdoorbench_moe.bench.pages.claims import claims_tables, judge_all, read_claims
from backdoorbench_moe.bench.tables.render import plain
from backdoorbench_moe.bench.tables.results import MANIFEST, RECORDS, read_manifest
from backdoorbench_moe.config import build_spec, normalise
from backdoorbench_moe.data import create_dataset
from backdoorbench_moe.engine.build import build_stamper
from backdoorbench_moe.engine.poisoning.learned import learned_trigger
from backdoorbench_moe.engine.poisoning.poison import stamp_images
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.triggers import list_triggers

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from torch import Tensor

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
MADE = "made"
# To a file below benchmarks/, from a page or from one in a folder of pages ("up").
LINK = re.compile(r"\]\(\.\./\.\./(?P<up>\.\./)?benchmarks/(?P<name>[^)#]+)(?=\))")
APPLICATORS = {"image": "on the image", "patch": "in every patch"}
# A square of 4x4 pixels would cover all of a 4x4 tile.
OPTIONS = {("square", "patch"): {"size": 2}}
# Sides in pixels: of the model's patches, and of a pixel in the pictures.
PATCH, ENLARGED = 4, 4


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that are made."""
    from mkdocs.structure.files import File

    for name, content in made_files():
        files.append(File.generated(config, f"{MADE}/{name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables into a page, and let its links into benchmarks/ lead to the site's reports and copies."""
    text = re.sub(r"<!-- made: ([\w-]+) -->", lambda match: TABLES[match[1]](), markdown)
    return LINK.sub(lambda match: f"]({match['up'] or ''}{MADE}/{copy_of(match['name'])}", text)


def copy_of(name: str) -> str:
    """Name the file below `made/` for one below benchmarks/: the tables of a suite are in its report."""
    file = BENCHMARKS / name
    is_table = file.name == "table.md" and (file.parent / MANIFEST).exists()
    return f"reports/{label(file.parent)}/index.html" if is_table else name


def made_files() -> Iterator[tuple[str, bytes]]:
    """Yield the files below `made/`: pictures of triggers, the reports of suites and of an analysis, and copies."""
    yield "triggers/clean.png", png(clean_image())
    for (trigger, applicator), image in pictures().items():
        yield f"triggers/{trigger}-{applicator}.png", png(image)
    for folder in results_folders():
        for name in ("index.html", RECORDS):
            yield f"reports/{label(folder)}/{name}", (folder / name).read_bytes()
    yield "analysis.html", draw_report(load_document(RESULTS / "report" / "analysis.json")).page.encode()
    for page in sorted((ROOT / "docs" / "pages").rglob("*.md")):
        for _, name in LINK.findall(page.read_text(encoding="utf-8")):
            if copy_of(name) == name:
                yield name, (BENCHMARKS / name).read_bytes()


@cache
def clean_image() -> Tensor:
    """Return the image that is stamped, (1, 3, H, W) uint8."""
    return create_dataset("signs", train_images=10, test_images=20).load().test.images[:1]


@cache
def pictures() -> dict[tuple[str, str], Tensor]:
    """Stamp one image with every trigger of the package that is not learned, on the image and in every patch."""
    found = {}
    for trigger in shown_triggers():
        for applicator in APPLICATORS:
            part = {"name": trigger, **OPTIONS.get((trigger, applicator), {})}
            spec = build_spec(normalise({"trigger": part, "applicator": applicator}))
            try:
                stamper = build_stamper(spec, patch_size=PATCH, image_size=clean_image().shape[-1])
            except ConfigError:
                continue  # It needs files, or does not fit into a tile.
            if learned_trigger(stamper) is None:
                found[trigger, applicator] = stamp_images(clean_image(), stamper)
    return found


def shown_triggers() -> list[str]:
    """List the triggers that come with the package."""
    points = entry_points(group="backdoorbench_moe.triggers")
    own = {point.name for point in points if point.dist and point.dist.name == "backdoorbench-moe"}
    return [name for name in list_triggers() if name in own - {"stored"}]


def png(images: Tensor) -> bytes:
    """Enlarge the first of (N, 3, H, W) uint8 images without smoothing, and write it as a PNG file."""
    image = Image.fromarray(images[0].permute(1, 2, 0).contiguous().numpy())
    file = BytesIO()
    image.resize((ENLARGED * image.width, ENLARGED * image.height), Image.Resampling.NEAREST).save(
        file, "PNG"
    )
    return file.getvalue()


def results_folders() -> list[Path]:
    """List the results folders of suites."""
    return sorted(file.parent for file in RESULTS.rglob(MANIFEST))


def label(folder: Path) -> str:
    """Name a results folder by its suite and scale, such as "badpatches-table1-small"."""
    return "-".join(folder.relative_to(RESULTS).parts)


def gallery() -> str:
    """Draw the table of triggers and applicators."""
    lines = [f"| trigger | {' | '.join(APPLICATORS.values())} |", "| --- | --- | --- |"]
    for trigger in dict.fromkeys(name for name, _ in pictures()):
        cells = [
            f"![{trigger} {said}]({MADE}/triggers/{trigger}-{applicator}.png)"
            if (trigger, applicator) in pictures()
            else "–"
            for applicator, said in APPLICATORS.items()
        ]
        lines.append(f"| `{trigger}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def learned() -> str:
    """List the triggers that have no picture."""
    return ", ".join(
        f"`{name}`" for name in shown_triggers() if not any(name == each for each, _ in pictures())
    )


def suites() -> str:
    """Draw the table of results folders with links to their reports."""
    lines = ["| results | scale | runs |", "| --- | --- | --: |"]
    for folder in results_folders():
        manifest = read_manifest(folder)
        runs = len((folder / RECORDS).read_text(encoding="utf-8").splitlines())
        report = f"[{plain(manifest['title'])}]({MADE}/reports/{label(folder)}/index.html)"
        lines.append(f"| {report} | {manifest['scale'] or '–'} | {runs} |")
    return "\n".join(lines)


def claims() -> str:
    """Draw the claims of the papers from the records, below the text of benchmarks/claims.md."""
    text = (BENCHMARKS / "claims.md").read_text(encoding="utf-8").partition("\n")[2]
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    folders = Path("benchmarks") / "results"
    drawn = claims_tables(list(judge_all(read_claims(BENCHMARKS / "claims.yaml"), RESULTS)), folders)
    return re.sub(r"<!-- claims -->\n.*<!-- /claims -->", lambda _: drawn, text, flags=re.DOTALL)


TABLES: dict[str, Callable[[], str]] = {
    "gallery": gallery,
    "learned": learned,
    "suites": suites,
    "claims": claims,
}
