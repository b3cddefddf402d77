"""Load weights from a file into a model. Names and shapes must match, apart from a prefix of all names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from backdoorbench_moe.engine.weights.reading import Weights
from backdoorbench_moe.errors import RecordError
from backdoorbench_moe.moe.structure import Structured

# Prefixes of all names in the state dict of a model in `DataParallel`, and of a compiled model.
WRAPPING = ("module.", "_orig_mod.")
# Old files lack this counter of batch norms, which is only used if the momentum is None.
COUNTER = "num_batches_tracked"
LISTED = 10


@runtime_checkable
class _Renames(Protocol):
    """A model whose weights have different names in published files."""

    def own_name(self, name: str) -> str:
        """Convert a published name to the model's name."""

    def their_name(self, name: str) -> str:
        """Convert the model's name to the published name; the inverse of `own_name`."""


def fit_weights(
    model: nn.Module, weights: Weights, *, head: Literal["keep", "auto", "new"] = "keep"
) -> tuple[str, ...]:
    """Load weights into a model, in place.

    Prefixes that all names of the file have are removed: those in `WRAPPING`, and any other, such as "model.", if names
    fit the model only without it. If the model has the attribute `published_prefix`, such as "network.", the names may
    also lack this prefix. If it has the methods `own_name` and `their_name`, which convert published names to those of
    the model and back, the names may also be the published ones.

    Args:
        model: The model.
        weights: The weights.
        head: Which classifier to use: "keep" for that of the file, which must match; "auto" for that of the file if it
            has the model's number of classes, and otherwise the model's; "new" for the model's.

    Returns:
        The changes to the weights, each as one sentence for the user; the notes of `weights` come first.

    Raises:
        RecordError: Names or shapes do not match, which the message counts and of which it lists the first ones; or
            values do not have the model's kind of data type, or are not finite.
    """
    own = model.state_dict()
    tensors, notes, shown = _rename(model, own, weights.tensors)
    if head != "keep":
        tensors, more = _leave_head(model, own, tensors, always=head == "new")
        notes += more
    counters = [name for name in own if name.endswith(COUNTER)]
    kept = {name: own[name] for name in counters if name not in tensors or _is_infinite(tensors[name])}
    tensors = {**tensors, **kept}
    if faults := _misfits(own, tensors, shown):
        why = _other_classes(model, own, tensors) + _small_stem(model, own, tensors)
        raise RecordError(f"weights {weights.file}: do not match the model: {faults}{why}")
    changed, more = _convert(replace(weights, tensors=tensors), own, _must_be_finite(model), shown)
    model.load_state_dict(changed)
    return (*weights.notes, *notes, *more)


def _rename(
    model: nn.Module, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...], Callable[[str], str]]:
    """Convert the names in a file to those of the model: remove or add a prefix of all names, or translate them.

    Returns:
        The tensors by the model's names, the changes, and a function from a name of the model to that in the file.
    """
    renamed, notes = dict(tensors), []
    published = getattr(model, "published_prefix", "")
    while prefix := _outer_prefix(own, renamed, published):
        renamed = {name.removeprefix(prefix): tensor for name, tensor in renamed.items()}
        notes.append(f"the prefix {_printable(prefix)!r} was removed from all names")
    added = "" if any(name.startswith(published) for name in renamed) else published
    renamed = {f"{added}{name}": tensor for name, tensor in renamed.items()}
    if not isinstance(model, _Renames) or any(name in own for name in renamed):
        return renamed, tuple(notes), lambda name: name.removeprefix(added)
    renamed = {model.own_name(name): tensor for name, tensor in renamed.items()}
    return renamed, tuple(notes), model.their_name


def _outer_prefix(own: Mapping[str, Tensor], names: Iterable[str], published: str) -> str:
    """Return the prefix to remove from all names of a file; "" for none."""
    first = next(iter(names), "")
    prefix = first[: first.find(".") + 1]
    if not prefix or not _all_start(names, prefix) or _all_start(own, prefix):
        return ""

    def known(name: str) -> bool:
        return name in own or f"{published}{name}" in own

    fits_only_without = any(known(name.removeprefix(prefix)) for name in names) and not any(map(known, names))
    return prefix if prefix in WRAPPING or fits_only_without else ""


def _all_start(names: Iterable[str], prefix: str) -> bool:
    return all(name.startswith(prefix) and name != prefix for name in names)


