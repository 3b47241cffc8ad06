"""Texts as vectors, and documents ranked for a query (Zhang et al., 2025, https://arxiv.org/abs/2506.05176).

The templates come from the model cards of Qwen3-Embedding and Qwen3-Reranker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike

from qwen3np.cache import KVCache
from qwen3np.errors import ContextOverflowError
from qwen3np.files.sentence import Pooling
from qwen3np.generate import PREFILL_CHUNK
from qwen3np.guard import checked_sequence, forward, require_finite
from qwen3np.model import Model
from qwen3np.numerics import Array, named
from qwen3np.padding import unpadded
from qwen3np.sampling import log_probabilities
from qwen3np.tokenizer import Tokenizer

DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def embed(
    model: Model,
    texts: Sequence[str],
    instruction: str | None = None,
    dimensions: int | None = None,
    *,
    prompt: str | None = None,
    attention_mask: ArrayLike | None = None,
    numerics: str = "float32",
    engine: str = "fast",
    progress: Callable[[int], object] | None = None,
) -> Array:
    """Embed texts. The dot product of two vectors is the cosine similarity of their texts.

    A sentence-transformers folder determines how hidden states are pooled, how texts end, and which prompt precedes
    them; other checkpoints are used like Qwen3-Embedding.

    Parameters
    ----------
    model
        A model that was trained for this, such as Qwen/Qwen3-Embedding-0.6B.
    texts
        The texts; with an attention_mask, padded ids (N, S) that already end the way the model expects.
    instruction
        For queries: what to look for (DEFAULT_INSTRUCTION: web searches). None: documents, embedded as they are.
    dimensions
        Keep only the first ones, normalised again, which Qwen3-Embedding was trained for.
    prompt
        The name of one of the folder's own prompts, such as "query", in place of its default.
    attention_mask
        (N, S): 1 for tokens, 0 for padding, on the left or on the right.
    numerics, engine
        As in forward.
    progress
        Called with the number of texts that were just embedded.

    Returns
    -------
    (N, D) or (N, dimensions) float32, rows of length 1; float64 for numerics "float64".

    Raises
    ------
    ValueError
        For an empty list, texts that are not str, dimensions outside 1 to D, a prompt that the folder does not have,
        and a tokenizer that is missing or lacks <|endoftext|>. ContextOverflowError for a text that is too long: texts
        are never silently truncated.
        CheckpointError and NonFiniteError as in generate.

    Examples
    --------
    >>> model = qwen3np.load()  # shows the shapes; for useful vectors load a model that was trained for them
    >>> qwen3np.embed(model, ["The sky is blue.", "Grass is green."]).shape
    (2, 160)
    """
    skipped = 0
    if attention_mask is not None:
        if instruction is not None or prompt is not None:
            raise ValueError("instruction and prompt are for texts; ids with an attention_mask are taken as they are")
        sequences = [checked_sequence(row, model.config) for row in unpadded(cast("Any", texts), attention_mask)]
    else:
        sequences, skipped = encoded(model, texts, instruction, prompt)
    return vectors(model, sequences, skipped, dimensions, numerics=numerics, engine=engine, progress=progress)


def rerank(
    model: Model,
    query: str,
    documents: Sequence[str],
    instruction: str | None = None,
    *,
    numerics: str = "float32",
    engine: str = "fast",
    progress: Callable[[int], object] | None = None,
) -> Array:
    """Rate how well each document answers a query: the probability of "yes" where the model can say only "yes" or "no".

    Parameters
    ----------
    model
        A model that was trained for this, such as Qwen/Qwen3-Reranker-0.6B.
    query, documents
        Texts.
    instruction
        What to look for; None: DEFAULT_INSTRUCTION, for web searches.
    numerics, engine
        As in forward.
    progress
        Called with the number of documents that were just rated.

    Returns
    -------
    (N,) float64 from 0 to 1, in the order of the documents.

    Raises
    ------
    ValueError
        For an empty list, texts that are not str, and a tokenizer that is missing or lacks the tokens of the template.
        ContextOverflowError for a document that is too long: documents are never silently truncated. CheckpointError
        and NonFiniteError as in generate.

    Examples
    --------
    >>> model = qwen3np.load("Qwen/Qwen3-Reranker-0.6B")  # doctest: +SKIP
    >>> qwen3np.rerank(model, "capital of China", ["Beijing is the capital.", "Gravity attracts."])  # doctest: +SKIP
    """
    score = model.weights.get("score.weight")
    answers = ("no", "yes") if score is None else ()
    tokenizer, ids = _tokenizer(model, "rerank", *answers, "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    instruction = DEFAULT_INSTRUCTION if instruction is None else instruction
    for text, name in ((query, "query"), (instruction, "instruction")):
        _check_text(text, name)
    _check_texts(documents, "documents")

    before, after = tokenizer.encode(_BEFORE), tokenizer.encode(_AFTER)
    pairs = [f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}" for document in documents]
    sequences = [before + tokenizer.encode(pair) + after for pair in pairs]
    x = _last_hidden_states(model, sequences, "documents", numerics, engine, progress)
    num = named(numerics, engine)
    if score is None:
        head = "model.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
        score = model.weights[head][ids[:2]]
    elif len(score) > 2:
        raise ValueError(f"rerank: score.weight has {len(score)} labels; a model that scores texts has one or two")
    logits = num.ops.head(x, score, num)
    for row, sequence in zip(logits, sequences, strict=True):
        require_finite(row, model.weights, model.config, sequence, numerics)
    if logits.shape[1] == 1:  # yes - no, as Qwen3ForSequenceClassification returns it
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    return np.exp(log_probabilities(logits)[:, 1])


def encoded(
    model: Model, texts: Sequence[str], instruction: str | None = None, name: str | None = None
) -> tuple[list[list[int]], int]:
    """Return the ids of texts with their prompt, and how many tokens of the prompt a mean leaves out.

    Texts end as the tokenizer.json of a sentence-transformers folder says; for other checkpoints as in Qwen3-Embedding.
    Raises ValueError as embed.
    """
    _check_texts(texts, "texts")
    pooling = model.pooling
    tokenizer, end = _tokenizer(model, "embed", *([] if pooling else ["<|endoftext|>"]))
    prompt = pooling.prompt if pooling else ""
    if name is not None:
        prompts = pooling.prompts if pooling else {}
        if instruction is not None or name not in prompts:
            known = ", ".join(sorted(prompts)) or "this model has none"
            raise ValueError(f"prompt={name!r} must be one of its prompts, without an instruction: {known}")
        prompt = prompts[name]
    if instruction is not None:
        _check_text(instruction, "instruction")
        prompt = f"Instruct: {instruction}\nQuery:"
    if pooling is None:
        return [[*tokenizer.encode(prompt + text), *end] for text in texts], 0
    sequences = [tokenizer.encode_whole(prompt + text) for text in texts]
    skipped = 0 if pooling.with_prompt else len(tokenizer.encode(prompt))
    if empty := [n for n, sequence in enumerate(sequences) if len(sequence) <= skipped]:
        raise ValueError(f"texts[{empty[0]}]: this model's tokenizer produces no token for it")
    return sequences, skipped


def vectors(
    model: Model,
    sequences: Sequence[list[int]],
    skipped: int = 0,
    dimensions: int | None = None,
    *,
    numerics: str = "float32",
    engine: str = "fast",
    progress: Callable[[int], object] | None = None,
) -> Array:
    """Embed the ids of N texts, which `encoded` returns with `skipped` -> (N, D). The rest, errors too, as in embed."""
    size, pooling = model.config.hidden_size, model.pooling or Pooling("lasttoken")
    if dimensions is not None and not (isinstance(dimensions, Integral) and 1 <= dimensions <= size):
        raise ValueError(
            f"dimensions must be a whole number from 1 to {size}, the size of the model, got {dimensions!r}"
        )
    if pooling.mode == "cls":  # the first token sees only itself
        sequences = [sequence[:1] for sequence in sequences]
    if pooling.mode == "mean":
        x = _mean_hidden_states(model, sequences, skipped, numerics, engine, progress)[:, :dimensions]
    else:
        x = _last_hidden_states(model, sequences, "texts", numerics, engine, progress)[:, :dimensions]
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _tokenizer(model: Model, what: str, *tokens: str) -> tuple[Tokenizer, list[int]]:
    """Return the model's tokenizer and the ids of these tokens. Raises ValueError where one is missing."""
    if model.tokenizer is None:
        raise ValueError(f"{what}: the model has no tokenizer; load it from a folder with tokenizer.json")
    ids = {token: model.tokenizer.token_to_id(token) for token in tokens}
    if missing := [token for token, i in ids.items() if i is None]:
        raise ValueError(
            f"{what}: the tokenizer has no token {', '.join(missing)}; load a model that was trained for this, such as "
            f"Qwen/Qwen3-{'Embedding' if what == 'embed' else 'Reranker'}-0.6B"
        )
    return model.tokenizer, [i for i in ids.values() if i is not None]


