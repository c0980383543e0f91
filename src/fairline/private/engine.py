"""One party's side of SPU: runtime, compiled programs, private values, and what a call cost.

Needs the extra ``fairline[mpc]``. SPU (Ma et al., USENIX ATC 2023) is the engine; nothing of the cryptography is here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import spu
from spu import libspu
from spu.utils import frontend

from fairline.errors import FairlineError
from fairline.private.graph import PlainGraph
from fairline.private.jax_graph import to_jax
from fairline.private.plan import MODEL_OWNER, Plan

_KINDS = {
    "cheetah": libspu.ProtocolKind.CHEETAH,
    "semi2k": libspu.ProtocolKind.SEMI2K,
    "ref2k": libspu.ProtocolKind.REF2K,
}
# Not FM32: its matrix product ends SPU 0.9.5 with a segmentation fault.
_FIELDS = {64: libspu.FieldType.FM64, 128: libspu.FieldType.FM128}


@dataclass(frozen=True)
class CallStats:
    """What one execution cost, by SPU's own profile of this party.

    Attributes:
        seconds: Wall time from the input in hand to the output.
        engine_seconds: Of them, inside SPU.
        sent: Bytes sent.
        received: Bytes received.
        messages: Messages sent.
        operators: For each SPU operator, seconds, bytes sent and received, messages sent.
    """

    seconds: float
    engine_seconds: float
    sent: int
    received: int
    messages: int
    operators: dict[str, tuple[float, int, int, int]] = field(default_factory=dict)


def runtime_config(protocol: str, ring_bits: int, fraction_bits: int) -> Any:
    """SPU's configuration."""
    config = libspu.RuntimeConfig()
    config.protocol = _KINDS[protocol]
    config.field = _FIELDS[ring_bits]
    config.fxp_fraction_bits = fraction_bits
    # Its profile is where bytes and messages are read from.
    config.enable_pphlo_profile = True
    # Keeps a private value with its owner instead of sharing it first.
    config.experimental_enable_colocated_optimization = protocol != "ref2k"
    return config


def log_to(path: Path) -> None:
    """Send SPU's log to a file of this process."""
    options = libspu.logging.LogOptions()
    options.enable_console_logger = False
    options.system_log_path = str(path)
    libspu.logging.setup_logging(options)


def compile_graph(graph: PlainGraph, batch: int, *, private: bool = True) -> Any:
    """Compile a graph for SPU, for a batch of fixed size. Needs no weights."""
    names = list(graph.shapes)
    # In a name that Python allows: SPU shows it in its profile.
    run = to_jax(graph)

    def network(*values: Any) -> Any:
        return run(dict(zip(names, values[:-1], strict=True)), values[-1])

    arguments = [np.zeros(graph.shapes[name], np.float32) for name in names]
    arguments.append(np.zeros((batch, *graph.input_shape), np.float32))
    visibility = libspu.Visibility.VIS_PRIVATE if private else libspu.Visibility.VIS_SECRET
    inputs = [f"w{i}" for i in range(len(names))] + ["x"]
    executable, _ = frontend.compile(
        frontend.Kind.JAX, network, arguments, {}, inputs, [visibility] * len(inputs), lambda _: ["y"]
    )
    return executable


class Engine:
    """A party's runtime of one protocol.

    Args:
        link: To the other party; of one party for ref2k.
        protocol: ``"cheetah"``, ``"semi2k"`` or ``"ref2k"``.
        ring_bits: Of the ring that values are shared in: 64 or 128.
        fraction_bits: Of a number's fixed-point form.
        log: SPU's log file, that the profile is read from.
    """

    def __init__(self, link: Any, protocol: str, ring_bits: int, fraction_bits: int, log: Path) -> None:
        self.link = link
        self.log = log
        config = runtime_config(protocol, ring_bits, fraction_bits)
        self.runtime = spu.Runtime(link, config)
        self.io = spu.Io(link.world_size, config)

    @classmethod
    def of_plan(cls, link: Any, protocol: str, plan: Plan, log: Path) -> Engine:
        """With a plan's bit widths."""
        return cls(link, protocol, plan.ring_bits, plan.fraction_bits, log)

    def set_private(self, name: str, value: np.ndarray[Any, Any], owner: int) -> None:
        """Put a private value in; parties other than the owner pass zeros of its shape, which are not used."""
        shares = self.io.make_shares(value, libspu.Visibility.VIS_SECRET, owner)
        self.runtime.set_var(name, shares[self.link.rank])

    def run(self, executable: Any) -> CallStats:
        """Execute, and read what it cost from the profile."""
        start = self.log.stat().st_size if self.log.exists() else 0
        began = perf_counter()
        self.runtime.run(executable)
        seconds = perf_counter() - began
        with self.log.open(encoding="utf-8", errors="replace") as opened:
            opened.seek(start)
            return parse_profile(opened.read(), seconds)

    def output_share(self) -> tuple[bytes, list[bytes]]:
        """This party's share of the output, as bytes."""
        share = self.runtime.get_var("y")
        return share.meta, list(share.share_chunks)

    def open_alone(self) -> np.ndarray[Any, Any]:
        """The output, where there is one party."""
        return np.asarray(self.io.reconstruct([self.runtime.get_var("y")]))

    def open_output(self, other: tuple[bytes, list[bytes]]) -> np.ndarray[Any, Any]:
        """The output, from both shares."""
        theirs = libspu.Share()
        theirs.meta, theirs.share_chunks = other
        mine = self.runtime.get_var("y")
        shares = [theirs, mine] if self.link.rank != MODEL_OWNER else [mine, theirs]
        return np.asarray(self.io.reconstruct(shares))


_EXECUTION = re.compile(r"execution took ([\d.e+-]+)s")
_LINK = re.compile(r"Link details: total send bytes (\d+), recv bytes (\d+), send actions (\d+)")
_OPERATOR = re.compile(
    r"- (pphlo\.[\w: .]+), executed \d+ times, duration ([\d.e+-]+)s, "
    r"send bytes (\d+) recv bytes (\d+), send actions (\d+)"
)


def parse_profile(text: str, seconds: float) -> CallStats:
    """Read SPU's profile of one execution.

    Args:
        text: What SPU logged of it.
        seconds: Wall time of the call.

    Returns:
        What the call cost.

    Raises:
        FairlineError: SPU wrote another format.
    """
    execution, link = _EXECUTION.search(text), _LINK.search(text)
    if execution is None or link is None:
        raise FairlineError("SPU's profile is not in the form of version 0.9.5; install spu==0.9.5.")
    operators = {
        name.removeprefix("pphlo."): (float(took), int(sent), int(received), int(messages))
        for name, took, sent, received, messages in _OPERATOR.findall(text)
    }
    sent, received, messages = (int(number) for number in link.groups())
    return CallStats(seconds, float(execution.group(1)), sent, received, messages, operators)
