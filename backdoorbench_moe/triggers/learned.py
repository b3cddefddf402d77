"""Triggers whose pattern is learned while a run is made, and kept in its folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.triggers.base import Trigger


class LearnedTrigger(Trigger, ABC):
    """A trigger that has a state: tensors, such as a pattern, that are learned while a run is made.

    The run folder keeps the state, in `trigger.safetensors`. Without a state, the trigger stamps what the learning
    starts from, which is drawn from its seed. Such a trigger can be checked and drawn, but not used in an attack.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self._state: dict[str, Tensor] = {}

    @property
    def learned(self) -> bool:
        """Whether the trigger has a state."""
        return bool(self._state)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of the state, by name; empty before it is learned."""
        return dict(self._state)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a state that `state` returned, from this object or from another one with the same options.

        Raises:
            ConfigError: It is not a state of such a trigger.
        """
        state = {name: tensor.detach() for name, tensor in tensors.items()}
        if fault := self.state_fault(state):
            raise ConfigError(f"{type(self).__name__}: {fault}")
        self._state = state

    @abstractmethod
    def state_fault(self, state: Mapping[str, Tensor]) -> str | None:
        """Return what is wrong with a state, such as a missing tensor or another shape; None if nothing is."""
