"""`qwen3np score`: how likely a text is."""

from __future__ import annotations

import argparse
import json

import numpy as np

from qwen3np.commands import add_computation, add_model, load_model, progress_bar, read_text, table
from qwen3np.scoring import score

EXAMPLE = "qwen3np score --model Qwen/Qwen3-0.6B-Base book.txt --window 2048 --stride 1024"
HELP = "measure how likely a text is: log-likelihood and perplexity"
DEFAULT_WINDOW = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("text", metavar="FILE", help="a UTF-8 text file, or - for stdin")
    parser.add_argument("--window", type=int, metavar="N", help=f"tokens seen at once (default: {DEFAULT_WINDOW})")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between window starts (default: half a window)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with each token's log-probability")
    add_model(parser)
    add_computation(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the log-likelihood of the tokens after the first, and their perplexity."""
    for flag in ("window", "stride"):
        if getattr(arguments, flag) is not None and getattr(arguments, flag) < 1:
            raise ValueError(f"--{flag} {getattr(arguments, flag)} must be at least 1")
    text = read_text(arguments.text)
    model, tokenizer = load_model(arguments)
    ids = tokenizer.encode(text)
    default = min(DEFAULT_WINDOW, model.config.max_position_embeddings)
    window = default if arguments.window is None else arguments.window
    stride = max(window // 2, 1) if arguments.stride is None else arguments.stride
    with progress_bar(len(ids), "scored") as bar:
        logprobs = score(
            model.weights,
            model.config,
            ids,
            window=window,
            stride=stride,
            numerics=arguments.numerics,
            engine=arguments.engine,
            progress=bar.update,
        )
    total = float(logprobs.sum())
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(-total / len(logprobs)))
    if arguments.json:
        result = {"ids": ids, "logprobs": [None, *logprobs.tolist()], "log_likelihood": total}
        result |= {"perplexity": perplexity, "window": window, "stride": stride}
        print(json.dumps(result))
        return
    rows = [
        ("tokens", f"{len(ids):,}, of which the first is only context"),
        ("log-likelihood", f"{total:.6f} (natural logarithm)"),
        ("perplexity", f"{perplexity:.6f} per token"),
        ("windows", f"{window:,} tokens, every {stride:,}"),
    ]
    print(table(rows))
