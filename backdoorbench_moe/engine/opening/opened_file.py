"""Open the model in a weight file for analysis, without importing it as a run."""

from __future__ import annotations

from pathlib import Path

from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.engine.makers.imported import ImportMaker
from backdoorbench_moe.engine.opening.opened_model import OpenedModel
from backdoorbench_moe.engine.progress.observer import Observer
from backdoorbench_moe.engine.workplace import Workplace


def open_file(spec: RunSpec, observer: Observer | None = None) -> OpenedModel:
    """Open the model that a run would import, with the test images of its data set. Nothing is written.

    Args:
        spec: The spec of that run. Its option `model.weights` names the file.
        observer: Receives progress.

    Raises:
        BbmoeError: A setting is not valid, or the file or the data cannot be used.
    """
    assert spec.imported
    workplace = Workplace(spec, observer)
    maker = ImportMaker(workplace.resolve(spec), workplace)
    maker.prepare({})
    images, test = workplace.images, maker.setup.test
    return OpenedModel(
        name=Path(str(spec.model.options["weights"])).name,
        model=maker.setup.model,
        images=test.images,
        labels=test.labels,
        classes=tuple(images.classes),
        image_size=images.image_size,
        device=workplace.device,
        precision=workplace.precision,
    )
