"""A folder or a Hub name -> a Model: config, weights, tokenizer and generation defaults together."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast, overload

import numpy as np
from numpy.typing import ArrayLike

from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.errors import CheckpointError, ConfigError, one_line
from qwen3np.files.adapter import adapted
from qwen3np.files.checkpoint import read_checkpoint, save_checkpoint
from qwen3np.files.folders import gguf_of
from qwen3np.files.gguf import generation_of, read_gguf
from qwen3np.files.hub import resolve
from qwen3np.files.limits import read_json
from qwen3np.files.sentence import Pooling, pooling_of
from qwen3np.generate import generate, stream
from qwen3np.guard import forward, require_unchanged
from qwen3np.memory import available_memory, require_memory
from qwen3np.numerics import Array, Edit, Trace
from qwen3np.ops.fast.pages import release
from qwen3np.ops.fast.threads import share
from qwen3np.rules import rules
from qwen3np.scoring import score
from qwen3np.settings import Batch, GenerationSettings, Ids, Progress, from_file, lists_settings
from qwen3np.stored import kind, put
from qwen3np.terminal import bars, counted, shows_bars
from qwen3np.tokenizer import FromGGUF, Tokenizer, said_in
from qwen3np.weights import LoadedWeights, Weights, count_parameters

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_MAX_NEW_TOKENS = 2048  # what the generation_config.json of the Base checkpoints says
SMALL = 10**9  # bytes: smaller float32 copies are made without a message
PIECE = 1 << 22  # elements copied at a time: few enough for a smooth bar, too many for its updates to cost anything


class ForwardOptions(TypedDict, total=False):
    """The keyword arguments of forward."""

    numerics: str
    engine: str
    last_only: bool
    head: bool
    trace: Trace | None
    edit: Edit | None
    attention_mask: ArrayLike | None


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

    Each method calls the function of the same name; `complete`, `score`, `embed`, `rerank` and `trace` take text.
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
        options: dict[str, Any] = {"numerics": numerics, "engine": engine, "attention_mask": attention_mask}
        with counted(progress, len(many), "embedded", "text") as count:
            vectors = embed(self, many, instruction, dimensions, progress=count, **options)
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
        points = self.trace(text, numerics=numerics, engine=engine, points="model.embed_tokens,model.layers.*")
        names = ["model.embed_tokens", *(f"model.layers.{n}" for n in range(self.config.num_hidden_layers))]
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


def load(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    weights_dtype: str = "auto",
    progress: bool = True,
) -> Model:
    """Load a checkpoint: the built-in one, a folder, a .gguf file, or a model on the Hugging Face Hub.

    Parameters
    ----------
    name_or_path
        A folder, a .gguf file, or a name on the Hub such as "Qwen/Qwen3-0.6B"; None is the built-in checkpoint.
    revision
        A branch, tag or commit on the Hub.
    gguf_file
        The name of the GGUF file to load, in the folder or on the Hub.
    adapter
        A LoRA adapter to apply: its folder, or its name on the Hub.
    weights_dtype
        "mapped" uses the file as it is: ready at once, in the memory of the file ("bfloat16" is its old name).
        "float32" makes a float32 copy, which is faster and takes twice the memory. "auto" makes the copy if it takes no
        more than half of the free memory. Results are bit-for-bit identical either way.
    progress
        Report on stderr what "auto" chose (unless it copied a small checkpoint), and on a terminal show progress bars.

    Returns
    -------
    Model
        Config, weights, tokenizer and generation defaults.

    Raises
    ------
    CheckpointError, ConfigError
        The message lists everything that is wrong with the checkpoint.
    ValueError
        For a float32 copy that would exceed the free memory.

    Examples
    --------
    >>> model = qwen3np.load()
    >>> model.complete("The capital of France is")
    ' Paris.'
    """
    if weights_dtype not in ("auto", "mapped", "bfloat16", "float32"):
        raise ValueError(f"weights_dtype={weights_dtype!r} is unknown; known: auto, mapped, float32")
    folder = resolve(name_or_path, revision=revision, gguf_file=gguf_file, progress=progress)
    pooling: Pooling | None = None
    if file := gguf_of(folder, gguf_file):
        config, weights, metadata = read_gguf(file)
        tokenizer = FromGGUF(file, config.vocab_size, metadata) if "tokenizer.ggml.tokens" in metadata else None
        generation_config = _checked_of(file, generation_of(metadata))
    else:
        config, weights = read_checkpoint(folder)
        path = folder / "generation_config.json"
        generation_config = _checked_of(path, None) if path.exists() else {}
        names = ("vocab.json", "merges.txt")
        has_tokenizer = (folder / "tokenizer.json").exists() or all((folder / name).exists() for name in names)
        tokenizer = Tokenizer.from_folder(folder, config.vocab_size) if has_tokenizer else None
        pooling = pooling_of(folder)
    if adapter is not None:
        config, weights = adapted(config, weights, resolve(adapter, adapter=True, progress=progress))
    if progress and weights.remarks:
        print(*(f"[{one_line(remark)}]" for remark in weights.remarks), sep="\n", file=sys.stderr)

    size = sum(4 * tensor.size for tensor in weights.values())
    if weights_dtype == "float32":
        way_out = 'weights_dtype="mapped" (--weights-dtype mapped) uses the file as it is'
        require_memory(size, f"{folder}: a float32 copy of the weights", way_out)
    if weights_dtype == "float32" or (weights_dtype == "auto" and _copy_fits(size, progress)):
        copies = _copied(weights, progress)
        require_unchanged(weights)  # else some copies could be of the old file, others of the new
        weights = LoadedWeights(copies)
    return Model(config, weights, tokenizer, generation_config, pooling)


def _checked_of(path: Path, settings: dict[str, Any] | None) -> dict[str, Any]:
    """Check these generation settings, or the file's, and return them. Raises CheckpointError."""
    try:
        return _checked(read_json(path) if settings is None else settings)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _checked(generation_config: dict[str, Any]) -> dict[str, Any]:
    """Return generation_config if its values have the right types. Raises ConfigError, which names the key."""
    known = rules(GenerationSettings)
    for key, value in generation_config.items():
        if value is None:
            continue
        if key == "do_sample" and type(value) is not bool:
            raise ConfigError(f"{key} = {value!r} is neither true nor false")
        if key == "eos_token_id":
            ids: list[Any] = cast("list[Any]", value) if type(value) is list else [value]
            if not all(type(token) is int for token in ids):
                raise ConfigError(f"{key} = {value!r} is neither a token id nor a list of them")
    for key, value in from_file(generation_config).items():
        if key in known and not known[key].holds(value):
            raise ConfigError(f"{key} = {value!r} must be {known[key].supported}")
    return generation_config