def _check_texts(texts: Sequence[str], name: str) -> None:
    """Raise ValueError unless texts is a sequence of one or more str."""
    if isinstance(texts, str):
        raise ValueError(f"{name}: must be a list of str, not a single str")
    if len(texts) == 0:
        raise ValueError(f"{name}: empty; at least one text is needed")
    for n, text in enumerate(texts):
        _check_text(text, f"{name}[{n}]")


def _check_text(text: object, name: str) -> None:
    """Raise ValueError unless text is a str."""
    if not isinstance(text, str):
        raise ValueError(f"{name}: must be a str, not {type(text).__name__}")


def _mean_hidden_states(
    model: Model,
    sequences: Sequence[list[int]],
    skipped: int,
    numerics: str,
    engine: str,
    progress: Callable[[int], object] | None,
) -> Array:
    """Return the mean hidden state (N, D) of the tokens of each of N sequences, without the first `skipped`."""
    config, n = model.config, named(numerics, engine)
    _require_context(sequences, "texts", config.max_position_embeddings)
    found = np.empty((len(sequences), config.hidden_size), n.dtype)
    for row, ids in enumerate(sequences):
        cache, total = KVCache.allocate(config, 1, len(ids), n.storage), np.zeros(config.hidden_size, np.float64)
        for start in range(0, len(ids), PREFILL_CHUNK):
            piece = np.array([ids[start : start + PREFILL_CHUNK]])
            x = forward(model.weights, config, piece, cache, numerics=numerics, engine=engine, head=False)[0]
            total += x[max(skipped - start, 0) :].sum(axis=0, dtype=np.float64)
        found[row] = total / (len(ids) - skipped)
        require_finite(found[row], model.weights, config, ids, numerics)
        if progress:
            progress(1)
    return found


