"""Logits processors and filters, in the order of transformers' generate: penalties, bans, forced ids; filters.

A processor takes (scores, value of its setting, all settings, ids so far, how many of them are new) and changes the
scores (V,) in place. A filter takes (scores (N,), value) and returns the indices to keep. All of it is float32, as in
transformers, because rounding decides ties.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Scores: TypeAlias = NDArray[np.float32]
Places: TypeAlias = NDArray[np.intp]
Processor: TypeAlias = Callable[[Scores, Any, Mapping[str, Any], Places, int], object]


def _repetition(scores: Scores, penalty: float, settings: Mapping[str, Any], ids: Places, new: int) -> None:
    """Divide (below 0: multiply) the scores of all ids so far by penalty; repeats count once."""
    previous, factor = scores[ids], np.float32(penalty)
    scores[ids] = np.where(previous < 0, previous * factor, previous / factor)


def _prompt_repetition(scores: Scores, penalty: float, settings: Mapping[str, Any], ids: Places, new: int) -> None:
    _repetition(scores, 1 / penalty, settings, _prompt(ids, new), 0)


def _presence(scores: Scores, penalty: float, settings: Mapping[str, Any], ids: Places, new: int) -> None:
    scores[np.unique(ids[ids.size - new :])] -= np.float32(penalty)


def _frequency(scores: Scores, penalty: float, settings: Mapping[str, Any], ids: Places, new: int) -> None:
    found, counts = np.unique(ids[ids.size - new :], return_counts=True)
    scores[found] -= np.float32(penalty) * counts.astype(np.float32)


def _bias(
    scores: Scores, biases: Mapping[Any, float] | Sequence[Any], settings: Mapping[str, Any], ids: Places, new: int
) -> None:
    """Add each bias to the last id of its sequence, where the ids so far end with the rest of the sequence."""
    added = np.zeros_like(scores)
    for sequence, bias in biases.items() if isinstance(biases, Mapping) else biases:
        *before, last = sequence
        if len(before) <= ids.size and ids[ids.size - len(before) :].tolist() == before:
            added[last] += np.float32(bias)
    scores += added


def _bad_words(scores: Scores, words: Sequence[Any], settings: Mapping[str, Any], ids: Places, new: int) -> None:
    ends = _ends(settings)
    bans = {tuple(word): -np.inf for word in words if not (len(word) == 1 and word[0] in ends)}
    _bias(scores, bans, settings, ids, new)


def _ngrams(scores: Scores, size: int, settings: Mapping[str, Any], ids: Places, new: int) -> None:
    _ban_ngrams(scores, size, ids, ids)


def _prompt_ngrams(scores: Scores, size: int, settings: Mapping[str, Any], ids: Places, new: int) -> None:
    _ban_ngrams(scores, size, ids, _prompt(ids, new))


def _ban_ngrams(scores: Scores, size: int, ids: Places, among: Places) -> None:
    """Ban each id that would complete an n-gram of this size that is already in `among`."""
    if 0 < size <= min(among.size, ids.size + 1):
        windows = np.lib.stride_tricks.sliding_window_view(among, size)
        same = (windows[:, :-1] == ids[ids.size + 1 - size :]).all(axis=1)
        scores[windows[same, -1]] = -np.inf


def _no_end_before(scores: Scores, least: int, settings: Mapping[str, Any], length: int) -> None:
    if length < least:
        scores[_ends(settings)] = -np.inf


def _force(scores: Scores, forced: int | Sequence[int]) -> None:
    scores[:] = -np.inf
    scores[forced] = 0


def _forced_start(scores: Scores, forced: int, settings: Mapping[str, Any], ids: Places, new: int) -> None:
    if ids.size == 1:
        _force(scores, forced)


def _forced_end(
    scores: Scores, forced: int | Sequence[int], settings: Mapping[str, Any], ids: Places, new: int
) -> None:
    limits = [ids.size - new + settings["max_new_tokens"]] if settings.get("max_new_tokens") else []
    limits += [settings["max_length"]] if settings["max_length"] is not None else []
    if limits and ids.size == min(limits) - 1:
        _force(scores, forced)


def _finite(scores: Scores, on: bool, settings: Mapping[str, Any], ids: Places, new: int) -> None:
    if on:
        np.nan_to_num(scores, copy=False, nan=0.0)


def _decay(scores: Scores, rule: tuple[int, float], settings: Mapping[str, Any], ids: Places, new: int) -> None:
    """Raise the scores of the stop ids exponentially after the given number of new ids."""
    start, factor = rule
    if new > start:
        ends = _ends(settings)
        added = np.abs(scores[ends]) * np.float32(factor ** (new - start) - 1)
        scores[ends] += np.where(np.isfinite(scores[ends]), added, np.float32(0))


def _suppress(scores: Scores, banned: Sequence[int], settings: Mapping[str, Any], ids: Places, new: int) -> None:
    scores[[i for i in banned if 0 <= i < scores.size]] = -np.inf


def _suppress_first(scores: Scores, banned: Sequence[int], settings: Mapping[str, Any], ids: Places, new: int) -> None:
    first = 1 if settings["forced_bos_token_id"] is not None and ids.size - new == 1 else 0
    if new == first:
        _suppress(scores, banned, settings, ids, new)


def _prompt(ids: Places, new: int) -> Places:
    return ids[: ids.size - new]


def _ends(settings: Mapping[str, Any]) -> list[int]:
    return sorted(set(settings["stop_ids"] or ()))


PROCESSORS: Mapping[str, Processor] = {
    "sequence_bias": _bias,
    "encoder_repetition_penalty": _prompt_repetition,
    "repetition_penalty": _repetition,
    "presence_penalty": _presence,
    "frequency_penalty": _frequency,
    "no_repeat_ngram_size": _ngrams,
    "encoder_no_repeat_ngram_size": _prompt_ngrams,
    "bad_words_ids": _bad_words,
    "min_length": lambda scores, n, settings, ids, new: _no_end_before(scores, n, settings, ids.size),
    "min_new_tokens": lambda scores, n, settings, ids, new: _no_end_before(scores, n, settings, new),
    "forced_bos_token_id": _forced_start,
    "forced_eos_token_id": _forced_end,
    "remove_invalid_values": _finite,
    "exponential_decay_length_penalty": _decay,
    "suppress_tokens": _suppress,
    "begin_suppress_tokens": _suppress_first,
}


def _top_h(scores: Scores, h: float) -> Places:
    """Keep the likeliest ids, of the top 100, whose contributions to the entropy sum to at most h of it."""
    order = np.argsort(-scores, kind="stable")[:100]
    logp = _log_softmax(scores[order])
    with np.errstate(invalid="ignore"):
        parts = -np.exp(logp) * logp  # NaN where p is 0: neither these nor any less likely id stays
    keep = np.cumsum(parts) <= np.float32(np.nansum(parts) * np.float32(h))
    keep[0] = True
    return np.sort(order[keep])


def _top_k(scores: Scores, k: int) -> Places:
    """Keep the k highest scores, and all that tie with the last of them."""
    first = max(scores.size - k, 0)
    return np.flatnonzero(scores >= np.partition(scores, first)[first])


def _top_p(scores: Scores, p: float) -> Places:
    """Drop the least likely ids while their total stays <= 1 - p."""
    ordered = np.sort(scores)
    probabilities = np.exp(ordered - ordered[-1])
    probabilities /= probabilities.sum()
    # As torch does: float32 probabilities, added in float64, compared in float32. It decides exact ties: of ten
    # equal logits and p = 0.9, float64 throughout would keep ten, not nine. All below `tail` are less than 1 - p
    # together, so one sum does for them.
    tail = np.searchsorted(probabilities, np.float32((1 - p) / (2 * scores.size)))
    cumulative = np.cumsum(probabilities[tail:], dtype=np.float64)
    cumulative += probabilities[:tail].sum(dtype=np.float64)
    dropped = np.searchsorted(cumulative.astype(np.float32), np.float32(1 - p), side="right")
    stay = max(cumulative.size - int(dropped), 1)

    # Of equal scores the lower ids go first: the order of a stable sort, without its time.
    last = ordered[-stay]
    keep = scores > last
    ties = np.flatnonzero(scores == last)
    keep[ties[np.count_nonzero(keep) - stay :]] = True
    return np.flatnonzero(keep)


def _min_p(scores: Scores, p: float) -> Places:
    """Keep ids at least p times as likely as the likeliest."""
    return np.flatnonzero(np.exp(scores - scores.max()) >= np.float32(p))


def _typical(scores: Scores, mass: float) -> Places:
    """Keep the ids whose information is nearest to the entropy, until their probabilities sum to `mass`."""
    logp = _log_softmax(scores)
    distance = np.abs(-logp - _entropy(logp))
    order = np.argsort(distance, kind="stable")
    cumulative = np.cumsum(np.exp(logp[order]), dtype=np.float64).astype(np.float32)
    last = min(int((cumulative < np.float32(mass)).sum()), scores.size - 1)
    return np.flatnonzero(distance <= distance[order[last]])


def _epsilon(scores: Scores, epsilon: float) -> Places:
    """Keep ids of at least this probability, and the likeliest."""
    return np.flatnonzero((np.exp(_log_softmax(scores)) >= np.float32(epsilon)) | (scores == scores.max()))


def _eta(scores: Scores, epsilon: float) -> Places:
    """Like _epsilon, with a threshold that falls as the entropy rises."""
    spread = np.sqrt(np.float32(epsilon)) * np.exp(-_entropy(_log_softmax(scores)))
    return _epsilon(scores, min(np.float32(epsilon), spread))


def _log_softmax(scores: Scores) -> Scores:
    shifted = scores - scores.max()
    return shifted - np.log(np.exp(shifted).sum(dtype=np.float32))


def _entropy(logp: Scores) -> np.float32:
    with np.errstate(invalid="ignore"):
        return np.float32(-np.nansum(np.exp(logp) * logp))


# Fan et al. 2018, arXiv:1805.04833; Holtzman et al. 2019, arXiv:1904.09751; Nguyen et al. 2024, arXiv:2407.01082;
# Meister et al. 2022, arXiv:2202.00666; Hewitt et al. 2022, arXiv:2210.15191
FILTERS: Mapping[str, Callable[[Scores, Any], Places]] = {
    "top_h": _top_h,
    "top_k": _top_k,
    "top_p": _top_p,
    "min_p": _min_p,
    "typical_p": _typical,
    "epsilon_cutoff": _epsilon,
    "eta_cutoff": _eta,
}
ALL = {"top_p": 1, "typical_p": 1}  # values that keep every id