def _copy_fits(size: int, progress: bool) -> bool:
    """Whether a float32 copy takes no more than half of the free memory; progress reports the choice on stderr."""
    free = available_memory()
    fits = size <= free / 2
    if progress and not (fits and size < SMALL):
        choice = "a float32 copy of the weights:" if fits else "weights mapped as they are: a float32 copy would take"
        room = f"of {free / 1e9:.1f} GB of free memory" if free else "and how much memory is free is unknown"
        print(f"[{choice} {size / 1e9:.1f} GB {room}]", file=sys.stderr)
    return fits


def _copied(weights: Weights, progress: bool) -> dict[str, Array]:
    """Return float32 copies of mapped weights, made by all threads."""
    tqdm = bars()

    copies: dict[str, Array] = {name: np.empty(tensor.shape, np.float32) for name, tensor in weights.items()}
    pieces: list[tuple[Array, Array]] = []
    for name, tensor in weights.items():
        step = max(PIECE * len(tensor) // tensor.size, 1)  # rows
        pieces += [(copies[name][n : n + step], tensor[n : n + step]) for n in range(0, len(tensor), step)]
    total, lock = sum(copy.size for copy in copies.values()), threading.Lock()
    off = not (progress and shows_bars())
    with tqdm(total=4 * total, desc="float32 copy", unit="B", unit_scale=True, delay=1, disable=off) as bar:

        def make(piece: tuple[Array, Array]) -> None:
            copy, tensor = piece
            put(tensor, copy)
            release(tensor)  # else the file and its copy would both stay in memory
            with lock:
                bar.update(copy.nbytes)

        share(pieces, total, make)
    return copies
