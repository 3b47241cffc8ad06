"""A folder or a Hub name -> a Model: config, weights, tokenizer and generation defaults together."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike

from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.errors import CheckpointError, ConfigError
from qwen3np.files.checkpoint import read_checkpoint
from qwen3np.files.hub import resolve
from qwen3np.files.limits import read_json
from qwen3np.generate import Batch, Ids, generate, stream
from qwen3np.guard import forward, require_unchanged
from qwen3np.memory import available_memory, require_memory
from qwen3np.numerics import Array
from qwen3np.ops.fast.pages import release
from qwen3np.ops.fast.threads import share
from qwen3np.tokenizer import Tokenizer
from qwen3np.weights import Weights

DEFAULT_MAX_NEW_TOKENS = 2048  # what the generation_config.json of the Base checkpoints says
SMALL = 10**9  # bytes of a float32 copy that goes without saying
PIECE = 1 << 22  # elements that a thread copies at a time: often enough for a bar, too seldom to cost anything


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A checkpoint in memory. The methods only forward to the functions of the same name."""

    config: Config
    weights: Weights
    tokenizer: Tokenizer | None  # None where the folder has none; everything on ids still works
    generation_config: Mapping[str, Any]

    def forward(self, input_ids: ArrayLike, cache: KVCache | None = None, **options: Any) -> Array:
        """Return logits; see qwen3np.forward."""
        return forward(self.weights, self.config, input_ids, cache, **options)

    def generate(self, input_ids: Ids | Batch, **options: Any) -> tuple[list[int] | list[list[int]], KVCache]:
        """Return new ids and the cache; see qwen3np.generate. What options leave out, generation_config.json gives."""
        return generate(self.weights, self.config, input_ids, **(self.generation_defaults() | options))

    def stream(self, input_ids: Ids, **options: Any) -> Iterator[int]:
        """Yield new ids; see qwen3np.stream. What options leave out, generation_config.json gives."""
        return stream(self.weights, self.config, input_ids, **(self.generation_defaults() | options))

    def generation_defaults(self) -> dict[str, Any]:
        """Return the keyword arguments of generate that the checkpoint's generation_config.json stands for.

        Its filters count only with do_sample, as in transformers, and those it leaves out are off; without do_sample
        decoding is greedy. The stop ids come from config.json where generation_config.json has none.
        """
        given = {key: value for key, value in self.generation_config.items() if value is not None}
        eos: int | list[int] | tuple[int, ...] = given.get("eos_token_id", self.config.eos_token_id)
        defaults: dict[str, Any] = {
            "max_new_tokens": given.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS),
            "stop_ids": (eos,) if isinstance(eos, int) else tuple(eos),
            "temperature": 0.0,
        }
        if given.get("do_sample"):
            defaults["temperature"] = given.get("temperature", 1.0)
            defaults |= {key: given[key] for key in ("top_k", "top_p", "min_p") if key in given}
        if "repetition_penalty" in given:
            defaults["repetition_penalty"] = given["repetition_penalty"]
        return defaults


