"""The commands of the command line, one file each, and the flags that several of them share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3np.loading import Model, load
from qwen3np.numerics import PRECISIONS
from qwen3np.tokenizer import Tokenizer


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a checkpoint."""
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--model", required=True, metavar="M", help="a folder, or a Hub id such as Qwen/Qwen3-0.6B")
    group.add_argument("--revision", metavar="R", help="branch, tag or commit on the Hub")


def add_computation(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how to compute."""
    group = parser.add_argument_group("computation")
    group.add_argument("--numerics", choices=tuple(PRECISIONS), default="float32", help="the precision (float32)")
    group.add_argument(
        "--weights-dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="bfloat16 maps the file, float32 makes a faster copy, auto looks at the free memory",
    )


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how the text goes on, and when it ends."""
    group = parser.add_argument_group("generation (defaults: the checkpoint's generation_config.json)")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="end after N tokens")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens (0: off)")
    group.add_argument("--top-p", type=float, metavar="P", help="only the likeliest tokens that make up P")
    group.add_argument("--min-p", type=float, metavar="P", help="only tokens P times as likely as the likeliest")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: repeat less")
    group.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text")


def generation_options(model: Model, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of qwen3np.generate: the flags over the checkpoint's defaults."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "numerics")
    given = {name: getattr(arguments, name) for name in names}
    return model.generation_defaults() | {name: value for name, value in given.items() if value is not None}


def load_model(arguments: argparse.Namespace) -> tuple[Model, Tokenizer]:
    """Return the model that the flags name, and its tokenizer. Raises ValueError where it has none."""
    model = load(arguments.model, revision=arguments.revision, weights_dtype=arguments.weights_dtype)
    if model.tokenizer is None:
        raise ValueError(f"{arguments.model}: has no tokenizer.json (nor vocab.json with merges.txt); text needs one")
    return model, model.tokenizer


def read_text(path: Path) -> str:
    """Return the text of a file. Raises ValueError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None


def progress_bar(total: int | None, what: str) -> Any:
    """Return a tqdm bar on stderr that counts tokens; it shows only when they take more than a second."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="tok", delay=1, leave=False)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Return rows of a name and a value, the values one below the other."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
