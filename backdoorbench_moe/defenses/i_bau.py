"""I-BAU: find a universal adversarial perturbation, and unlearn it with the implicit hypergradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.defenses.base import Defense, DefenseResult, DefenseTask
from backdoorbench_moe.defenses.cost import Cost
from backdoorbench_moe.defenses.requirements import Scope, check_tuning, modules_in
from backdoorbench_moe.defenses.stamps import ApplicatorName, canvas_shape, canvas_side, check_patch_size
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.precision import full_precision
from backdoorbench_moe.ops.hypergradient import fixed_point_hypergradient
from backdoorbench_moe.ops.images import Split, as_input
from backdoorbench_moe.ops.ranges import check_integer, check_positive, check_share, check_weight
from backdoorbench_moe.ops.seeding import generator

# Step of the gradient descent whose fixed point the hypergradient is taken at; that of the authors' code.
FIXED_POINT_STEP = 0.1


class IBAU(Defense):
    """Adversarial unlearning of backdoors: train against a universal adversarial perturbation.

    Every round first searches for a perturbation d that is added to all images, by gradient descent on
    -CE(f(x + d), y) + `penalty` * |d|^2 from d = 0, and scales it into the ball |d| <= `radius`. It then passes once
    over the clean images and minimises the cross-entropy with Adam, with d added to a share of each batch. Since d
    depends on the weights, the gradient has a second term, by the implicit function theorem; see `ops.hypergradient`.
    Images are in [0, 1], and x + d is not clipped.

    With `applicator="patch"`, d is one tile that is repeated over the image, like the triggers of BadPatches. Norms and
    steps refer to the full perturbation, so that both forms have the same budget.

    The model is in evaluation mode throughout, as in the authors' code: norms keep their running statistics, and
    dropout is off. Everything is computed in fp32, since second derivatives need the precision.

    The baseline is `portion=0`: the same steps of Adam on clean images only. It differs from `fine-tuning` in the
    optimizer and in the fixed running statistics; 5 rounds take as many steps as 5 epochs of `fine-tuning`.

    Departures: the number of inner steps is an option; the source passes once over its 5,000 images in batches of 100.
    The map of the implicit gradient is that of the outer batch; the authors' code uses that of the first batch for all.
    In their code, the scaling into the ball is commented out, and the inner loss is computed for the model's own
    predictions; here, as in the paper, for the true labels. The auxiliary losses of routed layers are omitted.

    Args:
        applicator: "image", or "patch" for a tile that is repeated.
        patch_size: With "patch", the side of the tile in pixels, a divisor of the image's height and width. None: that
            of the model's patches, or 4 for a model without patches.
        rounds: Number of rounds, from 1.
        inner_steps: Steps of gradient descent on d in each round, from 1; each uses one batch.
        inner_lr: Step size of d, above 0.
        penalty: Weight of the squared norm of d, at least 0.
        radius: Largest L2 norm of d, above 0.
        portion: Share of each batch to which d is added during unlearning, in [0, 1]; at least one image unless it is
            0. The default is that of the authors' code, one image out of 100. It is 1 in the paper, which may cost much
            clean accuracy.
        fixed_point_steps: Steps K of the fixed-point iteration for the implicit gradient, from 1.
        scope: What is trained: "all", or the component "experts", "router" or "head".
        lr: Learning rate of Adam, above 0; from 0.0001 to 0.001 in the source.
        clean_fraction: Share of the training images that the defender holds, in (0, 1].

    Raises:
        ConfigError: A value is out of range, the model does not have the component, or the tiles do not cover the
            images.

    Source:
        Zeng et al., "Adversarial unlearning of backdoors via implicit hypergradient", ICLR 2022, eq. 1 and algorithm 1;
        code YiZeng623/I-BAU.
    """

    # Every round passes once over the clean images.
    tuning_length: ClassVar[str | None] = "rounds"
    tiny: ClassVar[Mapping[str, object]] = {"rounds": 1, "inner_steps": 2, "fixed_point_steps": 2}

    def __init__(
        self,
        *,
        applicator: ApplicatorName = "image",
        patch_size: int | None = None,
        rounds: int = 5,
        inner_steps: int = 50,
        inner_lr: float = 10.0,
        penalty: float = 0.001,
        radius: float = 10.0,
        portion: float = 0.01,
        fixed_point_steps: int = 5,
        scope: Scope = "all",
        lr: float = 0.001,
        clean_fraction: float = 0.05,
    ) -> None:
        super().__init__(clean_fraction=clean_fraction)
        check_integer("rounds", rounds, 1)
        check_integer("inner_steps", inner_steps, 1)
        check_integer("fixed_point_steps", fixed_point_steps, 1)
        check_tuning(rounds, lr, at_least=1)
        check_positive(inner_lr=inner_lr, radius=radius)
        check_weight(penalty=penalty)
        check_share(portion=portion)
        check_patch_size(applicator, patch_size)
        self.applicator, self.patch_size, self.rounds = applicator, patch_size, rounds
        self.inner_steps, self.inner_lr, self.penalty, self.radius = inner_steps, inner_lr, penalty, radius
        self.portion, self.fixed_point_steps, self.scope, self.lr = portion, fixed_point_steps, scope, lr

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError if the model does not have the component."""
        modules_in(model, self.scope)

    def check_images(self, model: nn.Module, image_size: int) -> None:
        """Raise ConfigError if the tiles do not cover the images."""
        canvas_side(self.applicator, self.patch_size, model, image_size)

    def cost(self, model: nn.Module, *, held: int, train: int, classes: int, recipe: TrainSpec) -> Cost:
        """Count the inner and outer steps of each round.

        A step of unlearning passes its batch twice. Each step of the fixed-point iteration then goes backward through
        the graph of a gradient, which takes about as long as two passes and is counted as two.
        """
        steps, left = divmod(self.inner_steps, math.ceil(held / recipe.batch_size))
        sought = steps * held + min(left * recipe.batch_size, held)
        return Cost(trained=self.rounds * (sought + (2 + 2 * self.fixed_point_steps) * held))

    def defend(self, task: DefenseTask) -> DefenseResult:
        """Alternate between searching for the perturbation and unlearning it."""
        game = self._game(task)
        # Fused attention kernels have no second derivatives.
        with sdpa_kernel(SDPBackend.MATH), full_precision(task.device):
            for number in range(self.rounds):
                tile = self._seek(task, game, number)
                self._unlearn(task, game, tile, number)
                if not all(weight.isfinite().all() for weight in game.weights):
                    raise ConfigError(
                        f"lr: the weights are not finite after round {number + 1} with {self.lr}; lower it"
                    )
                task.progress(number + 1, self.rounds)
        game.optimizer.zero_grad(set_to_none=True)
        return DefenseResult("unlearned", task.model)

    def _seek(self, task: DefenseTask, game: Game, number: int) -> Tensor:
        """Search for the perturbation that maximises the loss, and return its tile."""
        tile = torch.zeros(game.tile_shape, device=task.device)
        batches = _batches(task, self.inner_steps, "inner", number)
        for images, labels in batches:
            tile.requires_grad_()
            tile = game.descend(tile, images, labels, self.inner_lr).detach()
        return tile * (self.radius / game.spread(tile).norm().clamp(min=self.radius))

    def _unlearn(self, task: DefenseTask, game: Game, tile: Tensor, number: int) -> None:
        """Minimise the loss of perturbed images in one pass."""
        draws = generator(task.seed, "perturbed", number)
        tile = tile.requires_grad_()
        for images, labels in _batches(task, None, "outer", number):
            count = max(1, round(self.portion * len(images))) if self.portion else 0
            perturbed = torch.randperm(len(images), generator=draws) < count
            where = perturbed.to(task.device, images.dtype).view(-1, 1, 1, 1)
            outer = F.cross_entropy(task.model(images + where * game.spread(tile)), labels)
            mapped = game.descend(tile, images, labels, FIXED_POINT_STEP, create_graph=True)
            gradients = fixed_point_hypergradient(
                outer, mapped, tile, game.weights, steps=self.fixed_point_steps
            )
            for weight, gradient in zip(game.weights, gradients, strict=True):
                weight.grad = gradient
            game.optimizer.step()

    def _game(self, task: DefenseTask) -> Game:
        """Return the state that both steps share."""
        model, images = task.model.eval(), task.clean.images
        height, width = images.shape[2:]
        side = canvas_side(self.applicator, self.patch_size, model, task.image_size)
        rows, columns = canvas_shape(images, side)
        modules = modules_in(model, self.scope)
        owners = [model] if modules is None else modules
        weights = [weight for owner in owners for weight in owner.parameters() if weight.requires_grad]
        return Game(
            model=model,
            weights=weights,
            optimizer=torch.optim.Adam(weights, lr=self.lr),
            tile_shape=(1, images.shape[1], rows, columns),
            repeats=(height // rows, width // columns),
            penalty=self.penalty,
        )


@dataclass(frozen=True)
class Game:
    """The model, its trained weights, and the form of the perturbation.

    Attributes:
        model: The model, in evaluation mode.
        weights: The parameters that are trained.
        optimizer: Their optimizer.
        tile_shape: (1, C, S, S); for a perturbation of the full image, (1, C, H, W).
        repeats: How often the tile is repeated vertically and horizontally.
        penalty: Weight of the squared norm of the perturbation.
    """

    model: nn.Module
    weights: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    tile_shape: tuple[int, ...]
    repeats: tuple[int, int]
    penalty: float

    def spread(self, tile: Tensor) -> Tensor:
        """Return the full perturbation (1, C, H, W) of a tile."""
        return tile.repeat(1, 1, *self.repeats)

    def descend(
        self, tile: Tensor, images: Tensor, labels: Tensor, step: float, *, create_graph: bool = False
    ) -> Tensor:
        """Return the tile after one step of gradient descent on the inner loss.

        The step is that of the full perturbation, projected onto perturbations that are the same in every tile: its
        gradient is the mean over the tiles, while the gradient of the tile is the sum.

        Args:
            tile: Of `tile_shape`; requires gradients.
            images: (B, C, H, W) in [0, 1].
            labels: (B,) int64.
            step: Step size.
            create_graph: Whether the result can be differentiated with respect to the tile and the weights.
        """
        spread = self.spread(tile)
        loss = self.penalty * spread.square().sum() - F.cross_entropy(self.model(images + spread), labels)
        [gradient] = torch.autograd.grad(loss, tile, create_graph=create_graph)
        return tile - step / (self.repeats[0] * self.repeats[1]) * gradient


def _batches(task: DefenseTask, count: int | None, *purpose: str | int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches (images in [0, 1], labels) of the clean images: `count` batches, or one pass if it is None."""
    clean: Split = task.clean
    size, left, done = task.train.batch_size, count, 0
    while left is None or left > 0:
        order = torch.randperm(len(clean), generator=generator(task.seed, "order", *purpose, done))
        rows = order.to(clean.images.device).split(size)[:left]
        for row in rows:
            yield as_input(clean.images[row]), clean.labels[row]
        if left is None:
            return
        left, done = left - len(rows), done + 1
