"""Preview of a trigger: clean and triggered images, their amplified difference, and the tiles each expert selects."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import ImageSet, Split, as_images
from backdoorbench_moe.engine.build import (
    Stamper,
    build_dataset,
    build_model,
    build_stamper,
    describe,
)
from backdoorbench_moe.engine.inference import as_input
from backdoorbench_moe.engine.names import check_names
from backdoorbench_moe.engine.opening.opened_run import load_run_images
from backdoorbench_moe.engine.poisoning.learned import learned_trigger
from backdoorbench_moe.engine.poisoning.poison import stamp_images
from backdoorbench_moe.engine.run import Run, check_finished
from backdoorbench_moe.engine.setups.tasks import Tasks
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.moe.structure import patch_size_of
from backdoorbench_moe.ops.images import draw_images
from backdoorbench_moe.ops.quality import psnr, ssim
from backdoorbench_moe.ops.seeding import seeded
from backdoorbench_moe.records import write_atomically

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

SPLITS = ("train", "test")
MAX_IMAGES = 100
# Factor of the brightness of tiles that an expert did not select.
DIMMED = 0.15

# In pixels: the approximate side of a drawn image (a multiple of its own side), gap and margins.
CELL, GAP, LEFT, RIGHT, TOP, BOTTOM = 160, 8, 132, 92, 84, 12
# A power of two, so that converting pixels to inches and back is exact.
DPI = 128
GREY = "0.35"


@dataclass(frozen=True)
class Preview:
    """N images of a split, without and with a trigger.

    Attributes:
        title: Title of the drawing.
        indices: (N,) int64, indices in the split.
        labels: The N class names.
        clean: (N, 3, S, S) uint8.
        triggered: (N, 3, S, S) uint8, rounded as in an image file.
        psnr: (N,) PSNR in dB; infinite for an image that the trigger did not change.
        ssim: (N,) SSIM, at most 1.
        selected: (N, E, rows, columns) bool, the tiles of the triggered image that each expert of the last routed
            layer selects; None without a trained routed model.
        tasks: For a mixture or one of its experts, the images as transformed for each task, (N, 3, S, S) uint8 by name
            of the task; an image that does not belong to the task is dimmed.
    """

    title: str
    indices: Tensor
    labels: tuple[str, ...]
    clean: Tensor
    triggered: Tensor
    psnr: Tensor
    ssim: Tensor
    selected: Tensor | None = None
    tasks: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def mean_psnr(self) -> float:
        """Mean PSNR in dB over the images that the trigger changed; infinite if it changed none."""
        changed = self.psnr[self.psnr.isfinite()]
        return changed.mean().item() if len(changed) else math.inf

    @property
    def mean_ssim(self) -> float:
        """Mean SSIM over all images."""
        return self.ssim.mean().item()


def preview_spec(spec: RunSpec, *, images: int = 6, split: str = "test") -> Preview:
    """Apply the trigger of a spec to some images. No model is trained.

    Args:
        spec: The spec.
        images: Number of images, 1 to MAX_IMAGES, drawn class by class with the spec's seed.
        split: "train" or "test".

    Raises:
        ConfigError: The spec has no trigger or a learned one, or the split has fewer images.
        UnknownNameError: The split or a part of the spec does not exist.
    """
    _check_choice(images, split)
    check_names(spec)
    data = as_images(build_dataset(spec).load())
    model = build_model(spec, data.model_options)
    size = patch_size_of(model)
    stamper = build_stamper(spec, patch_size=size, image_size=data.image_size)
    if learned_trigger(stamper) is not None:
        assert spec.trigger is not None
        raise ConfigError(
            f"trigger: {spec.trigger.name!r} is learned while a run is made; give the run with --run"
        )
    return _stamp(spec, data, stamper, images, split)


def preview_run(run: Run, *, images: int = 6, split: str = "test", data_root: str | None = None) -> Preview:
    """Apply the trigger of a finished run to some images, and route them if the model is routed.

    Args:
        run: The run.
        images: Number of images, 1 to MAX_IMAGES, drawn class by class with the run's seed.
        split: "train" or "test".
        data_root: Folder of the data, if it was moved after the run.

    Raises:
        RecordError: The run is not finished.
        DataError: The data are not those of the run.
        ConfigError: The run has no trigger, or the split has fewer images.
        UnknownNameError: The split does not exist.
    """
    _check_choice(images, split)
    check_finished(run)
    stamper, model = run.stamper(), run.model()
    data = load_run_images(run, data_root)
    preview = _stamp(run.spec, data, stamper, images, split)
    if not isinstance(model, RoutedModel):
        return preview
    # A model may draw random numbers.
    with torch.inference_mode(), seeded(run.spec.seed, "preview"):
        selected = model.forward_routed(as_input(preview.triggered)).routing[-1].selected
    return replace(preview, selected=selected.unflatten(-1, model.patch_grid))


def check_output(output: Path, amplify: float) -> None:
    """Check the options of `save_preview`.

    Raises:
        ConfigError: The name of the file does not end in .png, or `amplify` is not a number above 0.
    """
    if output.suffix.lower() != ".png":
        raise ConfigError.expected("output", "a file name that ends in .png", str(output))
    if not (math.isfinite(amplify) and amplify > 0):
        raise ConfigError.expected("amplify", "a number above 0", amplify)


def save_preview(preview: Preview, output: Path, *, amplify: float = 5.0) -> None:
    """Draw a preview and write it atomically as a PNG file; an existing file is replaced.

    Args:
        preview: The preview.
        output: Path of the file.
        amplify: Factor by which the absolute difference is multiplied, above 0.

    Raises:
        ConfigError: The name of the file does not end in .png, or `amplify` is not a number above 0.
        RecordError: The file cannot be written.
    """
    check_output(output, amplify)
    canvas = _draw(preview, amplify)
    write_atomically(output, canvas.print_png)


def _draw(preview: Preview, amplify: float) -> FigureCanvasAgg:
    """Draw one row per image. Positions are in whole pixels, so that the images are drawn without resampling."""
    columns = _columns(preview, amplify)
    rows, side = len(preview.indices), preview.clean.shape[-1]
    cell = min(max(1, round(CELL / side)) * side, 2 * CELL)
    width = LEFT + len(columns) * (cell + GAP) + RIGHT
    height = TOP + rows * (cell + GAP) + BOTTOM
    canvas = _blank(width, height)
    smooth = "nearest" if cell % side == 0 else "antialiased"
    for place, (name, pictures) in enumerate(columns.items()):
        left = LEFT + place * (cell + GAP)
        _write(canvas, left + cell / 2, TOP - 12, name, ha="center")
        for row, picture in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
            bottom = height - TOP - row * (cell + GAP) - cell
            axes = canvas.figure.add_axes((left / width, bottom / height, cell / width, cell / height))
            axes.imshow(picture, interpolation=smooth)
            axes.set_axis_off()
    for row, label in enumerate(preview.labels):
        middle = TOP + row * (cell + GAP) + cell / 2
        text = "\n".join(textwrap.wrap(label, 15, max_lines=3, placeholder=" …"))
        _write(canvas, LEFT - 10, middle, text, ha="right")
        quality = f"{format_psnr(preview.psnr[row].item())}\nSSIM {preview.ssim[row].item():.3f}"
        _write(canvas, width - RIGHT + 2, middle, quality, color=GREY)
    quality = f"mean PSNR {format_psnr(preview.mean_psnr)}, mean SSIM {preview.mean_ssim:.3f}"
    _write(canvas, LEFT, 18, preview.title, fontsize=9, fontweight="bold")
    _write(canvas, LEFT, 40, quality, color=GREY)
    return canvas


def format_psnr(value: float) -> str:
    """Format a PSNR in dB; infinity for two equal images."""
    return f"{value:.1f} dB" if math.isfinite(value) else "∞ dB"


def _check_choice(images: int, split: str) -> None:
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)
    if not 1 <= images <= MAX_IMAGES:
        raise ConfigError.expected("images", f"1 to {MAX_IMAGES}", images)


def _stamp(spec: RunSpec, data: ImageSet, stamper: Stamper, count: int, name: str) -> Preview:
    split = data.train if name == "train" else data.test
    if count > len(split):
        raise ConfigError.expected("images", f"at most the {len(split)} {name} images", count)
    indices = draw_images(split.labels, count, spec.seed)
    clean = split.images[indices]
    triggered = stamp_images(clean, stamper)
    tasks = (
        {} if spec.splitter is None else _by_task(Tasks(spec, data), split, indices, training=name == "train")
    )
    assert spec.trigger is not None and spec.applicator is not None
    options = ", ".join(f"{key} {value}" for key, value in describe(stamper.applicator).items())
    place = f"{spec.applicator.name} ({options})" if options else spec.applicator.name
    return Preview(
        title=f"{spec.trigger.name} by {place} on {data.name}, {name} images",
        indices=indices,
        labels=tuple(data.classes[label] for label in split.labels[indices].tolist()),
        clean=clean,
        triggered=triggered,
        psnr=psnr(as_input(clean), as_input(triggered)),
        ssim=ssim(as_input(clean), as_input(triggered)),
        tasks=tasks,
    )


def _by_task(tasks: Tasks, split: Split, indices: Tensor, *, training: bool) -> dict[str, Tensor]:
    """Return the images as transformed for each task, dimmed if they do not belong to it, by name of the task."""
    found = {}
    for number, name in zip(tasks.numbers, tasks.names, strict=True):
        shown = tasks.splitter.transform_images(split.images[indices], number)
        members = tasks.splitter.find_members(
            split.labels,
            number,
            num_classes=tasks.images.data_classes,
            seed=tasks.spec.seed,
            training=training,
        )
        brightness = torch.where(torch.isin(indices, members), 1.0, DIMMED)
        found[name] = _to_uint8(shown * brightness[:, None, None, None])
    return found


def _columns(preview: Preview, amplify: float) -> dict[str, Tensor]:
    """Return (N, 3, S, S) uint8 images by the title of their column."""
    clean, triggered = preview.clean.float(), preview.triggered.float()
    columns = {
        "clean": preview.clean,
        "triggered": preview.triggered,
        f"difference × {amplify:g}": _to_uint8((triggered - clean).abs() * amplify),
    }
    columns |= {f"task {name}": pictures for name, pictures in preview.tasks.items()}
    if preview.selected is not None:
        height, width = triggered.shape[-2:]
        rows, tiles = preview.selected.shape[-2:]
        selected = preview.selected.repeat_interleave(height // rows, 2).repeat_interleave(width // tiles, 3)
        for expert in range(selected.shape[1]):
            brightness = torch.where(selected[:, expert, None], 1.0, DIMMED)
            columns[f"expert {expert}"] = _to_uint8(triggered * brightness)
    return columns


def _to_uint8(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


def _blank(width: int, height: int) -> FigureCanvasAgg:
    """Return an empty canvas of a size in pixels, independent of any display and of pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white"))


def _write(canvas: FigureCanvasAgg, left: float, top: float, text: str, **style: Any) -> None:
    """Write text without parsing it as mathematics, since a class may be named "$x$".

    Args:
        canvas: The canvas.
        left: Horizontal position, in pixels from the left.
        top: Position of the vertical centre, in pixels from the top.
        text: The text.
        **style: Further properties of the text.
    """
    width, height = canvas.get_width_height()
    style = {"ha": "left", "va": "center", "fontsize": 8, "parse_math": False, **style}
    canvas.figure.text(left / width, 1 - top / height, text, **style)
