"""How a matrix product under Cheetah is cut into polynomials, and how many operations on ciphertexts that takes.

The protocol (Huang et al., USENIX Security 2022, section 3.1): one polynomial of degree N holds a block (a, b) of the
left matrix, one a block (b, c) of the right one, a·b·c ≤ N, and their product holds the (a, c) results, b coefficients
apart. Which cut is taken and how results are packed before they are returned is SPU 0.9.5's choice
(libspu/mpc/cheetah/arith/matmat_prot.cc and cheetah_dot.cc), followed here operation by operation:

- one result polynomial is returned as it is, all other coefficients of one half deleted;
- where b is less than the number of results, b polynomials are interleaved into one (Lu et al., BumbleBee, NDSS 2025);
- else every result becomes a ciphertext of its own and these are packed (Chen et al., ACNS 2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

#: Of the polynomials that SPU takes for a ring of 64 bits.
DEGREE = 8192


@dataclass(frozen=True)
class Blocks:
    """What a matrix product takes.

    Attributes:
        sent: Ciphertexts of the operand that is cut into fewer polynomials.
        products: Of a ciphertext and a polynomial of the other one.
        returned: Ciphertexts of the results, after packing.
        automorphisms: That packing takes.
        packing: ``"none"``, ``"interleaved"`` or ``"single"`` (results packed one by one).
    """

    sent: int
    products: int
    returned: int
    automorphisms: int
    packing: Literal["none", "interleaved", "single"]


@cache
def cut_matrices(m: int, k: int, n: int, degree: int = DEGREE) -> Blocks:
    """Cut (m, k) × (k, n) as SPU does.

    Args:
        m: Rows.
        k: Inner size.
        n: Columns.
        degree: Of the polynomials.

    Returns:
        What the cut takes.

    >>> cut_matrices(1, 64, 5)
    Blocks(sent=1, products=1, returned=1, automorphisms=0, packing='none')
    >>> cut_matrices(1, 3072, 300)
    Blocks(sent=3, products=114, returned=1, automorphisms=515, packing='single')
    """
    block = cheapest_blocks(m, k, n, degree, packed=True)
    packed = math.ceil(m / block[0]) * math.ceil(n / block[2]) > 1
    if not packed:
        # Without packing the inner block size need not be a power of two. It may give several results after all.
        block = cheapest_blocks(m, k, n, degree, packed=False)
    rows, inner, columns = (math.ceil(size / side) for size, side in zip((m, k, n), block, strict=True))
    results = rows * columns
    packing: Literal["none", "interleaved", "single"]
    if not packed:
        packing, returned, automorphisms = "none", results, 0
    elif block[1] < m * n:
        packing, returned = "interleaved", math.ceil(results / block[1])
        automorphisms = interleaving(results, block[1])
    else:
        packing, returned = "single", math.ceil(m * n / degree)
        automorphisms = packing_singly(m * n, degree)
    return Blocks(
        sent=min(rows, columns) * inner,
        products=rows * inner * columns,
        returned=returned,
        automorphisms=automorphisms,
        packing=packing,
    )


def cheapest_blocks(m: int, k: int, n: int, degree: int, *, packed: bool) -> tuple[int, int, int]:
    """The block sizes for which ``1000·ciphertexts + automorphisms + products/10`` is least.

    SPU takes b automorphisms for every ``degree`` results, more than there are where polynomials are few.

    Args:
        m: Rows.
        k: Inner size.
        n: Columns.
        degree: Of the polynomials.
        packed: Whether results are packed; then inner block sizes are powers of two.

    Returns:
        Rows, inner size and columns of a block; of several that cost the same, the one that SPU tries last.
    """
    sizes = 2 ** np.arange(k.bit_length()) if packed else np.arange(1, k + 1)
    # All pairs (a, b) with a·b ≤ degree, b running fastest.
    every = np.arange(1, min(degree, m) + 1)
    counts = np.searchsorted(sizes, degree // every, side="right")
    a = np.repeat(every, counts)
    b = sizes[np.arange(len(a)) - np.repeat(np.cumsum(counts) - counts, counts)]
    c = np.minimum(n, degree // (a * b))
    rows, inner, columns = -(-m // a), -(-k // b), -(-n // c)
    ciphertexts = np.minimum(rows, columns) * inner + -(-rows * columns // b)
    automorphisms = -(-m * n // degree) * b if packed else 0
    price = 1000.0 * ciphertexts + automorphisms + rows * inner * columns / 10
    best = len(price) - 1 - int(np.argmin(price[::-1]))
    return int(a[best]), int(b[best]), int(c[best])


def interleaving(results: int, gap: int) -> int:
    """Automorphisms that interleaving ``results`` polynomials takes, ``gap`` (a power of two) into one.

    Halving the gap merges pairs; a merge of which one polynomial at least is there takes one automorphism.

    Returns:
        How many.

    >>> interleaving(4, gap=4), interleaving(1, gap=4)
    (3, 2)
    """
    whole, rest = divmod(results, gap)
    levels = [2**i for i in range(gap.bit_length() - 1)]
    return whole * (gap - 1) + sum(min(level, rest) for level in levels)


def packing_singly(values: int, degree: int) -> int:
    """Automorphisms that packing ``values`` ≤ ``degree`` ciphertexts of one value each takes.

    They are filled up to a power of two, merged in pairs, and what is left of other coefficients is traced away.

    Returns:
        How many.

    >>> packing_singly(5, degree=8192)
    17
    """
    filled = 1 << (values - 1).bit_length()
    return filled - 1 + (degree // filled).bit_length() - 1