def load(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    weights_dtype: str = "auto",
    progress: bool = True,
) -> Model:
    """Load a checkpoint from a folder, from the Hugging Face Hub by its name ("Qwen/Qwen3-0.6B"), or the built-in one.

    weights_dtype "bfloat16" maps the file as it is: ready at once, in the memory of the file. "float32" makes one
    float32 copy: twice the memory, and faster. "auto" makes the copy where it takes no more than half of the memory
    that is free. The result of a forward does not depend on it. progress shows on stderr what "auto" chose, unless it
    is the copy of a small checkpoint, and, where that is a terminal, bars for what takes more than a second.

    Raises CheckpointError or ConfigError, which list what is wrong with the checkpoint, and ValueError for a float32
    copy that is larger than the memory that is free.
    """
    if weights_dtype not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"weights_dtype={weights_dtype!r} is unknown; known: auto, bfloat16, float32")
    folder = resolve(name_or_path, revision=revision, progress=progress)
    config, weights = read_checkpoint(folder)
    generation_config: dict[str, Any] = {}
    if (folder / "generation_config.json").exists():
        try:
            generation_config = _checked(read_json(folder / "generation_config.json"))
        except ConfigError as error:
            raise CheckpointError(f"{folder / 'generation_config.json'}: {error}") from None
    names = ("vocab.json", "merges.txt")
    has_tokenizer = (folder / "tokenizer.json").exists() or all((folder / name).exists() for name in names)
    tokenizer = Tokenizer.from_folder(folder, config.vocab_size) if has_tokenizer else None

    size = sum(4 * tensor.size for tensor in weights.values())
    if weights_dtype == "float32":
        way_out = 'weights_dtype="bfloat16" (--weights-dtype bfloat16) maps the file as it is'
        require_memory(size, f"{folder}: a float32 copy of the weights", way_out)
    if weights_dtype == "float32" or (weights_dtype == "auto" and _copy_fits(size, progress)):
        copies = _copied(weights, progress)
        require_unchanged(weights)  # else some may be of the file as it was, others as it is
        weights = copies
    return Model(config, weights, tokenizer, generation_config)


def _checked(generation_config: dict[str, Any]) -> dict[str, Any]:
    """Return generation_config if what is read of it is of the right type. Raises ConfigError, which names the key."""
    numbers = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
    for key, value in generation_config.items():
        if value is None:
            continue
        if key in numbers and (type(value) not in (int, float) or not abs(value) <= sys.float_info.max):
            raise ConfigError(f"{key} = {value!r} is not a finite number")
        if key == "max_new_tokens" and type(value) is not int:
            raise ConfigError(f"{key} = {value!r} is not a whole number")
        if key == "do_sample" and type(value) is not bool:
            raise ConfigError(f"{key} = {value!r} is neither true nor false")
        if key == "eos_token_id":
            ids: list[Any] = cast("list[Any]", value) if type(value) is list else [value]
            if not all(type(token) is int for token in ids):
                raise ConfigError(f"{key} = {value!r} is neither a token id nor a list of them")
    return generation_config


def _copy_fits(size: int, progress: bool) -> bool:
    """Whether a float32 copy takes no more than half of the free memory; with progress, what follows is said."""
    free = available_memory()
    fits = size <= free / 2
    if progress and not (fits and size < SMALL):
        choice = "a float32 copy of the weights:" if fits else "weights mapped as they are: a float32 copy would take"
        room = f"of the {free / 1e9:.1f} GB of memory that are free" if free else "and the free memory is not known"
        print(f"[{choice} {size / 1e9:.1f} GB {room}]", file=sys.stderr)
    return fits


def _copied(weights: Weights, progress: bool) -> dict[str, Array]:
    """Return float32 copies of mapped weights, which all threads make."""
    from tqdm import tqdm

    copies: dict[str, Array] = {name: np.empty(tensor.shape, np.float32) for name, tensor in weights.items()}
    pairs = [(copies[name].reshape(-1), tensor.reshape(-1)) for name, tensor in weights.items()]
    pieces = [
        (copy[start : start + PIECE], tensor[start : start + PIECE])
        for copy, tensor in pairs
        for start in range(0, copy.size, PIECE)
    ]
    total, lock = sum(copy.size for copy in copies.values()), threading.Lock()
    with tqdm(
        total=4 * total, desc="float32 copy", unit="B", unit_scale=True, delay=1, disable=None if progress else True
    ) as bar:

        def make(piece: tuple[Array, Array]) -> None:
            copy, tensor = piece
            np.copyto(copy, tensor)
            release(tensor)  # else the file and its copy would be in memory side by side
            with lock:
                cast("Any", bar).update(copy.nbytes)

        share(pieces, total, make)
    return copies
