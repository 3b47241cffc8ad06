"""A sentence-transformers folder: how hidden states become a vector, and which prompt precedes texts.

modules.json lists the steps, 1_Pooling/config.json says how states are pooled, and config_sentence_transformers.json
holds the prompts (https://sbert.net/docs/package_reference/sentence_transformer/models.html).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from qwen3np.errors import CheckpointError, ConfigError
from qwen3np.files.limits import parse_json, read_json, readable

_MODES = {
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}


@dataclass(frozen=True)
class Pooling:
    """Which hidden states make a vector: that of the last token, the mean of all, or that of the first token."""

    mode: str
    prompts: Mapping[str, str] = field(default_factory=dict)
    prompt: str = ""  # precedes every text, unless an instruction replaces it
    with_prompt: bool = True  # whether the mean includes the tokens of the prompt


def pooling_of(folder: Path) -> Pooling | None:
    """Return the pooling of a folder with modules.json, else None. Raises CheckpointError for unknown modules."""
    path = folder / "modules.json"
    if not path.is_file():
        return None
    try:
        modules = parse_json(readable(path).read_text(encoding="utf-8"))
        kinds = [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in modules]
    except (ValueError, RecursionError, OSError, TypeError, LookupError) as error:
        raise CheckpointError(f"{path}: not a list of modules: {error}") from None
    if other := [kind for kind, _ in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise CheckpointError(f"{path}: the module {other[0]} is not supported; supported: Pooling and Normalize")
    place = next((name for kind, name in kinds if kind == "Pooling"), "")
    if place != Path(place).name or place in ("", ".."):
        raise CheckpointError(f"{path}: has no Pooling in a separate folder")
    settings = _read(folder / place / "config.json")
    mode = settings.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else [key for key, value in settings.items() if value is True]
    modes = [name for name in modes if isinstance(mode, str) or name.startswith("pooling_mode_")]
    names = {**_MODES, **{name: name for name in _MODES.values()}}
    if len(modes) != 1 or modes[0] not in names:
        known = "lasttoken, mean and cls, one of them"
        raise CheckpointError(
            f"{folder / place / 'config.json'}: pooling by {modes} is not supported; supported: {known}"
        )
    texts: dict[str, Any] = {}
    if (folder / "config_sentence_transformers.json").is_file():
        texts = _read(folder / "config_sentence_transformers.json")
    prompts = cast("dict[Any, Any]", texts.get("prompts") or {}) if isinstance(texts.get("prompts"), dict) else {}
    known = {name: text for name, text in prompts.items() if isinstance(text, str)}
    default = texts.get("default_prompt_name")
    if default is not None and default not in known:
        raise CheckpointError(f"{folder}: default_prompt_name = {default!r} is not one of its prompts")
    return Pooling(names[modes[0]], known, known.get(default, ""), settings.get("include_prompt") is not False)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
