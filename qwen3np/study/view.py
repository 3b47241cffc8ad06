"""One prompt's way through the model, measured in a single forward pass and written as a page."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qwen3np.config import Config
from qwen3np.guard import checked_sequence, forward, require_finite
from qwen3np.numerics import Array, named
from qwen3np.qwen3 import rms_norm
from qwen3np.sampling import log_probabilities
from qwen3np.tokenizer import Tokenizer

MAX_TOKENS = 128  # pictures have a row and a column per token, and the page grows with its square per head
GUESSES = 5  # per layer and token
CANDIDATES = 100  # for the next token, listed individually; the rest of the vocabulary is grouped
GROUPS = 120

# The points of a layer in words, under their names in the trace.
POINTS = {
    "input_layernorm": "the state, normalised: what attention reads",
    "self_attn.q_proj": "queries: what each head looks for",
    "self_attn.k_proj": "keys: what each head can be found by",
    "self_attn.v_proj": "values: what each head hands over",
    "self_attn.q_norm": "queries, normalised",
    "self_attn.k_norm": "keys, normalised",
    "self_attn.q_rope": "queries, turned by their position",
    "self_attn.k_rope": "keys, turned by their position",
    "self_attn.scores": "query times key, scaled",
    "self_attn.probs": "scores after softmax: the attention",
    "self_attn.context": "values, mixed by the attention",
    "self_attn.o_proj": "what attention adds to the state",
    "attn_residual": "the state after attention",
    "post_attention_layernorm": "the state, normalised: what the MLP reads",
    "mlp.gate_proj": "the gate of the MLP",
    "mlp.up_proj": "what the gate lets through",
    "mlp.act": "silu(gate) times up",
    "mlp.down_proj": "what the MLP adds to the state",
    "mlp.gate": "the router's logits",
    "mlp.router_weights": "how much each chosen expert counts",
    "mlp.experts": "what the experts add to the state",
    "output": "the state after the layer",
}
_LAYER = re.compile(r"model\.layers\.(\d+)(?:\.(.+))?")
_BY_HEAD = ("self_attn.q_rope", "self_attn.k_rope", "self_attn.scores", "self_attn.probs")  # (B, heads, S, ...)
_VISIBLE = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"}


@dataclass(frozen=True)
class Observation:
    """What one forward pass over S tokens shows."""

    ids: list[int]
    guesses: Array  # (L + 1, S, GUESSES) ids, likeliest first: the embedding seen through the head, then each layer
    probabilities: Array  # (L + 1, S, GUESSES) of these guesses
    attention: Array  # (L, H, S, S)
    sizes: dict[str, Array]  # of the points outside the layers: the root mean square for each token, (S,)
    layer_sizes: dict[
        str, Array
    ]  # of the points in the layers: (L, S); the output's is "output"; NaN where there is none
    logits: Array  # (S, V)


def observe(
    weights: Mapping[str, Array],
    config: Config,
    input_ids: ArrayLike,
    *,
    numerics: str = "float32",
    engine: str = "fast",
    progress: Callable[[int], object] | None = None,
) -> Observation:
    """Run one sequence of ids (S,) and look at the recorded points. Calls progress(S) after each layer's guesses.

    A layer's guesses are its output through the final norm and the head, as if it were the last (the logit lens:
    nostalgebraist, 2020, https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru).

    Raises ValueError as forward does, and for more than MAX_TOKENS ids; NonFiniteError as generate.
    """
    ids, n = checked_sequence(input_ids, config), named(numerics, engine)
    if len(ids) > MAX_TOKENS:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, but a view shows at most {MAX_TOKENS}: attention "
            "grows with their square; shorten the prompt"
        )
    states: list[Array] = []
    attention: list[Array] = []
    sizes: dict[str, Array] = {}
    layer_sizes: dict[str, Array] = {}

    def record(name: str, x: Array) -> None:
        in_layer = _LAYER.fullmatch(name)
        point = (in_layer[2] or "output") if in_layer else name
        if point in ("model.embed_tokens", "output"):
            states.append(x)
        if point == "self_attn.probs":
            attention.append(x[0])
        if x.dtype.kind == "f":  # indices of experts have no size
            if in_layer:
                nowhere = np.full((config.num_hidden_layers, len(ids)), np.nan)
                layer_sizes.setdefault(point, nowhere)[int(in_layer[1])] = _sizes(point, x)
            else:
                sizes[name] = _sizes(point, x)

    logits = forward(weights, config, ids, numerics=numerics, engine=engine, trace=record)[0]
    require_finite(logits, weights, config, ids, numerics)
    head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    guesses: list[Array] = []
    probabilities: list[Array] = []
    for x in states:
        if x is states[-1]:
            early = logits
        else:
            early = n.ops.head(rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps, n), head, n)[0]
        best = _largest(early, GUESSES)
        guesses.append(best)
        probabilities.append(np.exp(np.take_along_axis(log_probabilities(early), best, axis=-1)))
        if progress is not None:
            progress(len(ids))
    return Observation(ids, np.stack(guesses), np.stack(probabilities), np.stack(attention), sizes, layer_sizes, logits)


def page(observation: Observation, tokenizer: Tokenizer, model_name: str) -> str:
    """Return the page: HTML that needs nothing else. All text in it is escaped, whatever the prompt says."""
    import jinja2

    folder = Path(__file__).parent
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True)
    data = _data(observation)
    shown = np.unique(np.concatenate([observation.ids, observation.guesses.ravel(), np.ravel(data["next"]["ids"])]))
    data["texts"] = {i: visible(tokenizer.token_bytes(i)) or f"#{i}" for i in shown.tolist()}
    return environment.get_template("view.html").render(
        data=data,
        model_name=model_name,
        prompt="".join(data["texts"][i] for i in observation.ids),
        layers=len(observation.attention),
        heads=observation.attention.shape[1],
        tokens=len(observation.ids),
        vocabulary=observation.logits.shape[-1],
        chart=chart(observation),
        style=(folder / "view.css").read_text(encoding="utf-8"),
        script=(folder / "view.js").read_text(encoding="utf-8"),
    )


def visible(token: bytes) -> str:
    r"""Return the bytes of a token in visible form: ␣ for a space, \xe2 for a byte of a longer character."""
    text = token.decode("utf-8", "backslashreplace")
    shown = [_VISIBLE.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text]
    return "".join(shown)


def chart(observation: Observation) -> str:
    """Return the sizes of the state, and of what attention and the MLP add to it, as SVG: a line for each token.

    Empty without matplotlib (in the extra `study`).
    """
    try:
        matplotlib: Any = import_module("matplotlib")
    except ImportError:
        return ""
    figure_class: Any = import_module("matplotlib.figure").Figure
    ticker: Any = import_module("matplotlib.ticker")
    sizes = observation.layer_sizes
    mlp = np.nanmax([sizes[point] for point in ("mlp.down_proj", "mlp.experts") if point in sizes], axis=0)
    added = {"output": sizes["output"], "self_attn.o_proj": sizes["self_attn.o_proj"], "mlp.down_proj": mlp}
    low, high = (float(extreme(list(added.values()))) for extreme in (np.nanmin, np.nanmax))
    steps = (1, 2, 5) if high < 1000 * low else (1,)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qwen3np", "font.size": 11}):
        figure = figure_class(figsize=(11, 3.6), layout="constrained")
        for axes, (point, values) in zip(figure.subplots(1, 3, sharey=True), added.items(), strict=True):
            marker = "" if len(values) > 1 else "o"
            for token in range(values.shape[1]):
                axes.plot(values[:, token], marker=marker, linewidth=1, gid=f"line-{point}-{token}")
            axes.set(title=POINTS[point], xlabel="layer", yscale="log")
            axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=steps))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
            axes.grid(alpha=0.3)
            axes.patch.set_visible(False)
        figure.axes[0].set_ylabel("root mean square")
        figure.patch.set_visible(False)
        file = StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return file.getvalue()[file.getvalue().index("<svg") :]


def _data(observation: Observation) -> dict[str, Any]:
    """Return what the page's script reads, rounded to what it shows."""
    tokens, vocabulary = observation.logits.shape
    best = _largest(observation.logits, min(CANDIDATES, vocabulary))
    candidates = np.take_along_axis(observation.logits, best, axis=-1)
    edges, groups = _groups(observation.logits)
    seen = np.tril_indices(tokens)  # row by row; the upper triangle is masked
    weights = np.rint(observation.attention[..., seen[0], seen[1]] * 255).astype(np.uint8)
    return {
        "ids": observation.ids,
        "lens": {"ids": observation.guesses.tolist(), "probabilities": _digits(observation.probabilities, 5)},
        "attention": {
            "layers": len(observation.attention),
            "heads": observation.attention.shape[1],
            "weights": base64.b64encode(weights.tobytes()).decode(),
        },
        "sizes": {
            "points": [[name, POINTS.get(name, "")] for name in observation.layer_sizes],
            "values": [_digits(values, 3) for values in observation.layer_sizes.values()],
            "outside": {name: _digits(values, 3) for name, values in observation.sizes.items()},
        },
        "next": {
            "ids": best.tolist(),
            "logits": candidates.astype(np.float64).round(4).tolist(),
            "group_sizes": np.diff(edges).tolist(),
            "group_logits": groups.round(4).tolist(),
        },
    }


