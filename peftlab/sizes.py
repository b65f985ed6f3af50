"""Sizes of factors, as plain arithmetic: what the methods build and what their cards count."""

import math


def kron_sizes(d_out: int, d_in: int, o: int, i: int) -> tuple[int, int, int, int]:
    """Return o_1, i_1, o_2, i_2 with o_1 o_2 = d_out and i_1 i_2 = d_in: [o_1, i_1] ⊗ [o_2, i_2].

    o and i are what o_1 and i_1 should be; see `split`.
    """
    (o_1, o_2), (i_1, i_2) = split(d_out, o), split(d_in, i)
    return o_1, i_1, o_2, i_2


def split(n: int, factor: int) -> tuple[int, int]:
    """Return two whole numbers whose product is n.

    The first is `factor` where that divides n; otherwise the largest divisor of n that exceeds
    neither `factor` nor √n. factor = -1 sets no bound: 768 -> (24, 32), a prime p -> (1, p).
    """
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    most = math.isqrt(n)
    most = most if factor == -1 else min(most, factor)
    first = max(d for d in range(1, most + 1) if n % d == 0)
    return first, n // first


def is_thin(rank: int, d_out: int, d_in: int) -> bool:
    """Whether a matrix [d_out, d_in] is worth holding as two factors of rank `rank`."""
    return 2 * rank < max(d_out, d_in)
