"""A name -> a folder: a checkpoint on disk or on the Hugging Face Hub."""

import errno
import os
import re
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qwen3np.errors import CheckpointError, ConfigError
from qwen3np.files.limits import read_json
from qwen3np.terminal import bars, shows_bars

# The files of a checkpoint that are read. Repositories may hold the same weights in other formats as well
# (consolidated.safetensors, onnx/, *.bin, *.gguf).
FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    # how a sentence-transformers model makes vectors
    "modules.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
]
ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]
# The older form of tokenizer.json, needed only if that is missing.
VOCABULARY_FILES = ["vocab.json", "merges.txt", "added_tokens.json"]

# Not a Hub id: it starts like a path, or contains a second slash, a backslash or a colon.
_PATH = re.compile(r"[./~]|.*/.*/|.*[\\:]")
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}

# The names of the family on the Hub, for hints about misspelt ones.
_SIZES = ("0.6B", "1.7B", "4B", "8B", "14B", "32B", "30B-A3B", "235B-A22B")
PUBLISHED = [
    *(f"Qwen/Qwen3-{size}{kind}" for size in _SIZES for kind in ("", "-FP8", "-AWQ", "-GGUF")),
    *(f"Qwen/Qwen3-{size}-Base" for size in (*_SIZES[:5], "30B-A3B")),
    *(f"Qwen/Qwen3-{size}-{kind}-2507" for size in ("4B", *_SIZES[6:]) for kind in ("Instruct", "Thinking")),
    *(f"Qwen/Qwen3-{kind}-{size}" for kind in ("Embedding", "Reranker") for size in ("0.6B", "4B", "8B")),
    *(f"Qwen/Qwen3-Coder-{size}-Instruct" for size in ("30B-A3B", "480B-A35B")),
]

BUILTIN = Path(__file__).parents[1] / "builtin"  # the small checkpoint that comes with the package


def resolve(
    name_or_path: str | os.PathLike[str] | None,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    adapter: bool = False,
    weights: bool = True,
    progress: bool = True,
) -> Path:
    """Return the folder of a checkpoint; a Hub id is downloaded first, None is the built-in checkpoint.

    An existing folder is returned as it is, whatever `revision` says. A Hub id (`Qwen/Qwen3-0.6B`) is fetched by
    huggingface_hub into its cache: only `FILES`, at `revision` (a branch, tag or commit; None is `main`). Files in the
    cache are not transferred again, and a complete copy there is enough if the Hub does not answer. huggingface_hub
    obeys HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.

    With gguf_file only this file is fetched, or all parts of a split one; an existing .gguf file is returned as it is.
    adapter=True fetches the files of a LoRA adapter. weights=False skips the weights, which are often many gigabytes.
    progress=True shows progress bars if stderr is a terminal.

    Raises CheckpointError: one line that says why there is no folder, and what to do.
    """
    if name_or_path is None:
        if revision is not None:
            raise CheckpointError(f"revision {revision}: the built-in checkpoint has none; name one on the Hub")
        return BUILTIN
    name, folder = os.fspath(name_or_path), os.path.expanduser(name_or_path)
    if os.path.isdir(folder):
        return Path(folder)
    if os.path.isfile(folder):
        if folder.endswith(".gguf"):
            return Path(folder)
        kind = "a shard of a model" if folder.endswith(".safetensors") else "a file"
        raise CheckpointError(
            f"{name} is {kind}: give the folder that holds it, {Path(folder).parent}, or a .gguf file"
        )
    if "/" not in name and (meant := similar(name)):  # every model of the family has an owner
        raise CheckpointError(f"there is no folder {name}; did you mean {meant}, on the Hub?")
    if isinstance(name_or_path, os.PathLike) or _PATH.match(name):
        raise CheckpointError(f"there is no folder {name}: give one that exists, or a Hub id such as Qwen/Qwen3-0.6B")
    try:
        wanted = _wanted(gguf_file, adapter)
        return _download(name, revision, wanted, weights, quiet=not (progress and shows_bars()))
    except CheckpointError:
        raise
    except Exception as error:  # the HTTP client differs between versions, and hf_xet raises its own errors
        raise CheckpointError(_explain(error, name, revision)) from error


def similar(name: str) -> str | None:
    """Return the published name that was most likely meant by one without an owner, or a misspelt one; else None."""
    known = {full.lower(): full for full in PUBLISHED}
    owned = name if "/" in name else f"Qwen/{name}"
    return next((known[near] for near in get_close_matches(owned.lower(), known, 1, 0.88) if known[near] != name), None)


