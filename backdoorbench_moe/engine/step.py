"""One training step: eager on the CPU; on a GPU captured once a batch size as a CUDA graph and replayed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from backdoorbench_moe.config import TrainSpec
from backdoorbench_moe.data.base import Split
from backdoorbench_moe.engine.device import autocast
from backdoorbench_moe.engine.inference import as_input
from backdoorbench_moe.moe.routed import RoutedModel

# Eager steps before a capture: lazily made buffers (momentum, library workspaces) must exist by then.
WARMUP_STEPS = 3


def make_optimizer(model: nn.Module, spec: TrainSpec, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of a spec. The learning rate is a tensor on a GPU, so that a graph can read new ones."""
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
    """Forward, backward and update on one batch; loss and hits are summed on the device.

    loss_sum: float64 scalar tensor, sum of the images' losses since `reset`. hits: int64 scalar tensor,
    images predicted as labelled. compile: let torch.compile fuse the forward and backward pass; the first
    step of a batch size takes minutes then, once in a process for all models of the same make.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        split: Split,
        device: torch.device,
        precision: str,
        *,
        compile: bool = False,
    ) -> None:
        self.model, self.optimizer, self.split = model, optimizer, split
        self.device, self.precision = device, precision
        self._losses = _compiled_losses() if compile else _losses
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._seen: dict[int, int] = {}

    def reset(self) -> None:
        """Set the sums to zero."""
        self.loss_sum.zero_()
        self.hits.zero_()

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next steps."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def __call__(self, indices: Tensor) -> None:
        """Train on the images at `indices`, (B,) int64 on the device."""
        if self.device.type != "cuda":
            self._step(indices)
            return
        size = len(indices)
        if size not in self._graphs:
            self._seen[size] = self._seen.get(size, 0) + 1
            if self._seen[size] <= WARMUP_STEPS:
                self._warm_up(indices)
                return
            self._graphs[size] = self._capture(indices)
        graph, static = self._graphs[size]
        static.copy_(indices)
        graph.replay()

    def _step(self, indices: Tensor) -> None:
        images, labels = as_input(self.split.images[indices]), self.split.labels[indices]
        with autocast(self.device, self.precision):
            logits, loss, total = self._losses(self.model, images, labels)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        self.loss_sum += loss.detach() * len(indices)
        self.hits += (logits.argmax(1) == labels).sum()

    def _warm_up(self, indices: Tensor) -> None:
        """A real step on a side stream, as CUDA graph capture asks for."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._step(indices)
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def _capture(self, indices: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record the step without running it; the replay that follows is the step."""
        static, graph = indices.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(static)
        return graph, static


def _losses(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits; the mean cross-entropy; and what is descended: that, and the routers' own losses, if any."""
    if not isinstance(model, RoutedModel):
        logits, own = model(images), []
    else:
        output = model.forward_routed(images)
        logits = output.logits
        own = [routing.aux_loss for routing in output.routing if routing.aux_loss is not None]
    loss = nn.functional.cross_entropy(logits.float(), labels)
    return logits, loss, loss + torch.stack(own).sum() if own else loss


@functools.cache
def _compiled_losses() -> Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """`_losses` compiled, once: models of the same make share the code, whatever their weights.

    Each batch size by itself: there are two, and code for any size would be slower.
    """
    return torch.compile(_losses, dynamic=False)
