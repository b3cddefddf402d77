"""Evaluating the end of a model repeatedly without recomputing its beginning."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from backdoorbench_moe.moe.temporary import hooked

Call = tuple[nn.Module, Any]


@contextmanager
def reuse_prefix(model: nn.Module, stop: Collection[nn.Module], run: Callable[[], object]) -> Iterator[None]:
    """Record the outputs of the modules before those in `stop`, and reuse them inside the block.

    During `run()`, the outputs of all submodules that return before the first module in `stop` is called are recorded.
    Inside the block, these submodules return the recorded outputs and ignore their inputs. This is exact if the model
    is in evaluation mode, is called as `model(batch)` with the same batch, and only modules in `stop` or after them
    were changed. Outputs that do not consist of tensors and numbers are recomputed.

    Args:
        model: The model, in evaluation mode.
        stop: The first modules that may be changed inside the block.
        run: Function that passes one batch through the model.
    """
    records = _record(model, set(stop), run)
    queue: list[Call] = []
    modules = {id(module): module for module, _ in records}
    hook = model.register_forward_pre_hook(lambda *_: queue.__setitem__(slice(None), records))
    # A module may already have a `forward` in its instance dictionary.
    own = {key: vars(module).get("forward") for key, module in modules.items()}
    for module in modules.values():
        module.forward = _replay(module, module.forward, queue)
    try:
        yield
    finally:
        hook.remove()
        for key, module in modules.items():
            del module.forward
            if (forward := own[key]) is not None:
                module.forward = forward


def _record(model: nn.Module, stop: set[nn.Module], run: Callable[[], object]) -> list[Call]:
    """The outermost calls that returned before `stop`, in order, with copies of their outputs."""
    records: list[Call] = []
    began: list[int] = []
    stopped = False

    def enter(module: nn.Module, *_: object) -> None:
        nonlocal stopped
        stopped = stopped or module in stop
        began.append(len(records))

    def leave(module: nn.Module, _: object, output: object) -> None:
        start = began.pop()
        if stopped or module is model:
            return
        if _can_copy(output):
            # The calls inside this one will not be repeated, since its output is recorded.
            del records[start:]
            records.append((module, _copy(output)))

    hooks = [module.register_forward_pre_hook(enter) for module in model.modules()]
    hooks += [module.register_forward_hook(leave) for module in model.modules()]
    with hooked(hooks):
        run()
    return records


def _replay(module: nn.Module, forward: Callable[..., Any], queue: list[Call]) -> Callable[..., Any]:
    def replay(*args: Any, **options: Any) -> Any:
        if queue and queue[0][0] is module:
            # A copy, since the output may be modified in place.
            return _copy(queue.pop(0)[1])
        return forward(*args, **options)

    return replay


def _can_copy(value: object) -> bool:
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return all(map(_can_copy, value))
    return isinstance(value, Tensor | int | float | None)


def _copy(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_copy, value))
    return value.clone() if isinstance(value, Tensor) else value
