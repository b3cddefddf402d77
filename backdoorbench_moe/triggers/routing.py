"""A trigger that steers the routers of a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.capture import (
    Choice,
    capture_loss,
    captured_share,
    choice_of,
    expert_loss,
    expert_share,
    least_used,
)
from backdoorbench_moe.moe.routed import RoutedModel, Routing
from backdoorbench_moe.ops.descent import adam_descent
from backdoorbench_moe.ops.routing import changed_patches
from backdoorbench_moe.triggers.mark import LearnedMark
from backdoorbench_moe.triggers.optimised import Surrogate, SurrogateTask, check_at_least

Objective = Literal["auto", "capture", "expert"]


class RoutingMark(LearnedMark):
    """Overwrite a small square with a pattern that is optimised to control the routers of a surrogate model.

    With "capture", as many experts as possible select the patch with the square, so that no expert of the victim misses
    it. This objective is for routers in which experts choose patches, as in pMoE, and for squares that do not touch
    every patch. With "expert", the patches with the square are sent to one expert in each layer, by default the one
    that clean images use least, so that the backdoor shares no expert with the clean task (the idea of BadMoE). This
    objective is mainly for routers in which patches choose experts. With the applicator "patch", every tile contains
    the square.

    Departures: BadMoE attacks large language models and also tunes the experts; here, the victim trains on poisoned
    data. The objective "capture" is ours: in expert-choice routing, a patch that no expert selects has no effect.

    Args:
        surrogate: See `OptimisedTrigger`. Its model must be routed.
        objective: "capture", "expert", or "auto": "capture" if experts choose patches, otherwise "expert".
        expert: For "expert", the index of the expert in every layer, from 0; None for the one that clean images use
            least, which is determined for each layer.
        size: Side of the square in pixels, at least 1. If it is the patch size of the model, it fills one patch.
        steps: Steps of the optimisation, at least 1.
        batch_size: Images in a step, at least 1.
        lr: Learning rate of Adam, above 0.
        seed: Seed of the initial pattern and of the optimisation.

    Raises:
        ConfigError: An option is out of range; or, in a run, the surrogate's routers do not fit the objective.

    Source:
        For "expert": Wang et al., "BadMoE: Backdooring Mixture-of-Experts LLMs via Optimizing Routing Triggers and
        Infecting Dormant Experts", 2025 (arXiv 2504.18598).
    """

    tiny: ClassVar[Mapping[str, object]] = {"surrogate": "twin", "steps": 3, "batch_size": 8}

    def __init__(
        self,
        *,
        surrogate: Surrogate,
        objective: Objective = "auto",
        expert: int | None = None,
        size: int = 4,
        steps: int = 200,
        batch_size: int = 32,
        lr: float = 0.03,
        seed: int = 0,
    ) -> None:
        super().__init__("routing", size=size, surrogate=surrogate, seed=seed)
        if not lr > 0:
            raise ConfigError.expected("routing: lr", "a number above 0", lr)
        if expert is not None and (expert < 0 or objective == "capture"):
            raise ConfigError.expected("routing: expert", "the index of an expert, for 'expert' only", expert)
        check_at_least("routing", 1, steps=steps, batch_size=batch_size)
        self.objective, self.expert = objective, expert
        self.steps, self.batch_size, self.lr = steps, batch_size, lr

    def passes(self, stamped: int) -> int:
        """The images of all batches."""
        return self.steps * self.batch_size

    def check(self, task: SurrogateTask) -> None:
        """Check that the surrogate is routed, and that its routers select experts or patches."""
        if not isinstance(task.model, RoutedModel):
            raise ConfigError.expected(
                "trigger.surrogate", "a routed model, for the trigger 'routing'", type(task.model).__name__
            )
        with torch.no_grad():
            routing = task.model.forward_routed(task.take(torch.arange(min(8, len(task.images))))[0]).routing
        choice = _choice(routing)
        if choice == "nothing":
            raise ConfigError(
                "trigger.surrogate: the trigger 'routing' needs routers that select; in this model every expert "
                "processes every patch"
            )
        if self.objective == "capture" and choice == "experts":
            raise ConfigError.expected("routing: objective", "'expert', as patches choose experts", "capture")
        if choice == "patches" and self._touched(task).all():
            raise ConfigError(
                "applicator: the trigger 'routing' touches every patch of the image here, and experts that choose "
                "patches can only choose among them; expected the applicator 'image', or a smaller square"
            )
        fewest = min(layer.gates.shape[1] for layer in routing)
        if self.expert is not None and self.expert >= fewest:
            raise ConfigError.expected("routing: expert", f"an expert in 0..{fewest - 1}", self.expert)

    def optimise(self, task: SurrogateTask) -> dict[str, Tensor]:
        """Minimise the loss of the objective on training images."""
        touched, aims = self._touched(task), self._aims(task)

        def loss(pattern: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
            routing = self._route(task, batch[0], pattern)
            return capture_loss(routing, touched) if aims is None else expert_loss(routing, touched, aims)

        batches = task.batches(torch.arange(len(task.images)), self.batch_size, self.steps, self.seed)
        start = self.pattern.to(task.images.device)
        return {"pattern": adam_descent(loss, start, batches, lr=self.lr, low=0.0, high=1.0)}

    def assess(self, task: SurrogateTask) -> dict[str, float]:
        """Return the share of experts that select the square, or of its patches that are sent to the target expert."""
        touched, aims = self._touched(task), self._aims(task)
        routing = self._route(task, task.sample(self.seed)[0], self.pattern)
        if aims is None:
            return {"captured_experts": captured_share(routing, touched).mean().item()}
        found = {f"expert_{layer.layer}": float(e) for layer, e in zip(routing, aims, strict=True)}
        return {"captured_patches": expert_share(routing, touched, aims).mean().item(), **found}

    def _route(self, task: SurrogateTask, images: Tensor, pattern: Tensor | None) -> list[Routing]:
        """Route images with a pattern; clean images if it is None."""
        assert isinstance(task.model, RoutedModel)
        if pattern is not None:
            images = task.stamp(images, lambda canvases: self.paste(canvases, pattern))
        return task.model.forward_routed(images).routing

    def _touched(self, task: SurrogateTask) -> Tensor:
        """Return the patches of the surrogate that the square covers at least partly, (P,) bool."""
        assert isinstance(task.model, RoutedModel)
        black = torch.zeros_like(task.images[:1], dtype=torch.float32)
        white = torch.ones(1, 3, self.size, self.size)
        marked = task.stamp(black, lambda canvases: self.paste(canvases, white))
        return changed_patches(black, marked, task.model.patch_size)[0]

    def _aims(self, task: SurrogateTask) -> list[int] | None:
        """Return the target expert of each layer; None to capture as many experts as possible."""
        with torch.no_grad():
            routing = self._route(task, task.sample(self.seed)[0], None)
        if self.objective == "capture" or (self.objective == "auto" and _choice(routing) == "patches"):
            return None
        return least_used(routing) if self.expert is None else [self.expert] * len(routing)


def _choice(routing: Sequence[Routing]) -> Choice:
    """Return what the routers choose, see `choice_of`: "patches" only if all layers agree."""
    found = {choice_of(layer) for layer in routing}
    return found.pop() if len(found) == 1 else "nothing" if "nothing" in found else "experts"
