"""Train on more images than memory may hold, and say how much memory that takes.

    python benchmarks/more_than_memory.py DIR [--images 200000] [--side 224] [--steps 20] [--json FILE]

DIR, which must not be there yet, gets a folder of JPEG files in ten classes, and the cache of decoded images. Few of
the images are distinct: the others are hard links to them, which are read and decoded like any other file. Where the
disk does not have space for all images, fewer are written, and the output says how many. Two processes then run
`bbmoe attack`'s code for some steps, with 1% of the images poisoned: the first decodes the files, the second finds
them in the cache.
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
# Of the free space. Others need the disk, too.
SHARE_OF_DISK = 0.8


def main() -> None:
    """Write the files, measure two processes, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--images", type=int, default=200_000, metavar="N", help="for training [200000]")
    parser.add_argument("--side", type=int, default=224, metavar="PIXELS", help="of an image [224]")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of training [20]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file, too")
    parser.add_argument("--here", action="store_true", help="train in this process, as JSON")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(train(given.folder, given.side, given.steps)))
        return
    if given.folder.exists():
        sys.exit(f"error: DIR: expected a folder that is not there yet, got {given.folder}")
    images = possible(given.folder.absolute().parent, given.images, given.side)
    if images < given.images:
        print(f"the disk has space for {images:,} of {given.images:,} images")
    write_files(given.folder / "files", images, given.side)
    rows = [in_child(given) for _ in range(2)]
    size = images * 3 * given.side**2
    print(f"{images:,} training images of {given.side}x{given.side}: {size / 1e9:.1f} GB as uint8")
    for name, row in zip(("first run", "second run"), rows, strict=True):
        print(
            f"{name}: peak RSS {row['peak_rss'] / 1e9:.2f} GB; {row['ready_cpu']:.0f} s of CPU time until the "
            f"first step, {row['step_cpu']:.2f} s a step of {BATCH} images; {row['decoded']:,} files decoded"
        )
    if given.json:
        result = {"images": images, "asked": given.images, "side": given.side, "bytes": size, "runs": rows}
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def possible(folder: Path, images: int, side: int) -> int:
    """How many of the images the disk has space for."""
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


def in_child(given: argparse.Namespace) -> dict[str, float]:
    """Train in a process of its own, for its peak memory."""
    command = [sys.executable, __file__, str(given.folder), "--here", "--side", str(given.side)]
    command += ["--steps", str(given.steps)]
    environment = {**os.environ, "BBMOE_CACHE": str(given.folder / "cache")}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def train(folder: Path, side: int, steps: int) -> dict[str, float]:
    """Run an attack for some steps, and measure memory and time of this process."""
    from backdoorbench_moe.config import build_spec
    from backdoorbench_moe.data import images as decoding
    from backdoorbench_moe.engine.observer import Observer, StopRun
    from backdoorbench_moe.engine.runner import Runner

    spent: list[float] = []

    class FewSteps(Observer):
        def on_train_start(self, *_: object, **__: object) -> None:
            spent.append(time.process_time())

        def on_step(self, images: int, loss: float | None) -> None:
            spent.append(time.process_time())
            if len(spent) > steps:
                raise StopRun

    decoded, decode = [0], decoding.decode_content

    def counted(*args: object, **options: object):  # type: ignore[no-untyped-def]
        decoded[0] += 1
        return decode(*args, **options)  # type: ignore[arg-type]

    decoding.decode_content = counted
    model = {"name": "pmoe", "patch_size": 16, "widen_factor": 1, "moe_channels": 64, "expert_channels": 16}
    spec = build_spec(
        {
            "dataset": {"name": "folder", "root": str(folder / "files"), "image_size": side},
            "model": model,
            "trigger": "square",
            "applicator": "patch",
            "poison": {"rate": 0.01},
            "train": {"epochs": 1, "batch_size": BATCH},
        }
    )
    try:
        Runner(spec, folder / "runs", observer=FewSteps()).attack(spec, twin=False)
    except StopRun:
        shutil.rmtree(folder / "runs")
    return {
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "ready_cpu": spent[0],
        "step_cpu": (spent[-1] - spent[0]) / steps,
        "decoded": decoded[0],
    }


if __name__ == "__main__":
    main()
