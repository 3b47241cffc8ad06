"""`qwen3np view`: a page that shows what the model does with a prompt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qwen3np.commands import add_computation, add_model, load_model, progress_bar, text
from qwen3np.files.writing import written_aside
from qwen3np.study.view import observe, page

EXAMPLE = 'qwen3np view "The capital of France is" -o view.html'
HELP = "write a page that shows what the model does with a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("prompt", type=text, metavar="PROMPT", help="the text to look into")
    help = "the page: one file, which needs no network"
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help=help)
    add_model(parser)
    add_computation(parser)


def run(arguments: argparse.Namespace) -> None:
    """Write the page, whole or not at all."""
    out: Path = arguments.out
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}; make it first")
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; name a file in it, such as {out / 'view.html'}")
    model, tokenizer = load_model(arguments)
    ids = tokenizer.encode(arguments.prompt)
    with progress_bar(len(ids) * (model.config.num_hidden_layers + 1), "guesses") as bar:
        seen = observe(
            model.weights, model.config, ids, numerics=arguments.numerics, engine=arguments.engine, progress=bar.update
        )
    content = page(seen, tokenizer, arguments.model or "the small built-in checkpoint").encode()
    with written_aside(out) as part:
        part.write_bytes(content)
    print(f"[{out}: {len(ids)} tokens, {len(content) / 1e6:.1f} MB; open it in a browser]", file=sys.stderr)
