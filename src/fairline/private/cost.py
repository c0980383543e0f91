"""What a private inference costs, predicted: bytes, rounds and seconds of a network on a protocol.

A cost has parts (:data:`PARTS`): ReLUs, by the value and by the layer that keeps any, where signs are shared only the
comparisons; the products with shared signs; max pooling, which is comparisons as ReLUs are and which no mask touches;
polynomials; linear layers; opening the result; and what a session costs before its first image. So it is never "ReLUs ×
constant": linear layers and pooling are a floor, and masks that empty whole layers save rounds that masks which thin
them do not.

Two protocols are calibrated on SPU 0.9.5, the engine that :mod:`fairline.private.spu` runs: ``cheetah`` and ``semi2k``.
Two are from their papers, and predict only what those state: ``delphi`` and ``cryptflow2``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import groupby
from operator import itemgetter
from typing import Any

import pandas as pd
from torch import Tensor, nn

from fairline.errors import FairlineError
from fairline.private.blocks import cut_matrices
from fairline.private.export import to_graph
from fairline.private.graph import POLYNOMIALS, Node, PlainGraph, kept_relus, polynomial_units
from fairline.private.wire import Network
from fairline.private.wire import network as find_network


@dataclass(frozen=True)
class Cost:
    """A cost, or a part of one.

    Attributes:
        bytes: Sent by both parties in a call.
        offline_bytes: Sent by both ahead of time for each call (Delphi), or now and then for several (Cheetah's
            oblivious transfers), as a mean.
        rounds: One-way trips that must be waited for.
        compute_seconds: Of both parties on two CPU cores; NaN where no source tells.
    """

    bytes: float = 0.0
    offline_bytes: float = 0.0
    rounds: float = 0.0
    compute_seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.bytes + other.bytes,
            self.offline_bytes + other.offline_bytes,
            self.rounds + other.rounds,
            self.compute_seconds + other.compute_seconds,
        )


#: The parts of a cost, as people call them. All but the setup add up to what a call costs.
PARTS = {
    "relu": "ReLUs",
    "select": "products with shared signs",
    "max_pool": "max pooling",
    "quadratic": "polynomials",
    "linear": "linear layers",
    "open": "opening",
    "setup": "setup, once a session",
}

#: The parts of a call.
CALL_PARTS = tuple(part for part in PARTS if part != "setup")

#: What a private inference is paid in.
COSTS = ("bytes", "rounds", "seconds")


class ProtocolCost(ABC):
    """What the operations of a protocol cost. Element counts are those of a whole batch."""

    #: Where the constants come from.
    source: str
    #: Once a session.
    setup: Cost
    #: What every call costs: opening the result.
    per_call_rounds: float = 1.0

    @abstractmethod
    def relu(self, n: int) -> Cost:
        """Sign and product of n values."""

    def compare(self, n: int) -> Cost:
        """Signs of n values; where no source tells, what whole ReLUs cost."""
        return self.relu(n)

    def select(self, n: int) -> Cost:
        """Products of n shared values with signs that are shared; where no source tells, with any shared values."""
        return self.product(n)

    @abstractmethod
    def matmul(self, m: int, k: int, n: int) -> Cost:
        """Shared (m, k) times private (k, n), truncated: a convolution is one over its unfolded input."""

    @abstractmethod
    def truncate(self, n: int) -> Cost:
        """Product of n shared values with public numbers."""

    @abstractmethod
    def product_with_private(self, n: int) -> Cost:
        """Product of n shared values with the owner's, element by element, truncated."""

    @abstractmethod
    def product(self, n: int) -> Cost:
        """Product of n shared values with n shared ones, truncated."""

    def pick(self, n: int) -> Cost:
        """Pick n shared values by public indices: each party does it for itself."""
        return Cost()

    def convolution(self, inputs: int, outputs: int, windows: int, m: int, k: int, n: int) -> Cost:
        """A convolution with ``inputs`` and ``outputs`` values, as a product (m, k) × (k, n) of ``windows`` cut out."""
        return self.matmul(m, k, n)

    def open(self, n: int) -> Cost:
        """Give the image's owner the other share of n outputs."""
        return Cost(bytes=8 * n + 42, rounds=self.per_call_rounds)


