"""The definition, literally: w <- w - lr * clip(u), u being clipped to [-alpha, alpha] element by element."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from hf_gradclip import optim

LR = 0.05
STEPS = 30
START = np.random.default_rng(0).standard_normal(8).astype(np.float32)
GRADIENTS = np.random.default_rng(1).standard_normal((STEPS, 8)).astype(np.float32)
GRADIENTS[[7, 8, 20]] *= 6


def trained(make) -> tuple[np.ndarray, float]:
    """The weights after the run, and the share of the steps that were clipped."""
    w = nn.Parameter(torch.from_numpy(START.copy()))
    optimizer = make([w])
    for g in GRADIENTS:
        w.grad = torch.from_numpy(g.copy())
        optimizer.step()
    return w.detach().numpy(), optimizer.update_clipper.report.summary()["rate"]


def test_momentum_w_minus_lr_times_clip_u():
    alpha = 4.0
    w, u = np.float64(START), np.zeros(8)
    clips = 0
    for g in np.float64(GRADIENTS):
        u = 0.9 * u + g
        clips += (np.abs(u) > alpha).any()
        w = w - LR * np.clip(u, -alpha, alpha)

    ours, rate = trained(lambda p: optim.SGD(p, lr=LR, momentum=0.9, update_clip=f"value:max_value={alpha}"))
    np.testing.assert_allclose(ours, w, rtol=1e-6, atol=1e-6)
    assert rate == clips / STEPS
    assert 0 < clips < STEPS


def test_rmsprop_w_minus_lr_times_clip_u():
    alpha = 2.0
    w, v = np.float64(START), np.zeros(8)
    clips = 0
    for g in np.float64(GRADIENTS):
        v = 0.99 * v + 0.01 * g**2
        u = g / (np.sqrt(v) + 1e-8)
        clips += (np.abs(u) > alpha).any()
        w = w - LR * np.clip(u, -alpha, alpha)

    ours, rate = trained(lambda p: optim.RMSprop(p, lr=LR, update_clip=f"value:max_value={alpha}"))
    np.testing.assert_allclose(ours, w, rtol=1e-6, atol=1e-6)
    assert rate == clips / STEPS
    assert 0 < clips < STEPS


def test_adam_w_minus_lr_times_clip_u():
    alpha = 0.6
    w, m, v = np.float64(START), np.zeros(8), np.zeros(8)
    clips = 0
    for t, g in enumerate(np.float64(GRADIENTS), start=1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        u = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        clips += (np.abs(u) > alpha).any()
        w = w - LR * np.clip(u, -alpha, alpha)

    ours, rate = trained(lambda p: optim.Adam(p, lr=LR, update_clip=f"value:max_value={alpha}"))
    np.testing.assert_allclose(ours, w, rtol=1e-6, atol=1e-6)
    assert rate == clips / STEPS
    assert 0 < clips < STEPS


def test_adamw_w_minus_lr_times_clip_u_with_decay_apart():
    alpha, decay = 0.6, 0.1
    w, m, v = np.float64(START), np.zeros(8), np.zeros(8)
    clips = 0
    for t, g in enumerate(np.float64(GRADIENTS), start=1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        u = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        clips += (np.abs(u) > alpha).any()
        w = w * (1 - LR * decay) - LR * np.clip(u, -alpha, alpha)

    ours, rate = trained(lambda p: optim.AdamW(p, lr=LR, weight_decay=decay, update_clip=f"value:max_value={alpha}"))
    np.testing.assert_allclose(ours, w, rtol=1e-6, atol=1e-6)
    assert rate == clips / STEPS
    assert 0 < clips < STEPS
