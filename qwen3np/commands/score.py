"""`qwen3np score`: how likely a text is."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from qwen3np.commands import add_computation, add_model, load_model, progress_bar, read_text, table
from qwen3np.scoring import score

EXAMPLE = "qwen3np score --model Qwen/Qwen3-0.6B-Base book.txt --window 2048 --stride 1024"
HELP = "tell how likely a text is: log-likelihood and perplexity"
DEFAULT_WINDOW = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("text", metavar="FILE", help="a UTF-8 text file, or - for stdin")
    parser.add_argument("--window", type=int, metavar="N", help=f"tokens seen at once (default: {DEFAULT_WINDOW})")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens from window to window (default: half a window)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with each token's log-probability")
    add_model(parser)
    add_computation(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the log-likelihood of the tokens after the first, and their perplexity."""
    text = sys.stdin.read() if arguments.text == "-" else read_text(Path(arguments.text))
    model, tokenizer = load_model(arguments)
    ids = tokenizer.encode(text)
    window = arguments.window or min(DEFAULT_WINDOW, model.config.max_position_embeddings)
    stride = arguments.stride or max(window // 2, 1)
    with progress_bar(len(ids), "scored") as bar:
        logprobs = score(
            model.weights,
            model.config,
            ids,
            window=window,
            stride=stride,
            numerics=arguments.numerics,
            progress=bar.update,
        )
    total = float(logprobs.sum())
    perplexity = math.exp(-total / len(logprobs))
    if arguments.json:
        result = {"ids": ids, "logprobs": [None, *logprobs.tolist()], "log_likelihood": total}
        result |= {"perplexity": perplexity, "window": window, "stride": stride}
        print(json.dumps(result))
        return
    rows = [
        ("tokens", f"{len(ids):,}, of which {len(logprobs):,} are scored (the first is only context)"),
        ("log-likelihood", f"{total:.6f} (natural logarithm)"),
        ("perplexity", f"{perplexity:.6f} a token"),
        ("bits per byte", f"{-total / math.log(2) / len(text.encode()):.6f}"),
        ("windows", f"{window:,} tokens, every {stride:,}"),
    ]
    print(table(rows))
