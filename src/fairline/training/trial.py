"""Whether a network trains faster in bfloat16 here: a few steps of each, in turn."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from fairline._memory import memory_kept
from fairline.inference import logits_of
from fairline.masking import copy_model
from fairline.precision import Arithmetic, Precision, has_bf16, require_precision

logger = logging.getLogger(__name__)

#: bfloat16 costs digits; it must win at least this much.
WORTHWHILE = 1.2
#: Images of a trial's step, and timed steps of each candidate at most.
TRIAL_IMAGES, TRIAL_STEPS = 64, 3
#: A trial ends when the ratio is this many times over or under what is worthwhile.
CLEAR = 1.25
#: In torch 2.13 convolutions of 8 channels in this memory order corrupt memory on two threads of a CPU with AMX.
NARROWEST = 16
#: Kinds of devices of which this process has said that they lack bfloat16 units; once is enough for many stages.
_warned_of: set[str] = set()


def choose(
    precision: Precision | Arithmetic | None, model: nn.Module, images: Tensor, device: torch.device
) -> Arithmetic:
    """Settle what a network is trained in.

    ``"auto"`` is bfloat16 where the device multiplies it natively and, on a CPU, a trial of a few training steps of
    this very network says that it is at least :data:`WORTHWHILE` times as fast. Activations lie channels last on a GPU,
    and on a CPU where :func:`suits_channels_last` says so and a step of this network runs through in this order.

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
    if device.type != "cpu" and (native or precision != "bf16"):
        fast = native and precision != "fp32"
        return Arithmetic(bf16=fast, channels_last=fast)
    images = images[:TRIAL_IMAGES].to(device)
    plain = Arithmetic(channels_last=suits_channels_last(model) and _runs_channels_last(model, images))
    if precision == "fp32" or (precision == "auto" and not native):
        return plain
    ratio = _trial(plain, model, images, device)
    if native:
        logger.info("bf16 runs at %.2f times the speed of fp32", ratio)
    elif device.type not in _warned_of:
        _warned_of.add(device.type)
        logger.warning("this processor has no bfloat16 units: bf16 runs at %.2f times the speed of fp32", ratio)
    return replace(plain, bf16=precision == "bf16" or ratio >= WORTHWHILE, ratio=ratio)


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


def _runs_channels_last(model: nn.Module, images: Tensor) -> bool:
    """Whether a training step runs through in the channels-last order; ``view`` of an activation may not."""
    try:
        _stepper(Arithmetic(channels_last=True), model, images[:2], images.device)()
    except Exception:
        # What else is wrong with the network, training says.
        return False
    return True


def _trial(plain: Arithmetic, model: nn.Module, images: Tensor, device: torch.device) -> float:
    """How many times as fast bfloat16 is as float32, by the fastest of some training steps without the optimizer's."""
    both = [_stepper(arithmetic, model, images, device) for arithmetic in (plain, replace(plain, bf16=True))]
    for step in both:
        step()
    fastest = [math.inf, math.inf]
    for _ in range(TRIAL_STEPS):
        # In turn, so that what else runs on the machine disturbs both.
        fastest = [min(best, step()) for best, step in zip(fastest, both, strict=True)]
        ratio = fastest[0] / fastest[1]
        if not WORTHWHILE / CLEAR < ratio < WORTHWHILE * CLEAR:
            break
    return ratio


def _stepper(arithmetic: Arithmetic, model: nn.Module, images: Tensor, device: torch.device) -> Callable[[], float]:
    """A training step of a copy that returns its seconds."""
    copied = copy_model(model).train()
    arithmetic.place(copied, device)

    def step() -> float:
        began = time.perf_counter()
        with torch.random.fork_rng([device] if device.type == "cuda" else []), memory_kept():
            with arithmetic.autocast(device):
                output = copied(arithmetic.order(images))
            copied.zero_grad(set_to_none=True)
            loss = logits_of(output, copied, images).float().logsumexp(1).sum()
            loss.backward()
            # An accelerator is still at work; reading a value waits for it.
            loss.item()
        return time.perf_counter() - began

    return step
