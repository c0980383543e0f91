"""Batch normalisation over the images of all ranks, on any device.

``torch.nn.SyncBatchNorm`` knows accelerators alone. Statistics of the parts are merged as by Chan, Golub and LeVeque
(1983), so that nothing cancels; the gradient is that of Ioffe and Szegedy (2015) with its two sums over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


class Connected(Protocol):
    """Ranks, as far as they are needed here."""

    rank: int
    size: int

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        ...


class SharedBatchNorm(TorchFunctionMode):
    """Every ``F.batch_norm`` in training mode, whoever calls it, is over all ranks' images while this is on."""

    def __init__(self, ranks: Connected) -> None:
        super().__init__()
        self.ranks = ranks

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
        count, mean, variance = statistics(x.detach(), self.ranks)
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean), momentum)
            if running_var is not None:
                running_var.lerp_((variance * (count / (count - 1))).to(running_var), momentum)
        scale = torch.rsqrt(variance + eps)
        return cast(Tensor, _Normalised.apply(x, weight, bias, mean, scale, count, self.ranks))


def statistics(x: Tensor, ranks: Connected) -> tuple[int, Tensor, Tensor]:
    """Of each channel over all ranks' images.

    Args:
        x: This rank's part, (B, C, …).
        ranks: Who has the others.

    Returns:
        How many values a channel has, their mean and their variance (divided by the count), (C,) each, float32 at
        least.

    Raises:
        ValueError: There is one value only, in torch's words.
    """
    exact = x.to(_exact(x))
    variance, mean = torch.var_mean(exact, _axes(x), correction=0)
    own = torch.cat([mean.new_tensor([x.numel() // x.shape[1]]), mean, variance])
    table = own.new_zeros(ranks.size, len(own))
    table[ranks.rank] = own
    counts, means, variances = ranks.total(table).split([1, len(mean), len(mean)], dim=1)
    shares = counts / counts.sum()
    count = int(counts.sum())
    if count < 2:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    mean = (shares * means).sum(0)
    return count, mean, (shares * (variances + (means - mean).square())).sum(0)


class _Normalised(Function):
    """(x − mean)·scale·weight + bias, whose mean and scale depend on all ranks' x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        count: int,
        ranks: Connected,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.count, ctx.ranks, ctx.bias_dtype = count, ranks, None if bias is None else bias.dtype
        factor = scale if weight is None else scale * weight
        shift = -mean * factor if bias is None else bias - mean * factor
        return torch.addcmul(_wide(shift, x), x, _wide(factor, x)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        normalised = (x - _wide(mean, x)) * _wide(scale, x)
        exact = grad.to(_exact(grad))
        own = torch.stack([exact.sum(_axes(x)), (exact * normalised).sum(_axes(x))])
        to_bias = None if ctx.bias_dtype is None else own[0].to(ctx.bias_dtype)
        to_weight = None if weight is None else own[1].to(weight.dtype)
        means = ctx.ranks.total(own.clone()) / ctx.count
        factor = scale if weight is None else scale * weight
        inner = exact - _wide(means[0], x) - normalised * _wide(means[1], x)
        return (_wide(factor, x) * inner).to(x.dtype), to_weight, to_bias, None, None, None, None


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _axes(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _wide(values: Tensor, x: Tensor) -> Tensor:
    """(C,) to go with (B, C, …)."""
    return values.view(1, -1, *[1] * (x.ndim - 2))