def _digits(x: Array, count: int) -> Any:
    """Return the numbers as lists, rounded to `count` digits; None for NaN, which JSON lacks."""
    rounded = [None if np.isnan(value) else float(f"{value:.{count}g}") for value in x.ravel().tolist()]
    return np.reshape(np.array(rounded, object), x.shape).tolist()


def _groups(logits: Array) -> tuple[list[int], Array]:
    """Return the ranks that bound groups of logits after the CANDIDATES largest, and their values (S, groups).

    The value of a group is the logarithm of the mean exponential of its logits. That is exact at temperature 1 and
    close at others, because groups grow with rank, where logits level out.
    """
    tokens, vocabulary = logits.shape
    first = min(CANDIDATES, vocabulary)
    edges = sorted({round(first * (vocabulary / first) ** (n / GROUPS)) for n in range(GROUPS + 1)})
    ordered = -np.sort(-logits.astype(np.float64), axis=-1)
    pairs = list(pairwise(edges))
    means = [np.logaddexp.reduce(ordered[:, a:b], axis=-1) - np.log(b - a) for a, b in pairs]
    return edges, np.stack(means, axis=-1) if means else np.empty((tokens, 0))


def _largest(x: Array, count: int) -> Array:
    """Return the indices of the `count` largest numbers in each row, largest first. x (S, V) -> (S, count)."""
    count = min(count, x.shape[-1])
    found = np.argpartition(-x, count - 1, axis=-1)[:, :count]
    return np.take_along_axis(
        found, np.argsort(-np.take_along_axis(x, found, axis=-1), axis=-1, kind="stable"), axis=-1
    )


def _sizes(point: str, x: Array) -> Array:
    """Return the root mean square for each token, (S,); for scores and attention, over visible positions only."""
    x = x[0].astype(np.float64)
    if point in _BY_HEAD:
        x = np.swapaxes(x, 0, 1)  # (S, heads, ...)
    seen: Any = True
    if point in ("self_attn.scores", "self_attn.probs"):
        seen = np.tril(np.ones((len(x), len(x)), np.bool_))[:, None]
    return np.sqrt(np.mean(np.square(x), axis=tuple(range(1, x.ndim)), where=seen))
