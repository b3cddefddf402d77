"""Triggers whose pattern is learned during a run and stored in its folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.triggers.base import Trigger


class LearnedTrigger(Trigger, ABC):
    """Base class of triggers with a state: tensors, such as a pattern, that are learned during a run.

    The state is stored in the run folder, in `trigger.safetensors`. Without a state, the trigger stamps its initial
    values, which are drawn from its seed. Such a trigger can be checked and displayed, but not used in an attack.
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
        """Load a state that was returned by `state` of this object, or of another one with the same options.

        Raises:
            ConfigError: The state is not valid for this trigger.
        """
        state = {name: tensor.detach() for name, tensor in tensors.items()}
        if fault := self.state_fault(state):
            raise ConfigError(f"{type(self).__name__}: {fault}")
        self._state = state

    @abstractmethod
    def state_fault(self, state: Mapping[str, Tensor]) -> str | None:
        """Return what is wrong with a state, such as a missing tensor or a wrong shape; None if it is valid."""
