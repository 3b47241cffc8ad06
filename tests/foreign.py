"""An independent Qwen3: every operation uses another formula than the package's, and can be replaced.

It computes in float32 and float64, and keeps numbers with the digits of `short`, a dtype.
`Foreign(config, weights, norm=...)` replaces an operation by a function (own, at, *inputs), where own is the right
one and at says where it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class At:
    """Where an operation runs: "decode.0." or "", the layer or None, the name of the point."""

    prefix: str
    layer: int | None
    name: str

    @property
    def kind(self):
        return self.name.rpartition(".")[2]


class Foreign:
    def __init__(self, config, weights, short=np.float32, **replaced):
        self.config, self.weights, self.short = config, weights, short
        self.replaced, self.points, self.at = replaced, {}, None

    def call(self, operation, name, *inputs):
        """Run an operation, or what replaces it, and keep its result as a point."""
        at, own = At(self.prefix, self.layer, name), getattr(self, operation)
        self.at = at
        y = self.replaced[operation](own, at, *inputs) if operation in self.replaced else own(*inputs)
        if y.dtype.kind == "f":
            y = y.astype(self.short).astype(np.float32)
        self.points[self.prefix + name] = y
        return y

    # --- operations ---------------------------------------------------------------------------------------------------

    def embed(self, ids):
        return self.weights["model.embed_tokens.weight"].astype(np.float32)[ids]

    def norm(self, x, weight=None, eps=None):
        weight = self.weights[f"{self.at.name}.weight"] if weight is None else weight
        x = x.astype(np.float64)
        size = np.linalg.norm(x, axis=-1, keepdims=True)
        scale = np.sqrt(x.shape[-1]) / np.sqrt(size**2 + x.shape[-1] * (eps or self.config.rms_norm_eps))
        return weight.astype(np.float64) * (x * scale)

    def linear(self, x, weight=None):
        weight = self.weights[f"{self.at.name}.weight"] if weight is None else weight
        y = np.einsum("bsi,oi->bso", x, weight.astype(np.float32), optimize=True)
        bias = self.weights.get(f"{self.at.name}.bias")
        return y if bias is None else y + bias.astype(np.float32)

    def frequencies(self):
        size = self.config.head_dim
        return np.exp(-np.arange(0, size, 2) / size * np.log(self.config.rope_theta))

    def rope(self, x, positions):
        turns = np.exp(1j * positions[:, None] * self.frequencies())
        half = x.shape[-1] // 2
        z = (x[..., :half].astype(np.float64) + 1j * x[..., half:]) * turns[:, None]
        return np.moveaxis(np.concatenate((z.real, z.imag), -1), 2, 1)

    def visible(self, new, total):
        i, j = np.arange(total - new, total)[:, None], np.arange(total)
        window = self.config.window(self.layer) or total
        return (j <= i) & (j > i - window)

    def scores(self, q, k, v):
        group = q.shape[1] // k.shape[1]
        s = np.einsum("bhsd,bhtd->bhst", q, np.repeat(k, group, 1), optimize=True) / np.sqrt(q.shape[-1])
        return np.where(self.visible(q.shape[2], k.shape[2]), s, -np.inf)

    def probs(self, s):
        e = np.exp2((s.astype(np.float64) - s.max(-1, keepdims=True)) * np.log2(np.e))
        return e / e.sum(-1, keepdims=True)

    def context(self, p, v):
        v = np.repeat(v, p.shape[1] // v.shape[1], 1)
        return np.einsum("bhst,bhtd->bshd", p, v, optimize=True).reshape(*p.shape[:1], p.shape[2], -1)

    def act(self, gate, up):
        return gate.astype(np.float64) * (np.tanh(gate.astype(np.float64) / 2) + 1) / 2 * up

    def add(self, x, y):
        return x + y

    def choose(self, logits):
        return np.argsort(-logits, -1, kind="stable")[..., : self.config.num_experts_per_tok]

    def shares(self, logits, chosen):
        p = self.probs(logits)
        p = np.take_along_axis(p, chosen, -1)
        return p / p.sum(-1, keepdims=True) if self.config.norm_topk_prob else p

    def experts(self, x, chosen, shares):
        y = np.zeros(x.shape)
        for e in np.unique(chosen):
            w = {
                n: self.weights[f"{self.at.name}.{e}.{n}_proj.weight"].astype(np.float64)
                for n in ("gate", "up", "down")
            }
            out = self.act(x @ w["gate"].T, x @ w["up"].T) @ w["down"].T
            y += out * np.where(chosen == e, shares, 0).sum(-1, keepdims=True)
        return y

    def head(self, x):
        name = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return self.linear(x, self.weights[f"{name}.weight"])

    def cache(self, kind, old, new):
        """Put new keys or values (B, K, S, Dh) behind the old."""
        return new if old is None else np.concatenate((old, new), 2)

    # --- the model ----------------------------------------------------------------------------------------------------

    def attention(self, x, base, positions):
        c, call = self.config, self.call
        heads = lambda y: y.reshape(*y.shape[:2], -1, c.head_dim)  # noqa: E731
        q, k, v = (call("linear", f"{base}.{n}_proj", x) for n in "qkv")
        q, k = (call("norm", f"{base}.{n}_norm", heads(y)) for n, y in (("q", q), ("k", k)))
        q, k = (call("rope", f"{base}.{n}_rope", y, positions) for n, y in (("q", q), ("k", k)))
        own = self.replaced.get("cache")
        at = At(self.prefix, self.layer, base)
        for kind, new in (("k", k), ("v", np.swapaxes(heads(v), 1, 2))):
            args = kind, self.kept.get((self.layer, kind)), new
            self.kept[self.layer, kind] = own(self.cache, at, *args) if own else self.cache(*args)
        k, v = (self.kept[self.layer, kind] for kind in "kv")
        s = call("scores", f"{base}.scores", q, k, v)
        y = call("context", f"{base}.context", call("probs", f"{base}.probs", s), v)
        return call("linear", f"{base}.o_proj", y)

    def mlp(self, x, base):
        call = self.call
        if self.config.is_sparse(self.layer):
            logits = call("linear", f"{base}.gate", x)
            chosen = call("choose", f"{base}.router_indices", logits)
            return call(
                "experts", f"{base}.experts", x, chosen, call("shares", f"{base}.router_weights", logits, chosen)
            )
        gate, up = (call("linear", f"{base}.{n}_proj", x) for n in ("gate", "up"))
        return call("linear", f"{base}.down_proj", call("act", f"{base}.act", gate, up))

    def forward(self, ids, start):
        positions = np.arange(start, start + ids.shape[1])
        self.layer = None
        x = self.call("embed", "model.embed_tokens", ids)
        for i in range(self.config.num_hidden_layers):
            self.layer = i
            base = f"model.layers.{self.layer}"
            y = self.attention(self.call("norm", f"{base}.input_layernorm", x), f"{base}.self_attn", positions)
            x = self.call("add", f"{base}.attn_residual", x, y)
            x = self.call(
                "add", base, x, self.mlp(self.call("norm", f"{base}.post_attention_layernorm", x), f"{base}.mlp")
            )
        self.layer = None
        return self.call("head", "lm_head", self.call("norm", "model.norm", x))

    def run(self, golden):
        """Return the points of a recording's ids."""
        self.points, self.kept = {}, {}
        for self.prefix, ids, positions in golden.passes:
            self.forward(ids, int(positions[0, 0]))
        return self.points