#: Seconds that SPU takes to pick a value by its index.
_PICK = 2e-6

_SPU = "measured with SPU 0.9.5 on one layer at a time (benchmarks/private_cost.py --calibrate)"


class Cheetah(ProtocolCost):
    """Cheetah (Huang et al. 2022) as SPU 0.9.5 implements it, ring of 64 bits.

    The protocol: linear layers are products of polynomials under homomorphic encryption; the operand that needs fewer
    polynomials is sent in ciphertexts, the results come back in packed ones. How many there are follows from how the
    matrices are cut into blocks (:mod:`fairline.private.blocks`). Of the work, packing weighs most: an automorphism
    takes ten times as long as a product, and a vector times a matrix with n columns takes up to 2n of them.

    This engine: where it cuts, the sizes of its ciphertexts (seeded and compressed), that results of small products are
    not packed, that comparisons of more than 2,048 values run in two threads, and all seconds.
    """

    source = _SPU + "; block sizes follow SPU's published rule (libspu/mpc/cheetah/arith/matmat_prot.cc)"
    setup = Cost(bytes=23.415e6, rounds=57, compute_seconds=4.9)

    #: Bytes of a ciphertext on its way out (its other half is a seed) and back (both halves, fewer primes). One that is
    #: not packed has a half that is zero but for the results, 18 bytes each.
    SENT, RETURNED, RETURNED_ALONE, RESULT_ALONE = 184_950, 254_400, 127_310, 18
    #: Bytes that truncating a value takes.
    TRUNCATE = 3.125
    #: Bytes of a comparison with zero and of the product with its result.
    SIGN, SELECT = 82.25, 16.25
    #: Bytes of new oblivious transfers: 532,550 every 224,700 comparisons. (In five million products there were none.)
    TRANSFERS = 2.37
    #: Five ciphertexts for each 8,192 products with a private value.
    PRIVATE_PRODUCTS, PER_PRIVATE = 8192, 1_143_500
    #: Triples for products of shared values are made 4,096 at a time, of which a call with polynomials needs many;
    #: using one takes 32 bytes.
    TRIPLE, USE_TRIPLE = 279.2, 32.1
    #: Seconds of a matrix product: to send a ciphertext, to encode a polynomial and multiply it with one, to merge two
    #: results, interleaved or packed one by one (that works on a prime fewer), and what every product waits.
    ENCRYPT, MULTIPLY, INTERLEAVE, PACK, PRODUCT = 5.1e-3, 2.3e-4, 1.7e-3, 8.5e-4, 7.5e-3
    #: Seconds to cut out a window of a convolution.
    WINDOW = 2.9e-5
    #: Seconds of a layer of ReLUs and of each, of a truncation and of each value.
    RELUS, RELU, TRUNCATION, TRUNCATED = 9.5e-3, 1.3e-5, 1.0e-3, 7e-7
    #: Of a ReLU's rounds and seconds, those of the product; the seconds by its share of the bytes.
    ROUNDS_SELECT, SELECTED = 2, RELU * SELECT / (SIGN + SELECT)
    ROUNDS_RELU, ROUNDS_MATMUL, ROUNDS_TRUNCATE, ROUNDS_PRIVATE, ROUNDS_PRODUCT = 20, 4, 2, 6, 2

    def relu(self, n: int) -> Cost:
        return self.compare(n) + self.select(n)

    def compare(self, n: int) -> Cost:
        seconds = self.RELUS + (self.RELU - self.SELECTED) * n
        return Cost(self.SIGN * n, self.TRANSFERS * n, self.ROUNDS_RELU - self.ROUNDS_SELECT, seconds)

    def select(self, n: int) -> Cost:
        return Cost(self.SELECT * n, 0, self.ROUNDS_SELECT, self.SELECTED * n)

    def matmul(self, m: int, k: int, n: int) -> Cost:
        blocks = cut_matrices(m, k, n)
        back = self.RETURNED * blocks.returned
        if blocks.packing == "none":
            back = self.RETURNED_ALONE * blocks.returned + self.RESULT_ALONE * m * n
        automorphism = self.INTERLEAVE if blocks.packing == "interleaved" else self.PACK
        return Cost(
            bytes=self.SENT * blocks.sent + back + self.TRUNCATE * m * n,
            rounds=self.ROUNDS_MATMUL,
            compute_seconds=self.PRODUCT
            + self.ENCRYPT * blocks.sent
            + self.MULTIPLY * blocks.products
            + automorphism * blocks.automorphisms,
        )

    def pick(self, n: int) -> Cost:
        return Cost(compute_seconds=_PICK * n)

    def convolution(self, inputs: int, outputs: int, windows: int, m: int, k: int, n: int) -> Cost:
        return self.matmul(m, k, n) + Cost(compute_seconds=self.WINDOW * windows)

    def truncate(self, n: int) -> Cost:
        return Cost(self.TRUNCATE * n, 0, self.ROUNDS_TRUNCATE, self.TRUNCATION + self.TRUNCATED * n)

    def product_with_private(self, n: int) -> Cost:
        batches = math.ceil(n / self.PRIVATE_PRODUCTS)
        return Cost(
            batches * self.PER_PRIVATE + self.TRUNCATE * n, rounds=self.ROUNDS_PRIVATE, compute_seconds=0.05 * batches
        )

    def product(self, n: int) -> Cost:
        total = self.TRIPLE + self.USE_TRIPLE + self.TRUNCATE
        return Cost(total * n, rounds=self.ROUNDS_PRODUCT, compute_seconds=1.2e-5 * n)


