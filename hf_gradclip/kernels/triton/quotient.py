"""The quotient in the update of Adam and RMSprop, in a few fast instructions and within one unit in the last place.

Division and root that are rounded correctly take 45 of the 64 instructions of a step per element, and leave the loop
for rare operands, so that nothing of one element is computed beside another.
"""

from __future__ import annotations

import triton
import triton.language as tl

SMALL = 2.0**-27
"""Below such an eps, numbers that the fast instructions take for 0 are felt. The usual 1e-8 is above."""


@triton.jit
def quotient(a, square, per_root, eps, ANY: tl.constexpr):
    """a / (per_root sqrt(square) + eps), at most 1 unit in the last place from this rounded to float32.

    Unless `ANY`, eps must be normal. As in division and root, 0 / 0 and the root of less than 0 are NaN, others by 0
    are inf, by inf 0, and NaN stays.

    The fast root is within 2^-23, the fast root of a reciprocal within 2^-22.9 [PTX ISA]; here either may be off by
    2^-18. What they missed is computed by fused multiply-adds, which round square - root^2 and a - below u to 2^-24 of
    themselves, and added: an error e becomes e^2, at most 2^-34. So below, rounded once, is within 2^-24, less than 1
    unit of u with the 2^-34; u is rounded by half a unit, and so is what it is compared with: less than 2 apart, so 1.
    This holds while a, square and u are above 2^-100: what was missed is then no subnormal number. Beyond, u is within
    8 units, and where square is subnormal or 0 it counts for 0 beside an eps that is normal.
    """
    x = square
    if ANY:
        tiny = square < 2.0**-96
        x = tl.where(tiny, square * 2.0**64, square)
    root = tl.sqrt(x)
    missed = tl.fma(-root, root, x) * tl.minimum(tl.rsqrt(x), 2.0**63)  # twice as much; the minimum, for x = 0
    if ANY:
        root = tl.where(tiny, root * 2.0**-32, root)
        missed = tl.where(tiny, missed * 2.0**-32, missed)
    below = tl.fma(root, per_root, eps)
    if ANY:
        inverse = tl.minimum(1.0 / below, 2.0**126)
        u = a / below
    else:
        inverse = tl.rsqrt(below)
        inverse *= inverse
        u = a * inverse
    left = tl.fma(-0.5 * per_root * missed, u, tl.fma(-below, u, a))
    return tl.where(tl.abs(left) < float("inf"), tl.fma(left, inverse, u), u)  # else below or u is 0, inf or NaN
