"""The forms of MLPs that can become the experts of a mixture."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from backdoorbench_moe.moe.layers import GatedMLPExperts, MLPExperts


@dataclass(frozen=True)
class MLPForm:
    """One form of an MLP from D features to D features.

    Attributes:
        first: Names of the linear layers (hidden units, D).
        last: Name of the linear layer (D, hidden units).
        act: Name of the activation, a module without weights.
        drops: Names of dropouts that such an MLP may have.
        bias: Whether the linear layers have biases. All of them have, or none has.
        experts: The experts of this form.
    """

    first: tuple[str, ...]
    last: str
    act: str
    bias: bool
    drops: tuple[str, ...]
    experts: type[MLPExperts] | type[GatedMLPExperts]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names in the state dict of such an MLP, which are also those in the state dict of its experts."""
        parts = ("weight", "bias") if self.bias else ("weight",)
        return tuple(f"{name}.{part}" for name in (*self.first, self.last) for part in parts)

    def fits(self, mlp: nn.Module) -> bool:
        """Whether an MLP is of this form, and has no other weights or modules that compute anything."""
        first = [getattr(mlp, name, None) for name in self.first]
        last = getattr(mlp, self.last, None)
        return (
            isinstance(last, nn.Linear)
            and isinstance(getattr(mlp, self.act, None), nn.Module)
            and all(
                isinstance(linear, nn.Linear)
                and (linear.in_features, linear.out_features) == (last.out_features, last.in_features)
                for linear in first
            )
            and mlp.state_dict().keys() == {*self.tensors}
            and all(
                isinstance(child, nn.Identity)
                for name, child in mlp.named_children()
                if name not in (*self.first, self.act, self.last, *self.drops)
            )
        )


# As in timm and in transformers' Llama.
PLAIN = MLPForm(("fc1",), "fc2", "act", True, ("drop1", "drop2"), MLPExperts)
GATED = MLPForm(("gate_proj", "up_proj"), "down_proj", "act_fn", False, (), GatedMLPExperts)
FORMS = (PLAIN, GATED)


def form_of(mlp: nn.Module) -> MLPForm | None:
    """Return the form of an MLP, or None if it cannot be merged."""
    return next((form for form in FORMS if form.fits(mlp)), None)


def experts_like(mlp: nn.Module, num_experts: int) -> MLPExperts | GatedMLPExperts:
    """Build E experts that start as copies of an MLP which is of one of the forms."""
    form = form_of(mlp)
    assert form is not None
    return form.experts.like(mlp, num_experts=num_experts, copies=True)


def features_of(mlp: nn.Module) -> int:
    """Return the number of features D of the tokens of an MLP which is of one of the forms."""
    form = form_of(mlp)
    assert form is not None
    last = mlp.get_submodule(form.last)
    assert isinstance(last, nn.Linear)
    return last.out_features