class Semi2k(ProtocolCost):
    """SEMI2K (SPDZ2k's semi-honest part; Cramer et al. 2018) as SPU 0.9.5 implements it, its first party the dealer.

    The protocol: a ring of 64 bits; a product opens both masked operands, eight bytes a value and party, in each call
    anew, so weights are paid for as values are. This engine: that the dealer is one of the two parties, and all
    seconds.
    """

    source = _SPU
    setup = Cost(bytes=1.215e6, rounds=19, compute_seconds=0.15)

    #: Seconds to mask, send and open a value of a product, to multiply and add one, to cut out a window of a
    #: convolution, and what every product waits.
    OPEN, MULTIPLY, WINDOW, PRODUCT = 8.2e-8, 1.1e-9, 1.4e-5, 1.3e-3

    def relu(self, n: int) -> Cost:
        return self.compare(n) + self.select(n)

    def compare(self, n: int) -> Cost:
        return Cost(112 * n, rounds=7, compute_seconds=5.8e-3 + 1.1e-6 * n)

    def select(self, n: int) -> Cost:
        return Cost(32 * n, rounds=1, compute_seconds=3e-7 * n)

    def matmul(self, m: int, k: int, n: int) -> Cost:
        opened = m * k + k * n
        seconds = self.PRODUCT + self.OPEN * opened + self.MULTIPLY * m * k * n
        return Cost(16 * opened + 8 * m * n, rounds=2, compute_seconds=seconds)

    def pick(self, n: int) -> Cost:
        return Cost(compute_seconds=_PICK * n)

    def convolution(self, inputs: int, outputs: int, windows: int, m: int, k: int, n: int) -> Cost:
        return self.matmul(m, k, n) + Cost(compute_seconds=self.WINDOW * windows)

    def truncate(self, n: int) -> Cost:
        return Cost(8 * n, rounds=1, compute_seconds=1.0e-3 + 5e-8 * n)

    def product_with_private(self, n: int) -> Cost:
        return Cost(40 * n, rounds=2, compute_seconds=5e-6 * n)

    def product(self, n: int) -> Cost:
        return Cost(40 * n, rounds=2, compute_seconds=5e-6 * n)


