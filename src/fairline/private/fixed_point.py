"""Whom fixed-point arithmetic hurts: agreement of private with plain predictions, group by group.

Private inference computes in integers: a number is ``round(x·2ᶠ) mod 2ᵏ``. With few fraction bits f it is coarse, with
many a product overflows the ring's k bits, and either can change a prediction. Nothing says that it changes as many in
every group: one whose images lie close to the decision boundary has more to lose.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fairline.audit.intervals import wilson_interval
from fairline.data.grouped import OVERALL, GroupedData
from fairline.errors import FairlineError
from fairline.private.export import to_graph
from fairline.private.graph import PlainGraph
from fairline.private.plan import IMAGE_OWNER, PROTOCOLS
from fairline.private.spu import measure, require_bits, require_spu
from fairline.training import Progress, ProgressCallback

#: SPU's arithmetic in the clear, without a second party.
IN_THE_CLEAR = "ref2k"


def agreement(
    model: nn.Module | PlainGraph,
    data: GroupedData,
    *,
    fraction_bits: Sequence[int] = (18,),
    ring_bits: int = 64,
    protocol: str = IN_THE_CLEAR,
    samples: int | None = 200,
    batch_size: int = 50,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> pd.DataFrame:
    """Compare private with plain predictions in each group.

    Args:
        model: Masked or not, or a plain graph.
        data: Labelled images.
        fraction_bits: Of the fixed-point form; each is tried.
        ring_bits: Of the ring: 64 or 128.
        protocol: ``"ref2k"`` does SPU's arithmetic in the clear, fast enough for whole groups; ``"cheetah"`` and
            ``"semi2k"`` run between two processes, with the random last bits of their truncations.
        samples: Images of each group, at random; None for all.
        batch_size: Images in a call.
        seed: Of the sample.
        progress: Told of every batch.

    Returns:
        A row for each number of fraction bits and group, and one for all images that were taken: ``fraction_bits``,
        ``group``, ``n``, ``agreement`` (share of images whose predicted class is the same) with Wilson's 95 % limits
        ``low`` and ``high``, ``accuracy_plain``, ``accuracy_private``, ``max_abs_error`` and ``mean_abs_error`` of the
        logits. Where groups are sampled, the row of all images weighs them as sampled.

    Raises:
        FairlineError: SPU is missing, the bits do not fit, or there is no such protocol.
    """
    check_request(protocol, fraction_bits, ring_bits, samples, batch_size)
    index = torch.arange(len(data))
    if samples is not None:
        index = torch.cat(data.sample_by_group(samples, seed)).cpu().sort().values
    images = data.normalized(index.to(data.device)).cpu()
    graph = model if isinstance(model, PlainGraph) else to_graph(model, images[:1])
    with torch.inference_mode():
        plain = torch.cat([graph(part) for part in images.split(100)])
    rows = []
    for bits in fraction_bits:
        if protocol == IN_THE_CLEAR:
            private = in_the_clear(graph, images, ring_bits, bits, batch_size, progress)
        else:
            options = {"ring_bits": ring_bits, "fraction_bits": bits, "seed": seed, "progress": progress}
            private = _between_parties(graph, images, protocol, batch_size, options)
        rows += [{"fraction_bits": bits, **row} for row in _by_group(plain, private, data, index)]
    return pd.DataFrame(rows)


def _between_parties(
    graph: PlainGraph, images: Tensor, protocol: str, batch_size: int, options: Mapping[str, Any]
) -> Tensor:
    """Logits (N, K), each batch sent once."""
    sizes = [min(batch_size, len(images))]
    measured = measure({"network": graph}, images, protocols=[protocol], batch_sizes=sizes, repeats=1, **options)
    (logits,) = measured.outputs.values()
    return logits


def _by_group(plain: Tensor, private: Tensor, data: GroupedData, index: Tensor) -> Iterator[dict[str, Any]]:
    """A row for each group that has samples, and one for all; logits are (N, K), of the samples ``index`` (N,)."""
    labels, groups = data.labels.cpu()[index], data.groups.cpu()[index]
    for group, name in [*enumerate(data.group_names), (-1, OVERALL)]:
        chosen = groups == group if group >= 0 else torch.ones_like(groups, dtype=torch.bool)
        if chosen.any():
            yield {"group": name, **_compared(plain[chosen], private[chosen], labels[chosen])}


def check_request(
    protocol: str, fraction_bits: Sequence[int], ring_bits: int, samples: int | None, batch_size: int
) -> None:
    """Refuse what :func:`agreement` cannot do.

    Raises:
        FairlineError: SPU is missing, the bits do not fit, or there is no such protocol.
    """
    require_spu()
    if protocol not in (IN_THE_CLEAR, *PROTOCOLS):
        raise FairlineError(f"There is no protocol '{protocol}'; known are {', '.join((IN_THE_CLEAR, *PROTOCOLS))}.")
    if not fraction_bits:
        raise FairlineError("No number of fraction bits was given.")
    if batch_size < 1 or (samples is not None and samples < 1):
        raise FairlineError("A batch and a sample hold at least one image.")
    for bits in fraction_bits:
        require_bits(ring_bits, bits)


def _compared(plain: Tensor, private: Tensor, labels: Tensor) -> dict[str, float]:
    before, after = plain.argmax(1), private.argmax(1)
    same = float((before == after).double().mean())
    low, high = wilson_interval(same, len(labels))
    error = (plain - private).abs()
    return {
        "n": len(labels),
        "agreement": same,
        "low": low,
        "high": high,
        "accuracy_plain": float((before == labels).double().mean()),
        "accuracy_private": float((after == labels).double().mean()),
        "max_abs_error": float(error.max()),
        "mean_abs_error": float(error.mean()),
    }


def in_the_clear(
    graph: PlainGraph,
    images: Tensor,
    ring_bits: int,
    fraction_bits: int,
    batch_size: int = 50,
    progress: ProgressCallback | None = None,
) -> Tensor:
    """Logits (N, K) of normalised images (N, C, H, W) in SPU's fixed-point arithmetic, in this process."""
    from spu import libspu

    from fairline.private.engine import Engine, compile_graph, log_to

    description = libspu.link.Desc()
    description.add_party("alone", "in-memory")
    with tempfile.TemporaryDirectory(prefix="fairline-fixed-point-") as folder:
        log = Path(folder) / "spu.log"
        log_to(log)
        engine = Engine(libspu.link.create_mem(description, 0), IN_THE_CLEAR, ring_bits, fraction_bits, log)
        size = min(batch_size, len(images))
        executable = compile_graph(graph, size, private=False)
        for place, value in enumerate(graph.weights.values()):
            engine.set_private(f"w{place}", value.numpy(), 0)
        pieces = []
        for start in range(0, len(images), size):
            piece = images[start : start + size].numpy()
            batch = np.zeros((size, *graph.input_shape), np.float32)
            batch[: len(piece)] = piece
            # Every party's shares are this one's.
            engine.set_private("x", batch, IMAGE_OWNER)
            engine.run(executable)
            pieces.append(engine.open_alone()[: len(piece)])
            if progress is not None:
                done = min(start + size, len(images))
                progress(Progress(f"{fraction_bits} fraction bits", done, len(images), f"{done} of {len(images)}"))
    return torch.from_numpy(np.concatenate(pieces)).float()