def _require_context(sequences: Sequence[list[int]], name: str, context: int) -> None:
    """Raise ContextOverflowError for a sequence that is longer than the context."""
    lengths = [len(sequence) for sequence in sequences]
    if max(lengths) > context:
        raise ContextOverflowError(
            f"{name}[{lengths.index(max(lengths))}]: {max(lengths)} tokens including the template; the context of "
            f"this model is {context}: split the text"
        )


def _last_hidden_states(
    model: Model,
    sequences: Sequence[list[int]],
    name: str,
    numerics: str,
    engine: str,
    progress: Callable[[int], object] | None,
) -> Array:
    """Return the hidden states (N, D) of the last token of each of N sequences, after the final norm.

    Their longest common prefix is computed once. Sequences of similar length go through the model together, padded on
    the right, where no token sees the padding; long ones go alone, in pieces.
    """
    config, n = model.config, named(numerics, engine)
    lengths = np.array([len(sequence) for sequence in sequences])
    _require_context(sequences, name, config.max_position_embeddings)

    def run(ids: Array, cache: KVCache) -> tuple[Array, int]:
        """Bring the cache up to ids (B, S). Return the hidden states of the last piece, and where it starts."""
        x, start = np.empty(0), 0
        for start in range(int(cache.lengths[0]), ids.shape[1], PREFILL_CHUNK):
            piece = ids[:, start : start + PREFILL_CHUNK]
            x = forward(model.weights, config, piece, cache, numerics=numerics, engine=engine, head=False)
        return x, start

    shared = 0
    if len(sequences) > 1:
        # at least one token of each sequence is not shared
        beginnings = np.array([sequence[: lengths.min() - 1] for sequence in sequences], np.int64)
        same = (beginnings == beginnings[0]).all(axis=0)
        shared = int(same.argmin()) if not same.all() else len(same)
    beginning = KVCache.allocate(config, 1, max(shared, 1), n.storage)
    run(np.array([sequences[0][:shared]], np.int64), beginning)

    found = np.empty((len(sequences), config.hidden_size), n.dtype)
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        longest = int(lengths[order[0]])
        group, order = np.split(order, [max(PREFILL_CHUNK // longest, 1)])
        ids = np.full((len(group), longest), sequences[0][-1])  # padding: the token that all of them end with
        for row, sequence in zip(ids, group, strict=True):
            row[: lengths[sequence]] = sequences[sequence]
        cache = KVCache.allocate(config, len(group), longest, n.storage)
        for held, first in ((cache.k, beginning.k), (cache.v, beginning.v)):
            held[..., :shared, :] = first[..., :shared, :]
        cache.ids[:, :shared], cache.lengths[:] = ids[:, :shared], shared
        x, start = run(ids, cache)  # a group of several is one piece
        found[group] = x[np.arange(len(group)), lengths[group] - 1 - start]
        members: list[int] = group.tolist()
        for sequence in members:
            require_finite(found[sequence], model.weights, config, sequences[sequence], numerics)
        if progress:
            progress(len(group))
    return found
