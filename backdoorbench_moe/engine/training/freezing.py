"""Freeze the parameters that match the patterns in `TrainSpec.freeze`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.moe.temporary import frozen


def frozen_names(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Return the names of the parameters that match patterns.

    Args:
        model: The model.
        patterns: Patterns for names of parameters: "*" matches any text, "?" one character and "[ab]" one of these
            characters.

    Raises:
        UnknownNameError: A pattern matches no parameter; similar names are suggested.
        ConfigError: The patterns match all parameters.
    """
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise UnknownNameError("train.freeze: parameter", pattern, names)
        found |= matched
    if found and found == set(names):
        raise ConfigError.expected("train.freeze", "patterns that leave a parameter to train", list(patterns))
    return found


@contextmanager
def freezing(model: nn.Module, patterns: Sequence[str]) -> Iterator[list[nn.Module]]:
    """Disable gradients of the parameters that match patterns inside the block.

    Yields:
        The batch norms whose parameters are all frozen, so that their statistics should be frozen, too.
    """
    found = frozen_names(model, patterns)
    chosen = [parameter for name, parameter in model.named_parameters() if name in found]
    numbers = set(map(id, chosen))
    norms: list[nn.Module] = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and (own := list(module.parameters()))
        and all(id(parameter) in numbers for parameter in own)
    ]
    with frozen(chosen):
        yield norms
