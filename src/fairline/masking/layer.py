"""How a ReLU is switched off.

A masked ReLU is ``f(x) = m·relu(x) + (1 − m)·g(x)`` with one mask entry a unit: m = 1 keeps the ReLU, m = 0 puts its
surrogate g in its place, and m between the two (Cho et al. 2022) is what mask learning moves through. The surrogate is
the identity, with which ``f(x) = x − m·min(x, 0)``, or a polynomial for each channel
(:mod:`fairline.masking.surrogates`), of one degree or of several.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fairline.errors import FairlineError
from fairline.masking.sharing import Sharing, effective, require_signs, shared_relu
from fairline.masking.surrogates import (
    MIXED,
    OF_DEGREE,
    POWER_SCALES,
    SURROGATES,
    Surrogate,
    evaluate,
    held,
    require_surrogate,
)

Granularity = Literal["pixel", "channel", "layer"]
GRANULARITIES: tuple[Granularity, ...] = ("pixel", "channel", "layer")


def _ordered_as(x: Tensor, mask: Tensor) -> Tensor:
    """A mask, (C, H, W), in the memory order of x, (B, C, H, W), so that no operation on both transposes one."""
    if x.ndim == 4 and x.stride(1) == 1 < x.stride(3):
        return mask.unsqueeze(0).contiguous(memory_format=torch.channels_last).squeeze(0)
    return mask


def _sum_over_batch(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of values, (B, *shape), over the batch, (*shape), in the memory order of a mask of that shape."""
    # torch takes a contiguous result, and steps through channels-last values with it: ten times as long.
    return torch.sum(values, 0, out=torch.empty_like(mask))


