"""A folder, a file or a Hub name -> a Model; float32 copies of its weights where they fit."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any, cast

import numpy as np

from qwen3np.errors import CheckpointError, ConfigError, one_line
from qwen3np.files.adapter import adapted
from qwen3np.files.checkpoint import read_checkpoint
from qwen3np.files.folders import gguf_of
from qwen3np.files.gguf import generation_of, read_gguf
from qwen3np.files.hub import resolve
from qwen3np.files.limits import read_json
from qwen3np.files.sentence import Pooling, pooling_of
from qwen3np.gguf_tokenizer import FromGGUF
from qwen3np.guard import require_unchanged
from qwen3np.memory import aligned, available_memory, require_memory
from qwen3np.model import Model
from qwen3np.numerics import Array
from qwen3np.ops.fast.pages import release
from qwen3np.ops.fast.threads import share
from qwen3np.rules import rules
from qwen3np.settings import GenerationSettings, from_file
from qwen3np.stored import put
from qwen3np.terminal import bars, shows_bars
from qwen3np.tokenizer import Tokenizer
from qwen3np.weights import LoadedWeights, Weights

SMALL = 10**9  # bytes: smaller float32 copies are made without a message
PIECE = 1 << 22  # elements copied at a time: few enough for a smooth bar, too many for its updates to cost anything


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

    copies: dict[str, Array] = {name: aligned(tensor.shape, np.float32) for name, tensor in weights.items()}
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
