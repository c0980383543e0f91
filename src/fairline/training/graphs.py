"""A network's forward and backward pass as CUDA graphs (``torch.cuda.make_graphed_callables``).

A narrow network leaves a GPU idle while Python launches its kernels one by one; a graph launches them all at once. Only
the network is captured. Objectives and penalties change between epochs and stay as they are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fairline.errors import FairlineError
from fairline.inference import logits_of

logger = logging.getLogger(__name__)

Compute = Callable[[Tensor], Tensor]
#: Says whether networks are captured where the caller does not.
VARIABLE = "FAIRLINE_CUDA_GRAPHS"
#: Where modules come from whose Python code decides nothing that a graph would freeze.
KNOWN = ("torch.nn.", "fairline.")


def wanted(asked: bool | None, network: nn.Module) -> bool:
    """Whether a network on a GPU is to be captured.

    Args:
        asked: By the caller; None leaves it to :data:`VARIABLE`.
        network: With hooks it never is. Where nothing else says so, one of modules of torch and fairline alone is.

    Returns:
        The answer.

    Raises:
        FairlineError: The variable is neither 0 nor 1.
    """
    # A replay runs no hook.
    if any(module._forward_hooks or module._forward_pre_hooks for module in network.modules()):
        return False
    if asked is not None:
        return asked
    told = os.environ.get(VARIABLE)
    if told not in (None, "0", "1"):
        raise FairlineError(f"{VARIABLE} is 1 or 0, not '{told}'.")
    if told is not None:
        return told == "1"
    return all(type(module).__module__.startswith(KNOWN) for module in network.modules())


class Replay:
    """Calls a network that is trained: captured with the first batch, and replayed for all batches of its shape.

    Others, such as a shorter last one, are computed as ever. A graph reads the memory that weights and buffers lay in;
    a network that puts others in their place, or that cannot be captured, is computed as ever from then on, with one
    warning. What its Python code decides is decided once, so a network that draws lots in Python is not for this.

    Args:
        network: In training mode, on its device.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.usable = True
        self.shape: torch.Size | None = None
        self.memory: list[tuple[int, bool]] = []
        self.replayed: Compute | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        if self.usable and self.shape is None:
            self.shape = images.shape
            self._capture(images)
        if self.replayed is not None and images.shape == self.shape:
            if self.memory == _memory(self.network):
                return self.replayed(images)
            self._give_up("its weights or buffers were replaced by others")
        return logits_of(self.network(images), self.network, images)

    def _capture(self, images: Tensor) -> None:
        """Capture, and leave buffers and random numbers as they were: what warms up draws and counts as well."""
        before = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        self.memory = _memory(self.network)
        try:
            with torch.random.fork_rng([images.device] if images.device.type == "cuda" else []):
                self.replayed = capture(_Logits(self.network), images.clone())
        except RuntimeError as error:
            self._give_up(str(error).splitlines()[0] if str(error) else type(error).__name__)
        with torch.no_grad():
            for name, buffer in self.network.named_buffers():
                buffer.copy_(before[name])

    def _give_up(self, reason: str) -> None:
        self.usable, self.replayed = False, None
        logger.warning("%s is trained without CUDA graphs: %s", type(self.network).__name__, reason)


class _Logits(nn.Module):
    """A network that returns nothing but its logits; what is captured is put into this module, not into the user's."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.network(images), self.network, images)


def can_capture(device: torch.device) -> bool:
    """Whether there are CUDA graphs on a device."""
    return device.type == "cuda"


def capture(network: nn.Module, images: Tensor) -> Compute:
    """Capture a network's forward and backward pass, under the autocast that is on.

    Args:
        network: In training mode; runs a few times, which its buffers notice.
        images: (B, C, H, W), on a CUDA device; kept, and overwritten by each call.

    Returns:
        What replays the graphs: images of the same shape to logits (B, K), with gradients for the network's weights.

    Raises:
        RuntimeError: The network cannot be captured, say because its Python code reads a value from the device.
    """
    kind = images.device.type
    if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
        # What is captured runs on a stream of its own, as torch.cuda.make_graphed_callables means it to.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    # Weights that autocast has converted and keeps would not be converted again when the graph is replayed.
    with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
        return torch.cuda.make_graphed_callables(network, (images,), allow_unused_input=True)  # type: ignore[return-value]


def _memory(network: nn.Module) -> list[tuple[int, bool]]:
    """Where weights and buffers lie, and which are trained."""
    return [(each.data_ptr(), each.requires_grad) for each in (*network.parameters(), *network.buffers())]
