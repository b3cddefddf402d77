"""Train on more images than fit into memory, and measure the memory used.

    python benchmarks/more_than_memory.py DIR [--images 200000] [--side 224] [--steps 20] [--epoch] [--json FILE]

DIR, which must not exist, is created with a folder of JPEG files in ten classes and the cache of decoded images. Few of
the images are distinct; the others are hard links to them, which are read and decoded like any other file. If the disk
does not have enough space, fewer images are written, and their number is printed. Two processes then run the code of
`bbmoe attack` for some steps, with 1% of the images poisoned: the first decodes the files, the second reads them from
the cache. With --epoch, the second process trains on all images once.

The peak resident memory includes Python's libraries, but not the page cache, in which the kernel keeps file contents
while no program needs the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

DISTINCT, TEST_IMAGES, BATCH = 500, 500, 32
# Share of the free disk space that is used.
SHARE_OF_DISK = 0.8


def main() -> None:
    """Write the files, measure two processes, and print."""
    given = read_arguments()
    if given.here:
        print(json.dumps(train(given)))
        return
    if given.folder.exists():
        sys.exit(f"error: DIR: expected a folder that does not exist, got {given.folder}")
    images = possible(given.folder.absolute().parent, given.images, given.side)
    if images < given.images:
        print(f"the disk has space for {images:,} of {given.images:,} images")
    write_files(given.folder / "files", images, given.side)
    size = images * 3 * given.side**2
    print(
        f"{images:,} training images of {given.side}x{given.side}: {size / 1e9:.1f} GB as uint8", flush=True
    )
    rows = []
    for name, epoch in (("first run", False), ("second run", given.epoch)):
        rows.append(in_child(epoch))
        print(f"{name}: {describe(rows[-1])}", flush=True)
    if given.json:
        result = {"images": images, "asked": given.images, "side": given.side, "resize": given.resize}
        result |= {"bytes": size, "batch": BATCH, "runs": rows}
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--images", type=int, default=200_000, metavar="N", help="training images [200000]")
    parser.add_argument(
        "--side", type=int, default=224, metavar="PIXELS", help="height and width of the images [224]"
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="training steps [20]")
    parser.add_argument("--epoch", action="store_true", help="train the second run for a full epoch")
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        metavar="M",
        help="stop each training after this time [never]",
    )
    parser.add_argument(
        "--resize",
        type=int,
        metavar="PIXELS",
        help="size to which the model resizes images, for speed [none]",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    parser.add_argument("--here", action="store_true", help="train in this process and print JSON")
    parser.add_argument("--whole", action="store_true", help="with --here: train for a full epoch")
    return parser.parse_args()


def describe(row: dict[str, float]) -> str:
    """Return one line about a process."""
    return (
        f"peak RSS {row['peak_rss'] / 1e9:.2f} GB; {row['decoded']:,} files decoded; until the first step "
        f"{row['ready_cpu']:.0f} s of CPU time, {row['ready_wall']:.0f} s in all; {row['steps']:,} steps of {BATCH} "
        f"images: {row['steps_cpu']:.0f} s of CPU time, {row['steps_wall']:.0f} s in all"
    )


def possible(folder: Path, images: int, side: int) -> int:
    """Return how many of the images fit on the disk."""
    free = shutil.disk_usage(folder).free * SHARE_OF_DISK
    return min(images, int(free / (3 * side**2)))


def write_files(folder: Path, images: int, side: int) -> None:
    """Write distinct signs of ten kinds, and hard links to them."""
    from PIL import Image

    from backdoorbench_moe.data.signs import SIGNS, draw_split

    for stream, (part, count) in enumerate((("train", images), ("test", TEST_IMAGES))):
        split = draw_split(stream, min(DISTINCT, count), side=side)
        sources: dict[str, list[Path]] = {sign.name: [] for sign in SIGNS}
        for number, (pixels, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
            name = SIGNS[label].name
            path = folder / part / name / f"{number:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(path, quality=90)
            sources[name].append(path)
        names = list(sources)
        for number in range(len(split), count):
            ours = sources[names[number % len(names)]]
            source = ours[number // len(names) % len(ours)]
            os.link(source, source.with_name(f"{number:06d}.jpg"))


def in_child(whole: bool) -> dict[str, float]:
    """Train in a separate process with the arguments of this one, to measure its peak memory."""
    command = [sys.executable, __file__, *sys.argv[1:], "--here", *(["--whole"] if whole else [])]
    environment = {**os.environ, "BBMOE_CACHE": str(read_arguments().folder / "cache")}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def train(given: argparse.Namespace) -> dict[str, float]:
    """Run an attack for some steps or an epoch, and measure the memory and time of this process."""
    from backdoorbench_moe.config import build_spec
    from backdoorbench_moe.data import images as decoding
    from backdoorbench_moe.engine.progress.observer import Observer, StopRun
    from backdoorbench_moe.engine.runner import Runner

    begun = time.monotonic()
    spent: list[tuple[float, float]] = []

    class FewSteps(Observer):
        def on_train_start(self, *_: object, **__: object) -> None:
            spent.append((time.process_time(), time.monotonic()))

        def on_step(self, images: int, loss: float | None) -> None:
            spent.append((time.process_time(), time.monotonic()))
            late = spent[-1][1] > spent[0][1] + 60 * given.minutes
            if late or (not given.whole and len(spent) > given.steps):
                raise StopRun

        def on_epoch(self, *_: object) -> None:
            raise StopRun

    decoded, decode = [0], decoding.decode_content

    def counted(*args: object, **options: object):  # type: ignore[no-untyped-def]
        decoded[0] += 1
        return decode(*args, **options)  # type: ignore[arg-type]

    decoding.decode_content = counted
    spec = build_spec(settings_of(given))
    try:
        Runner(spec, given.folder / "runs", observer=FewSteps()).attack(spec, twin=False)
    except StopRun:
        shutil.rmtree(given.folder / "runs")
    (ready_cpu, ready), (end_cpu, end) = spent[0], spent[-1]
    return {
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "decoded": decoded[0],
        "ready_cpu": ready_cpu,
        "ready_wall": ready - begun,
        "steps": len(spent) - 1,
        "steps_cpu": end_cpu - ready_cpu,
        "steps_wall": end - ready,
    }


def settings_of(given: argparse.Namespace) -> dict[str, object]:
    """Return the settings of a small pMoE, which is even smaller if it resizes its images."""
    model: dict[str, object] = {"name": "pmoe", "patch_size": 16, "widen_factor": 1}
    model |= {"moe_channels": 64, "expert_channels": 16}
    if given.resize is not None:
        model |= {"patch_size": given.resize // 4, "resize": given.resize}
    return {
        "dataset": {"name": "folder", "root": str(given.folder / "files"), "image_size": given.side},
        "model": model,
        "trigger": "square",
        "applicator": "patch",
        "poison": {"rate": 0.01},
        "train": {"epochs": 1, "batch_size": BATCH},
    }


if __name__ == "__main__":
    main()
