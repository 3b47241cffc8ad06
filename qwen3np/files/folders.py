"""Which files of a folder are its weights; for other folders, what they are and what to do with them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from qwen3np.errors import CheckpointError, ConfigError
from qwen3np.files.limits import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_PICKLES = ("*.bin", "*.pth", "*.pt")


def require_checkpoint(folder: Path) -> None:
    """Raise CheckpointError, saying what the folder is and what to do, if it has no weights in safetensors."""
    if (folder / "training_state.safetensors").exists() and not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: an unfinished training run; repeat its command with --resume to continue it")
    if any(folder.glob("*.safetensors")) and not (folder / ADAPTER).exists():
        return
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        return
    raise CheckpointError(f"{folder}: {_explained(folder)}")


def _explained(folder: Path) -> str:
    if (folder / ADAPTER).is_file():
        base = adapter_base(folder)
        return (
            f"a LoRA adapter of {base}, not a model: load({base!r}, adapter={str(folder)!r}), "
            f"or --model {base} --adapter {folder}"
        )
    name = folder.name
    if name.startswith("models--") and (folder / "snapshots").is_dir():
        hub = name.removeprefix("models--").replace("--", "/")
        return f"the Hub cache's folder for {hub}: give that name, or one of the folders in {folder / 'snapshots'}"
    if any(folder.glob("models--*")):
        return "the root of a Hub cache: give the name of a model, such as Qwen/Qwen3-0.6B"
    pickles = sorted({path.name for pattern in _PICKLES for path in folder.glob(pattern)})
    if pickles:
        return (
            f"has {pickles[0]}, a format that can run arbitrary code when read: save the model as safetensors with "
            'transformers, AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained("new")'
        )
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inside and not (folder / "config.json").exists():
        return f"not a checkpoint, but {folder / inside[0]} is one"
    if not (folder / "config.json").exists():
        raise ConfigError(f"{folder / 'config.json'}: no such file; a checkpoint folder needs one")
    return f"neither {SINGLE} nor {INDEX}, and no shards; only safetensors and GGUF checkpoints are read"


def adapter_base(folder: Path) -> str:
    """Return the name of an adapter's base model, from its config."""
    try:
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    except ConfigError as error:
        raise CheckpointError(f"{folder / ADAPTER}: {error}") from None
    return base if isinstance(base, str) and base else "its base model, which it does not name"


def gguf_of(path: Path, chosen: str | None = None) -> Path | None:
    """Return the GGUF file to load: the path itself, the chosen one of a folder, or the only one of a folder.

    None for a folder with other weights. Raises CheckpointError if the file is missing, or if there are several.
    """
    if path.is_file():
        return path
    if chosen is not None:
        if not (path / chosen).is_file():
            there = ", ".join(sorted(file.name for file in path.glob("*.gguf"))) or "no .gguf file"
            raise CheckpointError(f"{path}: no {chosen}; there is {there}")
        return path / chosen
    if any(path.glob("*.safetensors")) or (path / INDEX).exists():
        return None
    files = sorted(file for file in path.glob("*.gguf") if not re.search(r"-0*([2-9]|\d{2,})-of-\d+\.gguf$", file.name))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{path}: several GGUF files: choose one with gguf_file (--gguf-file): {names}")
    return files[0] if files else None


def weight_files(folder: Path, problems: list[str]) -> dict[Path, list[str] | None]:
    """Return the safetensors files of a folder, each with the tensors that the index (if any) lists for it."""
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if not (folder / INDEX).is_file():
        return _shards(folder)
    try:
        weight_map = read_json(folder / INDEX).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(f"{folder / INDEX}: {error}") from None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder / INDEX}: has no weight_map")
    shards: dict[str, list[str]] = {}
    for name, shard in cast("Mapping[str, Any]", weight_map).items():
        if isinstance(shard, str) and shard == Path(shard).name and shard not in ("", ".."):
            shards.setdefault(shard, []).append(name)
        else:
            problems.append(f"{name}: {INDEX} puts it into {shard!r}, which is not the name of a file in the folder")
    files: dict[Path, list[str] | None] = {}
    for shard, listed in shards.items():
        if os.path.isfile(folder / shard):  # False for impossible names, too
            files[folder / shard] = listed
        else:
            problems.append(f"{shard}: missing, though {INDEX} names it")
    return files


def _shards(folder: Path) -> dict[Path, list[str] | None]:
    """Return the shards of a folder without an index. Raises CheckpointError unless all are there."""
    found = {match[0]: match for file in folder.glob("*.safetensors") if (match := _SHARD.fullmatch(file.name))}
    counts = {match[2] for match in found.values()}
    if len(counts) != 1:
        there = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))[:5])
        raise CheckpointError(f"{folder}: no {SINGLE}, but {there}: rename the weights to {SINGLE}, or add {INDEX}")
    [count] = counts
    names = [f"model-{n:05}-of-{count}.safetensors" for n in range(1, int(count) + 1)]
    if missing := [name for name in names if name not in found]:
        raise CheckpointError(f"{folder}: {missing[0]} is missing ({len(missing)} of {len(names)} shards): download it")
    return {folder / name: None for name in names}
