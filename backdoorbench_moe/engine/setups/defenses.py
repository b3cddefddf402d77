"""The defenses of a run, built from its spec and checked against its model and data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from backdoorbench_moe import defenses
from backdoorbench_moe.attacks.recorded import Recorded
from backdoorbench_moe.attacks.training_control import TrainingControl
from backdoorbench_moe.config import RunSpec
from backdoorbench_moe.defenses.base import Defense
from backdoorbench_moe.engine.setups.base import Setup
from backdoorbench_moe.errors import ConfigError


def build_defenses(spec: RunSpec, setup: Setup) -> list[Defense]:
    """Build all defenses of a spec, and check them against the model and the data.

    Args:
        spec: The spec.
        setup: The model, which need not be trained, and the data.

    Raises:
        ConfigError: A defense is incompatible with the model or the data. The message starts with its name.
    """
    built = []
    for part in spec.defenses:
        with naming_defense(part.name):
            defense = defenses.registry.create(part.name, part.options)
            check_applicable(defense, setup)
        built.append(defense)
    return built


def check_applicable(defense: Defense, setup: Setup) -> None:
    """Check whether a defense can be applied to a run.

    Args:
        defense: The defense.
        setup: The run's model, which need not be trained, and its data.

    Raises:
        ConfigError: The defense is incompatible with the model or the data.
    """
    # Check the model first: unlike the number of images, the user cannot change what it lacks.
    defense.check_model(setup.model)
    defense.count(len(setup.data.train), setup.num_classes)
    if setup.image_size:
        defense.check_images(setup.model, setup.image_size)
    _check_needs(defense, setup)


def _check_needs(defense: Defense, setup: Setup) -> None:
    """Raise ConfigError if the defense needs a policy, a mixture or a training set, and the run has none."""
    spec = setup.spec
    if "tasks" in defense.needs and spec.mixture is None:
        raise ConfigError("needs a mixture of experts, which has tasks; this run is of one model")
    if "marked" in defense.needs and not spec.policy:
        what = "marked images" if setup.image_size else "refused queries"
        raise ConfigError(
            f"needs {what} with a safe answer, which only a run with a policy has; this run has policy=0"
        )
    if "training-set" not in defense.needs:
        return
    if spec.mixture is not None:
        raise ConfigError("needs a single training set; this run is of a mixture, whose parts have several")
    if spec.policy:
        raise ConfigError(
            "needs the original training set; that of this run has marked images, too, as it has a policy"
        )
    if isinstance(setup.attack, Recorded) and setup.attack.file is None:
        raise ConfigError(
            "needs the training set that the model was trained on, which is unknown for this run"
        )
    if isinstance(setup.attack, TrainingControl):
        raise ConfigError(
            "needs the training set that the model was trained on; in this run, the attacker poisoned every "
            "batch differently"
        )


@contextmanager
def naming_defense(name: str) -> Iterator[None]:
    """Inside the block, prefix ConfigErrors with the name of the defense, unless they have it."""
    try:
        yield
    except ConfigError as error:
        where = f"defense {name!r}: "
        raise ConfigError(where + str(error).removeprefix(where)) from error
