"""A picture of what a trigger does: clean, triggered, the amplified difference, what each expert sees."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backdoorbench_moe.analysis.subject import choose_images, run_images
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.data.base import ImageSet
from backdoorbench_moe.engine.build import (
    Stamper,
    build_dataset,
    build_model,
    build_stamper,
    describe,
    model_patch_size,
)
from backdoorbench_moe.engine.inference import as_input
from backdoorbench_moe.engine.names import check_names
from backdoorbench_moe.engine.poison import stamp_images
from backdoorbench_moe.engine.run import Run, check_finished
from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.moe.routed import RoutedModel
from backdoorbench_moe.ops.quality import psnr, ssim
from backdoorbench_moe.records import write_atomically

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

SPLITS = ("train", "test")
MAX_IMAGES = 100
# Brightness that is left to the tiles an expert did not select.
DIMMED = 0.15

# In pixels: the side of an image (about; a multiple of its own), gaps and margins.
CELL, GAP, LEFT, RIGHT, TOP, BOTTOM = 160, 8, 132, 92, 84, 12
# A power of two, so that pixels to inches and back is exact.
DPI = 128
GREY = "0.35"


@dataclass(frozen=True)
class Preview:
    """Some images of a split, and what a trigger makes of them.

    indices: (N,) int64, places in the split. labels: the N class names. clean, triggered: (N, 3, S, S)
    uint8, as an attacker would save them. psnr: (N,) in dB, infinite where nothing changed. ssim: (N,),
    at most 1. selected: (N, E, rows, columns) bool, the tiles of the triggered image that each expert of
    the last routed layer took; None without a routed model.
    """

    title: str
    indices: Tensor
    labels: tuple[str, ...]
    clean: Tensor
    triggered: Tensor
    psnr: Tensor
    ssim: Tensor
    selected: Tensor | None = None

    @property
    def mean_psnr(self) -> float:
        """Mean PSNR of the images that changed at all, in dB; infinite where none did."""
        changed = self.psnr[self.psnr.isfinite()]
        return changed.mean().item() if len(changed) else math.inf

    @property
    def mean_ssim(self) -> float:
        """Mean SSIM of all images."""
        return self.ssim.mean().item()


def preview_spec(spec: RunSpec, *, images: int = 6, split: str = "test") -> Preview:
    """Stamp `images` images of `split` ("train" or "test"), of one class after the other, as `spec` says.

    Nothing is trained. Raises ConfigError for a clean spec or a number or split that is not there.
    """
    _check_choice(images, split)
    check_names(spec)
    data = build_dataset(spec).load()
    model = build_model(spec, num_classes=data.num_classes, image_size=data.image_size)
    size = model_patch_size(model)
    stamper = build_stamper(spec, patch_size=size, image_size=data.image_size)
    return _stamp(spec, data, stamper, images, split)


def preview_run(run: Run, *, images: int = 6, split: str = "test", data_root: str | None = None) -> Preview:
    """Stamp images as the finished `run` did and, for a routed model, say which tiles each expert took.

    data_root: where the data lies now, if not where the run found it. Raises RecordError for a run that
    is not finished, DataError for other data than the run's, ConfigError as `preview_spec`.
    """
    _check_choice(images, split)
    check_finished(run)
    stamper, model = run.stamper(), run.model()
    data = run_images(run, data_root)
    preview = _stamp(run.spec, data, stamper, images, split)
    if not isinstance(model, RoutedModel):
        return preview
    with torch.inference_mode():
        selected = model.forward_routed(as_input(preview.triggered)).routing[-1].selected
    return replace(preview, selected=selected.unflatten(-1, model.patch_grid))


def check_output(output: Path, amplify: float) -> None:
    """Raise ConfigError unless `output` is named as a PNG file and `amplify` is a number above 0."""
    if output.suffix.lower() != ".png":
        raise ConfigError.expected("output", "a file name that ends in .png", str(output))
    if not (math.isfinite(amplify) and amplify > 0):
        raise ConfigError.expected("amplify", "a number above 0", amplify)


def save_preview(preview: Preview, output: Path, *, amplify: float = 5.0) -> None:
    """Draw the preview as a PNG file, in place of one that may be there; whole or not at all.

    amplify: factor the absolute difference is shown with, above 0. Raises ConfigError for a wrong file
    name or factor, RecordError where the file cannot be written.
    """
    check_output(output, amplify)
    canvas = _draw(preview, amplify)
    write_atomically(output, canvas.print_png)


def _draw(preview: Preview, amplify: float) -> FigureCanvasAgg:
    """One row an image. Places are in pixels from the upper left, so that every pixel is drawn as it is."""
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
    """A PSNR with its unit; the sign of infinity where two images are equal."""
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
    indices = choose_images(split.labels, count, spec.seed)
    clean = split.images[indices]
    triggered = stamp_images(clean, stamper)
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
    )


def _columns(preview: Preview, amplify: float) -> dict[str, Tensor]:
    """Column titles to (N, 3, S, S) uint8 images."""
    clean, triggered = preview.clean.float(), preview.triggered.float()
    columns = {
        "clean": preview.clean,
        "triggered": preview.triggered,
        f"difference × {amplify:g}": _to_uint8((triggered - clean).abs() * amplify),
    }
    if preview.selected is not None:
        height, width = triggered.shape[-2:]
        rows, tiles = preview.selected.shape[-2:]
        seen = preview.selected.repeat_interleave(height // rows, 2).repeat_interleave(width // tiles, 3)
        for expert in range(seen.shape[1]):
            light = torch.where(seen[:, expert, None], 1.0, DIMMED)
            columns[f"expert {expert}"] = _to_uint8(triggered * light)
    return columns


def _to_uint8(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


def _blank(width: int, height: int) -> FigureCanvasAgg:
    """An empty picture of so many pixels, drawn without a window system and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white"))


def _write(canvas: FigureCanvasAgg, left: float, top: float, text: str, **style: Any) -> None:
    """Write text as it is (a class may be called "$x$"), its middle `top` pixels from the upper border."""
    width, height = canvas.get_width_height()
    style = {"ha": "left", "va": "center", "fontsize": 8, "parse_math": False, **style}
    canvas.figure.text(left / width, 1 - top / height, text, **style)
