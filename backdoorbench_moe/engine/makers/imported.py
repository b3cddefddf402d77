"""Import a model that was trained elsewhere: read its weights from a file, measure it on clean images, and save it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

from backdoorbench_moe import models
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.engine.makers.base import Maker
from backdoorbench_moe.engine.makers.fitting import Checkpoint, Stopwatch
from backdoorbench_moe.engine.measuring.normalisations import advise
from backdoorbench_moe.engine.run import Run
from backdoorbench_moe.engine.setups.images import ImageSetup
from backdoorbench_moe.engine.weights.start import KEY, load_start
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.errors import BbmoeWarning, ConfigError
from backdoorbench_moe.ops.seeding import seeded
from backdoorbench_moe.records import Record, RunFolder


class ImportMaker(Maker):
    """Reads a model from a file and measures its clean accuracy. Nothing is trained."""

    starts_from_file = True
    setup: ImageSetup

    def __init__(self, spec: RunSpec, workplace: Workplace) -> None:
        if models.registry.common(spec.model.name, spec.model.options).weights is None:
            if spec.model.options.get("weights") is not None:
                expected = "one whose weights are in one file; for this: bbmoe import backdoorbench FOLDER"
                raise ConfigError.expected("model", expected, spec.model.name)
            raise ConfigError.expected(KEY, "the file of the model that is imported", None)
        super().__init__(spec, workplace)
        assert isinstance(self.setup, ImageSetup)  # The setup of texts refuses imported models.

    def load(self, inputs: Mapping[str, Run]) -> None:
        """Load the weights. Raises RecordError if the file cannot be read or does not match the model."""
        model = self.setup.model
        self.start = load_start(self.spec, model, self.workplace.observer)
        model.eval().to(self.workplace.device).to(memory_format=torch.channels_last)

    def complete(self, folder: RunFolder, record: Record, checkpoint: Checkpoint | None) -> None:
        """Measure the model and save it."""
        watch = Stopwatch(record)
        [record.metrics] = self.measure([self.setup.model])
        if (advice := self._try_normalisations()) is not None:
            warnings.warn(advice, BbmoeWarning, stacklevel=2)
            record.parts["model"]["start"]["notes"].append(advice)
        watch.done()
        folder.save_model(self.setup.model.state_dict(), self.model_header(record))

    def _try_normalisations(self) -> str | None:
        """Suggest another normalisation if one gives a clearly higher accuracy on a sample of test images."""
        spec, workplace = self.spec, self.workplace
        chosen = models.registry.common(spec.model.name, spec.model.options).normalisation
        with seeded(spec.seed, "normalisations"):
            return advise(
                self.setup.model, self.setup.test, chosen, seed=spec.seed, precision=workplace.precision
            )
