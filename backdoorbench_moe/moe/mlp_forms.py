"""The kinds of MLPs that can become the experts of a mixture."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from backdoorbench_moe.moe.layers import GatedMLPExperts, MLPExperts


@dataclass(frozen=True)
class MLPForm:
    """A kind of MLP that maps D features to D features.

    Attributes:
        first: Names of the linear layers (hidden units, D).
        last: Name of the linear layer (D, hidden units).
        act: Name of the activation, a module without weights.
        drops: Names of optional dropouts.
        bias: Whether all linear layers have biases; otherwise, none has.
        experts: Class of the experts of this kind.
    """

    first: tuple[str, ...]
    last: str
    act: str
    bias: bool
    drops: tuple[str, ...]
    experts: type[MLPExperts] | type[GatedMLPExperts]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors in the state dict of such an MLP, and in the state dict of its experts."""
        parts = ("weight", "bias") if self.bias else ("weight",)
        return tuple(f"{name}.{part}" for name in (*self.first, self.last) for part in parts)

    def fits(self, mlp: nn.Module) -> bool:
        """Return whether an MLP is of this kind, without other weights and without other modules than identities."""
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


# As in timm, and in Llama of transformers.
PLAIN = MLPForm(("fc1",), "fc2", "act", True, ("drop1", "drop2"), MLPExperts)
GATED = MLPForm(("gate_proj", "up_proj"), "down_proj", "act_fn", False, (), GatedMLPExperts)
FORMS = (PLAIN, GATED)


def form_of(mlp: nn.Module) -> MLPForm | None:
    """Return the kind of an MLP, or None if it cannot be merged."""
    return next((form for form in FORMS if form.fits(mlp)), None)


def experts_like(mlp: nn.Module, num_experts: int) -> MLPExperts | GatedMLPExperts:
    """Build E experts that are initialised as copies of an MLP in one of `FORMS`."""
    form = form_of(mlp)
    assert form is not None
    return form.experts.like(mlp, num_experts=num_experts, copies=True)


def features_of(mlp: nn.Module) -> int:
    """Return the number of features D of the tokens of an MLP in one of `FORMS`."""
    form = form_of(mlp)
    assert form is not None
    last = mlp.get_submodule(form.last)
    assert isinstance(last, nn.Linear)
    return last.out_features
