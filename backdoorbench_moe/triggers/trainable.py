"""Triggers whose networks are trained together with the model, by an attacker who controls the training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from backdoorbench_moe.errors import ShapeError
from backdoorbench_moe.triggers.learned import LearnedTrigger


class TrainableTrigger(LearnedTrigger):
    """Base class of triggers that consist of networks, which are trained together with the model.

    The attack `training-control` trains it. In every batch, some images are stamped and relabelled, and others get the
    stamps of other images and keep their labels. Gradients of the model's loss reach the networks.

    Args:
        networks: The networks, initialised from `seed`.
        lr: Learning rate of the networks, above 0.
        seed: Seed of the networks.

    Attributes:
        networks: The networks. They are in evaluation mode, without gradients, except while they are trained.
        pretrain_epochs: Passes over the training images for which `pretrained` is trained before the model.
    """

    pretrain_epochs: int = 0

    def __init__(self, networks: nn.Module, *, lr: float, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.networks, self.lr = networks.eval().requires_grad_(False), lr

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the weights of the networks. Raise ConfigError if they do not fit."""
        super().load_state(tensors)
        self.networks.load_state_dict(self._state)

    def state_fault(self, state: Mapping[str, Tensor]) -> str | None:
        """Return which weight is missing, unknown or has a wrong shape; None if the state is valid."""
        own = self.networks.state_dict()
        for name in sorted(own.keys() ^ state.keys()):
            return f"weight {name!r} is {'missing' if name in own else 'unknown to the networks'}"
        for name, tensor in state.items():
            if tensor.shape != own[name].shape:
                return f"weight {name!r}: expected shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}"
        return None

    def stamp(self, images: Tensor) -> Tensor:
        """Stamp images with the networks, in single precision, on the images' device.

        Raises:
            ShapeError: The images do not have 3 channels.
        """
        if images.shape[1] != 3:
            raise ShapeError(f"{type(self).__name__}: expected images of 3 channels, got {images.shape[1]}")
        if not len(images):
            return images.clone()
        self.networks.to(images.device)
        return self.stamp_from(images.float(), images.float()).clamp(0, 1).to(images.dtype)

    @abstractmethod
    def stamp_from(self, images: Tensor, sources: Tensor) -> Tensor:
        """Stamp images with the stamps that are computed from the sources.

        Args:
            images: (B, 3, H, W) float32 in [0, 1].
            sources: (B, 3, H, W) float32 in [0, 1]; for the test form, the images themselves.

        Returns:
            (B, 3, H, W) float32 in [0, 1].
        """

    @abstractmethod
    def joint_loss(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the term that is added to the model's loss while model and networks are trained, a scalar.

        Args:
            images: (B, 3, H, W) float32 in [0, 1], images that are stamped and relabelled.
            others: (B, 3, H, W), the same number of other images.
        """

    def pretrained(self) -> nn.Module:
        """Return the networks that are trained alone, before the model, and then frozen."""
        return nn.ModuleList()

    def pretrain_loss(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the loss of the networks that are trained alone; like `joint_loss`, for all images of a batch."""
        return torch.zeros((), device=images.device)