class _FixedMaskedReLU(Function):
    """max(x, floor) with floor 0 where the ReLU is kept and −∞ where it is not; saves its output alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, floor: Tensor) -> Tensor:
        return torch.maximum(x, floor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])
        ctx.save_for_forward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        y, floor = ctx.saved_tensors
        # As torch's ReLU, the slope at 0 is 0. One vectorised pass: comparing and filling takes several times as long.
        return torch.ops.aten.threshold_backward(grad, y - floor, 0), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        y, floor = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(tangent, y - floor, 0)


class _LearnedMaskedReLU(Function):
    """x − m·min(x, 0) with gradients for x and m; saves min(x, 0) alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        negative = x.clamp_max(0)
        ordered = _ordered_as(x, mask.to(x.dtype))
        ctx.save_for_backward(negative, ordered)
        ctx.mask_dtype = mask.dtype
        return torch.addcmul(x, ordered, negative, value=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        negative, mask = ctx.saved_tensors
        # The gradient where x ≥ 0, and a step of m from the identity's towards it: two vectorised passes.
        kept = torch.ops.aten.threshold_backward(grad, negative, -torch.finfo(grad.dtype).tiny)
        grad_x = torch.lerp(grad, kept, mask)
        grad_mask = _sum_over_batch(grad * negative, mask).neg_().to(ctx.mask_dtype)
        return grad_x, grad_mask


class _LearnedPolynomial(Function):
    """m·relu(x) + (1 − m)·g(x) with gradients for x, m and the coefficients of g; saves x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, coefficients: Tensor) -> Tensor:
        mask, coefficients = _ordered_as(x, mask.to(x.dtype)), coefficients.to(x.dtype)
        ctx.save_for_backward(x, mask, coefficients)
        *lower, last = coefficients
        g = torch.addcmul(_scaled(lower[-1], len(lower) - 1), x, last, value=POWER_SCALES[len(lower)])
        for power in reversed(range(len(lower) - 1)):
            g.mul_(x).add_(_scaled(lower[power], power))
        return g.lerp_(x.clamp_min(0), mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, mask, coefficients = ctx.saved_tensors
        # Sums over the batch come first: all that follows is as small as the mask.
        passed = torch.ops.aten.threshold_backward(grad, x, 0)
        replaced = 1 - mask
        grad_x = (replaced * coefficients[1]) * grad
        sums, times_x = [_sum_over_batch(grad, mask)], grad
        for power in range(1, len(coefficients)):
            times_x = grad * x if power == 1 else times_x.mul_(x)
            sums.append(_sum_over_batch(times_x, mask).mul_(POWER_SCALES[power]))
            if power + 1 < len(coefficients):
                slope = (power + 1) * replaced * _scaled(coefficients[power + 1], power + 1)
                grad_x.addcmul_(times_x, slope)
        grad_x.addcmul_(passed, mask)
        opened = _sum_over_batch(passed.mul_(x), mask)
        grad_mask = opened - sum(c * total for c, total in zip(coefficients, sums, strict=True))
        axes = tuple(range(1, mask.ndim))
        pieces = [replaced * total for total in sums]
        grad_coefficients = torch.stack([p.sum(axes, keepdim=True) if axes else p for p in pieces])
        return grad_x, grad_mask, grad_coefficients


def _scaled(coefficient: Tensor, power: int) -> Tensor:
    return coefficient if POWER_SCALES[power] == 1 else POWER_SCALES[power] * coefficient


class MaskedReLU(nn.Module):
    """A ReLU with one mask entry for each unit of its activation.

    Fixed masks (:meth:`set_mask`) hold 0 or 1 and cost what a plain ReLU costs. Learned masks (:meth:`learn`)
    are real numbers with a gradient, one a unit, a channel or a layer. Kept units may share signs (:meth:`share`).

    Attributes:
        shape: Shape of the activation without the batch axis.
        kept: bool, ``shape``: which ReLUs a fixed mask keeps.
        weight: The learned mask, compact (``shape``, (C, 1, …) or (1, …)); None while the mask is fixed.
        gate: Turns ``weight`` into the mask, where the two are not the same; of the weight's shape.
        coefficients: Of the surrogate ``c₀ + c₁x + 0.2·c₂x² + 0.04·c₃x³``, (3 or 4, C, 1, …), trained with the other
            weights; None where no channel has any to learn.
        degrees: int64, (C,): the degree of each channel's surrogate, 0 for zero and 1 for the identity, where they were
            chosen channel by channel or are zero; else None.
        signs: int32, ``(2, *shape)``, where units share signs: which one decides each unit, and which one it votes for;
            see :mod:`fairline.masking.sharing`. None where every unit has its own.
    """

    kept: Tensor
    _floor: Tensor
    signs: Tensor | None
    weight: nn.Parameter | None
    gate: nn.Module | None
    coefficients: nn.Parameter | None
    degrees: Tensor | None

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("kept", torch.ones(self.shape, dtype=torch.bool))
        self.register_buffer("_floor", torch.zeros(self.shape), persistent=False)
        self.register_parameter("weight", None)
        self.register_module("gate", None)
        self.register_parameter("coefficients", None)
        self.register_buffer("degrees", None)
        self.register_buffer("signs", None)
        self._sharing: Sharing | None = None
        self._num_kept = math.prod(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the masked ReLU to x, ``(B, *shape)``."""
        if x.shape[1:] != self.shape:
            raise FairlineError(
                f"A mask made for activations of shape {self.shape} met one of shape {tuple(x.shape[1:])}; "
                "mask the model again with an example of the new input size."
            )
        if self.weight is not None:
            return self._learned(x)
        if self._num_kept == 0:
            return self.substitute(x)
        if self.signs is not None:
            assert self._sharing is not None
            return shared_relu(x, self._sharing)
        if self._num_kept == self.kept.numel():
            return F.relu(x)
        if self.coefficients is None and self.degrees is None:
            return cast(Tensor, _FixedMaskedReLU.apply(x, _ordered_as(x, self._floor.to(x.dtype))))
        return torch.where(_ordered_as(x, self.kept), F.relu(x), self.substitute(x))

    def _learned(self, x: Tensor) -> Tensor:
        coefficients = self.polynomial
        if coefficients is not None:
            return cast(Tensor, _LearnedPolynomial.apply(x, self.mask, coefficients))
        return cast(Tensor, _LearnedMaskedReLU.apply(x, self.mask))

    def substitute(self, x: Tensor) -> Tensor:
        """The surrogate g(x) of every unit, kept or not; x is ``(B, *shape)``."""
        coefficients = self.polynomial
        return x if coefficients is None else evaluate(coefficients.to(x.dtype), x)

    @property
    def polynomial(self) -> Tensor | None:
        """The surrogate's coefficients, those that are fixed included, (2 to 4, C, 1, …); None for the identity."""
        if self.degrees is None:
            return self.coefficients
        start = self._start(2) if self.coefficients is None else self.coefficients
        return held(start, self.degrees)

    @property
    def channel_degrees(self) -> Tensor:
        """The degree of each channel's surrogate, int64, (C,)."""
        if self.degrees is not None:
            return self.degrees
        degree = 1 if self.coefficients is None else len(self.coefficients) - 1
        return torch.full((self.shape[0],), degree, device=self.kept.device)

    @property
    def surrogate(self) -> str:
        """What stands in a ReLU's place: a key of :data:`SURROGATES`, or ``"mixed"`` where channels differ."""
        found = self.channel_degrees.unique().tolist()
        return OF_DEGREE[found[0]] if len(found) == 1 else MIXED

    def use_surrogate(self, surrogate: Surrogate) -> None:
        """Choose what stands in a ReLU's place; a new polynomial starts as what stood there before.

        Args:
            surrogate: ``"identity"``, ``"quadratic"``, ``"cubic"`` or ``"zero"``.

        Raises:
            FairlineError: There is no such surrogate.
        """
        require_surrogate(surrogate)
        if surrogate != "identity":
            self._require_own_signs("other surrogate can stand beside")
        degree = SURROGATES[surrogate].degree
        before, self.degrees = self.polynomial, None
        self._hold(before, degree + 1 if SURROGATES[surrogate].learned else 0)
        if degree == 0:
            self.degrees = torch.zeros(self.shape[0], dtype=torch.int64, device=self.kept.device)

    def use_degrees(self, degrees: Tensor) -> None:
        """Choose what stands in a ReLU's place channel by channel; a new polynomial starts as what stood there before.

        Args:
            degrees: int64, (C,): 0 for zero, 1 for the identity, 2 or 3.

        Raises:
            FairlineError: There is no surrogate of such a degree, or they are not one a channel.
        """
        found = torch.as_tensor(degrees, dtype=torch.int64, device=self.kept.device)
        if found.shape != self.shape[:1]:
            raise FairlineError(f"{self.shape[0]} channels need as many degrees, not {tuple(found.shape)}.")
        unknown = set(found.tolist()) - OF_DEGREE.keys()
        if unknown:
            raise FairlineError(f"There is no surrogate of degree {min(unknown)}; degrees are 0 to {max(OF_DEGREE)}.")
        if bool((found != 1).any()):
            self._require_own_signs("other surrogate can stand beside")
        before = self.polynomial
        self._hold(before, len(POWER_SCALES) if bool((found > 1).any()) else 0)
        self.degrees = found.clone()

    def _start(self, rows: int) -> Tensor:
        """Coefficients of the identity."""
        start = torch.zeros(rows, self.shape[0], *[1] * (len(self.shape) - 1), device=self.kept.device)
        start[1] = 1
        return start

    def _hold(self, before: Tensor | None, rows: int) -> None:
        """Keep so many coefficients of each channel, with the values that they had so far."""
        if rows == 0:
            self.coefficients = None
            return
        values = self._start(rows) if before is None else before.new_zeros(rows, *before.shape[1:])
        if before is not None:
            values[: len(before)] = before.detach()[:rows]
        if self.coefficients is not None and len(self.coefficients) == rows:
            with torch.no_grad():
                self.coefficients.copy_(values)
        else:
            self.coefficients = nn.Parameter(values)

    @property
    def mask(self) -> Tensor:
        """The mask, float, with the shape of the activation.

        While it is learned it is a view of ``compact_mask``, or 0 where the fixed mask was 0 before.
        """
        if self.weight is None:
            return self.kept.float()
        mask = self.compact_mask.expand(self.shape)
        return mask if self._num_kept == self.kept.numel() else mask * self.kept

    @property
    def compact_mask(self) -> Tensor:
        """The learned mask, of the shape of ``weight``: the weight itself, or what the gate makes of it."""
        weight = cast(Tensor, self.weight)
        return weight if self.gate is None else cast(Tensor, self.gate(weight))

    def covered(self) -> Tensor:
        """How many ReLUs each entry of the learned mask switches, int64, of the shape of ``weight``."""
        shape = cast(Tensor, self.weight).shape
        axes = [axis for axis, size in enumerate(shape) if size != self.shape[axis]]
        counts = self.kept.long()
        return counts.sum(axes, keepdim=True) if axes else counts

    @property
    def num_kept(self) -> int:
        """How many ReLUs a fixed mask keeps for each sample; of units that share a sign, one."""
        return self._num_kept

    def share(self, signs: Tensor | None) -> None:
        """Let units share signs, which decide for those of them that the mask keeps.

        Args:
            signs: ``(2, *shape)``, as :func:`~fairline.masking.sharing.patches` gives them; None for a sign a unit.

        Raises:
            FairlineError: They are no signs of this layer, its mask is being learned, or quadratics stand in it.
        """
        if signs is not None:
            require_signs(signs, self.shape)
            if self.weight is not None or self.surrogate != "identity":
                raise FairlineError("Signs are shared under a fixed mask, beside which the identity stands.")
            signs = signs.to(self.kept.device, torch.int32)
        self.signs = signs
        self._refresh()

    @property
    def effective_signs(self) -> Tensor | None:
        """int64, ``(2, *shape)``: the shared signs that decide a kept unit, numbered from 0 on; None where none are."""
        return None if self.signs is None else effective(self.signs, self.kept)

    def _require_own_signs(self, what: str) -> None:
        if self.signs is not None:
            raise FairlineError(f"Units of this layer share signs, which no {what}; give each unit its own (share).")

    def set_mask(self, kept: Tensor) -> None:
        """Fix the mask.

        Args:
            kept: bool, broadcastable to ``shape``.
        """
        self.weight = self.gate = None
        self.kept = kept.to(device=self.kept.device, dtype=torch.bool).expand(self.shape).contiguous()
        self._refresh()

    def learn(self, granularity: Granularity = "pixel") -> nn.Parameter:
        """Make the mask learnable, starting from the fixed one; ReLUs that it has cut stay cut.

        Args:
            granularity: One entry a ``"pixel"`` (unit), ``"channel"`` or ``"layer"``.

        Returns:
            The parameter to optimise. An entry starts at 1 where one of its units is kept, else at 0.
        """
        self._require_own_signs("mask can be learned with")
        start = self.kept.float()
        shared = {"pixel": 0, "channel": 1, "layer": None}[granularity]
        if shared != 0:
            axes = tuple(range(shared or 0, len(self.shape)))
            start = start.amax(axes, keepdim=True) if axes else start
        self.weight = nn.Parameter(start.clone())
        return self.weight

    def _refresh(self) -> None:
        self._num_kept, self._sharing = int(self.kept.sum()), None
        if self.signs is not None:
            # Not when it is first needed: what is made within torch.func's transforms must not be kept.
            self._sharing = Sharing.of(effective(self.signs, self.kept))
            self._num_kept = self._sharing.signs
        self._floor = torch.where(self.kept, 0.0, -math.inf)

    def _apply(self, *args: Any, **kwargs: Any) -> MaskedReLU:
        super()._apply(*args, **kwargs)
        if self._sharing is not None:
            self._sharing = self._sharing.to(self.kept.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}kept" in state_dict:
            # A state with masks says itself whether signs are shared.
            signs = state_dict.get(f"{prefix}signs")
            self.signs = None if signs is None else torch.empty_like(signs, device=self.kept.device)
        if (degrees := state_dict.get(f"{prefix}degrees")) is not None:
            self.use_degrees(degrees)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._refresh()

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        text = f"shape={self.shape}, " + ("learned" if self.weight is not None else f"kept={self._num_kept}")
        text += "" if self.signs is None else f", deciding {int(self.kept.sum())} units"
        return text if self.surrogate == "identity" else f"{text}, surrogate={self.surrogate}"


def masked_relus(model: nn.Module) -> dict[str, MaskedReLU]:
    """The masked ReLUs of a model by name, in the order of its modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedReLU)}


def surrogate_of(model: nn.Module) -> str:
    """What stands in the place of a model's ReLUs: a key of :data:`SURROGATES`, or ``"mixed"``."""
    kinds = {layer.surrogate for layer in masked_relus(model).values()} or {"identity"}
    return kinds.pop() if len(kinds) == 1 else MIXED
