"""Plants small bugs in the package, one at a time, to check that the fast tests catch each: python tests/mutants.py.

A bug is a text of a file, which occurs there exactly once, and what takes its place. It is planted in a copy of the
project. The tests of its group run first; if they pass, so does every test of the default run that does not look at the
text of the source itself. Bugs that nobody could notice do not belong here.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# What these see is that a text has changed, whether a bug or not; so does test_tour.py, which has a copy of the core.
OF_THE_TEXT = ["engines.py::test_what_a_student_reads_stays_short", "readme.py::test_lines_are_counted_right"]
SECONDS = 300  # for the tests of a group, which take a few; the default run has three times as many

# (file, its tests, {bug: (text, what takes its place)})
GROUPS = [
    (
        "config.py",
        "config",
        {
            "eps is 1e-5 by default": ("rms_norm_eps: Positive = 1e-6", "rms_norm_eps: Positive = 1e-5"),
            "bias by default": ("attention_bias: Switch = False", "attention_bias: Switch = True"),
            "head tied by default": ("tie_word_embeddings: Switch = False", "tie_word_embeddings: Switch = True"),
            "window ignored": ("return self.sliding_window if slides else None", "return None"),
            "window on the wrong layers": (
                "return self.sliding_window if slides else None",
                "return None if slides else self.sliding_window",
            ),
            "sparse layers counted from 0": ("not (layer + 1) % self.decoder", "not layer % self.decoder"),
            "norm_topk_prob by default": ("norm_topk_prob: Switch = False", "norm_topk_prob: Switch = True"),
        },
    ),
    (
        "rules.py",
        "rules config",
        {
            "a bool is a number": ("type(x) in (int, float) and", "isinstance(x, (int, float)) and"),
            "infinity is finite": ("abs(x) <= most and holds(x)", "holds(x)"),
            "None refused where it is allowed": ("lambda x: x is None or rule.holds(x)", "lambda x: rule.holds(x)"),
            "NumPy's numbers stay": ("isinstance(value, np.generic)", "False"),
        },
    ),
    (
        "files/hf_config.py",
        "config",
        {
            "theta of rope_parameters not read": (
                'thetas.append(settings.pop("rope_theta"))',
                'settings.pop("rope_theta")\n            thetas = thetas or [10000.0]',
            ),
            "theta falls back to 10,000": (
                "    if not thetas:",
                "    thetas = thetas or [1e4]\n    if not thetas:",
            ),
            "head_dim is hidden_size / heads": (
                '    if "head_dim" not in values:\n',
                '    if values["hidden_size"] % values["num_attention_heads"] == 0:\n',
            ),
            "experts of no size": ("yield c.moe_intermediate_size > 0,", "yield True,"),
            "layer types for some of the layers": ("len(c.layer_types) in (0, layers)", "True"),
            "settings of YaRN not checked": ('(config.rope_scaling, "rope_scaling.")', '(None, "")'),
            "a context extended twice": (
                "original = config.rope_scaling.original_max_position_embeddings",
                "original = config.max_position_embeddings",
            ),
        },
    ),
    (
        "numerics.py",
        "numerics engines moe",
        {
            "rounding cuts off": (
                "x.astype(BFLOAT16).astype(self.dtype) if",
                "(x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) if",
            ),
            "ties are rounded away from 0": (
                "x.astype(BFLOAT16).astype(self.dtype) if",
                "((x.view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32) if",
            ),
            "wide weights not rounded": (
                "        if self.rounds and x.dtype != BFLOAT16:\n            return self.round(x)\n",
                "",
            ),
            "bfloat16-grouped is bfloat16": ("rounds=True, grouped=True)", "rounds=True)"),
            "the engine's name ignored": ("engine=engine)", 'engine="fast")'),
            "an unknown engine is the fast one": (
                "        if name not in known:\n",
                '        if key == "engine" and name not in known:\n            engine = "fast"\n'
                "        elif name not in known:\n",
            ),
        },
    ),
    (
        "ops/elementary.py",
        "norm rope numerics golden",
        {
            "mean square: unbiased": ("/ x.shape[-1]\n", "/ max(x.shape[-1] - 1, 1)\n"),
            "mean square: of the whole array": ("total(x * x) / x.shape[-1]", "total(x * x).mean() / x.shape[-1]"),
            "total: of all rows": ("np.add.reduce(x, axis=-1,", "np.add.reduce(x, axis=None,"),
            "power in the dtype of the exponents": (
                "np.power(base, exponents, dtype=np.float64).astype(exponents.dtype)",
                "np.power(base, exponents)",
            ),
            "cos in float32": ("np.cos(x, dtype=np.float64).astype(x.dtype)", "np.cos(x)"),
            "sin in float32": ("np.sin(x, dtype=np.float64).astype(x.dtype)", "np.sin(x)"),
            "the logarithm of base 10": ("log = math.log\n", "log = math.log10\n"),
        },
    ),
    (
        "ops/plain.py",
        "numerics engines",
        {
            "softmax: nothing subtracted": ("np.exp(x - np.max(x, axis=-1, keepdims=True))", "np.exp(x)"),
            "softmax: the largest of all rows": ("np.max(x, axis=-1, keepdims=True)", "np.max(x)"),
            "softmax: not divided": ("return e / total(e)", "return e"),
            "silu: sign": ("(1 + np.exp(-x))", "(1 + np.exp(x))"),
            "silu: a warning far out": ('np.errstate(over="ignore")', "np.errstate()"),
            "linear: bias left out": ('(num.widen(m[f"{name}.bias"]) if bias else 0)', "0"),
            "linear: bias added after rounding": (
                '    ys = [x @ num.widen(m[f"{name}.weight"]).T + (num.widen(m[f"{name}.bias"]) if bias else 0) '
                "for name in names]\n",
                '    ys = [num.round(x @ num.widen(m[f"{name}.weight"]).T) for name in names]\n'
                '    ys = [y + (num.widen(m[f"{name}.bias"]) if bias else 0) for name, y in zip(names, ys)]\n',
            ),
            "linear: wide weights not rounded": ('num.widen(m[f"{name}.weight"])', 'm[f"{name}.weight"]'),
            "head: not rounded": ("return num.round(x @ num.widen(w).T)", "return x @ num.widen(w).T"),
            "head: wide weights not rounded": ("num.widen(w).T", "w.T"),
            "attend: scores not scaled": (" * q.shape[-1] ** -0.5)", ")"),
            "attend: scaled before the first rounding": (
                "R(R(q @ np.swapaxes(repeated(keys), 2, 3)) *",
                "R((q @ np.swapaxes(repeated(keys), 2, 3)) *",
            ),
            "attend: the next position seen": ("(past <= at)", "(past <= at + 1)"),
            "attend: the window shows one more": (
                "(past > at - (window or length))",
                "(past >= at - (window or length))",
            ),
            "attend: KV heads tiled": (
                "np.repeat(np.stack(padded), q.shape[1] // len(padded[0]), axis=1)",
                "np.tile(np.stack(padded), (1, q.shape[1] // len(padded[0]), 1, 1))",
            ),
            "attend: every sequence as long as the longest": (
                "np.array([a.shape[1] for a in keys])",
                "np.array([length for _ in keys])",
            ),
            "attend: probabilities not rounded": ("R(softmax(scores))", "softmax(scores)"),
            "attend: heads and positions mixed up": (
                "np.swapaxes(context, 1, 2).reshape(len(q)",
                "context.reshape(len(q)",
            ),
            "attend: an edit of the scores is ignored": (
                'scores = m.out("scores", np.where(seen, scores, scores.dtype.type(-np.inf)))',
                'm.out("scores", (scores := np.where(seen, scores, scores.dtype.type(-np.inf))).copy())',
            ),
            "combine: the weight of the most probable for all": ("p[token, slot, None]", "p[token, 0, None]"),
            "combine: outputs not rounded": (
                "num.round(expert(n, rows[token]) * p[token, slot, None])",
                "expert(n, rows[token]) * p[token, slot, None]",
            ),
            "combine: grouped rounds each sum": ("more if num.grouped else num.round(more)", "num.round(more)"),
            "combine: the last expert alone": ("more = y[token] + num", "more = num"),
        },
    ),
    (
        "ops/fast/__init__.py",
        "engines",
        {
            "softmax: nothing subtracted": ("np.exp(x - np.max(x, axis=-1, keepdims=True))", "np.exp(x)"),
            "softmax: the largest of all rows": ("np.max(x, axis=-1, keepdims=True)", "np.max(x)"),
            "softmax: in place": (
                "e = np.exp(x - np.max(x, axis=-1, keepdims=True))",
                "e = np.exp(np.subtract(x, np.max(x, axis=-1, keepdims=True), out=x), out=x)",
            ),
            "silu: sign": ("e = np.exp(-x)", "e = np.exp(x)"),
            "silu: a warning far out": ('np.errstate(over="ignore")', "np.errstate()"),
            "silu: in place": ("np.divide(x, e, out=e)", "np.divide(x, e, out=x)"),
        },
    ),
    (
        "ops/fast/products.py",
        "linear golden",
        {
            "bias left out of one row": ("if bias is not None:", "if bias is not None and len(rows) > 1:"),
            "bias added after rounding": ("y += num.widen(bias)", "y = num.round(y) + num.widen(bias)"),
            "wide weights not rounded for one row": (
                "w.dtype == num.dtype == num.storage",
                "w.dtype == num.dtype",
            ),
            "few rows: the last outputs left out": (
                "for start, stop, near in ((0, cut, NEAR), (cut, len(w), len(w) - cut)):",
                "for start, stop, near in ((0, cut, NEAR),):",
            ),
            "few rows: rows and blocks mixed up": ("products.swapaxes(0, 1).reshape", "products.reshape"),
            "few rows: the last block left out": (
                "for a, b in _pieces(0, len(w), step)]",
                "for a, b in _pieces(0, len(w), step)[:-1]]",
            ),
            "tiles: the last left out": ("[*range(start, stop, size), stop]", "[*range(start, stop, size)]"),
        },
    ),
    (
        "ops/fast/attention.py",
        "attention model cache engines drafts",
        {
            "scores not scaled": ("rows = rows * scale", "pass"),
            "bfloat16: scores not scaled": ("r(r(scores) * scale)", "r(r(scores))"),
            "scaled before the first rounding": ("r(r(scores) * scale)", "r(scores * scale)"),
            "the mask shows the next position": ("past[near:] > at)", "past[near:] > at + 1)"),
            "the mask hides the own position": ("past[near:] > at)", "past[near:] >= at)"),
            "the window shows one more": ("past <= at - window", "past < at - window"),
            "the window shows one less": ("max(first - window + 1, 0)", "max(first - window + 2, 0)"),
            "running softmax: sums not rescaled": ("sums += total_exp * shrink", "sums += total_exp"),
            "running softmax: values not rescaled": ("products += mixed * shrink", "products += mixed"),
            "running softmax: the largest of this block alone": (
                "            np.maximum(largest, before, out=largest)\n",
                "            pass\n",
            ),
            "bfloat16: a row in blocks": ("width = reach if num.rounds else", "width ="),
            "bfloat16: probabilities not rounded": ("scores = r(scores / sums)", "scores = scores / sums"),
            "blocks: a row's last keys left out": (
                "for a in range(0, total, width):",
                "for a in range(0, max(total - 1, 1), width):",
            ),
            "a few positions in one product": ("most = 1 if new <= FEW_ROWS else", "most ="),
            "an edit of the scores is ignored": ("probs = num.round(softmax(edited))", "pass"),
            "edited scores do not reach the context": (
                " and np.array_equal(probs, num.round(softmax(scores)))",
                "",
            ),
            "an edit of the probabilities is ignored": (
                "if np.array_equal(edited, probs) and np",
                "if np",
            ),
            "an edit in place is lost": ("scores.copy()", "scores"),
            "edited: KV heads tiled": (
                "np.repeat(num.widen(v), group, axis=0)",
                "np.tile(num.widen(v), (group, 1, 1))",
            ),
            "edited: context not rounded": (
                "context[b] = num.round(mixed.swapaxes(0, 1))",
                "context[b] = (mixed.swapaxes(0, 1))",
            ),
            "edited: heads and positions mixed up": ("num.round(mixed.swapaxes(0, 1))", "num.round(mixed)"),
        },
    ),
    (
        "ops/fast/experts.py",
        "moe model",
        {
            "the weight of another token": ("* by_weight[places])", "* by_weight[places[::-1]])"),
            "the input of another token": ("rows[places // k]", "rows[places % len(rows)]"),
            "summed in the router's order": (
                "    if not num.grouped:\n        order",
                "    if False:\n        order",
            ),
            "grouped rounds each sum": (
                "        if not num.grouped:\n            y = ",
                "        if True:\n            y = ",
            ),
            "outputs not rounded": (
                "num.round(expert(n, rows[places // k]) * by_weight[places])",
                "expert(n, rows[places // k]) * by_weight[places]",
            ),
            "one expert fewer": ("for n in range(1, k):", "for n in range(1, k - 1):"),
        },
    ),
    (
        "qwen3.py",
        "norm golden",
        {
            "norm: wide weights not rounded": ("R, weight = num.round, num.widen(weight)", "R = num.round"),
            "norm: eps is always 1e-5": ("num.ops.mean_square(x) + eps", "num.ops.mean_square(x) + 1e-5"),
            "norm: eps outside the root": (
                "(1 / np.sqrt(num.ops.mean_square(x) + eps))",
                "(1 / (np.sqrt(num.ops.mean_square(x)) + eps))",
            ),
            "norm: times 1 + weight": ("+ eps))) * weight)", "+ eps))) * (1 + weight))"),
            "norm: mean subtracted": ("return R(R(x * (1 /", "return R(R((x - x.mean(-1, keepdims=True)) * (1 /"),
            "norm: rounded once": (
                "R(R(x * (1 / np.sqrt(num.ops.mean_square(x) + eps))) * weight)",
                "R(x * (1 / np.sqrt(num.ops.mean_square(x) + eps)) * weight)",
            ),
            "norm: the product with the weight not rounded": (
                "return R(R(x * (1 / np.sqrt(num.ops.mean_square(x) + eps))) * weight)",
                "return R(x * (1 / np.sqrt(num.ops.mean_square(x) + eps))) * weight",
            ),
        },
    ),
    (
        "qwen3.py",
        "rope golden model",
        {
            "rotation: turned the other way": (
                "R(a * cos) - R(b * sin), R(b * cos) + R(a * sin)",
                "R(a * cos) + R(b * sin), R(b * cos) - R(a * sin)",
            ),
            "rotation: interleaved": (
                "    return num.ops.rowwise(turn, x, *tables)\n",
                "    y = num.ops.rowwise(turn, np.concatenate([x[..., ::2], x[..., 1::2]], -1), *tables)\n"
                "    return np.stack([y[..., :half], y[..., half:]], -1).reshape(x.shape)\n",
            ),
            "rotation: products not rounded": (
                "R(a * cos) - R(b * sin), R(b * cos) + R(a * sin)",
                "a * cos - b * sin, b * cos + a * sin",
            ),
            "rotation: sums not rounded": ("return R(np.concatenate([", "return (np.concatenate(["),
            "rotation: keys are not turned": ('m.out("k_rope", rotate(k, tables, num))', 'm.out("k_rope", k)'),
        },
    ),
    (
        "qwen3.py",
        "golden model cache",
        {
            "attention: q/k norm after rotation": (
                "    q, k, v = (x.swapaxes(1, 2) for x in "
                '(norm("q_norm", q), norm("k_norm", k), heads(v)))  # (B, heads, S, Dh)\n'
                '    q, k = m.out("q_rope", rotate(q, tables, num)), m.out("k_rope", rotate(k, tables, num))\n',
                "    q, k, v = (heads(x).swapaxes(1, 2) for x in (q, k, v))\n"
                "    q, k = (np.swapaxes(rotate(y, tables, num), 1, 2) for y in (q, k))\n"
                '    q, k = (norm(n, y.reshape(*x.shape[:2], -1)) for n, y in (("q_norm", q), ("k_norm", k)))\n'
                '    q, k = (m.out(n, np.swapaxes(y, 1, 2)) for n, y in (("q_rope", q), ("k_rope", k)))\n',
            ),
            "attention: q/k norm missing": (
                'rms_norm(heads(x), m[f"{name}.weight"], config.rms_norm_eps, num)',
                "heads(x)",
            ),
            "attention: q/k norm missing in decode": (
                'rms_norm(heads(x), m[f"{name}.weight"], config.rms_norm_eps, num)',
                'rms_norm(heads(x), m[f"{name}.weight"], config.rms_norm_eps, num) if x.shape[1] > 1 else heads(x)',
            ),
            "attention: q/k norm over all heads": (
                'rms_norm(heads(x), m[f"{name}.weight"], config.rms_norm_eps, num)',
                'heads(rms_norm(x, np.tile(m[f"{name}.weight"], x.shape[-1] // config.head_dim), '
                "config.rms_norm_eps, num))",
            ),
            "attention: q_norm and k_norm swapped": (
                'rms_norm(heads(x), m[f"{name}.weight"]',
                "rms_norm(heads(x), m[{'q_norm': 'k_norm', 'k_norm': 'q_norm'}[name] + '.weight']",
            ),
            "attention: scale of another head_dim": (
                "num.ops.attend(q, keys",
                "num.ops.attend(q * (config.head_dim * config.num_attention_heads / config.hidden_size) ** 0.5, keys",
            ),
            "attention: KV heads tiled": (
                "num.ops.attend(q, keys, values,",
                "num.ops.attend(q, *([np.tile(y, (q.shape[1] // len(y), 1, 1)) for y in a] for a in (keys, values)),",
            ),
            "attention: the cache is written, not read": (
                "(k, v) if cache is None else cache.write(layer, k, v)",
                "(k, v) if cache is None else (cache.write(layer, k, v), (k, v))[1]",
            ),
            "attention: every layer in the cache of the first": ("cache.write(layer, k, v)", "cache.write(0, k, v)"),
            "attention: the window of another layer": ("config.window(layer)", "config.window(0)"),
            "attention: o_proj without bias": ('("o_proj",), num, bias)', '("o_proj",), num)'),
            "mlp: gate and up swapped": ("R(R(num.ops.silu(gate)) * up)", "R(R(num.ops.silu(up)) * gate)"),
            "mlp: quick gelu": ("R(num.ops.silu(gate))", "R(num.ops.silu(1.702 * gate) / 1.702)"),
            "mlp: silu not rounded": ("R(R(num.ops.silu(gate)) * up)", "R(num.ops.silu(gate) * up)"),
            "final norm missing": (
                'rms_norm(x[:, -1:] if last_only else x, m["model.norm.weight"], config.rms_norm_eps, num)',
                "x[:, -1:] if last_only else x",
            ),
            "head always tied": (
                '"model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"',
                '"model.embed_tokens.weight"',
            ),
            "a head that is given wins over the tie": (
                'if config.tie_word_embeddings else "lm_head.weight"',
                'if "lm_head.weight" not in weights else "lm_head.weight"',
            ),
            "position reset in decode": (
                "start[:, None] + np.arange(ids.shape[1])",
                "0 * start[:, None] + np.arange(ids.shape[1])",
            ),
            "position off in decode": (
                "start[:, None] + np.arange(ids.shape[1])",
                "start[:, None] + (ids.shape[1] == 1) + np.arange(ids.shape[1])",
            ),
            "positions of other sequences": ("cache.lengths[cache.rows]", "cache.lengths[: len(ids)]"),
            "residual of the normalised": (
                '    h = attention(norm("input_layernorm", x), m / "self_attn"',
                '    x = norm("input_layernorm", x)\n    h = attention(x, m / "self_attn"',
            ),
            "no residual around the MLP": ("    return add(x, h)\n", "    return h\n"),
            "residual not rounded": ("num.round(x + h)", "x + h"),
            "norms of a layer swapped": ('norm("input_layernorm", x)', 'norm("post_attention_layernorm", x)'),
            "last_only gives the first": ("x[:, -1:]", "x[:, :1]"),
            "the cache does not advance": ("        cache.advance(ids)\n", "        pass\n"),
        },
    ),
    (
        "qwen3.py",
        "moe model finite engines",
        {
            "mixture: never renormalised": ("p / num.ops.total(p) if config.norm_topk_prob else p", "p"),
            "mixture: always renormalised": (
                "p / num.ops.total(p) if config.norm_topk_prob else p",
                "p / num.ops.total(p)",
            ),
            "mixture: a damaged router hides an expert": (" + 0 * num.ops.total(logits)", ""),
            "mixture: raw logits for weights": (
                'm.out("router_weights", router_weights(probs,',
                'm.out("router_weights", router_weights(logits,',
            ),
            "mixture: of equal ones the higher numbers": (
                'np.argsort(-probs, axis=-1, kind="stable")[',
                'np.argsort(probs, axis=-1, kind="stable")[..., ::-1][',
            ),
            "mixture: one expert fewer": (
                "top_k(probs, config.num_experts_per_tok)",
                "top_k(probs, max(config.num_experts_per_tok - 1, 1))",
            ),
            "mixture: weights not rounded": (
                "num.round(p / num.ops.total(p) if config.norm_topk_prob else p)",
                "(p / num.ops.total(p) if config.norm_topk_prob else p)",
            ),
            "mixture: in dense layers too": ("if config.is_sparse(layer)", "if config.num_experts"),
            "mixture: an edit of the experts chosen is ignored": (
                '    chosen = m.out("router_indices", top_k(probs, config.num_experts_per_tok))',
                '    m.out("router_indices", (chosen := top_k(probs, config.num_experts_per_tok)).copy())',
            ),
            "mixture: points inside the experts": (
                'replace(m / "experts", trace=None, edit=None)',
                'm / "experts"',
            ),
        },
    ),
    (
        "qwen3.py",
        "engines",
        {
            "scope: an edit is ignored": ("            x = edited\n", "            pass\n"),
            "scope: trace sees the unedited": (
                "        if self.edit is not None and (edited := self.edit(self.prefix + name, x)) is not None:\n"
                "            x = edited\n"
                "        if self.trace is not None:\n"
                "            self.trace(self.prefix + name, x)\n",
                "        if self.trace is not None:\n"
                "            self.trace(self.prefix + name, x)\n"
                "        if self.edit is not None and (edited := self.edit(self.prefix + name, x)) is not None:\n"
                "            x = edited\n",
            ),
            "scope: an edit sees names without their layer": (
                "self.edit(self.prefix + name, x)",
                "self.edit(name, x)",
            ),
            "scope: edits do not reach the modules of a layer": (
                "return Scope(self.weights, self.trace, self.edit,",
                "return Scope(self.weights, self.trace, self.edit if self.prefix == '' else None,",
            ),
            "an edit of the logits is ignored": (
                'x = m.out("lm_head", num.ops.head(x, matrix, num))',
                'm.out("lm_head", (x := num.ops.head(x, matrix, num)).copy())',
            ),
            "an edit of the turned keys is ignored": (
                'm.out("k_rope", rotate(k, tables, num))',
                '(m.out("k_rope", (k := rotate(k, tables, num)).copy()), k)[1]',
            ),
            "an edit of the context is ignored": (
                'context = m.out("context", num.ops.attend(q, keys, values, config.window(layer), m, num))',
                'm.out("context", (context := num.ops.attend(q, keys, values, config.window(layer), m, num)).copy())',
            ),
            "an edit of the residual stream is ignored": (
                'x = m.out("attn_residual", add(x, h))',
                'm.out("attn_residual", (x := add(x, h)).copy())',
            ),
        },
    ),
    (
        "rope.py",
        "rope golden model",
        {
            "sign of sin": ("num.round(num.ops.sin(angles)", "num.round(-num.ops.sin(angles)"),
            "bfloat16 tables": (
                "return num.round(num.ops.cos(angles) * scale), num.round(num.ops.sin(angles) * scale)",
                'return tuple((f(angles) * scale).astype("bfloat16").astype(num.dtype) for f in (np.cos, np.sin))',
            ),
            "bfloat16: tables not rounded": ("num.round(num.ops.cos(angles) * scale)", "(num.ops.cos(angles) * scale)"),
            "bfloat16 frequencies": (
                "frequencies = 1 / powers\n",
                'frequencies = (1 / powers).astype("bfloat16").astype(num.dtype)\n',
            ),
            "frequencies rounded once": (
                "frequencies = 1 / powers\n",
                "frequencies = (1 / np.float64(config.rope_theta) ** exponents.astype(np.float64)).astype(num.dtype)\n",
            ),
            "YaRN ignored": ("    if config.rope_scaling:\n        kept", "    if False:\n        kept"),
            "YaRN factor dropped": ("scale = attention_factor(config, num)", "scale = 1.0"),
            "YaRN factor squared": (
                "scale = attention_factor(config, num)",
                "scale = attention_factor(config, num) ** 2",
            ),
            "YaRN factor on cos alone": ("num.round(num.ops.sin(angles) * scale)", "num.round(num.ops.sin(angles))"),
            "YaRN factor: the logarithm of base 10": ("num.ops.log(yarn.factor)", "math.log10(yarn.factor)"),
            "YaRN: lanes of the square of theta": (
                "head_dim * num.ops.log(length) / (2 *",
                "head_dim * num.ops.log(length) / (4 *",
            ),
            "YaRN: mscale alone": ("if yarn.mscale is not None and", "if yarn.mscale is not None or"),
            "YaRN: a ramp within one lane": ("        high += 0.001\n", "        pass\n"),
            "YaRN factor of the config ignored": ("if yarn.attention_factor is not None:", "if False:"),
            "YaRN: truncate ignored": ("if yarn.truncate:", "if True:"),
            "YaRN: fast and slow lanes swapped": ("kept = 1 - _slowed(config, num)", "kept = _slowed(config, num)"),
            "YaRN: the new context for the original one": (
                "length = yarn.original_max_position_embeddings /",
                "length = config.max_position_embeddings /",
            ),
        },
    ),
    (
        "cache.py",
        "cache finite generate memory",
        {
            "written one position early": (
                "self.lengths.item(row) + new.shape[2]",
                "max(self.lengths.item(row) - 1, 0) + new.shape[2]",
            ),
            "all written where the longest ends": (
                "self.lengths.item(row) + new.shape[2]",
                "int(self.lengths.max()) + new.shape[2]",
            ),
            "all sequences advance": ("self.lengths[self.rows] += ids.shape[1]", "self.lengths += ids.shape[1]"),
            "ids written from the start": (
                "self.ids[row, self.lengths[row] :][: len(new)] = new",
                "self.ids[row, : len(new)] = new",
            ),
            "keep_prefix keeps the difference": (
                "np.append(held != ids[: len(held)], True).argmax()",
                "min(np.append(held != ids[: len(held)], True).argmax() + 1, len(held))",
            ),
            "keep_prefix believes what is not held": ("min(self.lengths[row], len(ids))", "len(ids)"),
            "selection of a selection": ("self.rows[list(rows)]", "np.array(rows)"),
            "a selection grows": ("rows=selected, whole=False)", "rows=selected)"),
            "reserve keeps what the first holds": ("int(self.lengths.max())", "int(self.lengths[0])"),
            "a moved cache shares lengths": ("            self.lengths = self.lengths.copy()\n", ""),
            "a moved cache has memory for what it held before": (
                "            self.notes = dict(self.notes, filled=np.full_like(self.lengths, self.lengths.max()))\n",
                "",
            ),
        },
    ),
    (
        "guard.py",
        "model scoring",
        {
            "ids: the one behind the vocabulary": ("ids.max() >= config.vocab_size:", "ids.max() > config.vocab_size:"),
            "ids: below 0": ("if ids.min() < 0 or ids.max()", "if ids.max()"),
            "ids: true and false": ('not in "iu"', 'not in "iub"'),
            "ids: the first of several sequences for one": ("if np.ndim(ids) != 1:", "if False:"),
        },
    ),
    (
        "guard.py",
        "cache finite generate memory engines",
        {
            "cache: one too many": ("0 <= length <= room - new", "0 <= length <= room - new + 1"),
            "cache: any numerics": ('if not np.can_cast(num.storage, cache.k.dtype, "safe"):', "if False:"),
            "cache: any weights": ("if not np.array_equal(self.sample, self._sample(weights)):", "if False:"),
            "cache: any config": ("if self.settings != (num.name, num.engine, *_settings(config)):", "if False:"),
            "cache: any engine": (
                "if self.settings != (num.name, num.engine, *_settings(config)):",
                "if (self.settings[0], *self.settings[2:]) != (num.name, *_settings(config)):",
            ),
            "cache: a context of another length is another config": ('"max_position_embeddings", "tie', '"tie'),
            "cache: set back to 0, it remembers the weights": (
                "    if not cache.lengths.any():\n",
                '    if "origin" not in cache.notes:\n',
            ),
            "cache: it cannot be pickled": ('"arrays": {}}', '"arrays": self.arrays}'),
            "cache: memory of positions set back not counted": (
                'cache.notes.get("filled", cache.lengths)[cache.rows]',
                "cache.lengths[cache.rows]",
            ),
            "cache: holds as many of other ids": (" and np.array_equal(cache.ids[row, : len(ids)], ids)", ""),
            "cache: holds these ids and more": (
                "cache.lengths[row] == len(ids) and",
                "cache.lengths[row] >= len(ids) and",
            ),
            "memory: logits of any size": ("if size > LARGE:", "if False:"),
            "memory: last_only needs that of all logits": ("if head and not last_only:", "if head:"),
            "edit: any shape": ("if y.shape != x.shape or not", "if not"),
            "edit: any dtype": ("return y.astype(x.dtype, copy=False)", "return y"),
            "edit: not passed on": ("edit=None if edit is None else _checked_edit(edit)", "edit=None"),
        },
    ),
    (
        "guard.py",
        "finite",
        {
            "files: a change not seen": ("if now == number and found != before:", "if False:"),
            "files: another one in its place is a change": (
                "if now == number and found != before:",
                "if (now, *found) != (number, *before):",
            ),
            "finite: the last token": ("[:, position_axis(name)].min()", "[:, position_axis(name)].max()"),
            "finite: the token within its piece": ("at = start + token", "at = token"),
            "finite: a head of its own not looked at": (
                'config.tie_word_embeddings or "lm_head.weight" in weights',
                "config.tie_word_embeddings",
            ),
            "finite: a tied head never to blame": (
                '"model.embed_tokens" if point == "lm_head" and config.tie_word_embeddings else point',
                "point",
            ),
            "finite: experts never to blame": (' or module.endswith(".experts")', ""),
            "finite: hidden scores taken for infinite": (
                'np.isnan(x) | np.isposinf(x) if name.endswith(".scores") else ~np.isfinite(x)',
                "~np.isfinite(x)",
            ),
        },
    ),
    (
        "processors.py",
        "processors sampling settings",
        {
            "top_k without ties": ("scores >= np.partition", "scores > np.partition"),
            "top_p one less": ('np.float32(1 - p), side="right")', 'np.float32(1 - p), side="left")'),
            "top_p in float64": ("cumulative.astype(np.float32), np.float32(1 - p)", "cumulative, 1 - p"),
            "top_p: of equal ones the lower ids": (
                "keep[ties[np.count_nonzero(keep) - stay :]] = True",
                "keep[ties[: stay - np.count_nonzero(keep)]] = True",
            ),
            "min_p not relative to the likeliest": (
                "np.exp(scores - scores.max()) >=",
                "np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum() >=",
            ),
            "min_p before top_p": (
                '    "top_p": _top_p,\n    "min_p": _min_p,\n',
                '    "min_p": _min_p,\n    "top_p": _top_p,\n',
            ),
            "penalty counts repeats": (
                "scores[ids] = np.where(previous < 0, previous * factor, previous / factor)",
                "np.divide.at(scores, ids, factor)",
            ),
            "presence penalty counts repeats": (
                "scores[np.unique(ids[ids.size - new :])] -= np.float32(penalty)",
                "np.subtract.at(scores, ids[ids.size - new :], np.float32(penalty))",
            ),
            "presence penalty added": (
                "scores[np.unique(ids[ids.size - new :])] -= np.float32(penalty)",
                "scores[np.unique(ids[ids.size - new :])] += np.float32(penalty)",
            ),
            "presence penalty counts the prompt": (
                "scores[np.unique(ids[ids.size - new :])]",
                "scores[np.unique(ids)]",
            ),
            "presence penalty of the prompt before anything is new": (
                "scores[np.unique(ids[ids.size - new :])]",
                "scores[np.unique(ids[-new:])]",
            ),
            "frequency penalty once": (
                "np.float32(penalty) * counts.astype(np.float32)",
                "np.float32(penalty)",
            ),
            "frequency penalty counts the prompt": (
                "np.unique(ids[ids.size - new :], return_counts=True)",
                "np.unique(ids, return_counts=True)",
            ),
            "frequency penalty of the prompt before anything is new": (
                "np.unique(ids[ids.size - new :], return_counts=True)",
                "np.unique(ids[-new:], return_counts=True)",
            ),
            "frequency penalty without presence penalty ignored": (
                "    found, counts = np.unique(",
                '    if settings["presence_penalty"] is None:\n        return\n    found, counts = np.unique(',
            ),
        },
    ),
    (
        "sampling.py",
        "settings sampling generate",
        {
            "temperature multiplies": ("scores /= np.float32(temperature)", "scores *= np.float32(temperature)"),
            "temperature after the filters": (
                "        if temperature > 0:\n            scores /= np.float32(temperature)\n",
                "",
            ),
            "processors before the penalties": (
                "        for name, process in PROCESSORS.items():\n"
                "            if settings[name] is not None:\n"
                "                process(scores, settings[name], settings, previous, new)\n",
                '        for process in settings["logits_processors"]:\n'
                "            scores = np.array(process(np.asarray(previous_ids), scores), np.float32)\n"
                "        for name, process in PROCESSORS.items():\n"
                "            if settings[name] is not None:\n"
                "                process(scores, settings[name], settings, previous, new)\n"
                '        settings = {**settings, "logits_processors": ()}\n',
            ),
            "processors after the temperature": (
                "            if scores.shape != np.shape(logits):\n",
                "            if temperature > 0:\n"
                "                scores = np.array(\n"
                "                    process(np.asarray(previous_ids), scores / np.float32(temperature)), np.float32\n"
                "                ) * np.float32(temperature)\n"
                "            if scores.shape != np.shape(logits):\n",
            ),
            "processors last to first": (
                'for process in settings["logits_processors"]:',
                'for process in reversed(settings["logits_processors"]):',
            ),
            "the first processor alone": (
                'for process in settings["logits_processors"]:',
                'for process in settings["logits_processors"][:1]:',
            ),
            "an id below 0 is the last": ("0 <= previous.min() <= previous.max()", "previous.max()"),
            "one generator for all": (
                "np.random.default_rng([*parts, row] if row else parts)",
                "np.random.default_rng(parts)",
            ),
            "ids of probability 0": ('cdf[-1], side="right"', 'cdf[-1], side="left"'),
            "sums in float32": (
                "np.exp(scores - scores.max()), dtype=np.float64",
                "np.exp(scores - scores.max()), dtype=np.float32",
            ),
        },
    ),
    (
        "drafts.py",
        "drafts",
        {
            "look-up: what followed the first ids": ("(grams == ids[-n:])", "(grams == ids[:n])"),
            "look-up: one id too early": ("places[0]) + n", "places[0]) + n - 1"),
            "look-up: the shortest first": ("NGRAMS = (4, 3, 2)", "NGRAMS = (2, 3, 4)"),
            "the estimate counts what follows a wrong guess": (
                "            if guessed != followed:\n                break\n",
                "",
            ),
            "wrong guesses change nothing": ("self.right += WEIGHT *", "self.right += 0 *"),
            "no pause where it does not pay": ("self.wait = self.waited\n", "pass\n"),
            "further rows are free": ("(1 + n * self.cost)", "1"),
            "processors see guesses": ('settings = {**settings, "logits_processors": ()}', "pass"),
            "a guess changes the random numbers": ("    rng = deepcopy(rng)\n", ""),
            "edits see guesses": ('if settings["edit"] is not None or', "if"),
            "a small model beyond its context": (
                "len(guesses) < most and cache.lengths[0] + len(new) <= cache.max_length",
                "len(guesses) < most",
            ),
        },
    ),
    (
        "generate.py",
        "drafts",
        {
            "a guess is taken as the answer": (
                "answer.guesses[n : n + 1] != [chosen]",
                "n == len(answer.guesses)",
            ),
            "guesses stay in the cache": (
                "        cache.lengths[cache.rows[answer.row]] = answer.end  # without",
                "        pass  #",
            ),
        },
    ),
    (
        "generate.py",
        "settings generate engines",
        {
            "never stops at an id": (" or chosen in stop_ids", ""),
            "the callable stop ignored": (" or (stop is not None and stop(answer.new))", ""),
            "stop is given the whole sequence": ("and stop(answer.new)", "and stop(answer.ids.tolist())"),
            "one token more": ("len(answer.new) == answer.most", "len(answer.new) > answer.most"),
            "prefix believed": (
                "start = cache.keep_prefix(0, ids[:-1])",
                "start = min(int(cache.lengths[cache.rows[0]]), len(ids) - 1)",
            ),
            "a cache that another call used": ("if not guard.cache_holds(", "if False and guard.cache_holds("),
            "prefix not used": ("start = cache.keep_prefix(0, ids[:-1])", "start = cache.keep_prefix(0, [])"),
            "chunk: the last logits of another": ("        if start == len(ids):", "        if start >= len(ids) - 1:"),
            "the penalty does not count the prompt": (
                "answer.rng, ids, len(answer.new))",
                "answer.rng, answer.new, len(answer.new))",
            ),
            "nothing is new to the penalties": ("answer.rng, ids, len(answer.new))", "answer.rng, ids)"),
            "finished sequences mix up the others": (
                "cache.select(rows), settings",
                "cache.select(range(len(rows))), settings",
            ),
            "top_k not passed on": (
                "steps(weights, config, batch, **chosen):",
                'steps(weights, config, batch, **{**chosen, "top_k": None}):',
            ),
            "stream: top_p not passed on": (
                "steps(weights, config, batch, **settings))",
                'steps(weights, config, batch, **{**settings, "top_p": None}))',
            ),
            "stream: the cache not passed on": (
                "steps(weights, config, batch, **settings))",
                'steps(weights, config, batch, **{**settings, "cache": None}))',
            ),
            "numerics not passed on": ('("numerics", "engine", "edit")', '("engine", "edit")'),
            "the engine not passed on": ('("numerics", "engine", "edit")', '("numerics", "edit")'),
            "the edit not passed on": ('("numerics", "engine", "edit")', '("numerics", "engine")'),
            "the cache that is given is ignored": ('held or chosen["cache"] or', "held or"),
            "room for the shortest alone": ("room = max(len(prompt)", "room = min(len(prompt)"),
        },
    ),
    (
        "settings.py",
        "settings sampling generate loading",
        {
            "defaults win over what is given": (
                "return {name: rule.default for name, rule in known.items() if rule.default is not REQUIRED} | "
                "dict(settings)",
                "return dict(settings) | "
                "{name: rule.default for name, rule in known.items() if rule.default is not REQUIRED}",
            ),
            "any name": ("        if name not in known:\n", "        if False:\n"),
            "any value": ("if not ((value is None and", "if False and not ((value is None and"),
            "no length: an endless answer": (
                '        raise TypeError("max_new_tokens is missing: the number of new tokens after which to end")\n',
                '        settings = {**settings, "max_new_tokens": 1 << 20}\n',
            ),
            "temperature 1 by default": ('"a finite number >= 0 (0 is greedy)", 0.0)', '"a finite number >= 0", 1.0)'),
            "top_p of 0": ("lambda p: 0 < p <= 1", "lambda p: 0 <= p <= 1"),
            "temperature infinite": ("lambda t: 0 <= t < inf", "lambda t: 0 <= t"),
            "without stop_ids it never stops": ("frozenset(config.eos_token_id if", "frozenset(() if"),
            "empty stop_ids are those of the config": (
                'config.eos_token_id if chosen["stop_ids"] is None else chosen["stop_ids"])',
                'chosen["stop_ids"] or config.eos_token_id)',
            ),
            "stop_ids and those of the config": (
                'config.eos_token_id if chosen["stop_ids"] is None else chosen["stop_ids"])',
                '[*config.eos_token_id, *(chosen["stop_ids"] or ())])',
            ),
            "filters without do_sample": ('if given.get("do_sample"):', "if given:"),
        },
    ),
    (
        "scoring.py",
        "scoring",
        {
            "scores of the token itself": (
                "targets = ids[scored : scored + len(chunk)]",
                "targets = ids[scored - 1 : scored - 1 + len(chunk)]",
            ),
            "windows see what came before": ("        cache.lengths[0] = 0\n", ""),
            "a text of two tokens": ("max(window // 2, 1)", "max(window // 2, 2)"),
            "context of the first window": ("at := start + int(cache.lengths[0])", "at := int(cache.lengths[0])"),
        },
    ),
    (
        "weights.py",
        "checkpoint",
        {
            "biases assumed": (
                "        if config.attention_bias:\n            layer[",
                '        if name != "o_proj":\n            layer[',
            ),
            "a repr of every tensor": ("if len(names) <= _SHOWN", "if True"),
        },
    ),
    (
        "files/tensors.py",
        "checkpoint",
        {
            "float16 read as bfloat16": (
                'np.dtype(f"<f{bits // 8}") for bits',
                'np.dtype(f"<f{bits // 8}") if bits > 16 else BFLOAT16 for bits',
            ),
            "truncation not told": ("if (whole := _described(header)) > size:", "if False:"),
            "header not counted": ("end = 8 + length", "end = length"),
            "a file that was replaced": ("if end != size:", "if False:"),
            "tensors at odd places": ("(-len(text) % 8)", "(len(text) % 8)"),
        },
    ),
    (
        "tokenizer.py",
        "checkpoint",
        {
            "templates of their own not saved": ('*self.folder.glob("additional_chat_templates/*.jinja")', "*()"),
        },
    ),
    (
        "files/checkpoint.py",
        "checkpoint",
        {
            "any shape of as many numbers": ("tensor.shape != shape:", "tensor.size != np.prod(shape):"),
            "any dtype": ("if stored not in _STORED:", "if False:"),
            "extra names ignored": (
                'problems = [f"{name}: extra: no such tensor in this model" for name in sorted(',
                'problems = [f"{name}" for name in () and sorted(',
            ),
            "a tensor in two shards": ("for name in found.keys() & tensors.keys()]", "for name in ()]"),
            "another model's files replaced": (" and path.read_bytes() == files.get(name))", ")"),
            "the tokenizer left out": ("        files |= tokenizer.files()", "        pass"),
        },
    ),
    (
        "files/names.py",
        "checkpoint",
        {
            "names without model. refused": ('if not any(name.startswith("model.") for name in tensors):', "if False:"),
        },
    ),
    (
        "files/quantized.py",
        "quantized",
        {
            "fp8: NaN as 480": ("max(initial=0) == 0x7F or", "max(initial=0) == 0x80 or"),
            "fp8: scales that overflow": ("< 128).all()", "< 1e30).all()"),
            "fp8: the next block's scale": ("scales[first : last + 1]", "scales[first + 1 : last + 2]"),
            "fp8: rows across blocks as one": ("range) and (first == last or", "range) and (True or"),
            "fp8: the last of a sorted few for all": ("isinstance(self.rows, range) and (", "("),
            "AWQ: columns in order": ("AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)", "AWQ_ORDER = tuple(range(8))"),
            "GPTQ: zeros as stored": (".T + self.less", ".T"),
            "GPTQ: groups in order": (
                "_apply(out, zeros, self.scales.T, self.group)",
                "_apply(out, zeros, self.scales.T, None)",
            ),
            "MLX: no bias": ("        groups += self.biases.astype(FLOAT)[:, :, None]\n", ""),
        },
    ),
    (
        "files/packing.py",
        "formats",
        {
            "GPTQ: zeros out of range": ("if less and (unpacked_columns(", "if False and (unpacked_columns("),
            "GPTQ: g_idx left out": ("scales, group, bits, less,", "scales, None, bits, less,"),
            "bitsandbytes taken for bytes": ('if any(name.endswith(f".{end}") for name in found):', "if False:"),
        },
    ),
    (
        "files/gguf.py",
        "gguf",
        {
            "the first expert for all": ("tensor[expert * shape[0] : (expert + 1) * shape[0]]", "tensor[: shape[0]]"),
            "a split file alone": ("    if split is None:\n", "    if True:\n"),
        },
    ),
    (
        "files/gguf_blocks.py",
        "gguf",
        {
            "Q8_0: no scale": ('    out *= blocks.view("<f2")[:, :1].astype(FLOAT)\n', ""),
            "Q4_K: the pair exchanged": ("pairs[:, :, 1], codes >> 4", "pairs[:, :, 1], codes & 15"),
            "Q4_K: 4 bits of the last scales": ("| ((s >> 2) & 48)", ""),
        },
    ),
    (
        "files/adapter.py",
        "adapter",
        {
            "rank-stabilised as plain": ("math.sqrt(rank) if", "rank if"),
            "a single row rounded otherwise": ("if len(self) == 1 else", "if False else"),
            "the head's adapter in the embedding": ("config = replace(config, tie_word_embeddings=False)", "pass"),
        },
    ),
    (
        "files/sentence.py",
        "sentence",
        {
            "the default prompt left out": ('known.get(default, "")', '""'),
            "the prompt in every mean": ('settings.get("include_prompt") is not False', "True"),
        },
    ),
    (
        "files/limits.py",
        "config fuzz",
        {
            "names given twice": ("if len(found) < len(pairs):", "if False:"),
            "links out of the folder": ("if not {root, blobs} & set(target.parents):", "if False:"),
        },
    ),
    (
        "loading.py",
        "loading",
        {
            "a file that changes while it is copied": ("        require_unchanged(weights)", "        pass"),
            "auto: any size": ("fits = size <= free / 2", "fits = size <= 2 * free"),
            "auto: the size of the file": ("4 * tensor.size for", "tensor.nbytes for"),
            "copy: each piece the first": (
                "(copies[name][n : n + step], tensor[n : n + step])",
                "(copies[name][n : n + step], tensor[: len(copies[name][n : n + step])])",
            ),
        },
    ),
    (
        "model.py",
        "loading",
        {"stop ids of config.json alone": ('eos: Any = given.get("eos_token_id")', "eos: Any = None")},
    ),
    (
        "tokenizer.py",
        "tokenizer conversation generate",
        {
            "UTF-8 token by token": (
                "decoder.decode(self.token_bytes(i, skip_special_tokens))",
                'self.token_bytes(i, skip_special_tokens).decode("utf-8", "replace")',
            ),
            "the end of a stream lost": ('decoder.decode(b"", final=True)', 'decoder.decode(b"")'),
            "stop string: its last character not awaited": (
                "for n in range(len(stop)) if",
                "for n in range(len(stop) - 1) if",
            ),
        },
    ),
    (
        "files/tokenizer_files.py",
        "tokenizer",
        {
            "split without the look ahead": (r"|\s*[\r\n]+|\s+(?!\S)|\s+", r"|\s*[\r\n]+|\s+"),
            "added tokens as words": ("AddedToken(**token)", 'AddedToken(**(token | {"single_word": True}))'),
        },
    ),
    (
        "chat.py",
        "chat",
        {
            "lines of blocks kept": ("trim_blocks=True", "trim_blocks=False"),
            "JSON in ASCII": ("ensure_ascii: bool = False", "ensure_ascii: bool = True"),
            "reasoning lost": (', "reasoning_content": message[name]}', "}"),
        },
    ),
    (
        "ops/fast/threads.py",
        "threads",
        {
            "threads of the pool keep their BLAS threads": ("_set_threads(library, 1)", "pass"),
            "cuts of any BLAS": ("all(library.internal_api ==", "any(library.internal_api =="),
            "errors of other threads lost": ("        raise errors.pop()\n", "        pass\n"),
            "parts begin after an error": ("            left.clear()\n            errors", "            errors"),
            "parts still run when it returns": (
                "                end.acquire()\n    if",
                "                pass\n    if",
            ),
            "BLAS not given back": (
                "            _hold(self.outside)\n\n\ndef blas_limit",
                "            pass\n\n\ndef blas_limit",
            ),
            "blocks: the first for all": (
                "f(*(array[..., rows, :] for array in arrays))",
                "f(x[..., rows, :], *(array[..., :step, :] for array in arrays[1:]))",
            ),
        },
    ),
    (
        "embeddings.py",
        "embeddings",
        {
            "the end token left out": ("[[*tokenizer.encode(prompt + text), *end]", "[tokenizer.encode(prompt + text)"),
            "mean pooling": (
                "x[np.arange(len(group)), lengths[group] - 1 - start]",
                "[row[: n - start].mean(0) for row, n in zip(x, lengths[group], strict=True)]",
            ),
            "the padding's vector": ("lengths[group] - 1 - start", "-1"),
            "not normalised": (
                "    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)\n",
                "    return x\n",
            ),
            "normalised before the cut": (
                "    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)\n",
                "    whole = _last_hidden_states(model, sequences, 'texts', numerics, None)\n"
                "    return x / np.linalg.norm(whole, axis=-1, keepdims=True)\n",
            ),
            "sigmoid of a probability": (
                "return np.exp(log_probabilities(logits)[:, 1])",
                "return 1 / (1 + np.exp(-np.exp(log_probabilities(logits)[:, 1])))",
            ),
            "yes and no swapped": ("log_probabilities(logits)[:, 1]", "log_probabilities(logits)[:, 0]"),
        },
    ),
    (
        "conversation.py",
        "conversation",
        {
            "options do not reach the template": ("(messages, **template_options)", "(messages)"),
        },
    ),
    (
        "files/writing.py",
        "paths",
        {
            "a link is replaced, not what it leads to": ("    path = path.resolve()", "    path = path.absolute()"),
        },
    ),
    (
        "porting/shapes.py",
        "verdicts",
        {
            "heads in groups not joined": ("for form in forms for found", "for form in forms[:1] for found"),
            "vocabulary not cut": ('*("f" if kind == "lm_head" else "")', '*""'),
            "features of two sequences side by side": (
                'if part[0] == "B" and part[1] in "df" and "S" in axes:',
                "if False:",
            ),
            "no cache of repeated heads": (
                "for notes, form in forms:\n            if axis",
                "for notes, form in forms[:1]:\n            if axis",
            ),
        },
    ),
    (
        "porting/diagnose.py",
        "verdicts",
        {
            "no pattern next to a setting": (
                "result.reports, point, result.table))",
                "result.reports, point, POINTS))",
            ),
            "bugs of decode steps alone not tried": (
                "if bench.adding and all(split_pass(name)[0] for name in bench.adding):",
                "if False:",
            ),
        },
    ),
    (
        "porting/compare.py",
        "verdicts",
        {
            "mixed digits not seen": ("and _is_mixed(aligned):", "and False:"),
            "no word on a smaller bug": ("any(s.explained < WHOLE for s in settings)", "False"),
        },
    ),
    (
        "porting/compare.py",
        "harmless",
        {
            "settings one by one alone": ("_nearest(bench, _together(bench, alone))", "_nearest(bench, [])"),
            "no single layers": ("bench.attempt((*pairs, *parts))", "bench.attempt(pairs)"),
        },
    ),
    (
        "porting/settings.py",
        "verdicts",
        {"products are not kept short": ("return short(product(run, at, *x))", "return product(run, at, *x)")},
    ),
    (
        "porting/judge.py",
        "compare",
        {
            "ulps of the best number": ("(error[seen] / place).max()", "(error[seen] / place).min()"),
            "key heads numbered as query heads": ('is not None and kind[0] != "k"', "is not None"),
            "a shape that fits no layout is a bug": ('PointReport(name, "unread",', 'PointReport(name, "different",'),
            "nothing said of such a shape": ("    if aligned.misfits:\n", "    if False:\n"),
        },
    ),
    (
        "porting/shapes.py",
        "harmless",
        {
            "copies are not padded": ("        forms += [(notes, form | {", "        _ = [(notes, form | {"),
            "one copy alone": ("in product(sequences, lengths):", "in product(sequences[:1], lengths):"),
        },
    ),
    (
        "porting/layouts.py",
        "harmless",
        {"copies are positions where one is nearer": ("<= 10 * best[chosen][0]:", "< 0:")},
    ),
    (
        "porting/harmless.py",
        "harmless compare",
        {
            "a shift that nothing shows": (" or not any(follows(first[0], name) for name in found)", ""),
            "a shift of some passes": (
                "not first or not all(name in shifts for name in first)",
                "not first or first[0] not in shifts",
            ),
            "another shift elsewhere": (
                "all(np.array_equal(shift, other) for other in shifts.values())",
                "True",
            ),
            "angles of other positions": ("positions + self.shift[:, None])", "positions)"),
        },
    ),
    (
        "porting/floors.py",
        "harmless",
        {"no other luck in 16 bits": ("for numerics in drawn if size < FEW]", "for numerics in drawn[:0]]")},
    ),
    (
        "training/gradients.py",
        "gradients",
        {
            "embedding: repeated ids once": (
                "np.add.at(gradients[embedding], ids, dx)",
                "gradients[embedding][ids] += dx",
            ),
            "norm: its mean left out": ("    dx -= normed * np.mean(dx * normed, axis=-1, keepdims=True)\n", ""),
            "rotation not turned back": ("(cos, -sin)", "(cos, sin)"),
            "scores not scaled": ("        ds *= head_dim**-0.5\n", ""),
        },
    ),
    (
        "ops/exact/rounding.py",
        "exact exact_forward",
        {
            "what float64 leaves open stays as it is": ("        y[still_open] = then(found) if then else found\n", ""),
            "found elements not rounded further": ("then(found) if then else found", "found"),
            "a zero keeps its sign": ("    y += 0  # -0 becomes +0\n", ""),
            "low parts left out": (
                "two_sum(high.sum(axis=1), low.sum(axis=1))",
                "two_sum(high.sum(axis=1), low[:, 0] * 0)",
            ),
            "no bound on the low parts": ("* np.abs(low).sum(axis=1)  # with", "* 0 * np.abs(low).sum(axis=1)  # with"),
            "sigma too small": ("(k + 1).bit_length()", "0 * k"),
            "pairs rounded twice": ("np.where((t != 0) & even, np.nextafter(a, np.copysign(np.inf, t)), a)", "a + t"),
            "a tie is no tie": ("(t != 0) & even", "even"),
            "trust without measure": (" | ~(bound <= U / 4 * np.abs(hi))", ""),
            "nothing left for whole numbers": (
                "np.flatnonzero(still_open & finite)",
                "np.flatnonzero(still_open & ~finite)",
            ),
            "sums not divided": ("(hi / count, lo / count, bound / count)", "(hi, lo, bound)"),
            "quotients trusted": ("lo / count, bound / count)", "lo / count, bound * 0)"),
            "whole numbers not divided": ("Fraction(whole, count << 298)", "Fraction(whole, 1 << 298)"),
            "fractions rounded twice": ("if rest and not np.float64(f).view(np.int64) & 1", "if False"),
        },
    ),
    (
        "ops/exact/sums.py",
        "exact exact_forward",
        {
            "product: no bound": ("(k + 2) * U * SLACK * norms(x)", "0 * norms(x)"),
            "product: bound without the length": ("(k + 2) * U * SLACK * norms(x)", "2 * U * SLACK * norms(x)"),
            "product: another row is summed": ("x[rows] * w[columns]", "x[rows] * w[columns][::-1]"),
            "sums: bound without the length": ("(n + 3) * U * SLACK / count", "2 * U * SLACK / count"),
            "sums: bound by the sum itself": ("(s * count if absolute is None else absolute)", "s * count"),
            "mean of the magnitudes": ("    squares *= squares\n", "    squares = np.abs(squares)\n"),
        },
    ),
    (
        "ops/exact/elementary.py",
        "exact exact_forward",
        {
            "exp: a term forgotten": ("        s = r * (1 / 24)\n", "        s = r * 0\n"),
            "exp: no bound": ("s * 2.0**-50,", "s * 0,"),
            "exp: second stage in one term": ("t_hi * (b + c +", "t_hi * (0 * b + c +"),
            "exp: table without what it lacks": ("+ t_lo * a))", "))"),
            "exp: second stage trusted": ("2.0**-77 * hi", "0 * hi"),
            "exp: ends too early": ("LOWEST, HIGHEST, STEPS = -104,", "LOWEST, HIGHEST, STEPS = -103,"),
            "sine: pi in two parts": ("    r += rest - n * HALF_PI[2]\n", "    r += rest\n"),
            "sine: no bound": ("bound = 2.0**-50 * np.abs(s)", "bound = 0 * np.abs(s)"),
            "sine: a term less": ("range(15, 1, -2)", "range(13, 1, -2)"),
            "sine: the wrong quarter": ("(n.astype(np.int64) + quarters) & 3", "n.astype(np.int64) & 3"),
            "decimal: reduced with too few digits": ("        context.prec += 60", "        context.prec += 0"),
            "decimal: always the first digits": ("        if low == high:\n", "        if True:\n"),
            "power: base rounded": ("Decimal(base).ln()", "Decimal(round(base)).ln()"),
        },
    ),
    (
        "ops/exact/layers.py",
        "exact_forward exact",
        {
            "softmax: sum rounded as it comes": ("e /= sum_of_positive(e)", "e /= e.sum(axis=-1, keepdims=True)"),
            "float64 weights not rounded": ("        w = num.widen(w)\n", "        pass\n"),
            "bfloat16 not rounded": ("then = num.round if num.rounds and not more else None", "then = None"),
            "bias after rounding": (
                'num.round(y + num.widen(m[f"{name}.bias"]))',
                'num.round(y) + num.widen(m[f"{name}.bias"])',
            ),
            "a block forgotten": (
                "for b in range(0, len(w), step) for tile",
                "for b in range(0, len(w) - step, step) for tile",
            ),
            "the future seen": ("hidden = past > at if window", "hidden = past > at + 1 if window"),
            "window one wider": ("past <= at - window)", "past < at - window)"),
            "hidden values matter": ("np.where(p[..., None] == 0, 0, ", "np.where(False, 0, "),
            "scores scaled in float64": (
                "scores *= np.float32(1 / math.sqrt(head_dim))",
                "scores = scores * np.float64(1 / math.sqrt(head_dim))",
            ),
            "one scratch for all threads": ("class _Scratch(threading.local):", "class _Scratch:"),
        },
    ),
    (
        "audit/damage_kinds.py",
        "damage_kinds",
        {
            "routers quantised": ("if w.ndim == 2 and not is_router(name)", "if w.ndim == 2"),
            "zero point of int8": ("np.full((1, out), 128, np.uint8)", "np.full((1, out), 127, np.uint8)"),
            "fp8 scale from the mean": ("np.abs(blocks).max((1, 3)) / FLOAT", "np.abs(blocks).mean((1, 3)) / FLOAT"),
            "large keys are NaN in fp8": ('np.clip(x, -448, 448) if kind == "fp8" else x', "x"),
            "blocks across heads": ("by_head(short, x, config.head_dim)", "short(x)"),
        },
    ),
    (
        "audit/damage_runs.py",
        "damage",
        {
            "whole windows scored": ("slice(window // 2, window - 1)", "slice(0, window - 1)"),
            "KL of the model to the reference": (
                "np.exp(ours) * (ours - theirs)",
                "np.exp(theirs) * (theirs - ours)",
            ),
            "tokens predict themselves": ("self.ids[:, 1:][:, scored(", "self.ids[:, scored("),
            "tied head counted twice": (
                'if not callable(w) and not (self.tied and t == "lm_head.weight")',
                "if not callable(w)",
            ),
            "another rope is no matter": ("if theirs.get(key) != value]:", "if False]:"),
        },
    ),
    (
        "audit/damage_parts.py",
        "damage",
        {
            "the layer twice": ("for view in views]), n + 1)", "for view in views]), n)"),
            "saved is what is left": ("saved = kl - left_out[part.tensors]", "saved = left_out[part.tensors]"),
            "share without what is saved": ("(alone[part.tensors] + saved) / 2 / kl", "alone[part.tensors] / kl"),
            "moved scales of norms unnoticed": ("moved = _error(", "moved = 0 * _error("),
            "moved scales of matrices unnoticed": ("(part.weight_error or 0) > MATRIX_MOVED", "False"),
            "worth without bytes": ("key=lambda part: -part.alone / part.extra", "key=lambda part: -part.alone"),
            "budget never spent": ("left -= part.extra", "left -= 0"),
            "each expert a part": ('".experts.*.", name)', '".experts.0.", name)'),
        },
    ),
    (
        "audit/damage_activations.py",
        "damage",
        {
            "negative numbers ignored": ("sizes = np.abs(x)", "sizes = x.copy()"),
            "place in the window": ("start + int(place[", "int(place["),
        },
    ),
    (
        "audit/damage.py",
        "damage",
        {"parts on the first windows": ("np.linspace(0, len(ids) - 1, min(", "np.linspace(0, ranked - 1, min(")},
    ),
    (
        "audit/rollouts.py",
        "rollouts",
        {
            "masked tokens count": ("rows = [r if k[0][1] else {}", "rows = [r if True else {}"),
            "padding in the prompt": ("if seen]", "if True]"),
            "no limit on tokens": ("            if tokens > TOKENS:\n", "            if False:\n"),
        },
    ),
    (
        "audit/forms.py",
        "rollouts",
        {
            "SGLang's pairs the other way": (
                "return [(entry[1], number(entry[0]))]",
                "return [(entry[0], number(entry[1]))]",
            ),
            "the prompt's numbers first": ("        return entries[-count:]\n", "        return entries[:count]\n"),
            "impossible is a number": ("-math.inf if x <= IMPOSSIBLE else float(x)", "float(x)"),
            "digits are ids in texts": (
                "return [(text, number(x)) for text, x",
                "return [(int(text), number(x)) for text, x",
            ),
        },
    ),
    (
        "batches/requests.py",
        "batch",
        {
            "a repeated custom_id answered twice": ('if found["custom_id"] in seen:', "if False:"),
            "packets of lines, not tokens": ("tokens += request.cost", "tokens += 80"),
            "the shortest first": ("-request.cost, request.line", "request.cost, request.line"),
            "vectors computed with whatever is left": ("return packet if left and", "return left if left and"),
        },
    ),
    (
        "batches/answers.py",
        "batch",
        {
            "the machine in exact fingerprints": ('if engine != "exact":', "if True:"),
            "one seed for all": ("int(tag(request.key)[:16], 16)", "0"),
            "a text that is too long fails its packet": (
                "yield from self._embedded([requests[n]], [found[n]])",
                "yield requests[n], error",
            ),
            "a changed checkpoint is the requests' fault": ("if isinstance(outcome, CheckpointError):", "if False:"),
            "reused prefixes in results": ('del body["usage"]["prompt_tokens_details"]', "pass"),
        },
    ),
    (
        "batches/results.py",
        "batch",
        {
            "half a line stays": (
                "            self._file.truncate(self._end)\n        except",
                "            pass\n        except",
            ),
            "a full disk leaves half a line": (
                "with suppress(OSError):\n                self._file.truncate(self._end)",
                "with suppress(OSError):\n                pass",
            ),
            "a result written twice": ("if key in self.done:", "if False:"),
            "two processes write": ("fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
        },
    ),
    (
        "batches/run.py",
        "batch_tables",
        {
            "other results taken for these": ("!= len(keys):", "< 0:"),
            "results in the order in which they came": (
                "for key in keys:\n            file",
                "for key in places:\n            file",
            ),
        },
    ),
    (
        "routing.py",
        "routing",
        {
            "the router's choice is lost": ("np.where(given < 0, x, given)", "given"),
            "twice is once": ("(twice | outside)", "outside"),
            "edits come first": ("edited = own(name, chosen)", "edited = own(name, x)"),
        },
    ),
    (
        "audit/endpoint.py",
        "endpoint",
        {
            "redirects followed": ("build_opener(_NoRedirects)", "build_opener()"),
            "any length": ("if len(found) > LARGEST:", "if False:"),
            "any time": ("thread.join(TIMEOUT)", "thread.join()"),
            "any scheme": ('parts.scheme not in ("http", "https") or not parts.hostname', "not parts.netloc"),
            "the echoed prompt is read twice": ("Fields(), echoed=True)", "Fields())"),
            "vLLM's prompts a token late": ('"logprobs": of_prompt[1:]', '"logprobs": of_prompt[:-1]'),
        },
    ),
    (
        "audit/processed.py",
        "audit",
        {
            "penalty on the prompt": ("np.unique(own, return_counts=True)", "np.unique(ids, return_counts=True)"),
            "top-p keeps one less": ("(mass < enough).sum(-1) + 1", "(mass < enough).sum(-1)"),
            "top-p of what top-k has dropped, too": (
                "np.take_along_axis(mass, count[:, None] - 1, -1)\n            count",
                "mass[:, -1:]\n            count",
            ),
            "min-p is a share of the whole": (
                "(ordered >= np.log(self.min_p))",
                "(ordered - np.log(mass[:, -1:]) >= np.log(self.min_p))",
            ),
            "what filters drop is kept": ("logp[y < np.take", "logp[y > 1 + np.take"),
        },
    ),
    (
        "audit/measure.py",
        "audit",
        {
            "states one late": ("x[b, p - 1 : p - 1 + len(r.ids)]", "x[b, p : p + len(r.ids)]"),
            "steps of two": ("range(starts[0], width) if self.stepped", "range(starts[0], width, 2) if self.stepped"),
            "experts a position late": ("count - 1: 0,", "count - 1: 1,"),
            "experts not replayed": ("return np.where(given < 0, chosen, given)", "return chosen"),
            "a few ids decide": ("EDGE = 1.0 ", "EDGE = 50.0 "),
            "the longest prompts": ("key=lambda r: len(r.prompt))", "key=lambda r: -len(r.prompt))"),
        },
    ),
    (
        "audit/causes.py",
        "audit",
        {
            "rounding is different": ('"rounding" if t.hypothesis.kind == h.ROUNDING else "different"', '"different"'),
            "a little of the pattern is enough": ("and hidden <= HIDDEN * distance", ""),
            "rounding tells causes apart": ("max(x, rounding, 1e-9)", "max(x, 1e-9)"),
            "a large model on all rollouts": ("court = court.first() if is_large(config) else court", "pass"),
        },
    ),
    (
        "audit/court.py",
        "audit",
        {
            "all rounding is float32's": ('MARGIN = {"float32": 4.0,', 'MARGIN = {"float32": 4e5,'),
            "no other ids left out": ("theirs[:, 1:] = np.nan", "pass"),
            "causes without evidence": ("if t.evidence < SURE:", "if False:"),
            "settings on top of a bug are not fitted": ("if model is not None and (own :=", "if False and (own :="),
            "a narrower rollout": ("return x[:rows, :columns]", "return x[:rows]"),
            "rollouts are as good as tokens": ("ddof=1) / math.sqrt(len(found))", "ddof=1) / len(found)"),
            "outliers make a pattern": ("[np.argsort(np.argsort(z[seen]))", "[z[seen]"),
        },
    ),
    (
        "audit/formats.py",
        "audit_formats",
        {
            "no subnormals": ("np.float32(2**-6)", "np.float32(2**-9)"),
            "a digit less": ("np.float32(1.5 * 2**20)", "np.float32(1.5 * 2**21)"),
            "squares of rows": ("scaled_e4m3((0, 2))", "scaled_e4m3((2,))"),
            "zero points are fractions": ("zero = np.rint(-low / scale)", "zero = -low / scale"),
            "the next lower code": ("(NF4[1:] + NF4[:-1]) / 2,", "NF4[1:],"),
            "as many quantiles on both sides": ("*_quantiles(8)]", "*_quantiles(7)]"),
        },
    ),
    (
        "audit/report.py",
        "audit",
        {
            "ratios upside down": ("    ratio = np.exp(-d)\n", "    ratio = np.exp(d)\n"),
            "k3 without its control": ("np.expm1(np.clip(-d, None, 50)) + d", "np.expm1(np.clip(-d, None, 50))"),
            "context one late": ("ids[:position][-CONTEXT:]", "ids[: position + 1][-CONTEXT:]"),
            "the least different first": ("np.argsort(-np.abs(e)", "np.argsort(np.abs(e)"),
        },
    ),
    (
        "serve/page.py",
        "serve_page",
        {
            "any inline script": ("script-src {_hash(script)}", "script-src 'unsafe-inline'"),
            "any server may be asked": ("connect-src 'self'", "connect-src *"),
            "shown inside other pages": ("frame-ancestors 'none'", "frame-ancestors *"),
            "strings may become HTML": ("require-trusted-types-for 'script'; ", ""),
            "hash of another text": ("hashlib.sha256(text.encode())", "hashlib.sha256(text.strip().encode())"),
            "no style": ('f"<style>{style}</style>"', '"<style></style>"'),
            "types are guessed": (', "X-Content-Type-Options": "nosniff"', ""),
            "defaults under other names": ("{theirs: defaults[ours]", "{ours: defaults[ours]"),
            "the limit of tokens forgotten": ('{"max_tokens": "max_new_tokens", **SETTINGS}', "SETTINGS"),
            "biases among the defaults": ("isinstance(defaults.get(ours), (int, float))", "ours in defaults"),
            "every template can think": ('"enable_thinking" in (service.tokenizer.chat_template or "")', "True"),
        },
    ),
    (
        "batches/tables.py",
        "batch batch_tables",
        {
            "failures before the first vector left out": ("before += 1", "before += 0"),
            "the end of a long line is another line": ("while len(rest) == LONGEST + 1 and", "while False and"),
        },
    ),
    (
        "batches/spread.py",
        "batch_spread",
        {
            "requests lost with one that kills workers": (
                "(packet[: len(packet) // 2], packet[len(packet) // 2 :])",
                "(packet[: len(packet) // 2],)",
            ),
            "models not compared": ("if len(models) > 1:", "if False:"),
            "all packets under way at once": ("len(under_way) < most", "True"),
        },
    ),
    (
        "serve/scheduler.py",
        "serve_limits serve",
        {
            "more rows than have the bits of one": ("ROWS = 8", "ROWS = 32"),
            "one random stream for all answers": ("job.row)\n", "0)\n"),
            "answers of clients that left go on": (
                "self._running = [job for job in self._running if not job.cancelled]",
                "pass",
            ),
            "no time limit": ("for job in self._running if now > job.until", "for job in self._running if False"),
            "the cache of the next answer counts alone": ("for other in [*self._running, job])", "for other in [job])"),
            "a queue without end": (">= self.limit", "< 0"),
            "wrong guesses stay in the cache": ("job.cache.lengths[0] = len(job.ids) + len(job.new) - 1", "pass"),
            "every guess is right": ("job.cache is None or guesses[n : n + 1] != job.new[-1:]", "job.cache is None"),
            "an answer goes on after its end": ("job.cache is None or guesses", "guesses"),
            "guesses beside other answers": ("if len(self._running) == 1 else []", "if len(jobs) == 1 else []"),
        },
    ),
    (
        "serve/prefixes.py",
        "serve_limits serve",
        {
            "the last used is dropped first": ("next(iter(self._kept))", "next(reversed(self._kept))"),
            "reuse is no use": ("self._kept.move_to_end(source)", "pass"),
            "the last token is reused, too": ("(len(ids) - 1) // self.piece", "len(ids) // self.piece"),
        },
    ),
    (
        "serve/calls.py",
        "serve_chat",
        {
            "arguments end at the first brace": ("json.JSONDecoder().raw_decode(text)[1]", 'text.index("}") + 1'),
            "markers are not held back": ("range(len(marker), 0, -1)", "range(0)"),
        },
    ),
    (
        "serve/chats.py",
        "serve_chat serve",
        {
            "a format applies in the reasoning": ('tokenizer.token_to_id("</think>") if inside else None', "None"),
            "a call ends as text does": ('"tool_calls" if self._calls and reason == "stop" else reason', "reason"),
            "no effort is some": ('fields["reasoning_effort"] == "none"', "False"),
        },
    ),
    (
        "serve/app.py",
        "serve_limits serve",
        {
            "any Host": ("if name not in self.hosts and not _is_address(name):", "if False:"),
            "bodies without end": ("if len(body) > f.BODY:", "if False:"),
        },
    ),
    (
        "serve/fields.py",
        "serve",
        {"names that are almost right are ignored": ("rules, 1, 0.9)", "rules, 1, 1.0)")},
    ),
]


class Mutant(NamedTuple):
    """A bug: its name, its file in the package, the tests that run first, and what is replaced by what."""

    name: str
    file: str
    tests: str
    text: str
    replacement: str


MUTANTS = [
    Mutant(f"{file.removesuffix('.py').removesuffix('/__init__')}: {name}", file, tests, *change)
    for file, tests, changes in GROUPS
    for name, change in changes.items()
]


def planted(mutant: Mutant) -> str:
    """Return the whole file with the bug. Raises ValueError for a bug that is stale, or no Python."""
    source = (ROOT / "qwen3np" / mutant.file).read_text(encoding="utf-8")
    if (count := source.count(mutant.text)) != 1:
        raise ValueError(f"stale: {mutant.file} holds its text {count} times, not once")
    wrong = source.replace(mutant.text, mutant.replacement)
    try:
        compile(wrong, mutant.file, "exec")
    except SyntaxError as error:
        raise ValueError(f"no Python: {error}") from None
    return wrong


def run_tests(copy: Path, tests: str, seconds: float) -> str | None:
    """Run these test files in a copy of the project. Return which test fails, or None if all pass.

    Raises RuntimeError where pytest itself fails: then no test has caught anything.
    """
    which = [f"tests/test_{name}.py" for name in tests.split()] or ["--ignore=tests/test_tour.py"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        "--hypothesis-profile=unshrunk",
        *(f"--deselect=tests/test_{name}" for name in OF_THE_TEXT),
        *which,
    ]
    process = subprocess.Popen(
        command,
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what the tests started
        process.wait()
        return f"a hang: no end after {seconds} s"
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+::.*?)(?: - .*)?$", output, re.MULTILINE)
    if process.returncode not in (0, 1) or bool(failed) != bool(process.returncode):
        raise RuntimeError(f"pytest ended with status {process.returncode}: {output.strip()[-300:]}")
    return failed and failed[1]


def copied(project: Path, folder: str) -> Path:
    """Return a copy of the project in this folder."""
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist")
    return Path(shutil.copytree(project, Path(folder) / project.name, ignore=ignored))


def tried(mutant: Mutant, project: Path) -> tuple[bool, str]:
    """Plant a bug in a copy. Return whether a test caught it, and a line that says which, and how long it took."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(project, folder)
        (copy / "qwen3np" / mutant.file).write_text(planted(mutant), encoding="utf-8")
        try:
            by = run_tests(copy, mutant.tests, SECONDS) or run_tests(copy, "", 3 * SECONDS)
        except RuntimeError as error:
            return False, f"BROKEN: {error}"
    return bool(by), f"{by or 'MISSED'} ({time.monotonic() - start:.0f} s)"


def main() -> int:
    """Plant every bug, print a line for each, and return 1 if one is missed or stale."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--only", metavar="PATTERN", default="*", help="only the bugs of such names: 'cache: *'")
    pattern = parser.parse_args().only
    chosen = [mutant for mutant in MUTANTS if fnmatch(mutant.name, pattern)]
    if not chosen:
        parser.error(f"no bug has a name like {pattern!r}")
    wrong = 0
    for mutant in chosen:
        try:
            planted(mutant)
        except ValueError as error:
            print(f"{mutant.name}: {error}")
            wrong += 1
    if wrong:
        return 1
    caught = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        project = copied(ROOT, folder)
        files = sorted({name for mutant in chosen for name in mutant.tests.split()})
        if by := run_tests(project, " ".join(files), 3 * SECONDS):  # what fails without a bug catches none
            print(f"without a bug, too, this fails: {by}")
            return 1
        for mutant, (found, line) in zip(chosen, pool.map(tried, chosen, repeat(project)), strict=True):
            print(f"{mutant.name:64} {line}", flush=True)
            caught += found
    print(f"{caught} of {len(chosen)} planted bugs caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