class Delphi(ProtocolCost):
    """DELPHI (Mishra et al. 2020): garbled circuits for ReLUs, Beaver triples for squares, linear work offline.

    A shared sign is priced as a whole ReLU, an upper bound of its smaller circuit, and its products as squares.
    Online, a linear layer costs the image's owner one masked value for each input. Offline it costs ciphertexts, at
    least as many as hold its inputs and outputs: a lower bound, as the rotations' keys are left out.
    """

    source = (
        "Mishra et al., USENIX Security 2020: 17.5 kB offline and 2.048 kB online a ReLU, 0.152 and 0.016 kB a square "
        "(amortised; quoted from memory, not read again here); ciphertexts of degree 8,192 and 180 bits"
    )
    setup = Cost(compute_seconds=math.nan)
    CIPHERTEXT = 2 * 8192 * 180 / 8

    def relu(self, n: int) -> Cost:
        return Cost(2048 * n, 17_500 * n, 2, math.nan)

    def matmul(self, m: int, k: int, n: int) -> Cost:
        return self.convolution(m * k, m * n, 1, m, k, n)

    def convolution(self, inputs: int, outputs: int, windows: int, m: int, k: int, n: int) -> Cost:
        ciphertexts = math.ceil(inputs / 8192) + math.ceil(outputs / 8192)
        return Cost(4 * inputs, self.CIPHERTEXT * ciphertexts, 1, math.nan)

    def truncate(self, n: int) -> Cost:
        # Done on the shares, each for itself.
        return Cost()

    def product_with_private(self, n: int) -> Cost:
        return self.convolution(n, n, 1, n, 1, 1)

    def product(self, n: int) -> Cost:
        return Cost(16 * n, 152 * n, 1, math.nan)


class CrypTFlow2(ProtocolCost):
    """CrypTFlow2 (Rathee et al. 2020): ReLUs and truncations by IKNP oblivious transfers, linear layers by HE.

    With ℓ ring bits, f fraction bits and λ = 128: a ReLU takes λℓ + 18ℓ bits and log₂ℓ + 4 rounds, a faithful
    truncation λ(ℓ + f + 2) + 19ℓ + 14f bits and log₂ℓ + 3 rounds. Of a ReLU, the product with the sign takes
    2(λ + 2ℓ) bits and two rounds (their multiplexer), the comparison the rest.
    """

    source = (
        "Rathee et al., CCS 2020, their bounds for comparison-based ReLU and truncation (quoted from memory, not read "
        "again here), ℓ = 64 and f = 18 as in our runs; ciphertexts of degree 8,192 and 180 bits, a lower bound"
    )
    setup = Cost(compute_seconds=math.nan)
    RING, FRACTION, SECURITY = 64, 18, 128

    def relu(self, n: int) -> Cost:
        return self.compare(n) + self.select(n)

    def compare(self, n: int) -> Cost:
        bits = (self.SECURITY + 18) * self.RING - 2 * (self.SECURITY + 2 * self.RING)
        return Cost(bits / 8 * n, rounds=math.log2(self.RING) + 2, compute_seconds=math.nan)

    def select(self, n: int) -> Cost:
        return Cost(2 * (self.SECURITY + 2 * self.RING) / 8 * n, rounds=2, compute_seconds=math.nan)

    def matmul(self, m: int, k: int, n: int) -> Cost:
        return self.convolution(m * k, m * n, 1, m, k, n)

    def convolution(self, inputs: int, outputs: int, windows: int, m: int, k: int, n: int) -> Cost:
        ciphertexts = math.ceil(inputs / 8192) + math.ceil(outputs / 8192)
        return Cost(Delphi.CIPHERTEXT * ciphertexts, rounds=2, compute_seconds=math.nan) + self.truncate(outputs)

    def truncate(self, n: int) -> Cost:
        bits = self.SECURITY * (self.RING + self.FRACTION + 2) + 19 * self.RING + 14 * self.FRACTION
        return Cost(bits / 8 * n, rounds=math.log2(self.RING) + 3, compute_seconds=math.nan)

    def product_with_private(self, n: int) -> Cost:
        return self.convolution(n, n, 1, n, 1, 1)

    def product(self, n: int) -> Cost:
        # Two cross terms, each a product of one party's values with the other's.
        ciphertexts = 2 * 2 * math.ceil(n / 8192)
        return Cost(Delphi.CIPHERTEXT * ciphertexts, rounds=2, compute_seconds=math.nan) + self.truncate(n)