def _leave_head(
    model: nn.Module, own: Mapping[str, Tensor], tensors: dict[str, Tensor], *, always: bool
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Replace the head of a file by the model's: always, or only if the file has none or one with another shape."""
    head = set(head_names(model))
    theirs = head & tensors.keys()
    other = any(tensors[name].shape != own[name].shape for name in theirs)
    if not head or not (always or other or not theirs):
        return tensors, ()
    why = "as requested" if always else "the file has none"
    if other and not always:
        last = next(name for name in own if name in theirs and tensors[name].shape != own[name].shape)
        why = f"{last} is {_shape(tensors[last])} in the file and {_shape(own[last])} in the model"
    kept = {name: tensor for name, tensor in tensors.items() if name not in head}
    return {**kept, **{name: own[name] for name in head}}, (f"the head is randomly initialised: {why}",)


def head_names(model: nn.Module) -> list[str]:
    """The names of a model's classifier in its state dict; empty if the model does not declare it."""
    modules = model.components().get("head", []) if isinstance(model, Structured) else []
    places = [name for name, module in model.named_modules() if any(module is each for each in modules)]
    return [name for name in model.state_dict() if any(name.startswith(f"{place}.") for place in places)]


def _misfits(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], shown: Callable[[str], str]) -> str:
    """Count the missing and unexpected names and the wrong shapes, and list the first of each; "" if there are none."""
    shapes = [
        f"{shown(name)} (expected {_shape(own[name])}, got {_shape(tensors[name])})"
        for name in own
        if name in tensors and own[name].shape != tensors[name].shape
    ]
    kinds = {
        "missing": [shown(name) for name in own if name not in tensors],
        "unexpected": [_printable(shown(name)) for name in tensors if name not in own],
        "with another shape": shapes,
    }
    return "; ".join(_list_some(kind, names) for kind, names in kinds.items() if names)


def _small_stem(model: nn.Module, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """A hint for the error message if the model has a smaller first convolution than the file; otherwise ""."""
    name = getattr(model, "small_stem_weight", "")
    if not name or name not in own or name not in tensors or own[name].shape == tensors[name].shape:
        return ""
    return (
        "; the model's first convolution was made smaller, for small images: model.small_stem=false keeps it"
    )


def _other_classes(model: nn.Module, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """A hint for the error message if the head has another number of classes; otherwise ""."""
    for name in head_names(model):
        ours, theirs = own[name], tensors.get(name)
        if theirs is None or not ours.ndim or ours.shape[1:] != theirs.shape[1:] or not theirs.ndim:
            continue
        if len(ours) != len(theirs):
            return f"; the weights are for {len(theirs)} classes, and the data have {len(ours)}"
    return ""


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def _list_some(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} {kind}: {', '.join(names[:LISTED])}{more}"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


def _convert(
    weights: Weights, own: Mapping[str, Tensor], finite: set[str], shown: Callable[[str], str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Convert tensors with the correct shapes to the data types of the model.

    Args:
        weights: The weights.
        own: The model's state dict.
        finite: Names of the tensors that must not contain infinity. No tensor may contain NaN.
        shown: Converts a name of the model to that in the file, for error messages.
    """
    converted, kinds = {}, {}
    for name, tensor in weights.tensors.items():
        wanted = own[name].dtype
        where = f"weights {weights.file}: {_printable(shown(name))}"
        if _kind(tensor.dtype) != _kind(wanted) and not _holds_integers(tensor, wanted):
            raise RecordError(f"{where}: expected {wanted}, got {tensor.dtype}")
        if tensor.dtype != wanted and _kind(tensor.dtype) == _kind(wanted):
            kinds[tensor.dtype] = wanted
        converted[name] = values = tensor.detach().to(wanted, copy=True)
        if not values.is_floating_point():
            continue
        if values.isnan().any() or (name in finite and values.isinf().any()):
            raise RecordError(f"{where}: expected finite numbers, found NaN or infinity")
    notes = (f"weights of type {given} were converted to {wanted}" for given, wanted in kinds.items())
    return converted, tuple(notes)


def _is_infinite(counter: Tensor) -> bool:
    """Whether a counter was too large for the float type to which it was cast: float16 ends at 65504."""
    return counter.is_floating_point() and counter.numel() == 1 and bool(counter.isinf().any())


def _holds_integers(tensor: Tensor, wanted: torch.dtype) -> bool:
    """Whether floats can be converted to an integer type: casting a whole state dict also casts its counters."""
    if not tensor.is_floating_point() or _kind(wanted) != "integer":
        return False
    # 2 ** 53 is the largest float64 below which all integers are represented.
    values = tensor.double()
    return bool((values.isfinite() & (values == values.round()) & (values.abs() < 2**53)).all())


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "float"
    return "complex" if dtype.is_complex else "bool" if dtype == torch.bool else "integer"


def _must_be_finite(model: nn.Module) -> set[str]:
    """Names of parameters and of batch norm statistics. Other buffers may contain infinity, such as attention masks."""
    statistics = {name for name, _ in model.named_buffers() if ".running_" in f".{name}"}
    return {name for name, _ in model.named_parameters()} | statistics
