"""What a forward pass evaluates: its ReLUs, who calls them, whether an image reaches them; what else is nonlinear."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fairline.errors import FairlineError
from fairline.masking.layer import masked_relus

_ACTIVATIONS = """
relu6 hardtanh leaky_relu rrelu prelu elu selu celu gelu silu mish softplus softsign hardswish hardsigmoid hardshrink
softshrink tanhshrink logsigmoid sigmoid tanh glu lstm gru rnn_tanh lstm_cell gru_cell rnn_tanh_cell
"""
_REST = """
softmax log_softmax scaled_dot_product_attention multi_head_attention_forward max_pool1d max_pool2d max_pool3d
adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d maximum minimum max min amax amin where abs sign clamp
threshold exp log sqrt rsqrt norm gt ge lt le greater less
"""
#: Activation functions that are no ReLU, as torch names them.
ACTIVATIONS = frozenset(_ACTIVATIONS.split())
#: All nonlinear functions but ReLUs; private inference pays for each.
OTHERS = ACTIVATIONS | frozenset(_REST.split())
#: Operators of torch with a ReLU inside that no function of Python shows.
_FUSED = ("_addmm_activation", "_transformer_encoder_layer_fwd")
_NO_FUSED = ("leaky_relu", "prelu", "rrelu", "relu6")
_VALUES_DO_NOT_MATTER = ("_like", "new_", "empty", "zeros", "ones", "full")

#: Lines of code, outside of torch, from which a module's forward comes to a call: the innermost first.
Place = tuple[tuple[CodeType, int], ...]


#: Functions that can be a ReLU, and the names of their arguments.
RELU_LIKE = {
    "relu": ("input", "inplace"),
    "clamp": ("input", "min", "max"),
    "clip": ("input", "min", "max"),
    "clamp_min": ("input", "min"),
    "threshold": ("input", "threshold", "value", "inplace"),
}


def relu_input(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, bool] | None:
    """Recognise a call that computes max(x, 0).

    ``relu``, ``clamp`` with a minimum of 0 and no maximum, ``clamp_min`` with 0 and ``threshold`` with 0 and 0, as
    functions and methods.

    Args:
        func: Of torch.
        args: Given to it.
        kwargs: Given to it.

    Returns:
        Its input, and whether it overwrites it; None for any other call.
    """
    name = getattr(func, "__name__", "")
    kind = name.strip("_")
    if kind not in RELU_LIKE:
        return None
    given = dict(zip(RELU_LIKE[kind], args, strict=False)) | kwargs
    low = given.get("min", given.get("threshold", 0 if kind == "relu" else None))
    if isinstance(low, bool) or not isinstance(low, int | float) or low != 0:
        return None
    if given.get("max") is not None or given.get("value", 0) != 0:
        return None
    return given["input"], bool(given.get("inplace")) or name.endswith("_")


def is_plain_relu(module: nn.Module) -> bool:
    """Whether a module only calls a function: ``nn.ReLU``, ``nn.Threshold`` and heirs that change nothing."""
    if not isinstance(module, nn.ReLU | nn.Threshold) or "forward" in vars(module):
        return False
    return type(module).forward in (nn.ReLU.forward, nn.Threshold.forward)


@dataclass(frozen=True)
class Caller:
    """Who evaluates a ReLU.

    Attributes:
        modules: Whose forward is running, the innermost first; a plain ReLU module is left out.
        relu: The plain ReLU module that is called, or None for a function.
        place: The lines of code of the innermost module that lead to the call; none if torch's own code calls.
        checkpointed: How many of ``modules`` run within the innermost checkpoint; None without one.
    """

    modules: tuple[nn.Module, ...]
    relu: nn.Module | None
    place: Place
    checkpointed: int | None


_NOT_THE_USERS = ("torch.", "fairline.masking.")
_CALL = nn.Module._call_impl.__code__


def caller(*, innermost: bool = False) -> Caller:
    """Read from the stack who calls a function of torch at the moment.

    Args:
        innermost: Look no further than to the first module.

    Returns:
        What the stack tells.
    """
    modules: list[nn.Module] = []
    relu: nn.Module | None = None
    place: list[tuple[CodeType, int]] = []
    checkpointed: int | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not (innermost and modules):
        module_name = f"{frame.f_globals.get('__name__', '')}."
        if frame.f_code is _CALL:
            module = frame.f_locals["self"]
            if not modules and relu is None and is_plain_relu(module):
                relu = module
            else:
                modules.append(module)
        elif module_name == "torch.utils.checkpoint.":
            checkpointed = len(modules) if checkpointed is None else checkpointed
        elif not modules and not module_name.startswith(_NOT_THE_USERS):
            place.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return Caller(tuple(modules), relu, tuple(place), checkpointed)


def line_of(place: Place) -> str:
    """Where a place is, for people."""
    if not place:
        return "a line of torch"
    code, offset = place[0]
    line = next((line for start, end, line in code.co_lines() if start <= offset < end), None)
    return f"line {line} of {code.co_name}"


@dataclass(frozen=True)
class Call:
    """One evaluation of a ReLU in a forward pass.

    Attributes:
        scope: Path of the module whose code calls it.
        turn: Which call of that module this is, from 0.
        place: The lines of code that call.
        nth: Which call from there this is, within the turn.
        relu: Path of the ``nn.ReLU`` that is called, or None for a function.
        shape: Of the activation, with its batch axis.
        in_place: Whether the input is overwritten.
        reached: Whether the input depends on the images.
        checkpointed: As of its :class:`Caller`.
    """

    scope: str
    turn: int
    place: Place
    nth: int
    relu: str | None
    shape: tuple[int, ...]
    in_place: bool
    reached: bool
    checkpointed: int | None

    @property
    def key(self) -> tuple[int, Place, int]:
        """What tells it from other calls of the same scope."""
        return self.turn, self.place, self.nth


@dataclass
class Seen:
    """What one forward pass evaluated.

    Attributes:
        size: Of the batch.
        calls: Of ReLUs, in order.
        hidden: Path and class of modules with ReLUs inside one of torch's operators.
        others: Where each other nonlinear function ran: function → path → name of the function or of torch's module.
        turns: Calls of each module, by its path.
    """

    size: int
    calls: list[Call] = field(default_factory=list)
    hidden: dict[str, str] = field(default_factory=dict)
    others: defaultdict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    turns: Counter[str] = field(default_factory=Counter)


def watch(model: nn.Module, images: Tensor) -> Seen:
    """Run a model once and note what it evaluates, beside its masked ReLUs.

    Args:
        model: Run in its mode, with gradients if they are enabled; what a forward changes is changed.
        images: (B, …).

    Returns:
        What was seen.
    """
    seen = Seen(len(images))
    paths = {id(module): path for path, module in model.named_modules()}
    reach = _Reach(seen, paths, images)
    with _counting(model, seen.turns), reach, _Functions(seen, paths, reach):
        model(images)
    masked = masked_relus(model)
    seen.calls = [call for call in seen.calls if call.scope not in masked]
    return seen


def count_calls(model: nn.Module, images: Tensor) -> Counter[str]:
    """How often a forward pass calls each module, by its path."""
    turns: Counter[str] = Counter()
    with _counting(model, turns):
        model(images)
    return turns


@contextmanager
def _counting(model: nn.Module, turns: Counter[str]) -> Iterator[None]:
    def count(path: str) -> None:
        turns[path] += 1

    handles = [
        module.register_forward_pre_hook(lambda _module, _inputs, path=path: count(path))
        for path, module in model.named_modules()
        # They take no hooks, and nothing that runs inside them is redirected.
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Reach(TorchDispatchMode):
    """Follows what is computed from the images, and sees ReLUs inside torch's operators."""

    def __init__(self, seen: Seen, paths: dict[int, str], images: Tensor) -> None:
        super().__init__()
        self.seen = seen
        self.paths = paths
        self.in_function = False
        #: Memory that depends on the images. Held, so that no other tensor gets the same address.
        self.memory: dict[int, Tensor] = {}
        self.add(images)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would load its whole compiler to keep it out of here, which takes longer than all that is watched.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        fused = name in _FUSED or ("relu" in name and not any(each in name for each in _NO_FUSED))
        inputs = list(_tensors((args, kwargs or {})))
        reached = any(self.holds(each) for each in inputs)
        if fused and reached and not self.in_function and "backward" not in name:
            self.note_hidden()
        output = func(*args, **(kwargs or {}))
        if reached and not any(each in name for each in _VALUES_DO_NOT_MATTER):
            for each in _tensors(output):
                self.add(each)
        return output

    def note_hidden(self) -> None:
        modules = caller().modules
        path = next((self.paths[id(each)] for each in modules if id(each) in self.paths), "")
        self.seen.hidden[path] = type(modules[0]).__name__ if modules else "function"

    def add(self, tensor: Tensor) -> None:
        if tensor.numel():
            self.memory[_address(tensor)] = tensor

    def holds(self, tensor: Tensor) -> bool:
        return bool(tensor.numel()) and _address(tensor) in self.memory


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        # Sparse and foreign layouts have no storage.
        return id(tensor)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class _Functions(TorchFunctionMode):
    """Notes calls of nonlinear functions."""

    def __init__(self, seen: Seen, paths: dict[int, str], reach: _Reach) -> None:
        super().__init__()
        self.seen = seen
        self.paths = paths
        self.reach = reach
        self.counts: Counter[Any] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = relu_input(func, args, kwargs)
        if found is None:
            name = getattr(func, "__name__", "").strip("_")
            if name.startswith("rnn_relu"):
                self.reach.note_hidden()
            elif name in OTHERS and any(self.reach.holds(each) for each in _tensors((args, kwargs))):
                modules = caller().modules
                path = next((self.paths[id(each)] for each in modules if id(each) in self.paths), "")
                kind = type(modules[0]) if modules else nn.Module
                own = kind.__module__ in ("torch.nn.modules.activation", "torch.nn.modules.pooling")
                self.seen.others[name].setdefault(path, kind.__name__ if own else name)
            return func(*args, **kwargs)
        self.note(*found)
        self.reach.in_function = True
        try:
            return func(*args, **kwargs)
        finally:
            self.reach.in_function = False

    def note(self, x: Tensor, in_place: bool) -> None:
        who = caller()
        scope = self.paths.get(id(who.modules[0])) if who.modules else ""
        if scope is None:
            kind = type(who.modules[0]).__name__
            raise FairlineError(f"A {kind} with a ReLU is no part of the model that is saved; keep it in a ModuleList.")
        turn = self.seen.turns[scope] - 1
        nth = self.counts[scope, turn, who.place]
        self.counts[scope, turn, who.place] += 1
        self.seen.calls.append(
            Call(
                scope=scope,
                turn=turn,
                place=who.place,
                nth=nth,
                relu=None if who.relu is None else self.paths.get(id(who.relu)),
                shape=tuple(x.shape),
                in_place=in_place,
                reached=self.reach.holds(x),
                checkpointed=who.checkpointed,
            )
        )
