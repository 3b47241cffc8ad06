"""Small bugs planted in the package, one at a time, to see that the fast tests catch each: python tests/mutants.py.

A bug is a text of a file, which occurs there exactly once, and what takes its place. It is planted in a copy of the
project. The tests of its group run first; if they pass, so does every test of the default run that does not hold the
source itself against a copy. Bugs that nobody could notice do not belong here.
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
            "None for any setting": ("get_origin(hint) is Annotated:", "get_origin(hint) is Annotated and False:"),
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
        "numerics",
        {
            "rounding cuts off": (
                "x.astype(BFLOAT16).astype(self.dtype) if",
                "(x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) if",
            ),
            "wide weights not rounded": (
                "        if self.rounds and x.dtype != BFLOAT16:\n            return self.round(x)\n",
                "",
            ),
            "softmax: nothing subtracted": ("np.exp(x - np.max(x, axis=-1, keepdims=True))", "np.exp(x)"),
            "softmax: the largest of all rows": ("np.max(x, axis=-1, keepdims=True)", "np.max(x)"),
            "silu: sign": ("e = np.exp(-x)", "e = np.exp(x)"),
        },
    ),
    (
        "ops/fast/products.py",
        "linear golden",
        {
            "bias left out of one row": ("if bias is not None:", "if bias is not None and len(rows) > 1:"),
            "bias added after rounding": (
                "y += numerics.widen(bias)",
                "y = numerics.round(y) + numerics.widen(bias)",
            ),
            "wide weights not rounded for one row": (
                "w.dtype == numerics.dtype == numerics.storage",
                "w.dtype == numerics.dtype",
            ),
            "few rows: the last outputs left out": (
                "for start, stop, near in ((0, cut, NEAR), (cut, len(w), len(w) - cut)):",
                "for start, stop, near in ((0, cut, NEAR),):",
            ),
            "few rows: rows and blocks mixed up": ("np.swapaxes(products, 0, 1).reshape", "products.reshape"),
            "tiles: the last left out": ("[*range(start, stop, size), stop]", "[*range(start, stop, size)]"),
        },
    ),
    (
        "norm.py",
        "norm golden",
        {
            "wide weights not rounded": ("    weight = numerics.widen(weight)\n", ""),
            "eps is always 1e-5": ("mean_square + eps", "mean_square + 1e-5"),
            "eps outside the root": ("(1 / np.sqrt(mean_square + eps))", "(1 / (np.sqrt(mean_square) + eps))"),
            "times 1 + weight": ("y *= weight", "y *= 1 + weight"),
            "unbiased mean": ("/ x.shape[-1]\n", "/ max(x.shape[-1] - 1, 1)\n"),
            "mean subtracted": ("y = numerics.round(x *", "y = numerics.round((x - x.mean(-1, keepdims=True)) *"),
            "rounded once": (
                "y = numerics.round(x * (1 / np.sqrt(mean_square + eps)))",
                "y = x * (1 / np.sqrt(mean_square + eps))",
            ),
        },
    ),
    (
        "rope.py",
        "rope golden model",
        {
            "sign of sin": ("numerics.round(sin * scale)", "numerics.round(-sin * scale)"),
            "interleaved rotation": (
                "    return in_blocks(turn, x, *tables)\n",
                "    y = in_blocks(turn, np.concatenate([x[..., ::2], x[..., 1::2]], -1), *tables)\n"
                "    return np.stack([y[..., :half], y[..., half:]], -1).reshape(x.shape)\n",
            ),
            "bfloat16 tables": (
                "return numerics.round(cos * scale), numerics.round(sin * scale)",
                'return tuple((t * scale).astype("bfloat16").astype(numerics.dtype) for t in (cos, sin))',
            ),
            "bfloat16 frequencies": (
                "frequencies = 1 / powers\n",
                'frequencies = (1 / powers).astype("bfloat16").astype(numerics.dtype)\n',
            ),
            "frequencies rounded once": (
                "frequencies = 1 / powers\n",
                "frequencies = (1 / np.power(base, exponents, dtype=np.float64)).astype(numerics.dtype)\n",
            ),
            "bfloat16: products not rounded": ("r(pairs * sin[..., None, :])", "pairs * sin[..., None, :]"),
            "YaRN ignored": ("    if config.rope_scaling:\n        kept", "    if False:\n        kept"),
            "YaRN factor dropped": ("scale = attention_factor(config)", "scale = 1.0"),
            "YaRN factor squared": ("scale = attention_factor(config)", "scale = attention_factor(config) ** 2"),
            "YaRN factor on cos alone": ("numerics.round(sin * scale)", "numerics.round(sin)"),
            "YaRN: mscale alone": ("if yarn.mscale is not None and", "if yarn.mscale is not None or"),
            "YaRN: a ramp within one lane": ("        high += 0.001\n", "        pass\n"),
            "YaRN factor of the config ignored": ("if yarn.attention_factor is not None:", "if False:"),
            "YaRN: truncate ignored": ("if yarn.truncate:", "if True:"),
            "YaRN: the new context for the original one": (
                "length = yarn.original_max_position_embeddings /",
                "length = config.max_position_embeddings /",
            ),
        },
    ),
    (
        "cache.py",
        "cache finite generate",
        {
            "written one position early": (
                "end = start + k.shape[1]",
                "start = max(start - 1, 0)\n        end = start + k.shape[1]",
            ),
            "all written where the longest ends": (
                "start: int = self.lengths.item(row)\n        end",
                "start: int = int(self.lengths.max())\n        end",
            ),
            "all sequences advance": ("self.lengths[self.rows] += ids.shape[1]", "self.lengths += ids.shape[1]"),
            "ids written from the start": (
                "self.ids[row, start : start + len(new)] = new",
                "self.ids[row, : len(new)] = new",
            ),
            "keep_prefix keeps the difference": ("= differs[0] if", "= differs[0] + 1 if"),
            "keep_prefix believes what is not held": ("min(self.lengths[row], len(ids))", "len(ids)"),
            "selection of a selection": ("self.rows[list(rows)]", "np.array(rows)"),
            "reserve keeps what the first holds": ("int(self.lengths.max())", "int(self.lengths[0])"),
            "check: one too many": ("0 <= length <= room - new", "0 <= length <= room - new + 1"),
            "check: any precision": (
                "if not np.can_cast(numerics.storage, self.k.dtype",
                "if not np.can_cast(self.k.dtype, self.k.dtype",
            ),
            "check: any weights": ("if not np.array_equal(self.sample, self._sample(weights)):", "if False:"),
            "check: any config": ("if self.settings != (numerics, *_settings(config)):", "if False:"),
            "a moved cache shares lengths": (
                "self.lengths, self.filled, self.origin = self.lengths.copy(),",
                "_, self.filled, self.origin = 0,",
            ),
            "memory of positions set back not counted": (
                "np.minimum(self.filled[self.rows], length)",
                "self.lengths[self.rows]",
            ),
            "holds as many of other ids": (" and np.array_equal(self.ids[row, : len(ids)], ids)", ""),
        },
    ),
    (
        "attention.py",
        "golden model",
        {
            "q/k norm after rotation": (
                'q, k, v = normalise(q, "q_norm"), normalise(k, "k_norm"), np.swapaxes(heads(v), 1, 2)\n'
                "    q, k = rotate(q, tables, numerics), rotate(k, tables, numerics)\n",
                "q, k, v = (np.swapaxes(heads(y), 1, 2) for y in (q, k, v))\n"
                "    q, k = (np.swapaxes(rotate(y, tables, numerics), 1, 2) for y in (q, k))\n"
                "    q, k = (y.reshape(*x.shape[:2], -1) for y in (q, k))\n"
                '    q, k = normalise(q, "q_norm"), normalise(k, "k_norm")\n',
            ),
            "q/k norm missing": (
                'y = rms_norm(heads(y), weights[f"{prefix}{name}.weight"], config.rms_norm_eps, numerics)',
                "y = heads(y)",
            ),
            "q/k norm missing in decode": (
                '        y = rms_norm(heads(y), weights[f"{prefix}{name}.weight"], config.rms_norm_eps, numerics)\n',
                "        y = heads(y)\n        if x.shape[1] > 1:\n"
                '            y = rms_norm(y, weights[f"{prefix}{name}.weight"], config.rms_norm_eps, numerics)\n',
            ),
            "q/k norm over all heads": (
                'y = rms_norm(heads(y), weights[f"{prefix}{name}.weight"], config.rms_norm_eps, numerics)',
                'weight = np.tile(weights[f"{prefix}{name}.weight"], y.shape[-1] // config.head_dim)\n'
                "        y = heads(rms_norm(y, weight, config.rms_norm_eps, numerics))",
            ),
            "q_norm and k_norm swapped": (
                'rms_norm(heads(y), weights[f"{prefix}{name}.weight"]',
                "rms_norm(heads(y), weights[prefix + {'q_norm': 'k_norm', 'k_norm': 'q_norm'}[name] + '.weight']",
            ),
            "scale of another head_dim": (
                "attend(q[b], keys",
                "attend(q[b] * (config.head_dim * config.num_attention_heads / config.hidden_size) ** 0.5, keys",
            ),
            "KV heads tiled": (
                "attend(q[b], keys, values,",
                "attend(q[b], *(np.tile(y, (len(q[b]) // len(y), 1, 1)) for y in (keys, values)),",
            ),
        },
    ),
    (
        "attention.py",
        "attention model cache",
        {
            "scores not scaled": ("        scores *= head_dim**-0.5\n", ""),
            "the mask shows the next position": ("total - last - a + 1)", "total - last - a + 2)"),
            "the mask hides the own position": ("total - last - a + 1)", "total - last - a)"),
            "the window shows one more": ("total - last - a - window)", "total - last - a - window - 1)"),
            "the window shows one less": ("max(first - window + 1, 0)", "max(first - window + 2, 0)"),
            "running softmax: sums not rescaled": ("sums += total_exp * shrink", "sums += total_exp"),
            "running softmax: values not rescaled": ("products += mixed * shrink", "products += mixed"),
            "bfloat16: a row in blocks": ("width = reach if numerics.rounds else", "width ="),
            "bfloat16: probabilities not rounded": ("scores = r(scores / sums)", "scores = scores / sums"),
            "blocks: a row's last keys left out": (
                "for a in range(0, total, width):",
                "for a in range(0, max(total - 1, 1), width):",
            ),
        },
    ),
    (
        "mlp.py",
        "golden model",
        {
            "gate and up swapped": ("silu(gate)) * up", "silu(up)) * gate"),
            "quick gelu": ("silu(gate)", "silu(1.702 * gate) / 1.702"),
            "silu not rounded": ("numerics.round(silu(gate)) * up", "silu(gate) * up"),
        },
    ),
    (
        "moe.py",
        "moe model",
        {
            "never renormalised": ("if config.norm_topk_prob:", "if False:"),
            "a damaged router hides an expert": ("p[~np.isfinite(logits).all(axis=-1)] = np.nan", "pass"),
            "raw logits for weights": ("np.take_along_axis(p, indices", "np.take_along_axis(logits, indices"),
            "of equal ones the higher numbers": (
                'np.argsort(-p, axis=-1, kind="stable")[',
                'np.argsort(p, axis=-1, kind="stable")[..., ::-1][',
            ),
            "one expert fewer": (": config.num_experts_per_tok]", ": max(config.num_experts_per_tok - 1, 1)]"),
            "the weight of another token": ("y * by_weight[places]", "y * by_weight[places[::-1]]"),
            "summed in the router's order": (
                "    if not numerics.grouped:\n        order",
                "    if False:\n        order",
            ),
            "weights not rounded": ("return numerics.round(shares)", "return shares"),
        },
    ),
    (
        "model.py",
        "golden model cache",
        {
            "final norm missing": ('    x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps, n)\n', ""),
            "head always tied": (
                'w = embedding if config.tie_word_embeddings else weights["lm_head.weight"]',
                "w = embedding",
            ),
            "a head that is given wins over the tie": (
                'embedding if config.tie_word_embeddings else weights["lm_head.weight"]',
                'weights.get("lm_head.weight", embedding)',
            ),
            "position reset in decode": ("starts[:, None] + np.arange(new)", "0 * starts[:, None] + np.arange(new)"),
            "position off in decode": (
                "starts[:, None] + np.arange(new)",
                "starts[:, None] + (new == 1) + np.arange(new)",
            ),
            "residual of the normalised": (
                '    x = in_blocks(add, x, h)\n    record(f"{prefix}attn_residual", x)\n    h = normalise(',
                '    x = in_blocks(add, h, h)\n    record(f"{prefix}attn_residual", x)\n    h = normalise(',
            ),
            "no residual around the MLP": (
                "    x = in_blocks(add, x, h)\n    record(prefix[:-1], x)",
                "    x = h\n    record(prefix[:-1], x)",
            ),
            "residual not rounded": ("return numerics.round(x + h)", "return x + h"),
            "last_only gives the first": ("x = x[:, -1:]", "x = x[:, :1]"),
        },
    ),
    (
        "ids.py",
        "model scoring",
        {
            "the id behind the vocabulary": ("ids.max() >= config.vocab_size", "ids.max() > config.vocab_size"),
            "the first of several sequences for one": ("if np.ndim(ids) != 1:", "if False:"),
        },
    ),
    (
        "sampling.py",
        "sampling",
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
            "temperature multiplies": ("scores /= np.float32(parameters", "scores *= np.float32(parameters"),
            "temperature after the filters": (
                "        if parameters.temperature > 0:\n            scores /= np.float32(parameters.temperature)\n",
                "",
            ),
            "penalty counts repeats": (
                "scores[previous_ids] = np.where(previous < 0, previous * factor, previous / factor)",
                "np.divide.at(scores, previous_ids, factor)",
            ),
            "an id below 0 is the last": (
                "0 <= previous_ids.min() <= previous_ids.max()",
                "previous_ids.max()",
            ),
            "ids of probability 0": ('cdf[-1], side="right"', 'cdf[-1], side="left"'),
            "sums in float32": (
                "np.exp(scores - scores.max()), dtype=np.float64",
                "np.exp(scores - scores.max()), dtype=np.float32",
            ),
        },
    ),
    (
        "generate.py",
        "generate",
        {
            "never stops": (" or stop(new[row])", ""),
            "one token more": ("len(new[row]) == most[row]", "len(new[row]) > most[row]"),
            "prefix believed": (
                "start = cache.keep_prefix(0, ids[:-1])",
                "start = min(int(cache.lengths[cache.rows[0]]), len(ids) - 1)",
            ),
            "a cache that another call used": ("if not cache.holds(", "if False and cache.holds("),
            "prefix not used": ("start = cache.keep_prefix(0, ids[:-1])", "start = cache.keep_prefix(0, [])"),
            "chunk: the last logits of another": ("last = start == len(ids)", "last = start >= len(ids) - 1"),
            "one generator for all": (
                "[np.random.default_rng(seed) for _ in prompts]",
                "[np.random.default_rng(seed)] * len(prompts)",
            ),
            "the penalty does not count the prompt": ("generators[row], ids[row, :end])", "generators[row], new[row])"),
            "finished sequences mix up the others": (
                "selected = cache.select(active)",
                "selected = cache.select(range(len(active)))",
            ),
            "top_k not passed on": (
                "        cache,\n        max_new_tokens=max_new_tokens,\n        sampling=SamplingParameters(\n"
                "            temperature=temperature,\n            top_k=top_k,\n",
                "        cache,\n        max_new_tokens=max_new_tokens,\n        sampling=SamplingParameters(\n"
                "            temperature=temperature,\n",
            ),
            "stream: top_p not passed on": (
                "is None else cache,\n        max_new_tokens=max_new_tokens,\n        sampling=SamplingParameters(\n"
                "            temperature=temperature,\n            top_k=top_k,\n            top_p=top_p,\n",
                "is None else cache,\n        max_new_tokens=max_new_tokens,\n        sampling=SamplingParameters(\n"
                "            temperature=temperature,\n            top_k=top_k,\n",
            ),
            "room for the shortest alone": ("room = max(len(prompt)", "room = min(len(prompt)"),
            "stop string: its last character not awaited": (
                "for n in range(len(stop)) if",
                "for n in range(len(stop) - 1) if",
            ),
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
        "files/checkpoint.py",
        "checkpoint",
        {
            "any shape of as many numbers": ("tensor.shape != shape:", "tensor.size != np.prod(shape):"),
            "any dtype": ("if stored not in _STORED:", "if False:"),
            "extra names ignored": (
                'problems = [f"{name}: extra: no such tensor in this model" for name in sorted(',
                'problems = [f"{name}" for name in () and sorted(',
            ),
            "names without model. refused": ('if not any(name.startswith("model.") for name in found):', "if False:"),
            "a tensor in two shards": ("for name in found.keys() & tensors.keys()]", "for name in ()]"),
            "another model's files replaced": (" and path.read_bytes() == files.get(name))", ")"),
            "the tokenizer left out": ("        files |= tokenizer.files()", "        pass"),
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
        "guard.py",
        "finite",
        {
            "a changed file not seen": ("if now == number and found != before:", "if False:"),
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
                "tensor[start : start + PIECE]",
                "tensor[: copy[start : start + PIECE].size]",
            ),
            "filters without do_sample": ('if given.get("do_sample"):', "if given:"),
            "stop ids of config.json alone": (
                'given.get("eos_token_id", self.config.eos_token_id)',
                "self.config.eos_token_id",
            ),
        },
    ),
    (
        "finite.py",
        "finite",
        {
            "the last token": ("[:, position_axis(name)].min()", "[:, position_axis(name)].max()"),
            "the token within its piece": ("at = start + token", "at = token"),
            "a head of its own not looked at": (
                'config.tie_word_embeddings or "lm_head.weight" in weights',
                "config.tie_word_embeddings",
            ),
            "experts never to blame": (' or module.endswith(".experts")', ""),
            "hidden scores taken for infinite": (
                'np.isnan(x) | np.isposinf(x) if name.endswith(".scores") else ~np.isfinite(x)',
                "~np.isfinite(x)",
            ),
        },
    ),
    (
        "tokenizer.py",
        "tokenizer conversation",
        {
            "UTF-8 token by token": (
                "decoder.decode(self.token_bytes(i, skip_special_tokens))",
                'self.token_bytes(i, skip_special_tokens).decode("utf-8", "replace")',
            ),
            "the end of a stream lost": ('decoder.decode(b"", final=True)', 'decoder.decode(b"")'),
            "split without the look ahead": (r"|\s*[\r\n]+|\s+(?!\S)|\s+", r"|\s*[\r\n]+|\s+"),
            "templates of their own not saved": ('*self.folder.glob("additional_chat_templates/*.jinja")', "*()"),
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
            "errors of other threads lost": ("            other.result()\n", "            pass\n"),
            "parts begin after an error": (
                "        except BaseException:\n            left = iter(())\n            raise\n"
                "        finally:\n            _here",
                "        finally:\n            _here",
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
            "the end token left out": ("[[*tokenizer.encode(text), end] for", "[tokenizer.encode(text) for"),
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
            "options do not reach the template": ("(self.messages, **template_options)", "(self.messages)"),
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
        "porting/judge.py",
        "compare",
        {
            "ulps of the best number": ("(error[seen] / place).max()", "(error[seen] / place).min()"),
            "key heads numbered as query heads": ('is not None and kind[0] != "k"', "is not None"),
        },
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
]


class Mutant(NamedTuple):
    """A bug: its name, its file in the package, the tests that run first, and what is replaced by what."""

    name: str
    file: str
    tests: str
    text: str
    replacement: str


MUTANTS = [
    Mutant(f"{Path(file).stem}: {name}", file, tests, *change)
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
    # the tour holds the core's source itself against a copy
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
            print(f"{mutant.name:50} {line}", flush=True)
            caught += found
    print(f"{caught} of {len(chosen)} planted bugs caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