def _wanted(gguf_file: str | None, adapter: bool) -> list[str]:
    """Return the patterns of the files to fetch."""
    if gguf_file is not None:
        return [re.sub(r"-\d{5}-of-(\d{5})\.gguf$", r"-*-of-\1.gguf", gguf_file)]
    return ADAPTER_FILES if adapter else FILES


def _download(name: str, revision: str | None, wanted: list[str], weights: bool, *, quiet: bool) -> Path:
    from huggingface_hub import (
        constants,
        model_info,
        snapshot_download,  # pyright: ignore[reportUnknownVariableType]  # a bare `dict` in its signature
    )
    from huggingface_hub.errors import LocalEntryNotFoundError

    if wanted is FILES and not weights:
        wanted = [pattern for pattern in wanted if not pattern.endswith(".safetensors")]
    try:
        # snapshot_download asks for this as well, but without a timeout.
        info = model_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:
        with suppress(LocalEntryNotFoundError):
            cached = snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=True)
            whole = wanted[0] != FILES[0] or not weights or has_weights(Path(cached))
            if whole and not _missing(os.listdir(cached), wanted, weights):
                return Path(cached)
        raise
    files = [sibling.rfilename for sibling in info.siblings or ()]
    if missing := _missing(files, wanted, weights):
        ggufs = [file for file in files if file.endswith(".gguf")]
        way_out = (
            f"choose one of its GGUF files with gguf_file (--gguf-file): {', '.join(ggufs[:10])}"
            if ggufs
            else "give a repository (or a revision) with the weights as transformers saves them in safetensors, "
            "or with GGUF files; .bin cannot be read"
        )
        raise CheckpointError(f"{name} on {constants.ENDPOINT} has no {missing}: {way_out}")
    more = VOCABULARY_FILES if wanted[0] == FILES[0] and "tokenizer.json" not in files else []
    patterns = wanted + more
    with _no_bars() if quiet else nullcontext():
        shown = None if quiet else bars()  # its own would be seen in terminals only
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, tqdm_class=shown))


@contextmanager
def _no_bars() -> Generator[None]:
    """Keep the client from drawing progress bars, some of which would end up in redirected output."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def has_weights(folder: Path) -> bool:
    """Whether a folder holds all weight files. An unreadable index is left to the loader to report."""
    if (folder / "model.safetensors").exists():
        return True
    try:
        shards: Any = read_json(folder / "model.safetensors.index.json").get("weight_map")
        return all((folder / shard).exists() for shard in shards.values())
    except (ConfigError, AttributeError, TypeError, ValueError):
        return any(folder.glob("*.safetensors"))


def _missing(files: Collection[str], wanted: Sequence[str], weights: bool) -> str | None:
    """Return the name of a wanted file that is not in `files`, or None."""
    if wanted[0] != FILES[0]:
        return next((pattern for pattern in wanted if not any(fnmatch(file, pattern) for file in files)), None)
    if "config.json" not in files:
        return "config.json"
    if weights and "model.safetensors" not in files and "model.safetensors.index.json" not in files:
        return "model.safetensors"
    return None


def _explain(error: BaseException, name: str, revision: str | None) -> str:
    """Turn an error of huggingface_hub into one line: the cause, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # why the cache was needed
    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    log_in = "set HF_TOKEN or run `hf auth login`"
    status = getattr(getattr(error, "response", None), "status_code", None)
    hint = f"did you mean {meant}?" if (meant := similar(name)) else "check the spelling (such as Qwen/Qwen3-0.6B)"
    if isinstance(error, HFValidationError):
        return f"{name!r} is neither a folder nor a Hub id (owner/name): {hint}"
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return f"there is neither a folder {name} nor a model {name} on {hub}: {hint}; if it is private, {log_in}"
    if status in (401, 403):
        return f"{hub} denies access to {name} ({status}): accept its licence on {hub}/{name}, then {log_in}"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision}: give a branch, a tag or a commit of {hub}/{name}"
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"{name} is not complete in the cache {cache}, and HF_HUB_OFFLINE is set: "
            "run once without it to download the rest, or give a folder" + (f"; {hint}" if meant else "")
        )
    if isinstance(error, OSError) and error.errno in _WRITE_ERRORS:
        return (
            f"cannot write {name} into the cache {cache} ({error.strerror}): "
            "make room there, or set HF_HOME to a folder on another disk"
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{name} is not complete in the cache {cache}, and downloading it from {hub} failed ({reason}): "
        "check the connection and run it again (completed files are kept), or give a folder"
        + (f"; {hint}" if meant else "")
    )
