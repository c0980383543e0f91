"""What training computes in: float32, or bfloat16 where the processor has units for it.

Matrix products and convolutions then take bfloat16 operands (``torch.autocast``) and sum in float32; weights, masks,
the optimizer's state and the statistics of batch normalisation stay float32, as in Micikevicius et al. 2018 ("Mixed
Precision Training"); bfloat16 has float32's range, so losses need no scaling (Kalamkar et al. 2019).
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from fairline.errors import FairlineError

Precision = Literal["auto", "fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Arithmetic:
    """How a network is computed while it is trained.

    Attributes:
        bf16: Whether products take bfloat16 operands.
        channels_last: Whether activations lie in memory with their channels side by side.
        ratio: Images a second over those of float32, where that was measured.

    >>> Arithmetic(bf16=True).name
    'bf16'
    """

    bf16: bool = False
    channels_last: bool = False
    ratio: float | None = None

    @property
    def name(self) -> str:
        """``"fp32"`` or ``"bf16"``."""
        return "bf16" if self.bf16 else "fp32"

    @property
    def memory_format(self) -> torch.memory_format:
        """Of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """What forward passes run under."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)

    def place(self, model: nn.Module, device: torch.device) -> None:
        """Move a model to a device, its weights in this memory order."""
        model.to(device, memory_format=self.memory_format)  # type: ignore[call-overload]

    def order(self, images: Tensor) -> Tensor:
        """Images in this memory order."""
        return images.contiguous(memory_format=self.memory_format)

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


FLOAT32 = Arithmetic()


def require_precision(precision: str) -> None:
    """Refuse an unknown precision.

    Raises:
        FairlineError: It is none of :data:`PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise FairlineError(f"Precision is {', '.join(PRECISIONS)}, not '{precision}'.")


def default_precision() -> Precision:
    """What commands and studies compute in unless told otherwise: the variable FAIRLINE_PRECISION, else ``"auto"``.

    Returns:
        The precision.

    Raises:
        FairlineError: The variable says none of :data:`PRECISIONS`.
    """
    precision = os.environ.get("FAIRLINE_PRECISION", "auto")
    require_precision(precision)
    return cast(Precision, precision)


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 natively (a CPU with AMX or AVX-512-BF16, a GPU from Ampere on)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def processor(device: torch.device) -> str:
    """What makes a choice for one machine one for another: the device's name, and on a CPU the threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return f"{capabilities.get('cpu_name', device.type)}, {torch.get_num_threads()} threads"
