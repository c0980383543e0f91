"""Whether a network trains faster in bfloat16 here: a few steps of each, in turn."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fairline.inference import logits_of
from fairline.masking import copy_model
from fairline.precision import FLOAT32, Arithmetic, Precision, has_bf16, require_precision

logger = logging.getLogger(__name__)

#: bfloat16 costs digits; it must win at least this much.
WORTHWHILE = 1.1
#: Images of a trial's step, and timed steps of each candidate.
TRIAL_IMAGES, TRIAL_STEPS = 64, 3
#: In torch 2.13 convolutions of 8 channels in this memory order corrupt memory on two threads of a CPU with AMX.
NARROWEST = 16
#: Kinds of devices of which this process has said that they lack bfloat16 units; once is enough for many stages.
_warned_of: set[str] = set()


def choose(
    precision: Precision | Arithmetic | None, model: nn.Module, images: Tensor, device: torch.device
) -> Arithmetic:
    """Settle what a network is trained in.

    ``"auto"`` is bfloat16 where the device multiplies it natively and, on a CPU, a trial of a few training steps of
    this very network says that it is at least :data:`WORTHWHILE` times as fast.

    Args:
        precision: What was asked for; what is settled already stays. By default float32 on a CPU, and on a GPU bfloat16
            if it multiplies that natively.
        model: Not changed.
        images: Normalised, (B, C, H, W); a few of them are enough.
        device: Of the training.

    Returns:
        The arithmetic.

    Raises:
        FairlineError: There is no such precision.
    """
    if isinstance(precision, Arithmetic):
        return precision
    if precision is None:
        precision = "auto" if device.type == "cuda" else "fp32"
    require_precision(precision)
    native = has_bf16(device)
    if precision == "fp32" or (precision == "auto" and not native):
        return FLOAT32
    if native and device.type != "cpu":
        return Arithmetic(bf16=True, channels_last=True)
    best = _trial(model, images[:TRIAL_IMAGES].to(device), device)
    if precision == "bf16":
        if not native and device.type not in _warned_of:
            _warned_of.add(device.type)
            logger.warning(
                "this processor has no bfloat16 units: bf16 runs at %.2f times the speed of fp32", best.ratio
            )
        return best
    logger.info("bf16 runs at %.2f times the speed of fp32", best.ratio)
    return best if best.ratio is not None and best.ratio >= WORTHWHILE else Arithmetic(ratio=best.ratio)


def suits_channels_last(model: nn.Module) -> bool:
    """Whether every convolution is wide enough for the channels-last order on a CPU; see :data:`NARROWEST`."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    # The images' own three channels or fewer do no harm.
    return bool(convolutions) and all(
        layer.groups == 1
        and layer.out_channels >= NARROWEST
        and (layer.in_channels >= NARROWEST or layer.in_channels <= 4)
        for layer in convolutions
    )


def _trial(model: nn.Module, images: Tensor, device: torch.device) -> Arithmetic:
    """The fastest way to train in bfloat16, with its ratio to float32."""
    candidates = [Arithmetic(bf16=True)]
    if suits_channels_last(model):
        candidates.append(Arithmetic(bf16=True, channels_last=True))
    seconds = {arithmetic: _seconds(arithmetic, model, images, device) for arithmetic in (FLOAT32, *candidates)}
    best = min(candidates, key=lambda arithmetic: seconds[arithmetic])
    return Arithmetic(best.bf16, best.channels_last, seconds[FLOAT32] / seconds[best])


def _seconds(arithmetic: Arithmetic, model: nn.Module, images: Tensor, device: torch.device) -> float:
    """Of the fastest of some training steps, without the optimizer's part."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        copied = copy_model(model).train()
        arithmetic.place(copied, device)
        step = _step(copied, arithmetic, images, device)
        step()
        times = []
        for _ in range(TRIAL_STEPS):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
    return min(times)


def _step(model: nn.Module, arithmetic: Arithmetic, images: Tensor, device: torch.device) -> Callable[[], None]:
    def step() -> None:
        with arithmetic.autocast(device):
            output = model(arithmetic.order(images))
        model.zero_grad(set_to_none=True)
        loss = logits_of(output, model, images).float().logsumexp(1).sum()
        loss.backward()
        # An accelerator is still at work; reading a value waits for it.
        loss.item()

    return step
