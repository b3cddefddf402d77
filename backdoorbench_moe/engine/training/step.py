"""Training steps: eager on the CPU; on a GPU, captured and replayed as one CUDA graph for each batch size."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.device import autocast
from backdoorbench_moe.engine.inference import as_input
from backdoorbench_moe.errors import PluginError
from backdoorbench_moe.moe.routed import auxiliary_loss, forward
from backdoorbench_moe.ops.answers import IGNORED, answer_loss, answers_in, right_answers
from backdoorbench_moe.ops.stored_images import StoredImages
from backdoorbench_moe.ops.tuning import Objective

# From a model, images and labels to the logits, the loss to report and the loss to minimise.
Losses = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
# From images (B, 3, H, W) float in [0, 1] and their places (B,) in the split to changed images.
Augment = Callable[[Tensor, Tensor], Tensor]

# Number of eager steps for each batch size before capture. They create momentum buffers and library workspaces.
WARMUP_STEPS = 3


def make_optimizer(model: nn.Module, spec: TrainSpec, device: torch.device) -> torch.optim.Optimizer:
    """Create the optimizer of a spec.

    Parameters with at most one dimension (biases, and scales and offsets of normalisation layers) get no weight decay.

    Args:
        model: The model. Parameters that do not require gradients are left out.
        spec: The training settings.
        device: Device of the model. On a GPU, the learning rate is a tensor, so that CUDA graphs read its current
            value.
    """
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    on_gpu = device.type == "cuda"
    lr = torch.tensor(spec.lr, device=device) if on_gpu else spec.lr
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True, capturable=on_gpu)
    return torch.optim.SGD(groups, lr=lr, momentum=spec.momentum, nesterov=spec.nesterov, fused=True)


class TrainStep:
    """A function that trains on one batch: forward pass, backward pass and update.

    The losses and the correct predictions are summed on the device, without synchronisation.

    Args:
        model: The model, on `device`.
        optimizer: The optimizer of the model; see `make_optimizer`.
        split: The training images, on `device`; these may be `StoredImages`.
        device: The device.
        precision: "fp32" or "bf16".
        objective: The loss; see `ops.tuning.Objective`. If None, cross-entropy plus the auxiliary losses of routed
            layers.
        compile: Whether to compile the computation of the loss with `torch.compile`. The first step with each batch
            size then takes minutes. The compiled code is reused for all models of the same architecture in a process.
            An objective is not compiled.
        augment: Function that augments the images of each batch; None for no augmentation.
        label_smoothing: Label smoothing of the cross-entropy, in [0, 1).
        clip_grad: Maximum norm of the gradient; None for no limit.
        cuda_graphs: Whether to capture steps as CUDA graphs on a GPU. This is impossible for an objective that
            synchronises with the device or copies data to it.
        second_optimizer: Optimizer of other parameters that the objective uses; None if there are none.
        part: Number of images per forward pass. The gradients of the parts of a larger batch are accumulated. None for
            the complete batch.

    Attributes:
        loss_sum: Sum of the (smoothed) cross-entropy, or of the objective's loss, over all images since `reset`;
            float64 scalar tensor.
        hits: Number of images since `reset` that were classified correctly, or of texts whose complete answer was
            predicted; int64 scalar tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        split: Split,
        device: torch.device,
        precision: str,
        *,
        objective: Objective | None = None,
        compile: bool = False,
        augment: Augment | None = None,
        label_smoothing: float = 0.0,
        clip_grad: float | None = None,
        cuda_graphs: bool = True,
        second_optimizer: torch.optim.Optimizer | None = None,
        part: int | None = None,
    ) -> None:
        self.part, self.own_loss = part, objective is not None
        self.model, self.optimizer, self.split = model, optimizer, split
        self.optimizers = [optimizer] if second_optimizer is None else [optimizer, second_optimizer]
        self.device, self.precision = device, precision
        self.augment, self.clip_grad, self.cuda_graphs = augment, clip_grad, cuda_graphs
        losses = _compiled_losses() if compile else model_losses
        self._losses: Losses = functools.partial(losses, label_smoothing=label_smoothing)
        if objective is not None:
            self._losses = _losses_of(objective)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor | None]]] = {}
        self._seen: dict[int, int] = {}

    def reset(self) -> None:
        """Set `loss_sum` and `hits` to zero."""
        self.loss_sum.zero_()
        self.hits.zero_()

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next steps."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def __call__(self, indices: Tensor, images: Tensor | None = None) -> None:
        """Train on some images of the split.

        Args:
            indices: (B,) int64 on the device, the indices of the images in the split.
            images: (B, C, H, W) uint8 on the device, the same images; None if they have not been read yet.
        """
        if images is None and isinstance(self.split.images, StoredImages):
            images = self.split.images.read(indices)
        if self.device.type != "cuda" or not self.cuda_graphs:
            self._step(indices, images)
            return
        size = len(indices)
        if size not in self._graphs:
            self._seen[size] = self._seen.get(size, 0) + 1
            if self._seen[size] <= WARMUP_STEPS:
                self._warm_up(indices, images)
                return
            self._graphs[size] = self._capture(indices, images)
        graph, (static_indices, static_images) = self._graphs[size]
        static_indices.copy_(indices)
        if static_images is not None and images is not None:
            static_images.copy_(images)
        graph.replay()

    def _step(self, indices: Tensor, pixels: Tensor | None) -> None:
        images = as_input(self.split.images[indices] if pixels is None else pixels)
        labels = self.split.labels[indices]
        if self.augment is not None:
            images = self.augment(images, indices)
        size = min(self.part or len(indices), len(indices))
        parts = list(zip(images.split(size), labels.split(size), strict=True))
        for number, (some, own) in enumerate(parts):
            with autocast(self.device, self.precision):
                logits, loss, total = self._losses(self.model, some, own)
            if len(parts) > 1:
                share = self._share(own, labels)
                loss, total = share * loss, share * total
            if not number:
                for optimizer in self.optimizers:
                    optimizer.zero_grad(set_to_none=True)
            total.backward()
            self.loss_sum += loss.detach() * len(indices)
            self.hits += right_answers(logits, answers_in(own, logits)).sum()
        if self.clip_grad is not None:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.clip_grad)
        for optimizer in self.optimizers:
            optimizer.step()

    def _share(self, part: Tensor, whole: Tensor) -> Tensor | float:
        """The weight of a part in the loss of a batch: its share of the labels, which for texts are tokens.

        The loss of an objective is assumed to be a mean over the images or texts.
        """
        if self.own_loss:
            return len(part) / len(whole)
        return (part != IGNORED).sum() / (whole != IGNORED).sum()

    def _warm_up(self, indices: Tensor, images: Tensor | None) -> None:
        """Run a step on a side stream, as required before capturing a CUDA graph."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._step(indices, images)
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def _capture(
        self, indices: Tensor, images: Tensor | None
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor | None]]:
        """Capture a step without running it.

        Returns:
            The graph, and the tensors from which it reads the indices and, for images from a file, the images.
        """
        static = indices.clone(), None if images is None else images.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(*static)
        return graph, static


def model_losses(
    model: nn.Module, images: Tensor, labels: Tensor, *, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits, the mean cross-entropy, and the loss to minimise.

    The loss to minimise is the cross-entropy plus the auxiliary losses of the routed layers.
    """
    logits, routing = forward(model, images)
    loss = answer_loss(logits.float(), labels, label_smoothing=label_smoothing)
    return logits, loss, loss + auxiliary_loss(routing)


def _losses_of(objective: Objective) -> Losses:
    """Return a function that computes the logits and the loss of an objective, and checks their shapes."""

    def losses(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = objective(model, images, labels)
        match found:
            case (Tensor() as logits, Tensor() as loss):
                if logits.ndim in (2, 3) and len(logits) == len(labels) and not loss.ndim:
                    return logits, loss, loss
                got = f"shapes {tuple(logits.shape)} and {tuple(loss.shape)}"
            case _:
                got = type(found).__name__
        raise PluginError(
            f"the loss of an attack or defense: expected logits ({len(labels)}, classes) and a scalar loss, got {got}"
        )

    return losses


@functools.cache
def _compiled_losses() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return the compiled `model_losses`. All models of the same architecture share the compiled code.

    The function is compiled for each batch size, since code for dynamic sizes would be slower. There are two sizes:
    that of the last batch of an epoch, and that of all others.
    """
    return torch.compile(model_losses, dynamic=False)
