"""Read an expert that was fine-tuned elsewhere from a checkpoint folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from backdoorbench_moe.config.mixture import WEIGHTS
from backdoorbench_moe.engine.weights.start import Start
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.models.base import ReadsCheckpoints
from backdoorbench_moe.moe.merging import expert_names
from backdoorbench_moe.wording.counting import count


class GivenExpert:
    """The checkpoint of an expert. Only its MLPs are used, since a merge takes all other weights from the base.

    Args:
        model: The model. It must have the base's weights when `load` is called.
        path: The folder of the checkpoint.
        task: Number of the expert.

    Raises:
        ConfigError: The model does not support checkpoints, or the checkpoint does not match its shape.
    """

    def __init__(self, model: nn.Module, path: str, task: int) -> None:
        self.key, self.path = f"{WEIGHTS}[{task}]", path
        if not isinstance(model, ReadsCheckpoints):
            expected = f"none, as {type(model).__name__} reads no checkpoints of experts"
            raise ConfigError.expected(self.key, expected, path)
        self.model: ReadsCheckpoints = model
        with self._named():
            model.check_checkpoint(path)

    def load(self) -> Start:
        """Load the MLPs of the checkpoint into the model, and return their origin.

        Raises:
            ConfigError: The checkpoint cannot be read or does not match the model.
        """
        with self._named():
            found, origin = self.model.read_checkpoint(self.path)
        assert isinstance(self.model, nn.Module)
        names, own = expert_names(self.model), self.model.state_dict()
        others = [n for n in own if n not in names and not torch.equal(own[n].cpu(), found[n].cpu())]
        self.model.load_state_dict({n: found[n] if n in names else tensor for n, tensor in own.items()})
        notes: tuple[str, ...] = ()
        if others:
            tensors = count(len(others), "tensor")
            notes = (
                f"{self.key}: {tensors} outside of the MLPs differ from the base's, which are used instead",
            )
        return Start(origin.sha256, origin.backdoored, notes)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Inside the block, let ConfigErrors name the option of the mixture instead of the model's `weights`."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError(f"{self.key}: {str(error).removeprefix('weights: ')}") from error