PROTOCOL_COSTS: dict[str, type[ProtocolCost]] = {
    "cheetah": Cheetah,
    "semi2k": Semi2k,
    "delphi": Delphi,
    "cryptflow2": CrypTFlow2,
}


def require_cost_model(protocol: str) -> None:
    """Refuse a protocol whose costs nobody has told.

    Raises:
        FairlineError: There is no such model.
    """
    if protocol not in PROTOCOL_COSTS:
        raise FairlineError(f"There is no cost model of '{protocol}'; known are {', '.join(PROTOCOL_COSTS)}.")


@dataclass(frozen=True)
class Estimate:
    """A predicted private inference.

    Attributes:
        protocol: A key of :data:`PROTOCOL_COSTS`.
        network: Between the parties.
        batch_size: Images in a call.
        relus: Evaluated for each image.
        bytes: Sent by both parties in a call.
        offline_bytes: Ahead of time or now and then, for each call.
        rounds: One-way trips of a call that must be waited for.
        compute_seconds: On two CPU cores; NaN where no source tells.
        network_seconds: Bytes and rounds on this network.
        setup: Once a session; no part of the numbers above.
        layers: A row for each operator, two where polynomials stand beside ReLUs and where signs are shared: layer, op,
            part (see :data:`PARTS`), relus, bytes, offline_bytes, rounds, compute_seconds.
        source: Where the constants come from.
    """

    protocol: str
    network: Network
    batch_size: int
    relus: int
    bytes: float
    offline_bytes: float
    rounds: float
    compute_seconds: float
    network_seconds: float
    setup: Cost
    layers: pd.DataFrame
    source: str

    @property
    def seconds(self) -> float:
        """Of a call: compute and network; NaN where compute is not known."""
        return self.compute_seconds + self.network_seconds

    @property
    def relu_bytes(self) -> float:
        """Of the bytes of a call, those that kept ReLUs cost; of shared signs the comparisons."""
        return float(self.parts.loc["relu", "bytes"])

    @property
    def linear_bytes(self) -> float:
        """Of the bytes of a call, those of linear layers: a floor that no mask goes below."""
        return float(self.parts.loc["linear", "bytes"])

    @property
    def setup_bytes(self) -> float:
        """Once a session."""
        return self.setup.bytes

    @property
    def parts(self) -> pd.DataFrame:
        """A row for each of :data:`PARTS`, with the columns bytes, offline_bytes, rounds, compute_seconds, seconds.

        All rows but ``setup`` add up to what a call costs.
        """
        columns = [f.name for f in fields(Cost)]
        # What is unknown of a layer is unknown of its part.
        table = self.layers.groupby("part")[columns].agg(lambda values: values.sum(skipna=False))
        table = table.reindex(CALL_PARTS, fill_value=0.0)
        table.loc["setup"] = [getattr(self.setup, column) for column in columns]
        added = [self.network.seconds(row.bytes, row.rounds) for row in table.itertuples()]
        return table.assign(seconds=table["compute_seconds"] + added).rename_axis("part")

    def row(self) -> dict[str, float]:
        """What a call costs and what its parts do, for tables.

        Returns:
            ``bytes`` (ahead of time included), ``rounds`` and ``seconds``, and each of a part: ``bytes_relu``, ….
        """
        table = self.parts.assign(bytes=lambda parts: parts["bytes"] + parts["offline_bytes"])
        total = {"bytes": self.bytes + self.offline_bytes, "rounds": self.rounds, "seconds": self.seconds}
        return total | {f"{cost}_{part}": float(table.loc[part, cost]) for cost in COSTS for part in PARTS}

    def __str__(self) -> str:
        total = self.bytes + self.offline_bytes
        compute = "unknown" if math.isnan(self.compute_seconds) else f"{self.compute_seconds:.2f} s"
        return (
            f"{self.protocol}, {self.relus:,} ReLUs, batch of {self.batch_size}: {total / 1e6:.2f} MB "
            f"({self.bytes / 1e6:.2f} in the call), {self.rounds:.0f} rounds; compute {compute}, "
            f"{self.network.name} {self.network_seconds:.2f} s"
        )


