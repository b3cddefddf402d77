"""Merging experts that were fine-tuned from one dense model into a mixture, and extracting experts from a mixture.

Experts differ from the base only in their MLPs; see `structure.Mergeable`. In the merged model, an MoE layer replaces
each MLP. All other weights are those of the base.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from backdoorbench_moe.errors import ConfigError, UnknownNameError
from backdoorbench_moe.moe.layers import MoEModel, Router, SparseMoELayer
from backdoorbench_moe.moe.mlp_forms import experts_like, features_of, form_of
from backdoorbench_moe.moe.routed import Routing
from backdoorbench_moe.moe.structure import (
    ChannelGroup,
    Mergeable,
    MergesItself,
    Structured,
    WithFeatures,
    WithMLPs,
    data_options,
    patch_size_of,
    takes_text,
)
from backdoorbench_moe.moe.temporary import hooked, restored

# Prefix of the names of the dense model's modules in a merged model.
NETWORK = "network."


def check_mergeable(model: nn.Module) -> WithMLPs:
    """Check that experts which are fine-tuned from a model can be merged.

    Args:
        model: A dense model.

    Returns:
        The same model; it is `Mergeable` unless it takes texts.

    Raises:
        ConfigError: The model lacks a method or attribute, or its MLPs cannot be merged.
    """
    text = takes_text(model)
    if not isinstance(model, WithMLPs if text else Mergeable):
        methods = "a method mlps" if text else "methods mlps and token_layout"
        raise _refusal(model, f"expected {methods} (see backdoorbench_moe.moe.structure)")
    mlps = model.mlps()
    if not text and patch_size_of(model) is None:
        raise _refusal(model, "expected an attribute patch_size, the side of a patch in pixels")
    if not mlps:
        raise _refusal(model, "it has no MLPs")
    modules = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(mlps, Mapping) or any(modules.get(name) is not mlp for name, mlp in mlps.items()):
        raise _refusal(model, "expected that mlps returns modules of the model by their dotted names")
    for name, mlp in () if isinstance(model, MergesItself) else mlps.items():
        if form_of(mlp) is None:
            raise _refusal(
                model,
                f"{name}: expected linear layers fc1 (hidden units, D) and fc2 (D, hidden units) with biases, "
                "an activation act between them, and no other weights; or gate_proj, up_proj, down_proj and act_fn "
                "as in Llama, without biases",
            )
    return model


def _refusal(model: nn.Module, reason: str) -> ConfigError:
    return ConfigError(f"model: {type(model).__name__} cannot be merged: {reason}")


def expert_names(model: nn.Module) -> set[str]:
    """Return the state-dict names of the tensors that belong to the MLPs of a dense model.

    Raises:
        ConfigError: The model cannot be merged.
    """
    return {
        f"{name}.{part}" for name, mlp in check_mergeable(model).mlps().items() for part in mlp.state_dict()
    }


def check_same_base(
    base: Mapping[str, Tensor], expert: Mapping[str, Tensor], names: Collection[str], where: str
) -> None:
    """Check that an expert was fine-tuned from a base: all tensors outside the MLPs are equal bit for bit.

    Args:
        base: State dict of the base.
        expert: State dict of the expert.
        names: Names of the tensors that belong to the MLPs, see `expert_names`. Only their shapes must be equal.
        where: Name of the expert in the error message.

    Raises:
        ConfigError: A tensor differs; the message names the first one in the order of the base.
    """
    for name in [*base, *(name for name in expert if name not in base)]:
        first, second = base.get(name), expert.get(name)
        if difference := _difference(first, second, "the base", only_shape=name in names):
            raise ConfigError(f"{where}: is not tuned from this base: {name} {difference}")


def _difference(wanted: Tensor | None, got: Tensor | None, whose: str, *, only_shape: bool) -> str | None:
    """Describe how a tensor differs from the expected one of `whose`, such as "the base"; None if it does not."""
    if wanted is None:
        return f"is not in {whose}"
    if got is None:
        return "is missing"
    if (wanted.shape, wanted.dtype) != (got.shape, got.dtype):
        forms = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (wanted, got)]
        return f"is {forms[1]}, in {whose} {forms[0]}"
    return None if only_shape or _same_bits(wanted, got) else "has other values"


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same bytes. Unlike in `torch.equal`, NaN equals NaN."""
    one, other = (tensor.detach().flatten().view(torch.uint8) for tensor in (first, second))
    return torch.equal(one, other.to(one.device))


