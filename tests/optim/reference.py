"""The optimizers and the clip rules in float64, written from their equations; nothing here knows the library.

Weights, gradients and updates are dicts of arrays by name. `update` advances the moments and returns u, the update
before the learning rate; `go` makes one whole step of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

Arrays = dict[str, np.ndarray]
Clip = Callable[[Arrays], Arrays]


class Adam:
    """m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, u = m_hat / (sqrt(v_hat) + eps); L2 in the gradient."""

    decoupled = False

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, decay: float = 0.0) -> None:
        self.betas, self.eps, self.decay = betas, eps, decay
        self.t = 0
        self.m: Arrays = {}
        self.v: Arrays = {}

    def update(self, g: Arrays, w: Arrays) -> Arrays:
        self.t += 1
        b1, b2 = self.betas
        u = {}
        for name in g:
            grad = g[name] if self.decoupled else g[name] + self.decay * w[name]
            self.m[name] = b1 * self.m.get(name, 0.0) + (1 - b1) * grad
            self.v[name] = b2 * self.v.get(name, 0.0) + (1 - b2) * grad**2
            m_hat = self.m[name] / (1 - b1**self.t)
            v_hat = self.v[name] / (1 - b2**self.t)
            u[name] = m_hat / (np.sqrt(v_hat) + self.eps)
        return u


class AdamW(Adam):
    """Adam whose decay is applied to the weight, apart from the update."""

    decoupled = True


class RMSprop:
    """v <- a v + (1 - a) g^2, u = g / (sqrt(v) + eps); less the square of the mean if centered; or a buffer of u."""

    decoupled = False

    def __init__(
        self,
        alpha: float = 0.99,
        eps: float = 1e-8,
        momentum: float = 0.0,
        decay: float = 0.0,
        centered: bool = False,
        corrected: bool = False,
    ) -> None:
        self.alpha, self.eps, self.momentum, self.decay = alpha, eps, momentum, decay
        self.centered, self.corrected = centered, corrected
        self.t = 0
        self.v: Arrays = {}
        self.mean: Arrays = {}
        self.b: Arrays = {}

    def update(self, g: Arrays, w: Arrays) -> Arrays:
        self.t += 1
        known = 1 - self.alpha**self.t if self.corrected else 1.0
        for name in g:
            grad = g[name] + self.decay * w[name]
            self.v[name] = self.alpha * self.v.get(name, 0.0) + (1 - self.alpha) * grad**2
            self.mean[name] = self.alpha * self.mean.get(name, 0.0) + (1 - self.alpha) * grad
            variance = self.v[name] / known
            if self.centered:
                variance = variance - (self.mean[name] / known) ** 2
            self.b[name] = self.momentum * self.b.get(name, 0.0) + grad / (np.sqrt(variance) + self.eps)
        return {name: self.b[name] for name in g}


class SGD:
    """b <- mu b + (1 - dampening) g, the first b being g; u = b, or g + mu b by Nesterov."""

    decoupled = False

    def __init__(
        self, momentum: float = 0.0, dampening: float = 0.0, decay: float = 0.0, nesterov: bool = False
    ) -> None:
        self.momentum, self.dampening, self.decay, self.nesterov = momentum, dampening, decay, nesterov
        self.b: Arrays = {}

    def update(self, g: Arrays, w: Arrays) -> Arrays:
        u = {}
        for name in g:
            grad = g[name] + self.decay * w[name]
            first = name not in self.b
            self.b[name] = grad if first else self.momentum * self.b[name] + (1 - self.dampening) * grad
            u[name] = grad + self.momentum * self.b[name] if self.nesterov else self.b[name]
        return u


def go(optimizer: Adam | RMSprop | SGD, w: Arrays, u: Arrays, lr: float) -> Arrays:
    """w <- w (1 - lr decay) - lr u, the decay only where it is decoupled."""
    keep = 1 - lr * optimizer.decay if optimizer.decoupled else 1.0
    return w | {name: w[name] * keep - lr * u[name] for name in u}


def value(limit: float) -> Clip:
    """Every element to [-limit, limit]."""
    return lambda x: {name: np.minimum(np.maximum(a, -limit), limit) for name, a in x.items()}


def global_norm(limit: float) -> Clip:
    """All times min(1, limit / (n + 1e-6)), n being the norm of all together."""

    def clip(x: Arrays) -> Arrays:
        n = math.sqrt(sum(float((a * a).sum()) for a in x.values()))
        return {name: a * min(1.0, limit / (n + 1e-6)) for name, a in x.items()}

    return clip


def param_norm(limit: float) -> Clip:
    """Each times min(1, limit / (n + 1e-6)), n being its own norm."""
    return lambda x: {name: a * min(1.0, limit / (math.sqrt((a * a).sum()) + 1e-6)) for name, a in x.items()}


def block_rms(limit: float) -> Clip:
    """Each times min(1, L / (n + 1e-6)), n being its own norm and L = limit * sqrt(number of elements)."""

    def clip(x: Arrays) -> Arrays:
        wide = {name: limit * math.sqrt(a.size) for name, a in x.items()}
        return {name: a * min(1.0, wide[name] / (math.sqrt((a * a).sum()) + 1e-6)) for name, a in x.items()}

    return clip


def in_turn(factors: tuple[float, ...], turn_of: Callable[[str], int]) -> Clip:
    """Times one factor after the other from call to call; each array begins at its own."""
    calls = itertools.count()

    def clip(x: Arrays) -> Arrays:
        call = next(calls)
        return {name: a * factors[(call + turn_of(name)) % len(factors)] for name, a in x.items()}

    return clip


def changed(before: Arrays, after: Arrays) -> list[str]:
    """The names that a rule has changed."""
    return [name for name in before if not np.array_equal(before[name], after[name])]
