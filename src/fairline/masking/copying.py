"""A copy of a network: of the plain module inside wrappers, also where it holds what ``copy.deepcopy`` refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fairline.errors import FairlineError

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside ``DataParallel``, ``DistributedDataParallel``, ``AveragedModel`` and ``torch.compile``."""
    while True:
        # Asked by its attribute: importing the class would load the whole compiler.
        inside = model.module if isinstance(model, _WRAPPERS) else getattr(model, "_orig_mod", None)
        if not isinstance(inside, nn.Module):
            return model
        model = inside


def copy_model(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with a network.

    Wrappers are taken off, also those of submodules. Tensors that a forward left on a module (kept activations, the
    weight of an old-style ``weight_norm``) are copied without their history, generators with their state. Hooks and
    functions that hold the network hold the copy instead.

    Args:
        model: Any network. It is not changed.

    Returns:
        The copy.

    Raises:
        FairlineError: Something on it cannot be copied.
    """
    model = unwrap(model)
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in _values(vars(module)):
            if isinstance(value, ModuleType):
                memo[id(value)] = value
            elif isinstance(value, torch.Generator):
                memo[id(value)] = torch.Generator(value.device).set_state(value.get_state())
            elif not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        # The innermost first: an outer wrapper's network may hold another one.
        for module in reversed(list(model.modules())):
            if (inside := unwrap(module)) is not module:
                memo[id(module)] = copy.deepcopy(inside, memo)
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FairlineError(f"{type(model).__name__} cannot be copied: {_culprit(model)} ({reason}).") from None
    _rebind(copied, memo)
    return copied


def _rebind(copied: nn.Module, twins: Mapping[int, Any]) -> None:
    """Make functions that a network keeps (hooks, attributes) hold the copy's modules where they held its own."""
    for module in copied.modules():
        own = vars(module)
        for held in (own, *(value for value in own.values() if isinstance(value, dict))):
            for name, value in held.items():
                if isinstance(value, FunctionType):
                    held[name] = _rebound(value, twins)


def _rebound(function: FunctionType, twins: Mapping[int, Any]) -> FunctionType:
    def twin(value: Any) -> Any:
        return twins.get(id(value), value) if isinstance(value, nn.Module) else value

    def twin_cell(cell: CellType) -> CellType:
        try:
            return CellType(twin(cell.cell_contents))
        except ValueError:
            # Not assigned yet.
            return cell

    closure = tuple(map(twin_cell, function.__closure__ or ()))
    defaults = tuple(map(twin, function.__defaults__ or ()))
    if closure == (function.__closure__ or ()) and defaults == (function.__defaults__ or ()):
        return function
    bound = FunctionType(function.__code__, function.__globals__, function.__name__, defaults or None, closure)
    bound.__kwdefaults__ = {key: twin(value) for key, value in (function.__kwdefaults__ or {}).items()} or None
    bound.__dict__.update(function.__dict__)
    return bound


def _values(value: object, depth: int = 3) -> Iterator[Any]:
    """Tensors, generators and Python's modules in containers within containers."""
    if isinstance(value, Tensor | torch.Generator | ModuleType):
        yield value
    elif depth and isinstance(value, Mapping | list | tuple):
        for each in list(value.values() if isinstance(value, Mapping) else value):
            yield from _values(each, depth - 1)


def _culprit(model: nn.Module) -> str:
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(value)
            except Exception:
                where = f"attribute '{name}' of '{path}'" if path else f"its attribute '{name}'"
                return f"{where} is a {type(value).__name__}, which is none of its weights; keep it outside"
    return "one of its parts does not allow it"
