"""tokenizer.json, or vocab.json with merges.txt -> what splits and joins text in the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3np.errors import CheckpointError
from qwen3np.files.limits import MOST_BYTES, read_json, readable

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import models

# How Qwen3's tokenizer.json splits text before BPE; a folder with vocab.json and merges.txt alone does not say it.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_backend(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a folder, config being its tokenizer_config.json. CheckpointError for broken files."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    file = folder / "tokenizer.json"
    if not file.is_file():
        return _from_vocab_and_merges(folder, config)
    with refused(f"{file}: not a tokenizer"):
        backend = Backend.from_buffer(readable(file, 2 * MOST_BYTES).read_bytes())
    if not isinstance(backend.decoder, decoders.ByteLevel):
        raise CheckpointError(f"{file}: the decoder is {backend.decoder}, where Qwen3 has ByteLevel")
    if backend.normalizer is not None:
        normalizer = json.loads(backend.normalizer.__getstate__())
        # others may make texts longer, by any factor
        if any(part != {"type": "NFC"} for part in normalizer.get("normalizers", [normalizer])):
            raise CheckpointError(f"{file}: the normalizer is {backend.normalizer}, where Qwen3 has NFC")
    # What a training run may have saved: encode would silently cut, pad or choose at random.
    backend.no_truncation()
    backend.no_padding()
    if isinstance(backend.model, models.BPE):
        backend.model.dropout = None
    return backend


def _from_vocab_and_merges(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, models

    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    with refused(f"{vocab} with {merges.name}: not a BPE vocabulary"):
        files = [str(readable(file)) for file in (vocab, merges)]
        backend = byte_level_bpe(models.BPE.from_file(*files))
    file = folder / "tokenizer_config.json"
    try:
        if "added_tokens_decoder" in config or not (folder / "added_tokens.json").is_file():
            added = {int(i): AddedToken(**token) for i, token in config["added_tokens_decoder"].items()}
        else:  # an older spelling, without what is special
            ids = read_json(folder / "added_tokens.json")
            added = {i: AddedToken(text, special=text.startswith("<|"), normalized=False) for text, i in ids.items()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: no usable added_tokens_decoder: {error!r}") from error
    backend.add_tokens([token for _, token in sorted(added.items())])
    for i, token in added.items():
        if backend.token_to_id(token.content) != i:
            raise CheckpointError(f"{file}: {token.content} has id {i}, which {vocab.name} does not lead to")
    return backend


def byte_level_bpe(model: models.BPE) -> tokenizers.Tokenizer:
    """A tokenizer that does with text what Qwen3's tokenizer.json does before and after its BPE model."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    backend = Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


@contextmanager
def refused(what: str) -> Generator[None]:
    """Turn what the library raises, which is a bare Exception or a panic of its Rust code, into CheckpointError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise CheckpointError(f"{what}: {error}") from error
