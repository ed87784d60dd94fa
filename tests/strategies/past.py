"""The rule of hf_gradclip.outlier in plain Python, for the tests of everything that goes by it."""

from __future__ import annotations

import math
from statistics import median


class Past:
    """The norms of one thing. Called with the next one it judges it, and remembers it."""

    def __init__(self) -> None:
        self.logs: list[float] = []

    def ordinary(self) -> tuple[float, float]:
        """Median m of the logarithms of the last 64 norms, and the reach r: a norm stands out above exp(m + r)."""
        known = sorted(self.logs[-64:])
        if len(self.logs) < 2:
            return 0.0, math.inf
        m = median(known)
        s = 1.4826 * median(abs(log - m) for log in known)
        fourth = known[-4] if len(known) >= 4 else known[0]
        r = max(min(5 * s, math.log(30)), min(max(1.5 * (fourth - m), math.log(3)), math.log(8)))
        return m, r if len(self.logs) >= 16 else max(r, math.log(8))

    def __call__(self, norm: float) -> tuple[float, float]:
        """The most that is left of the norm, inf where it does not stand out; and the norm above which it would."""
        m, r = self.ordinary()
        log = math.log(norm) if norm > 0 else -math.inf
        if math.isfinite(log):
            self.logs.append(log)
        return math.exp(m) if log > m + r else math.inf, math.exp(m + r)
