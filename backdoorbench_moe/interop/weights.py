"""Fitting the weights of a result to a model, by name and shape."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from backdoorbench_moe.engine.weights import WRAPPING
from backdoorbench_moe.errors import DataError
from backdoorbench_moe.models.backdoorbench import BackdoorBenchModel

LISTED = 8


def load_weights(model: BackdoorBenchModel, weights: Mapping[str, Tensor], source: str) -> None:
    """Load the weights of BackdoorBench into a model, in place.

    Args:
        model: The model.
        weights: The weights by their names in the result.
        source: The file, for messages.

    Raises:
        DataError: A weight is missing, unknown, or of another shape or type; the message lists them. No weight is
            matched by its position.
    """
    for prefix in WRAPPING:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    own = model.state_dict()
    given = {model.own_name(name): (name, tensor) for name, tensor in weights.items()}
    # Weights from before PyTorch counted the batches of a norm.
    missing = [name for name in own if name not in given and not name.endswith("num_batches_tracked")]
    faults = [f"{name.removeprefix('trunk.')} is missing" for name in missing]
    for name, (theirs, tensor) in given.items():
        if name not in own:
            faults.append(f"{theirs} is not in {model.architecture}")
        elif own[name].shape != tensor.shape or own[name].dtype != tensor.dtype:
            expected, got = (f"{tuple(each.shape)} {each.dtype}" for each in (own[name], tensor))
            faults.append(f"{theirs} is {got} instead of {expected}")
    if faults:
        more = f"; and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
        raise DataError(f"{source}: does not fit {model.architecture}: {'; '.join(faults[:LISTED])}{more}")
    model.load_state_dict({**own, **{name: tensor for name, (_, tensor) in given.items()}})
