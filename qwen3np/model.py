"""Model: a checkpoint's parts together, with the functions of the package as methods."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast, overload

import numpy as np
from numpy.typing import ArrayLike

from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.files.checkpoint import save_checkpoint
from qwen3np.files.sentence import Pooling
from qwen3np.generate import generate, stream
from qwen3np.guard import forward
from qwen3np.numerics import Array, Edit, Trace
from qwen3np.scoring import score
from qwen3np.settings import Batch, GenerationSettings, Ids, Progress, from_file, lists_settings
from qwen3np.stored import kind
from qwen3np.terminal import counted
from qwen3np.tokenizer import Tokenizer, said_in
from qwen3np.weights import Weights, count_parameters

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_MAX_NEW_TOKENS = 2048  # what the generation_config.json of the Base checkpoints says


class ForwardOptions(TypedDict, total=False):
    """The keyword arguments of forward."""

    numerics: str
    engine: str
    last_only: bool
    head: bool
    trace: Trace | None
    edit: Edit | None
    attention_mask: ArrayLike | None
    routed_experts: ArrayLike | None


class ScoreOptions(TypedDict, total=False):
    """The keyword arguments of score."""

    window: int | None
    stride: int | None
    numerics: str
    engine: str
    progress: Progress | bool | None


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A checkpoint in memory: config, weights, tokenizer and generation defaults. It holds no state beyond these.

    forward, generate, stream, score, embed and rerank call the functions of these names; complete, score, embed, rerank
    and trace take text.
    """

    config: Config
    weights: Weights
    tokenizer: Tokenizer | None  # None where the folder has none; everything on ids still works
    generation_config: Mapping[str, Any]
    pooling: Pooling | None = None  # how a sentence-transformers folder makes vectors

    def __repr__(self) -> str:
        """Show sizes, not arrays."""
        c, counts = self.config, count_parameters(self.config)
        kinds = ", ".join(sorted({kind(w) for w in self.weights.values()}))
        experts = f", {c.num_experts_per_tok} of {c.num_experts} experts" if c.num_experts else ""
        tokenizer = repr(self.tokenizer) if self.tokenizer else "no tokenizer"
        return (
            f"Model({counts['unique'] / 1e6:,.1f} M parameters in {kinds}: {c.num_hidden_layers} layers of "
            f"{c.hidden_size}, {c.num_attention_heads} heads, {c.num_key_value_heads} KV heads{experts}; "
            f"context {c.max_position_embeddings:,}; {tokenizer})"
        )

    @property
    def text(self) -> Tokenizer:
        """The tokenizer. Raises ValueError where the checkpoint has none, so its type is never None."""
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer.json (nor vocab.json with merges.txt); text needs one")
        return self.tokenizer

    def __call__(self, input_ids: ArrayLike, cache: KVCache | None = None, **options: Unpack[ForwardOptions]) -> Array:
        """Return logits, like qwen3np.forward, which describes arguments and errors.

        Examples
        --------
        >>> model = qwen3np.load()
        >>> model([281, 297, 272, 1132, 259]).shape
        (1, 5, 2048)
        """
        return forward(self.weights, self.config, input_ids, cache, **options)

    def forward(self, input_ids: ArrayLike, cache: KVCache | None = None, **options: Unpack[ForwardOptions]) -> Array:
        """Return logits; the same as calling the model."""
        return forward(self.weights, self.config, input_ids, cache, **options)

    @overload
    def generate(self, input_ids: Ids, **settings: Unpack[GenerationSettings]) -> tuple[list[int], KVCache]: ...
    @overload
    def generate(self, input_ids: Batch, **settings: Unpack[GenerationSettings]) -> tuple[list[list[int]], KVCache]: ...
    @lists_settings
    def generate(self, input_ids: Any, **settings: Unpack[GenerationSettings]) -> tuple[Any, KVCache]:
        """Return new ids and the cache, like qwen3np.generate, which describes arguments and errors.

        Settings left out come from the checkpoint's generation_config.json. What takes longer than two seconds shows a
        bar, in a notebook or on stderr if that is a terminal, unless progress is False; so do `complete`, `score`,
        `embed` and `rerank`.

        Examples
        --------
        >>> model = qwen3np.load()
        >>> new, cache = model.generate(model.text.encode("The capital of France is"))
        >>> model.text.decode(new)
        ' Paris.<|endoftext|>'
        """
        chosen = self.generation_settings({"progress": True, **settings})
        return generate(self.weights, self.config, input_ids, **chosen)

    @lists_settings
    def stream(self, input_ids: Ids, **settings: Unpack[GenerationSettings]) -> Iterator[int]:
        """Yield new ids, like qwen3np.stream, which describes arguments and errors.

        Settings left out come from the checkpoint's generation_config.json.

        Examples
        --------
        >>> model = qwen3np.load()
        >>> "".join(model.text.stream(model.stream(model.text.encode("Seven plus five is"), max_new_tokens=2)))
        ' twelve.'
        """
        chosen = self.generation_settings(settings)
        return stream(self.weights, self.config, input_ids, **chosen)

    @lists_settings
    def complete(self, prompt: str, **settings: Unpack[GenerationSettings]) -> str:
        """Return the text that follows a prompt.

        Parameters
        ----------
        prompt
            A text to continue.
        **settings
            As in generate; those left out come from the checkpoint's generation_config.json.

        Returns
        -------
        str
            The new text, without special tokens.

        Raises
        ------
        ValueError
            As generate, and where the checkpoint has no tokenizer.

        Examples
        --------
        >>> qwen3np.load().complete("The opposite of hot is")
        ' cold.'
        """
        new, _ = self.generate(self.text.encode(prompt), **settings)
        return self.text.decode(new, skip_special_tokens=True)

    @overload
    def score(  # pyright: ignore[reportOverlappingOverload]  # a str is a sequence of str, too
        self, texts: str | Ids, **options: Unpack[ScoreOptions]
    ) -> Array: ...
    @overload
    def score(self, texts: Sequence[str], **options: Unpack[ScoreOptions]) -> list[Array]: ...
    def score(self, texts: Any, **options: Unpack[ScoreOptions]) -> Array | list[Array]:
        """Return the log-probability of each token of a text after the first, like qwen3np.score.

        `texts` is a text or its ids, or a list of texts, for which a list of arrays is returned. qwen3np.score
        describes the other arguments and the errors.

        Examples
        --------
        >>> logprobs = qwen3np.load().score("The capital of France is Paris.")
        >>> logprobs.shape, f"{logprobs.sum():.3f}"
        ((7,), '-8.539')
        """
        several = not isinstance(texts, str) and len(texts) and isinstance(texts[0], str)
        sequences = [self._ids(text) for text in (texts if several else [texts])]
        with counted(options.get("progress", True), sum(map(len, sequences)), "scored") as count:
            rest: dict[str, Any] = {**options, "progress": count}
            found = [score(self.weights, self.config, ids, **rest) for ids in sequences]
        return found if several else found[0]

    def embed(
        self,
        texts: str | Sequence[str],
        instruction: str | None = None,
        dimensions: int | None = None,
        *,
        prompt: str | None = None,
        attention_mask: ArrayLike | None = None,
        numerics: str = "float32",
        engine: str = "fast",
        progress: Progress | bool | None = True,
    ) -> Array:
        """Return a vector of length 1 for each text, (N, D), or for a single one, (D,).

        Arguments and errors are those of qwen3np.embed.
        """
        from qwen3np.embeddings import embed

        many = [texts] if isinstance(texts, str) else texts
        options: dict[str, Any] = {"prompt": prompt, "numerics": numerics, "engine": engine}
        with counted(progress, len(many), "embedded", "text") as count:
            vectors = embed(
                self, many, instruction, dimensions, attention_mask=attention_mask, progress=count, **options
            )
        return vectors[0] if isinstance(texts, str) else vectors

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        instruction: str | None = None,
        *,
        numerics: str = "float32",
        engine: str = "fast",
        progress: Progress | bool | None = True,
    ) -> Array:
        """Return how well each document answers the query, from 0 to 1: (N,), in the order of the documents.

        Arguments and errors are those of qwen3np.rerank.
        """
        from qwen3np.embeddings import rerank

        with counted(progress, len(documents), "ranked", "document") as count:
            return rerank(self, query, documents, instruction, numerics=numerics, engine=engine, progress=count)

    def trace(
        self, text: str | Ids, *, numerics: str = "float32", engine: str = "fast", points: str = "*"
    ) -> dict[str, Array]:
        """Return the recorded points of one forward pass.

        Parameters
        ----------
        text
            A text, or its ids.
        numerics, engine
            As in forward.
        points
            Which points: shell patterns, separated by commas, such as "*.probs" or "model.layers.0.*,lm_head".

        Returns
        -------
        dict[str, numpy.ndarray]
            Each point under its name, in the order of the forward pass.

        Raises
        ------
        ValueError
            As forward, and for text where the checkpoint has no tokenizer.

        Examples
        --------
        >>> points = qwen3np.load().trace("The capital of France is", points="*.0.self_attn.probs")
        >>> {name: x.shape for name, x in points.items()}
        {'model.layers.0.self_attn.probs': (1, 4, 5, 5)}
        """
        seen: dict[str, Array] = {}
        patterns = points.split(",")

        def keep(name: str, x: Array) -> None:
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                seen[name] = x

        self.forward(self._ids(text), numerics=numerics, engine=engine, trace=keep)
        return seen

    def hidden_states(self, text: str | Ids, *, numerics: str = "float32", engine: str = "fast") -> Array:
        """Return the state of each token of a text, or of ids, after the embedding and after each layer: (L + 1, S, D).

        Equal to transformers' hidden states, except that transformers applies the final norm to the last one.
        """
        names = ["model.embed_tokens", *(f"model.layers.{n}" for n in range(self.config.num_hidden_layers))]
        points = self.trace(text, numerics=numerics, engine=engine, points=",".join(names))
        return np.stack([points[name][0] for name in names])

    def attention_maps(self, text: str | Ids, *, numerics: str = "float32", engine: str = "fast") -> Array:
        """Return how much each token of a text, or of ids, attends to each token, by layer and head: (L, H, S, S)."""
        points = self.trace(text, numerics=numerics, engine=engine, points="*.self_attn.probs")
        return np.stack([points[f"model.layers.{n}.self_attn.probs"][0] for n in range(self.config.num_hidden_layers)])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write weights, config, tokenizer and generation_config.json to a new folder.

        Parameters
        ----------
        folder
            Where to write; it is created if necessary. load(folder) then returns this model again.

        Raises
        ------
        CheckpointError, ValueError
            As qwen3np.save_checkpoint.

        Examples
        --------
        >>> qwen3np.load().save("copy")
        >>> qwen3np.load("copy").complete("The opposite of hot is")
        ' cold.'
        """
        save_checkpoint(
            Path(folder),
            self.config,
            self.weights,
            tokenizer=self.tokenizer,
            generation_config=self.generation_config,
        )

    def _ids(self, text: str | Ids) -> Any:
        return self.text.encode(text) if isinstance(text, str) else text

    def generation_settings(self, settings: Mapping[str, Any]) -> GenerationSettings:
        """Return these settings over generation_defaults; stop_strings, which need the tokenizer, become `stop`."""
        defaults = self.generation_defaults()
        if "max_new_tokens" in settings:  # overrides the file's max_length, as in transformers
            defaults.pop("max_length", None)
        chosen = cast("dict[str, Any]", {**defaults, **settings})
        strings, stop = chosen.pop("stop_strings", None), chosen.get("stop")
        if strings:
            ended = said_in(self.text, [strings] if isinstance(strings, str) else strings)
            chosen["stop"] = ended if stop is None else lambda new: stop(new) or ended(new)
        return cast("GenerationSettings", chosen)

    def generation_defaults(self) -> GenerationSettings:
        """Return the checkpoint's generation_config.json as keyword arguments of generate.

        All logits processors and stopping rules count, as in transformers: see settings.from_file. The stop ids come
        from config.json where generation_config.json has none. Settings that ask for another algorithm, such as
        num_beams, are passed on as well; generate raises an error for them unless an argument overrides them.
        """
        given = self.generation_config
        eos: Any = given.get("eos_token_id")
        eos = self.config.eos_token_id if eos is None else eos
        ends: list[int] = [eos] if isinstance(eos, int) else list(eos)
        defaults: GenerationSettings = {
            "max_new_tokens": given.get("max_length") or DEFAULT_MAX_NEW_TOKENS,
            "stop_ids": tuple(i for i in ends if 0 <= i < self.config.vocab_size),
        }
        defaults |= from_file(given)
        return defaults