def estimate(
    model: nn.Module | PlainGraph,
    example: Tensor | None = None,
    *,
    protocol: str = "cheetah",
    network: str | Network = "lan",
    batch_size: int = 1,
) -> Estimate:
    """Predict what a private inference of a network costs.

    Args:
        model: Masked or not, or a plain graph.
        example: An input (B, C, H, W); not needed for a plain graph.
        protocol: ``"cheetah"``, ``"semi2k"``, ``"delphi"`` or ``"cryptflow2"``.
        network: ``"lan"`` (1 Gb/s, 0.3 ms), ``"wan"`` (100 Mb/s, 40 ms), ``"MBITS:MS"``, or a
            :class:`~fairline.private.Network`.
        batch_size: Images in a call.

    Returns:
        The prediction, as a whole and by layer.

    Raises:
        FairlineError: There is no such protocol or network, or the model cannot be exported.

    >>> import torch
    >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
    >>> told = estimate(network, torch.zeros(1, 3, 8, 8), protocol="semi2k")
    >>> told.relus, round(told.relu_bytes), round(told.rounds)
    (256, 36864, 13)
    """
    require_cost_model(protocol)
    if batch_size < 1:
        raise FairlineError("A batch holds at least one image.")
    if isinstance(model, PlainGraph):
        graph = model
    elif example is None:
        raise FairlineError("Estimating the cost of a module needs an example input, (B, C, H, W).")
    else:
        graph = to_graph(model, example)
    wire = find_network(network)
    costs = PROTOCOL_COSTS[protocol]()
    layers = list(part_costs(graph, costs, batch_size))
    total = sum((cost for *_, cost in layers), Cost())
    return Estimate(
        protocol=protocol,
        network=wire,
        batch_size=batch_size,
        relus=graph.relus,
        bytes=total.bytes,
        offline_bytes=total.offline_bytes,
        rounds=total.rounds,
        compute_seconds=total.compute_seconds,
        network_seconds=wire.seconds(total.bytes, total.rounds),
        setup=costs.setup,
        layers=pd.DataFrame([_row(graph, *each) for each in layers]),
        source=costs.source,
    )


def _row(graph: PlainGraph, node: Node | None, part: str, cost: Cost) -> dict[str, Any]:
    described: dict[str, Any] = {"layer": "output", "op": "open", "part": part, "relus": 0}
    if node is not None:
        relus = kept_relus(graph, node) if part == "relu" else 0
        described = {"layer": node.layer, "op": node.op, "part": part, "relus": relus}
    return {**described, **{f.name: getattr(cost, f.name) for f in fields(cost)}}


def part_costs(graph: PlainGraph, costs: ProtocolCost, batch: int = 1) -> Iterator[tuple[Node | None, str, Cost]]:
    """Cost of each node of a graph, by part, and of opening its output (None)."""
    for node in graph.nodes:
        if node.op in POLYNOMIALS and (kept := kept_relus(graph, node)):
            yield node, "relu", costs.relu(batch * kept)
        if node.op == "shared_relu":
            yield node, "relu", costs.compare(batch * kept_relus(graph, node))
        yield node, _PART_OF.get(node.op, "linear"), OPERATORS[node.op](graph, node, costs, batch)
    yield None, "open", costs.open(batch * graph.outputs)


def layer_costs(graph: PlainGraph, costs: ProtocolCost, batch: int = 1) -> Iterator[tuple[Node | None, Cost]]:
    """Cost of each node of a graph, and of opening its output (None)."""
    for node, parts in groupby(part_costs(graph, costs, batch), key=itemgetter(0)):
        yield node, sum((cost for *_, cost in parts), Cost())


def _conv2d(graph: PlainGraph, node: Node, costs: ProtocolCost, batch: int) -> Cost:
    per_group, *kernel = graph.shapes[node.weights[0]][1:]
    groups = int(node.options["groups"])
    sides = graph.input_shapes(node)[0][1:]
    windows, outputs = math.prod(node.shape[1:]), node.shape[0] // groups
    product = (batch * windows, per_group * math.prod(kernel), outputs)
    if math.prod(kernel) > math.prod(sides):
        # XLA makes the kernel the image and the image the kernel where that multiplies less.
        product = (batch, per_group * math.prod(sides), outputs * windows)
    inputs = batch * per_group * math.prod(sides)
    total = Cost()
    for _ in range(groups):
        total += costs.convolution(inputs, batch * windows * outputs, windows, *product)
    return total


