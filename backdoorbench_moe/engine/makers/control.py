"""Training controlled by the attacker, who poisons batches and may train the trigger together with the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backdoorbench_moe.attacks.training_control import ControlledBatch, TrainingControl
from backdoorbench_moe.config import RunSpec, TrainSpec
from backdoorbench_moe.engine.build import cut
from backdoorbench_moe.engine.setups.base import Setup
from backdoorbench_moe.engine.training.checkpoint import Companion
from backdoorbench_moe.engine.training.step import model_losses
from backdoorbench_moe.engine.training.tune import Tuner
from backdoorbench_moe.engine.workplace import Workplace
from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.ops.seeding import derive_seed
from backdoorbench_moe.shares import share_of
from backdoorbench_moe.triggers.trainable import TrainableTrigger

# Betas of Adam for the networks of a trigger (from the code of Nguyen and Tran, 2020).
BETAS = (0.5, 0.9)
# Noise depends on the index in the training set, see `Trigger`. Random indices give new noise in every batch.
PLACES = 1 << 40


class ControlledTraining:
    """Poisons each batch and trains the trigger, for an attacker who controls the training.

    Args:
        spec: The spec of the run.
        setup: The parts of the run; the attack is a `TrainingControl`.
        workplace: The data, the device and the observer.

    Raises:
        ConfigError: A rate is too small for one image of a batch, the trigger has no noise form, or there is a probe
            and the trigger changes during training.
    """

    def __init__(self, spec: RunSpec, setup: Setup, workplace: Workplace) -> None:
        assert setup.stamper is not None and isinstance(setup.attack, TrainingControl)
        self.spec, self.setup, self.workplace = spec, setup, workplace
        self.stamper, self.attack = setup.stamper, setup.attack
        trigger = self.stamper.trigger
        self.trigger = trigger if isinstance(trigger, TrainableTrigger) else None
        size = min(spec.train.batch_size, len(setup.images.train))
        for name in ("rate", "noise"):
            rate = getattr(spec.poison, name)
            if rate and not share_of(rate, size):
                raise ConfigError.expected(
                    f"poison.{name}",
                    f"at least 1/{size}, one image of a batch, where batches are poisoned",
                    rate,
                )
        if spec.poison.noise and self.trigger is None and not trigger.has_noise:
            assert spec.trigger is not None
            raise ConfigError(
                f"poison.noise: the trigger {spec.trigger.name!r} has no noise form; set it to 0"
            )
        if spec.probe and self.trigger is not None:
            raise ConfigError.expected(
                "probe", "0 for a trigger that is trained together with the model", spec.probe
            )

    @property
    def capturable(self) -> bool:
        """Whether CUDA graphs can capture the steps: not with triggers that copy data to the device."""
        return self.trigger is not None

    def companion(self) -> Companion | None:
        """The networks of the trigger and their optimizer; None if the trigger is not trained."""
        if self.trigger is None:
            return None
        networks = self.trigger.networks.to(self.workplace.device).requires_grad_(True)
        alone = self.trigger.pretrained().requires_grad_(False)
        trained = [network for network in networks.children() if network is not alone]
        parameters = [parameter for network in trained for parameter in network.parameters()]
        on_gpu = self.workplace.device.type == "cuda"
        adam = torch.optim.Adam(parameters, lr=self.trigger.lr, betas=BETAS, fused=True, capturable=on_gpu)
        return Companion(networks, adam, trained)

    def pretrain(self) -> None:
        """Train the network of the trigger that is trained before the model."""
        trigger, workplace = self.trigger, self.workplace
        if trigger is None or not trigger.pretrain_epochs:
            return
        network = trigger.pretrained().to(workplace.device).requires_grad_(True)
        recipe = TrainSpec(
            batch_size=self.spec.train.batch_size,
            optimizer="adamw",
            lr=trigger.lr,
            schedule="step",
            milestones=(0.4, 0.8),
        )

        def objective(_: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            canvases = cut(self.stamper.applicator, images)
            loss = trigger.pretrain_loss(
                canvases, cut(self.stamper.applicator, _others(images, 0, len(images)))
            )
            return loss.new_zeros(len(labels), 1), loss

        assert self.spec.trigger is not None
        seed = derive_seed(self.spec.seed, "trigger networks")
        observer, name = workplace.observer, self.spec.trigger.name
        tune = Tuner(recipe, seed, workplace.device, workplace.precision, observer, name)
        tune(network, self.setup.images.train, epochs=trigger.pretrain_epochs, objective=objective)
        network.requires_grad_(False)

    def objective(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Poison a batch and return the logits and the loss; see `ops.tuning.Objective`.

        The first images are poisoned. This is a random choice, since the images are in random order.
        """
        size = len(images)
        poison, noise = (share_of(getattr(self.spec.poison, name), size) for name in ("rate", "noise"))
        stamped, crossed, extra = self._stamp(images, poison, noise)
        mixed = torch.cat([stamped, crossed, images[poison + noise :]])
        mixed = mixed.contiguous(memory_format=torch.channels_last)
        wanted = self.attack.wanted(labels[:poison], self.setup.images.data_classes)
        answers = torch.cat([wanted, labels[poison:]])

        def usual_loss(model: nn.Module) -> tuple[Tensor, Tensor]:
            smoothing = self.spec.train.label_smoothing
            logits, _, total = model_losses(model, mixed, answers, label_smoothing=smoothing)
            return logits, total

        batch = ControlledBatch(mixed, answers, images, labels, poison, noise, usual_loss)
        logits, loss = self.attack.loss(model, batch)
        return logits, loss + extra

    def finish(self) -> None:
        """Set the state of the trigger to the trained networks."""
        if self.trigger is not None:
            self.trigger.networks.eval().requires_grad_(False)
            state = self.trigger.networks.state_dict()
            self.trigger.load_state({name: tensor.detach().cpu() for name, tensor in state.items()})

    def _stamp(self, images: Tensor, poison: int, noise: int) -> tuple[Tensor, Tensor, Tensor]:
        """Stamp the first images of a batch, and the next ones with noise.

        Returns:
            The stamped images (poison, C, H, W), those with noise (noise, C, H, W), and a loss to add.
        """
        own, next_ones = images[:poison], images[poison : poison + noise]
        extra = images.new_zeros(())
        if self.trigger is None:
            places = torch.randint(PLACES, (poison + noise,), device=images.device)
            stamped = self.stamper.training(own, places[:poison])
            return stamped, self.stamper.noise(next_ones, places[poison:]) if noise else next_ones, extra
        applicator, stamp = self.stamper.applicator, self.trigger.stamp_from
        if poison:
            extra = self.trigger.joint_loss(cut(applicator, own), cut(applicator, _others(images, 0, poison)))
            own = applicator.apply(own, lambda canvases: stamp(canvases, canvases))
        if noise:
            sources = cut(applicator, _others(images, poison, noise))
            next_ones = applicator.apply(next_ones, lambda canvases: stamp(canvases, sources))
        return own, next_ones, extra


def _others(images: Tensor, first: int, count: int) -> Tensor:
    """Return a different image for each of `count` images of a batch, starting at index `first`.

    The returned images start in the middle of the batch, or one later if this would return the same images.
    """
    start = len(images) // 2
    return images.roll(-(start + (start == first)), 0)[:count]
