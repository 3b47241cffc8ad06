"""AdamW, the learning rate schedule, and gradient clipping.

Decoupled weight decay: Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101; the moments: Kingma and Ba, 2015,
https://arxiv.org/abs/1412.6980; the cosine: Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983; clipping:
Pascanu et al., 2013, https://arxiv.org/abs/1211.5063.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from qwen3np.numerics import Array
from qwen3np.ops.fast.threads import blas_threads, share

Moments: TypeAlias = dict[
    str, tuple[Array, Array]
]  # of each weight: the running means of its gradient and of the gradient's square


def zero_moments(weights: Mapping[str, Array]) -> Moments:
    """Return the moments before the first step."""
    return {name: (np.zeros_like(w), np.zeros_like(w)) for name, w in weights.items()}


def cosine_schedule(step: int, steps: int, warmup: int, peak: float) -> float:
    """Return the learning rate of step 0, 1, ... of `steps`: linearly up to the peak, then down to 0 on a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def clip(gradients: Mapping[str, Array], max_norm: float) -> float:
    """Scale all gradients in place so that their joint L2 norm is at most max_norm; return the norm before."""
    with blas_threads():  # a multithreaded BLAS would split a sum according to its thread count
        norm = math.sqrt(sum(float(np.vdot(g, g)) for g in gradients.values()))
    if norm > max_norm:
        for gradient in gradients.values():
            gradient *= gradient.dtype.type(max_norm / norm)
    return norm


def adamw(
    weights: Mapping[str, Array],
    gradients: Mapping[str, Array],
    moments: Moments,
    step: int,
    learning_rate: float,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> None:
    """Perform step 1, 2, ... of AdamW, updating weights and moments in place.

    m = β1 m + (1 - β1) g, v = β2 v + (1 - β2) g², w = w (1 - lr λ) - lr m̂ / (sqrt(v̂) + eps), where
    m̂ = m / (1 - β1^step) and v̂ = v / (1 - β2^step). The decay λ applies to matrices, not to norm weights and biases.
    """
    first, second = 1 - betas[0] ** step, 1 - betas[1] ** step

    def update(name: str) -> None:
        w, g, (m, v) = weights[name], gradients[name], moments[name]
        m *= betas[0]
        m += (1 - betas[0]) * g
        v *= betas[1]
        g = g * g
        g *= 1 - betas[1]
        v += g
        change = np.sqrt(v)
        change /= math.sqrt(second)
        change += eps
        np.divide(m, change, out=change)
        change *= learning_rate / first
        if w.ndim == 2:
            w *= 1 - learning_rate * weight_decay
        w -= change

    # an elementwise step of a matrix costs about as much as ten multiply-adds for each of its elements
    share(list(weights), 10 * sum(w.size for w in weights.values()), update)
