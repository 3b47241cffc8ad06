"""The oracle: transformers' own Qwen3 in eager mode, run on our config and weights, its every step recorded.

Nothing here computes: the hooks and wrappers only look at what transformers' code does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3 import modeling_qwen3  # noqa: F401  # for the tests
from transformers.models.qwen3_moe import modeling_qwen3_moe

from qwen3np import Config

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()  # it warns about every YaRN factor that is not a ratio of two contexts
torch.set_num_threads(1)  # models this small only lose time to more
Points = dict[str, np.ndarray]
Model = Qwen3ForCausalLM | Qwen3MoeForCausalLM


def model_of(
    config: Config, weights: Mapping[str, np.ndarray], dtype: str = "float32", experts: str = "eager"
) -> Model:
    """Return transformers' model of this config and these weights, eager, in "float32", "bfloat16" or "float64".

    experts is how it adds up experts: "eager" or "grouped_mm".
    """
    options = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}
    if config.num_experts:
        options["experts_implementation"] = experts
        model = Qwen3MoeForCausalLM._from_config(Qwen3MoeConfig(**config.to_dict()), **options)
    else:
        model = Qwen3ForCausalLM._from_config(Qwen3Config(**config.to_dict()), **options)
    state = {name: torch.from_numpy(np.array(w, np.float32)) for name, w in weights.items()}
    for layer in filter(config.is_sparse, range(config.num_hidden_layers)):  # in memory all experts are one tensor
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([state.pop(f"{prefix}{n}.{name}_proj.weight") for n in range(config.num_experts)])
            for name in ("gate", "up", "down")
        )
        state |= {f"{prefix}gate_up_proj": torch.cat((gate, up), 1), f"{prefix}down_proj": down}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


class Float64(TorchFunctionMode):
    """Within it, transformers' casts to float32 (norms, softmax, rotary tables) are casts to float64."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widen(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(widen, args), **{name: widen(x) for name, x in (kwargs or {}).items()})


def run(model: Model, ids: np.ndarray, cache: DynamicCache | None = None, points: Points | None = None) -> np.ndarray:
    """Return the logits (B, S, V) of ids (B, S), and put every point on the way into points."""
    with torch.no_grad(), nullcontext() if points is None else _recording(model, points):
        return array(model(torch.from_numpy(ids), past_key_values=cache, use_cache=cache is not None).logits)


def prefill_and_decode(model: Model, ids: np.ndarray, steps: int, points: list[Points] | None = None) -> np.ndarray:
    """Return the logits (B, S, V) when the last `steps` of the S ids are fed one by one, through a DynamicCache."""
    cache = DynamicCache(config=model.config)
    logits: list[np.ndarray] = []
    for part in np.split(ids, range(ids.shape[1] - steps, ids.shape[1]), axis=1):
        if points is not None:
            points.append({})
        logits.append(run(model, part, cache, points[-1] if points is not None else None))
    return np.concatenate(logits, axis=1)


def array(x: torch.Tensor) -> np.ndarray:
    """Return a copy as NumPy; bfloat16 values in a float32 array, as ours are."""
    return np.array((x.float() if x.dtype == torch.bfloat16 else x).numpy())


@contextmanager
def _recording(model: Model, points: Points) -> Iterator[None]:
    """Put every recorded point into points, under our names and in our shapes.

    Beside them, for checks of single steps: self_attn.product, the unscaled q kᵀ, and self_attn.keys and .values, what
    the cache holds after this step.
    """

    def output(name: str) -> Callable[..., None]:
        return lambda module, args, result: points.__setitem__(name, array(result))

    def input_(name: str) -> Callable[..., None]:
        return lambda module, args: points.__setitem__(name, array(args[0]))

    def router(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, result: Any) -> None:
            mlp = name.removesuffix("gate")
            for point, x in zip(("gate", "router_weights", "router_indices"), result, strict=True):
                points[mlp + point] = array(x).reshape(*points["model.embed_tokens"].shape[:2], -1)

        return hook

    def experts(name: str) -> Callable[..., None]:  # they see one row of tokens
        return lambda module, args, y: points.__setitem__(name, array(y).reshape(points["model.embed_tokens"].shape))

    modeling = sys.modules[type(model).__module__]
    kind = type(model).__name__.removesuffix("ForCausalLM")
    recorded = (
        torch.nn.Linear,
        torch.nn.Embedding,
        getattr(modeling, f"{kind}RMSNorm"),
        getattr(modeling, f"{kind}DecoderLayer"),
    )
    inputs = {
        "o_proj": "context",
        "post_attention_layernorm": "attn_residual",
        "down_proj": "act",
    }
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, recorded):
            hooks.append(module.register_forward_hook(output(name)))
        elif isinstance(module, modeling_qwen3_moe.Qwen3MoeTopKRouter):
            hooks.append(module.register_forward_hook(router(name)))
        elif isinstance(module, modeling_qwen3_moe.Qwen3MoeExperts):
            hooks.append(module.register_forward_hook(experts(name)))
        parent, _, own = name.rpartition(".")
        if own in inputs:
            hooks.append(module.register_forward_pre_hook(input_(f"{parent}.{inputs[own]}")))

    attention = modeling.eager_attention_forward

    def eager_attention_forward(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        prefix = f"model.layers.{module.layer_idx}.self_attn."
        with _Inside() as inside:
            result = attention(module, query, key, value, *args, **kwargs)
        scores = array(inside.scores)
        scores[scores < np.finfo(np.float32).min / 2] = -np.inf  # transformers adds the lowest finite number
        points.update(
            {
                f"{prefix}q_rope": array(query),
                f"{prefix}k_rope": array(key[:, :, -query.shape[2] :]),
                f"{prefix}keys": array(key),
                f"{prefix}values": array(value),
                f"{prefix}product": array(inside.product),
                f"{prefix}scores": scores,
                f"{prefix}probs": array(result[1]),
            }
        )
        return result

    modeling.eager_attention_forward = eager_attention_forward
    try:
        yield
    finally:
        modeling.eager_attention_forward = attention
        for hook in hooks:
            hook.remove()


class _Inside(TorchFunctionMode):
    """Keeps what passes within transformers' attention: q kᵀ, and what its softmax is given."""

    product: torch.Tensor | None = None
    scores: torch.Tensor | None = None

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.matmul and self.product is None:
            self.product = result
        elif func is F.softmax:
            self.scores = args[0]
        return result