class MergedModel(MoEModel):
    """A dense model with a sparse MoE layer of E experts in place of each MLP.

    All experts are initialised as copies of the MLP they replace; `load_experts` loads their weights.

    Args:
        dense: The dense model, which is copied.
        num_experts: Number of experts E in each layer, at least 1.
        gate: Function that builds the router of one layer from the number of features D and E, such as a `Gate`.

    Attributes:
        network: The copy of the dense model. The names of its MoE layers are "network." and the name of the MLP.
        num_experts: Number of experts E.

    Raises:
        ConfigError: The model cannot be merged, or E is below 1.
    """

    def __init__(self, dense: nn.Module, num_experts: int, gate: Callable[[int, int], Router]) -> None:
        super().__init__()
        if num_experts < 1:
            raise ConfigError.expected("num_experts", "an integer of at least 1", num_experts)
        check_mergeable(dense)
        self.network, self.num_experts = copy.deepcopy(dense), num_experts
        prefix = 0
        if isinstance(dense, Mergeable):
            self.patch_grid, prefix = dense.token_layout()
            self.patch_size = int(dense.patch_size)  # type: ignore[arg-type]
        # Of the copy: experts share the activation and the dropouts of their MLP.
        mlps = check_mergeable(self.network).mlps()
        for name, mlp in mlps.items():
            experts = experts_like(mlp, num_experts)
            router = gate(features_of(mlp), num_experts)
            layer = SparseMoELayer(experts, router, name=NETWORK + name, num_prefix_tokens=prefix)
            self.network.set_submodule(name, layer)
        self.train(dense.training)

    @property
    def data_options(self) -> tuple[str, ...]:
        """The options of the dense model (see `structure.data_options`), which show whether a mixture takes texts."""
        return data_options(self.network)

    def routers(self) -> list[nn.Module]:
        """Return the router of each layer, in the order of the layers."""
        return [layer.router for layer in self.layers()]

    def load_experts(self, base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]]) -> None:
        """Load E experts; see the function `load_experts`."""
        load_experts(self, base, experts)

    def extract_features(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [0, 1] to features (B, D), the input of the classifier.

        Raises:
            ConfigError: The dense model does not implement `WithFeatures`.
        """
        return self._with_features().extract_features(images)

    def classify(self, features: Tensor) -> Tensor:
        """Map features (B, D) to logits (B, classes).

        Raises:
            ConfigError: The dense model does not implement `WithFeatures`.
        """
        return self._with_features().classify(features)

    def _with_features(self) -> WithFeatures:
        if not isinstance(self.network, WithFeatures):
            raise ConfigError(
                f"model: {type(self.network).__name__} does not give its features: "
                "expected methods extract_features and classify (see backdoorbench_moe.moe.structure)"
            )
        return self.network

    def components(self) -> dict[str, list[nn.Module]]:
        """Return the experts and routers of all layers, and the head if the dense model returns it."""
        named = self.network.components() if isinstance(self.network, Structured) else {}
        return {**super().components(), **{name: named[name] for name in ("head",) if name in named}}

    def prunable(self) -> dict[str, list[ChannelGroup]]:
        """Return the hidden units of each expert in the last layer, and the last convolution before it in its block."""
        block, _, own = self.layers()[-1].name.rpartition(".")
        convs = []
        for name, module in self.get_submodule(block).named_modules():
            if name == own:
                break
            if isinstance(module, nn.Conv2d):
                convs.append(module)
        trunk = {"trunk": [ChannelGroup.whole("trunk", convs[-1])]} if convs else {}
        return {**super().prunable(), **trunk}


@torch.no_grad()
def load_experts(
    merged: MergedModel, base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]]
) -> None:
    """Load the MLPs of E experts and all other weights of the base into a merged model, in place.

    Routers keep their weights, and muted or masked experts remain so. If an error is raised, nothing is loaded.

    Args:
        merged: The merged model.
        base: State dict of the base.
        experts: State dict of each of the E experts, with the same names as `base`.

    Raises:
        ConfigError: The number of experts, a name or a shape does not match the model, or an expert was not fine-tuned
            from the base.
    """
    if len(experts) != merged.num_experts:
        raise ConfigError.expected("experts", f"{merged.num_experts} state dicts", len(experts))
    state, stacked, shared = merged.state_dict(), _stacked_names(merged), _shared_names(merged)
    wanted = {name: state[key].unflatten(0, (merged.num_experts, -1))[0] for key, name in stacked.items()}
    wanted |= {name: state[key] for key, name in shared.items()}
    for name in [*wanted, *(name for name in base if name not in wanted)]:
        first, second = wanted.get(name), base.get(name)
        if difference := _difference(first, second, "the model", only_shape=True):
            raise ConfigError(f"base: {name} {difference}")
    for number, expert in enumerate(experts):
        check_same_base(base, expert, {*stacked.values()}, f"expert {number}")
    for key, name in shared.items():
        state[key].copy_(base[name])
    for key, name in stacked.items():
        state[key].copy_(torch.cat([expert[name] for expert in experts]))


def expert_of(merged: MergedModel, index: int) -> dict[str, Tensor]:
    """Return the state dict of one expert as a dense model, the inverse of `load_experts`.

    Args:
        merged: The merged model.
        index: Index of the expert, 0 to E - 1.

    Returns:
        Copies of the tensors by name. They do not depend on whether the expert is muted or masked.

    Raises:
        ConfigError: There is no such expert.
    """
    _check_expert(merged, index)
    state = merged.state_dict()
    found = {name: state[key].clone() for key, name in _shared_names(merged).items()}
    for key, name in _stacked_names(merged).items():
        found[name] = state[key].unflatten(0, (merged.num_experts, -1))[index].clone()
    return found


@contextmanager
def only_expert(merged: MergedModel, index: int) -> Iterator[None]:
    """Mask all experts except one in every layer of a merged model inside the block.

    In evaluation mode, the model then computes the same as this expert alone, as a dense model, because the weights of
    the outputs sum to 1. Afterwards, the previous masks are restored.

    Args:
        merged: The merged model, which is changed in place.
        index: Index of the expert, 0 to E - 1.

    Raises:
        ConfigError: There is no such expert.
    """
    _check_expert(merged, index)
    masks = [layer.router.get_buffer("masked") for layer in merged.layers()]
    with restored(masks):
        for mask in masks:
            mask.copy_(torch.arange(merged.num_experts, device=mask.device) != index)
        yield


def _check_expert(merged: MergedModel, index: int) -> None:
    if not 0 <= index < merged.num_experts:
        raise ConfigError.expected("expert", f"a number in 0..{merged.num_experts - 1}", index)


def _stacked_names(merged: MergedModel) -> dict[str, str]:
    """Names of the experts' weights in the merged model, mapped to those in the dense model."""
    return {
        f"{layer.name}.experts.{part}": f"{layer.name.removeprefix(NETWORK)}.{part}"
        for layer in merged.layers()
        for part in layer.experts.state_dict()
        if part != "heard"
    }


def _shared_names(merged: MergedModel) -> dict[str, str]:
    """Names of the tensors outside the MoE layers in the merged model, mapped to those in the dense model."""
    layers = tuple(f"{layer.name}." for layer in merged.layers())
    return {key: key.removeprefix(NETWORK) for key in merged.state_dict() if not key.startswith(layers)}


@contextmanager
def mlp_inputs(model: nn.Module, names: Collection[str] | None = None) -> Iterator[dict[str, Tensor]]:
    """Collect the inputs of the MLPs of a dense model, or of the MoE layers of a merged model, inside the block.

        with mlp_inputs(model) as inputs:
            logits = model(images)
        latents = list(inputs.values())

    Args:
        model: A `Mergeable`, or a model with MoE layers.
        names: Names of the MLPs as returned by `mlps`, or of the layers as in `Routing.layer`; None for all.

    Yields:
        A dict that each forward pass overwrites: name to (B, N, D), in the order of the layers, not detached. The N
        tokens are those before the patches, such as a class token, followed by the patches row by row; for texts, the
        positions.

    Raises:
        ConfigError: The model is neither mergeable nor merged, or has no MLP with a given name.
    """
    if isinstance(model, MoEModel):
        modules: dict[str, nn.Module] = {layer.name: layer for layer in model.layers()}
    else:
        modules = check_mergeable(model).mlps()
    for name in names or ():
        if name not in modules:
            raise UnknownNameError("mlp", name, modules)
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            found[name] = given[0].flatten(1, -2)

        return hook

    wanted = [name for name in modules if names is None or name in names]
    with hooked(modules[name].register_forward_pre_hook(keep(name)) for name in wanted):
        yield found


def gate_weights(routing: Routing) -> Tensor:
    """Return the share of each expert in the output of a layer, for each patch.

    The share is the gate of a selected expert divided by the sum of the gates of all selected experts of the patch. It
    equals the weight of the expert's output if the weights sum to 1, and is proportional to it for other routers.

    Args:
        routing: The routing of the layer.

    Returns:
        (B, E, P) float in [0, 1], which sums to 1 over the experts, or 0 for a patch without an expert.
    """
    chosen = (routing.gates * routing.selected).float()
    return chosen / chosen.sum(1, keepdim=True).clamp(min=torch.finfo(chosen.dtype).tiny)
