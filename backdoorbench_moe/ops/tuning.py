"""The interface of the function with which attacks and defenses train a model further."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from backdoorbench_moe.ops.images import Split

# A custom loss: maps the model, images (B, 3, H, W) float in [0, 1] and the labels of the split to logits (B, classes),
# from which the training accuracy is computed, and the loss to minimise, a scalar. For texts, the images are token ids
# (B, T) int64 and the logits (B, T, vocabulary). It is called with the precision of the run and, on a GPU, captured in
# a CUDA graph: shapes must not depend on values, and the host must not wait for the device.
Objective = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


class Tune(Protocol):
    """Trains a model further, in place, with the recipe of the run.

    The seed of each call is derived from the caller's seed and the epochs of earlier calls, so the same calls with the
    same seed give the same weights.
    """

    def __call__(
        self,
        model: nn.Module,
        split: Split,
        *,
        epochs: int,
        lr: float | None = None,
        modules: Sequence[nn.Module] | None = None,
        rows: Mapping[str, tuple[int, int]] | None = None,
        objective: Objective | None = None,
        augment: bool | None = None,
    ) -> None:
        """Train `model` on `split`.

        Args:
            model: The model. After training it is in evaluation mode.
            split: The images and their labels. With an objective, the labels may have more columns, (N, columns) int64,
                such as a second answer; the training accuracy refers to the first column, for texts to the first T
                columns.
            epochs: Number of passes over the images; 0 does nothing.
            lr: Peak learning rate; that of the recipe if None.
            modules: The modules to train. All others keep their weights and running statistics. All modules are
                trained if None.
            rows: The rows to train, instead of `modules`: ranges (start, stop) of dimension 0, by name in the model's
                state dict. All other values of parameters and buffers stay exactly the same. During training, norms
                with some of these rows normalise all of their channels with the statistics of the batch.
            objective: The loss; cross-entropy plus the auxiliary losses of routed layers if None. It may draw from
                torch's global generator, which is seeded for each epoch.
            augment: Whether to augment the images as in the recipe. By default, they are augmented unless there is an
                objective, which may contain values that were computed for the original images, such as the logits of a
                reference.

        Raises:
            ValueError: A name in `rows` is not in the state dict.
            PluginError: The objective did not return a row of logits for each image and a scalar loss.
        """
