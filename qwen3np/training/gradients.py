"""The backward pass: for each layer a function that carries the gradient back through it.

A name d... is the derivative of the loss with respect to that array, and has its shape. Each function states the
formula of its layer and takes the inputs or outputs of the layer in the forward pass, which `forward` records as points
(back-propagation: Rumelhart, Hinton and Williams, 1986, https://doi.org/10.1038/323533a0).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np
from numpy.typing import ArrayLike

from qwen3np.config import Config
from qwen3np.guard import checked_ids, forward
from qwen3np.numerics import FLOAT32, Array, Numerics, named
from qwen3np.ops.fast.threads import share
from qwen3np.qwen3 import rotate
from qwen3np.rope import rotary_tables

# Sequences per task. Results are added in a fixed order, so the number of threads changes no bit.
ROWS = 4


def loss_and_gradients(
    weights: Mapping[str, Array],
    config: Config,
    input_ids: ArrayLike,
    targets: ArrayLike,
    mask: ArrayLike,
    *,
    numerics: str = "float32",
) -> tuple[float, dict[str, Array]]:
    """Return the mean cross-entropy of the targets, in nats, and its gradient for each weight, by name.

    input_ids, targets and mask are (B, S): targets[b, s] is the id that should follow input_ids[b, :s + 1], and counts
    where mask[b, s] is true. numerics is "float32" or "float64". A tied head adds to the gradient of the
    embedding. Raises ValueError for shapes that differ, ids outside the vocabulary, a mask without true elements and a
    config with experts.
    """
    if config.num_experts:
        raise ValueError(f"config: num_experts = {config.num_experts}: gradients are computed for dense models only")
    n = named(numerics)
    if n.rounds:
        raise ValueError(f"numerics={numerics!r}: gradients are computed in float32 or float64")
    ids, wanted, counts = (
        checked_ids(input_ids, config),
        checked_ids(targets, config, "targets"),
        np.atleast_2d(mask).astype(bool),
    )
    if not ids.shape == wanted.shape == counts.shape:
        raise ValueError(f"input_ids {ids.shape}, targets {wanted.shape} and mask {counts.shape} must have one shape")
    counted = int(np.sum(counts))
    if not counted:
        raise ValueError("mask: no position counts, so there is no loss")

    starts = range(0, len(ids), ROWS)
    results: dict[int, tuple[float, dict[str, Array]]] = {}

    def part(start: int) -> None:
        rows = slice(start, start + ROWS)
        results[start] = _backward(weights, config, ids[rows], wanted[rows], counts[rows], counted, n)

    share(starts, ids.size * sum(tensor.size for tensor in weights.values()), part)
    loss, gradients = results[0]
    for start in starts[1:]:
        loss += results[start][0]
        for name, gradient in results[start][1].items():
            gradients[name] += gradient
    return loss, gradients


def _backward(
    weights: Mapping[str, Array],
    config: Config,
    ids: Array,
    targets: Array,
    mask: Array,
    counted: int,
    numerics: Numerics,
) -> tuple[float, dict[str, Array]]:
    """Return what these sequences contribute to the gradients and to the loss, a mean over `counted` positions."""
    points: dict[str, Array] = {}
    logits = forward(weights, config, ids, numerics=numerics.name, trace=points.__setitem__)
    gradients: dict[str, Array] = {}
    embedding = "model.embed_tokens.weight"
    head = embedding if config.tie_word_embeddings else "lm_head.weight"

    loss, dlogits = cross_entropy(logits[mask], targets[mask])  # positions that do not count give no gradient
    dlogits /= counted
    x = points["model.norm"]
    dx = np.zeros_like(x)
    dx[mask], gradients[head] = linear_backward(dlogits, x[mask], numerics.widen(weights[head]))

    layers = range(config.num_hidden_layers)
    inputs = [points["model.embed_tokens"], *(points[f"model.layers.{layer}"] for layer in layers)]
    norm = "model.norm.weight"
    dx, gradients[norm] = rms_norm_backward(dx, inputs[-1], numerics.widen(weights[norm]), config.rms_norm_eps)
    length: int = ids.shape[1]
    tables = rotary_tables(config, np.arange(length)[None], numerics)
    for layer in reversed(layers):
        dx = block_backward(dx, inputs[layer], points, weights, layer, config, tables, numerics, gradients)

    if embedding not in gradients:
        gradients[embedding] = np.zeros(weights[embedding].shape, numerics.dtype)
    np.add.at(gradients[embedding], ids, dx)  # repeated ids add up
    return loss / counted, gradients


def block_backward(
    dy: Array,
    x: Array,
    points: Mapping[str, Array],
    weights: Mapping[str, Array],
    layer: int,
    config: Config,
    tables: tuple[Array, Array],
    numerics: Numerics,
    gradients: dict[str, Array],
) -> Array:
    """Carry dy (B, S, D) back through a decoder layer: y = h + mlp(norm(h)), h = x + attention(norm(x)).

    points come from the forward pass. Returns dx, and stores the gradients of the layer's weights in gradients.
    """
    prefix = f"model.layers.{layer}."

    def weight(name: str) -> Array:
        return numerics.widen(weights[f"{prefix}{name}.weight"])

    def project(dy: Array, x: Array, name: str) -> Array:
        dx, gradients[f"{prefix}{name}.weight"] = linear_backward(dy, x, weight(name))
        if config.attention_bias and name.startswith("self_attn."):
            gradients[f"{prefix}{name}.bias"] = np.sum(dy, axis=(0, 1))
        return dx

    def normalise(dy: Array, x: Array, name: str) -> Array:
        dx, gradients[f"{prefix}{name}.weight"] = rms_norm_backward(dy, x, weight(name), config.rms_norm_eps)
        return dx

    def heads(name: str) -> Array:  # what a projection gave: (B, S, heads, Dh)
        return points[f"{prefix}self_attn.{name}"].reshape(*x.shape[:2], -1, config.head_dim)

    # y = h + down(silu(gate) * up): the gradient flows into both terms of the sum
    gate, up = points[f"{prefix}mlp.gate_proj"], points[f"{prefix}mlp.up_proj"]
    normed = points[f"{prefix}post_attention_layernorm"]
    dact = project(dy, points[f"{prefix}mlp.act"], "mlp.down_proj")
    dgate, dup = swiglu_backward(dact, gate, up)
    dnormed = project(dgate, normed, "mlp.gate_proj") + project(dup, normed, "mlp.up_proj")
    dh = dy + normalise(dnormed, points[f"{prefix}attn_residual"], "post_attention_layernorm")

    # h = x + o_proj(attend(q, k, v)), where q and k are normalised and rotated
    dcontext = project(dh, points[f"{prefix}self_attn.context"], "self_attn.o_proj")
    dq, dk, dv = attend_backward(
        dcontext,
        points[f"{prefix}self_attn.q_rope"],
        points[f"{prefix}self_attn.k_rope"],
        np.swapaxes(heads("v_proj"), 1, 2),
        points[f"{prefix}self_attn.probs"],
        points[f"{prefix}self_attn.context"],
    )
    dq, dk = rotate_backward(dq, tables, numerics), rotate_backward(dk, tables, numerics)
    dq = normalise(np.swapaxes(dq, 1, 2), heads("q_proj"), "self_attn.q_norm")
    dk = normalise(np.swapaxes(dk, 1, 2), heads("k_proj"), "self_attn.k_norm")
    normed = points[f"{prefix}input_layernorm"]
    dnormed = np.zeros_like(normed)
    for d, name in ((dq, "q_proj"), (dk, "k_proj"), (np.swapaxes(dv, 1, 2), "v_proj")):
        dnormed += project(d.reshape(*x.shape[:2], -1), normed, f"self_attn.{name}")
    return dh + normalise(dnormed, x, "input_layernorm")


def cross_entropy(logits: Array, targets: Array) -> tuple[float, Array]:
    """Of L = sum of -log softmax(logits)[target]; dlogits = softmax(logits) - onehot(target).

    logits (N, V), targets (N,). Returns L, a sum in nats, and dlogits.
    """
    rows = np.arange(len(targets))
    p = logits - np.max(logits, axis=-1, keepdims=True)
    chosen = p[rows, targets]
    np.exp(p, out=p)
    total = np.sum(p, axis=-1, keepdims=True)
    loss = float(np.sum(np.log(total[:, 0]) - chosen, dtype=np.float64))
    p /= total
    p[rows, targets] -= 1
    return loss, p


def linear_backward(dy: Array, x: Array, w: Array) -> tuple[Array, Array]:
    """Of y = x Wᵀ: dx = dy W, dW = dyᵀ x, summed over all rows. x (..., in), w (out, in), dy (..., out) -> dx, dw."""
    rows = dy.reshape(-1, len(w))
    return (rows @ w).reshape(x.shape), np.transpose(rows) @ x.reshape(-1, x.shape[-1])


def rms_norm_backward(dy: Array, x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """Of y = weight * x s, s = 1 / sqrt(mean(x²) + eps): dx = s (g - x s mean(g * x s)) with g = dy * weight.

    x and dy (..., N), weight (N,) -> dx (..., N), and dweight (N,): the sum of dy * x s over all rows.
    """
    scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    normed = x * scale
    dweight = np.sum((dy * normed).reshape(-1, len(weight)), axis=0)
    dx = dy * weight
    dx -= normed * np.mean(dx * normed, axis=-1, keepdims=True)
    dx *= scale
    return dx, dweight


def rotate_backward(dy: Array, tables: tuple[Array, Array], numerics: Numerics = FLOAT32) -> Array:
    """Of y = R(angle) x: dx = R(angle)ᵀ dy = R(-angle) dy, for a rotation. dy (B, heads, S, Dh) -> same."""
    cos, sin = tables
    return rotate(dy, (cos, -sin), numerics)


def attend_backward(
    dcontext: Array, q: Array, k: Array, v: Array, probs: Array, context: Array
) -> tuple[Array, Array, Array]:
    """Of P = softmax(q kᵀ / sqrt(Dh)), C = P v: dv = Pᵀ dC, dP = dC vᵀ, dscores = P * (dP - sum(P * dP)).

    The sum over a row of P * dP is that of C * dC (Dao et al., 2022, https://arxiv.org/abs/2205.14135, appendix B).
    q (B, H, S, Dh), k and v (B, K, S, Dh), probs (B, H, S, S), context and dcontext (B, S, H * Dh) -> dq, dk, dv. The
    G = H / K query heads of a KV head are rows of one product, which adds up what they give to dk and dv.
    """
    batch, kv_heads, length, head_dim = k.shape

    def grouped(y: Array) -> Array:  # (B, K, G * S, Dh or S)
        return y.reshape(batch, kv_heads, -1, y.shape[-1])

    def per_head(y: Array) -> Array:  # (B, S, H * Dh) -> (B, K, G * S, Dh)
        return grouped(np.swapaxes(y.reshape(batch, length, -1, head_dim), 1, 2))

    dq, dk, dv = np.empty_like(grouped(q)), np.empty_like(k), np.empty_like(k)
    groups = (grouped(q), k, v, grouped(probs), per_head(context), per_head(dcontext), dq, dk, dv)
    for at in product(range(batch), range(kv_heads)):  # one group at a time stays in the cache
        q1, k1, v1, p, c, dc, dq1, dk1, dv1 = (y[at] for y in groups)
        np.matmul(np.transpose(p), dc, out=dv1)
        ds = dc @ np.transpose(v1)
        ds -= np.sum(dc * c, axis=-1, keepdims=True)
        ds *= p
        ds *= head_dim**-0.5
        np.matmul(ds, k1, out=dq1)
        np.matmul(np.transpose(ds), q1, out=dk1)
    return dq.reshape(q.shape), dk, dv


def swiglu_backward(dact: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """Of act = silu(g) * up, silu(g) = g σ(g), silu'(g) = σ(g) (1 + g (1 - σ(g))). All (B, S, F) -> dgate, dup."""
    with np.errstate(over="ignore"):  # exp(-g) = inf gives the right limit, 0
        sigmoid = 1 / (1 + np.exp(-gate))
    silu = gate * sigmoid
    dgate = 1 - sigmoid
    dgate *= silu
    dgate += sigmoid
    dgate *= up
    dgate *= dact
    return dgate, dact * silu
