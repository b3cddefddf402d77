"""Anti-Backdoor Learning: train a new model, isolate the images that it learns first, and unlearn them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.sample_filter import Suspicion, in_order, judge_samples, without
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.routed import auxiliary_loss, forward
from backdoorbench_moe.ops.ranges import check_integer, check_interval, check_positive
from backdoorbench_moe.ops.tuning import Objective
from backdoorbench_moe.shares import share_of

Isolation = Literal["flooding", "local-gradient-ascent"]
# A single image has no batch statistics.
FEWEST_IMAGES = 2


class ABL(Defense):
    """Anti-Backdoor Learning: train a new model that learns mainly the backdoor, isolate poisoned images, unlearn them.

    The defender holds the training set and trains the model, so the given model is not used. There are three steps:

    1. Isolation: a new model is trained with a loss that is kept near or above `gamma`. Triggered images are learned
       first. The `ratio` of all images with the lowest loss are isolated as suspicious; the score is the negative loss.
    2. Training continues on all other images with the usual loss (stage "tuned").
    3. Unlearning: the loss of the isolated images is maximised with a small learning rate (stage "unlearned").

    All steps use the run's recipe, except for the learning rate of step 3; labels are smoothed in step 2 only. The
    images are first sorted by their contents, so that the result does not depend on the order of the training set.

    Departures: in the paper's code, epochs and learning rates do not depend on the run (10, 60 and 20 epochs), and
    `local-gradient-ascent` uses the sign of the mean loss of a batch, which gives the same gradient as flooding. Here,
    it uses the sign of each image's loss, as in the paper's equation 2. The auxiliary losses of routed layers are added
    in steps 1 and 2.

    Args:
        isolation: The loss of step 1. "flooding": |L - gamma| + gamma, where L is the mean cross-entropy of a batch.
            "local-gradient-ascent": the mean of sign(l - gamma) l, where l is the cross-entropy of an image.
        gamma: Threshold below which the loss is raised instead of lowered in step 1; above 0.
        isolation_epochs: Epochs of step 1, from 1; a tenth of those of the run's recipe if None, and at least 1. They
            should be so few that hardly anything but the trigger is learned: later, easy clean images also have a low
            loss.
        ratio: Share of the training images that are isolated, in (0, 1).
        epochs: Epochs of step 2, from 1; those of the run's recipe if None.
        unlearning_epochs: Epochs of step 3 over the isolated images, from 1.
        unlearning_lr: Peak learning rate of step 3, above 0.

    Raises:
        ConfigError: A value is out of range, or `ratio` isolates no image.

    Source:
        Li et al., "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021, section 3; flooding:
        Ishida et al., ICML 2020.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"training-set", "losses"})
    tiny: ClassVar[Mapping[str, object]] = {
        **{"isolation_epochs": 1, "ratio": 0.5, "epochs": 1, "unlearning_epochs": 1}
    }

    def __init__(
        self,
        *,
        isolation: Isolation = "flooding",
        gamma: float = 0.5,
        isolation_epochs: int | None = None,
        ratio: float = 0.01,
        epochs: int | None = None,
        unlearning_epochs: int = 20,
        unlearning_lr: float = 5e-4,
    ) -> None:
        super().__init__()
        check_positive(gamma=gamma, unlearning_lr=unlearning_lr)
        check_interval("ratio", ratio, "(0, 1)")
        check_integer("unlearning_epochs", unlearning_epochs, at_least=1)
        for name, number in (("isolation_epochs", isolation_epochs), ("epochs", epochs)):
            check_integer(name, number, at_least=1)
        self.isolation, self.gamma, self.isolation_epochs = isolation, gamma, isolation_epochs
        self.ratio, self.epochs = ratio, epochs
        self.unlearning_epochs, self.unlearning_lr = unlearning_epochs, unlearning_lr

    def count(self, images: int, num_classes: int) -> int:
        """Return 0: the defender holds no clean images.

        Raises:
            ConfigError: `ratio` isolates fewer than two training images, or leaves fewer.
        """
        isolated = share_of(self.ratio, images)
        if min(isolated, images - isolated) < FEWEST_IMAGES:
            raise ConfigError(
                f"ratio: {self.ratio} of {images} images isolates {isolated} and leaves {images - isolated}; "
                f"expected at least {FEWEST_IMAGES} of each, to train on"
            )
        return super().count(images, num_classes)

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Train on all images, then on those that are not isolated, then on those that are; compute all losses once."""
        isolated = share_of(self.ratio, train)
        trained = self._first_epochs(recipe) * train + (self.epochs or recipe.epochs) * (train - isolated)
        return Cost(trained=trained + self.unlearning_epochs * isolated, predicted=train)

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Isolate, train on the rest, and unlearn."""
        order, split = in_order(task.training_set)
        self.count(len(split), task.num_classes)
        model, size = task.fresh(), task.train.batch_size
        objective = limited_loss(self.isolation, self.gamma)
        first = self._first_epochs(task.train)
        task.tune(model, split, epochs=first, objective=objective, augment=True)
        found = self._isolate(task.losses(model, split), first)
        left = without(split, found.suspicious, found.scores, size)
        task.tune(model, left, epochs=self.epochs or task.train.epochs)
        task.report("tuned", model)
        # Among the isolated images, those with the highest loss are the least suspicious.
        isolated = without(split, ~found.suspicious, -found.scores, size)
        epochs, lr = self.unlearning_epochs, self.unlearning_lr
        task.tune(model, isolated, epochs=epochs, lr=lr, objective=ascent, augment=True)
        return DefenseResult("unlearned", model, (judge_samples(found, order),))

    def _first_epochs(self, recipe: TrainSpec) -> int:
        return self.isolation_epochs or max(1, recipe.epochs // 10)

    def _isolate(self, losses: Tensor, epochs: int) -> Suspicion:
        chosen = losses.argsort(stable=True)[: share_of(self.ratio, len(losses))]
        suspicious = torch.zeros_like(losses, dtype=torch.bool)
        suspicious[chosen] = True
        reason = f"after {epochs} epochs of training its loss is among the lowest {self.ratio:.3g}"
        return Suspicion(-losses, suspicious, reason)


def limited_loss(isolation: Isolation, gamma: float) -> Objective:
    """Return a loss that keeps the cross-entropy from falling far below `gamma`.

    Args:
        isolation: See `ABL`.
        gamma: See `ABL`.
    """

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits, routing = forward(model, images)
        if isolation == "flooding":
            loss = (F.cross_entropy(logits.float(), labels) - gamma).abs() + gamma
        else:
            each = F.cross_entropy(logits.float(), labels, reduction="none")
            loss = ((each.detach() - gamma).sign() * each).mean()
        return logits, loss + auxiliary_loss(routing)

    return objective


def ascent(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits and the negative cross-entropy: an `Objective` that unlearns the labels."""
    logits, _ = forward(model, images)
    return logits, -F.cross_entropy(logits.float(), labels)
