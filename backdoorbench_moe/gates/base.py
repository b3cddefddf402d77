"""The gate interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, final

from torch import Tensor

from backdoorbench_moe.errors import ConfigError, PluginError
from backdoorbench_moe.moe.layers import Router


class Gate(ABC):
    """Base class of gates, which build the routers of merged experts and define how the routers get their weights.

    Subclasses implement `build`; gates that are not trained also implement `set_from_states`. Users call an instance.

    Each token must be sent to at least one expert that is not masked, if there is one. In evaluation, the weights of
    the experts' outputs sum to 1 for each token, so that a mixture of equal experts computes the same as one of them.
    In training, they may sum to less.

    Attributes:
        trained: Whether the provider trains the routers on clean images of all tasks. If False, `set_from_states` sets
            the routers instead.
        tiny: Options with which the conformance tests build the gate.
        deviations: Reasons for the conformance tests that the gate is known to fail, by name of the test.
    """

    trained: ClassVar[bool] = True
    tiny: ClassVar[Mapping[str, object]] = {}
    deviations: ClassVar[Mapping[str, str]] = {}

    @final
    def __call__(self, features: int, num_experts: int, *, layers: int = 1) -> Router:
        """Build the router of one layer. Its weights are drawn from torch's global generator, which the caller seeds.

        Args:
            features: Features D of a token.
            num_experts: Number of experts E, at least 1.
            layers: Number of routed layers of the model, for losses that are averaged over the layers; see
                `Router.layers`.

        Raises:
            ConfigError: An option does not fit the number of experts.
            PluginError: The subclass did not return a router for E experts.
        """
        self.check(num_experts)
        router = self.build(features, num_experts)
        if not isinstance(router, Router) or len(router.masked) != num_experts:
            raise PluginError(
                f"gate {type(self).__name__}: expected a Router for {num_experts} experts, got {router!r}"
            )
        try:
            router.layers = layers
        except TypeError as error:  # The router has a submodule of this name.
            raise PluginError(
                f"gate {type(self).__name__}: expected a router whose `layers` is the number of routed layers "
                f"of the model, got {router!r}"
            ) from error
        return router

    def check(self, num_experts: int) -> None:  # noqa: B027
        """Check the options against the number of experts. The default accepts any number.

        Raises:
            ConfigError: An option does not fit; the message names it.
        """

    @abstractmethod
    def build(self, features: int, num_experts: int) -> Router:
        """Build the router of one layer; see `__call__`."""

    def set_from_states(self, router: Router, states: Tensor) -> None:
        """Set the weights of a router, in place. It is called once per layer if the gate is not trained.

        Args:
            router: A router that `build` returned.
            states: (E, D) float32: for each expert, the mean input of the layer over the clean tokens of the expert's
                task, computed by the base model.

        Raises:
            ConfigError: The gate is trained.
        """
        raise ConfigError(f"gate {type(self).__name__}: is trained, and not set from hidden states")