def _linear(graph: PlainGraph, node: Node, costs: ProtocolCost, batch: int) -> Cost:
    outputs, inputs = graph.shapes[node.weights[0]]
    return costs.matmul(batch, inputs, outputs)


def _affine(graph: PlainGraph, node: Node, costs: ProtocolCost, batch: int) -> Cost:
    return costs.product_with_private(batch * math.prod(node.shape))


def _add(graph: PlainGraph, node: Node, costs: ProtocolCost, batch: int) -> Cost:
    return Cost() if abs(node.options["alpha"]) == 1 else costs.truncate(batch * math.prod(node.shape))


def _truncated(graph: PlainGraph, node: Node, costs: ProtocolCost, batch: int) -> Cost:
    return costs.truncate(batch * math.prod(node.shape))


def _free(graph: PlainGraph, node: Node, costs: ProtocolCost, batch: int) -> Cost:
    return Cost()


def _gather(graph: PlainGraph, node: Node, costs: ProtocolCost, batch: int) -> Cost:
    return costs.pick(batch * math.prod(node.shape))


def _relu(graph: PlainGraph, node: Node, costs: ProtocolCost, batch: int) -> Cost:
    kept, units = kept_relus(graph, node), math.prod(node.shape)
    total = costs.relu(batch * kept) if kept else Cost()
    # Kept units are picked out, and put back among the others.
    return total if node.mask is None else total + costs.pick(2 * batch * units)


def _polynomial(graph: PlainGraph, node: Node, costs: ProtocolCost, batch: int) -> Cost:
    # By Horner's rule: a product with a private factor, and one of secrets for each power above x, those of squares and
    # of cubes at once. Zero and the identity cost nothing but that units are picked.
    *_, squares, cubes = polynomial_units(graph, node)
    total = costs.pick(2 * batch * math.prod(node.shape))
    if squares + cubes:
        bent = batch * (squares + cubes)
        total += costs.product_with_private(bent) + costs.product(bent)
    return total + costs.product(batch * cubes) if cubes else total


def _shared_relu(graph: PlainGraph, node: Node, costs: ProtocolCost, batch: int) -> Cost:
    decides, votes = graph.masks[str(node.mask)]
    # Voters are picked out, and signs for the decided units, which go back among the others.
    decided, units = int((decides >= 0).sum()), math.prod(node.shape)
    return costs.select(batch * decided) + costs.pick(batch * (int((votes >= 0).sum()) + decided + 2 * units))


def _max_pool(graph: PlainGraph, node: Node, costs: ProtocolCost, batch: int) -> Cost:
    window = math.prod(node.options["kernel"])
    one = costs.relu(batch * math.prod(node.shape) * (window - 1))
    # A tree of comparisons: its depth in rounds.
    return Cost(one.bytes, one.offline_bytes, one.rounds * math.ceil(math.log2(window)), one.compute_seconds)


#: Operators whose cost is no linear layer's.
_PART_OF = {
    "relu": "relu",
    **dict.fromkeys(POLYNOMIALS, "quadratic"),
    "shared_relu": "select",
    "max_pool": "max_pool",
}

#: What each operator of :data:`fairline.private.graph.OPERATORS` costs; a polynomial without the ReLUs beside it,
#: shared ReLUs without their comparisons.
OPERATORS: dict[str, Callable[[PlainGraph, Node, ProtocolCost, int], Cost]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "affine": _affine,
    "add": _add,
    "scale": _truncated,
    "concat": _free,
    "relu": _relu,
    "quadratic": _polynomial,
    "polynomial": _polynomial,
    "shared_relu": _shared_relu,
    "avg_pool": _truncated,
    "max_pool": _max_pool,
    "mean": _truncated,
    "reshape": _free,
    "gather": _gather,
}
