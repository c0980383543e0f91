"""What the two parties of a private inference agree on before they start. Public, and checked by both."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fairline.private.graph import PlainGraph

#: Ranks: who holds the weights, and who the image (and alone sees the result).
MODEL_OWNER, IMAGE_OWNER = 0, 1

Protocol = Literal["cheetah", "semi2k"]
PROTOCOLS: tuple[Protocol, ...] = ("cheetah", "semi2k")

#: What must be said wherever a protocol's numbers are shown.
CAVEATS: dict[str, str] = {
    "cheetah": "Cheetah: two parties, semi-honest, no dealer.",
    "semi2k": "SEMI2K: semi-honest with a trusted dealer, and here the dealer is the model's owner, who could learn "
    "the image from it: a comparison of cost, not protection between these two parties.",
    "ref2k": "REF2K: SPU's fixed-point arithmetic in the clear; no protection.",
}


class Plan(BaseModel):
    """A session: which networks run on which protocol, how often and in which order.

    Attributes:
        protocols: Each gets a runtime of its own.
        networks: Names, each with the digest of its public graph.
        batch_sizes: Images in a call.
        images: How many the image owner has.
        repeats: Timed calls of each batch, after one that is not timed.
        ring_bits: Of the ring Z/2ᵏ that values are shared in.
        fraction_bits: Of the fixed-point form.
        seed: Of the order of the calls.
        warm_up: Whether a call of each kind comes before the timed ones.
        skip: Timed calls that an interrupted session already has.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    protocols: list[Protocol] = Field(min_length=1)
    networks: dict[str, str] = Field(min_length=1)
    batch_sizes: list[int] = Field(min_length=1)
    images: int = Field(ge=1)
    repeats: int = Field(default=3, ge=1)
    ring_bits: Literal[64, 128] = 64
    fraction_bits: int = Field(default=18, ge=1, le=60)
    seed: int = 0
    warm_up: bool = True
    skip: int = Field(default=0, ge=0)

    def calls(self) -> list[tuple[str, str, int, int]]:
        """Protocol, network, batch size and index of the batch of each timed call that is left, in random order.

        Whatever slows the machine for a while then slows no network in particular.

        Returns:
            One entry a call.
        """
        calls: list[tuple[str, str, int, int]] = [
            (protocol, network, size, index)
            for protocol in self.protocols
            for network in self.networks
            for size in self.batch_sizes
            for index in range(-(-self.images // size))
            for _ in range(self.repeats)
        ]
        random.Random(self.seed).shuffle(calls)
        return calls[self.skip :]


def graph_digest(graph: PlainGraph) -> str:
    """Digest of the public half of a graph: what is computed, whatever its parts are called."""
    values = {"x": 0} | {node.name: place for place, node in enumerate(graph.nodes, start=1)}
    weights = {name: place for place, name in enumerate(graph.shapes)}
    described = [
        graph.input_shape,
        list(graph.shapes.values()),
        [
            [
                node.op,
                [values[name] for name in node.inputs],
                node.shape,
                [weights[name] for name in node.weights],
                node.mask is not None,
                sorted(node.options.items()),
            ]
            for node in graph.nodes
        ],
    ]
    digest = hashlib.blake2b(json.dumps(described).encode(), digest_size=16)
    for node in graph.nodes:
        if node.mask is not None:
            digest.update(graph.masks[node.mask].numpy().tobytes())
    return digest.hexdigest()
