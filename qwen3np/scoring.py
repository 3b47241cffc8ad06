"""How likely a text is: the log-probability of each token, in sliding windows if the text exceeds the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.generate import PREFILL_CHUNK
from qwen3np.guard import checked_sequence, forward, require_finite
from qwen3np.numerics import Array, named
from qwen3np.sampling import log_probabilities
from qwen3np.weights import Weights

CHUNK = 128  # positions whose logits (V each) are in memory at once


def score(
    weights: Weights,
    config: Config,
    input_ids: Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    numerics: str = "float32",
    engine: str = "fast",
    progress: Callable[[int], object] | None = None,
) -> Array:
    """Compute the log-probability of each token of a text, given what precedes it in its window.

    Parameters
    ----------
    weights, config
        The model.
    input_ids
        The ids of the text, at least two.
    window
        How many tokens are seen at once; None: the model's context.
    stride
        How many tokens apart windows start; None: half a window. Each window scores only the tokens that no earlier
        one has scored, so a token sees at least window - stride tokens. A text that fits into one window gets exactly
        the log-probabilities of one forward pass.
    numerics, engine
        As in forward.
    progress
        Called with the number of tokens scored.

    Returns
    -------
    (N - 1,) float64: the log-probability of every token but the first. The perplexity of the text is exp(-mean).

    Raises
    ------
    ValueError
        For fewer than two tokens, ids out of range, and unless 0 < stride < window <= context. CheckpointError and
        NonFiniteError as in generate.

    Examples
    --------
    >>> model = qwen3np.load()
    >>> qwen3np.score(model.weights, model.config, [281, 297, 272, 1132, 259, 1592]).shape
    (5,)
    """
    ids = np.array(checked_sequence(input_ids, config) if len(input_ids) else [])
    context = config.max_position_embeddings
    window = min(context, max(len(ids), 2)) if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    if len(ids) < 2:
        raise ValueError(
            f"score: the text has {len(ids)} tokens; at least two are needed, because the first is only context"
        )
    if not 0 < stride < window <= context:
        raise ValueError(
            f"score: stride {stride} and window {window} must satisfy 0 < stride < window <= {context}, the context"
        )

    cache = KVCache.allocate(config, 1, min(window, len(ids)), named(numerics).storage)
    result = np.empty(len(ids) - 1)
    scored, start = 1, 0  # tokens before `scored` have their log-probability, or are the first
    while scored < len(ids):
        end = min(start + window, len(ids))
        cache.lengths[0] = 0
        while (at := start + int(cache.lengths[0])) < scored - 1:  # context alone: its logits are not wanted
            chunk = ids[at : min(at + PREFILL_CHUNK, scored - 1)]
            forward(weights, config, chunk, cache, numerics=numerics, engine=engine, last_only=True, head=False)
        while scored < end:
            chunk = ids[scored - 1 : min(scored - 1 + CHUNK, end - 1)]
            logits = forward(weights, config, chunk, cache, numerics=numerics, engine=engine)[0]
            require_finite(logits, weights, config, ids[start : scored - 1 + len(chunk)].tolist(), numerics)
            targets = ids[scored : scored + len(chunk)]
            result[scored - 1 : scored - 1 + len(chunk)] = log_probabilities(logits)[np.arange(len(chunk)), targets]
            scored += len(chunk)
            if progress:
                progress(len(chunk))
        start += stride
    return result
