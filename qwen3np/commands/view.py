"""`qwen3np view`: a page that shows what the model does with a prompt."""

from __future__ import annotations

import argparse
import sys
import tempfile
import webbrowser
from pathlib import Path

from qwen3np.commands import add_computation, add_model, load_model, progress_bar, text
from qwen3np.files.writing import written_aside
from qwen3np.study.view import observe, page

EXAMPLE = 'qwen3np view "The capital of France is"'
HELP = "make a page that shows what the model does with a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("prompt", type=text, metavar="PROMPT", help="the text to inspect")
    out = "the page: a single file that needs no network (default: in a temporary folder)"
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help=out)
    parser.add_argument("--no-open", action="store_true", help="do not open it in a browser")
    add_model(parser)
    add_computation(parser)


def run(arguments: argparse.Namespace) -> None:
    """Write the page, whole or not at all."""
    out: Path = arguments.out or Path(tempfile.mkdtemp(prefix="qwen3np-")) / "view.html"
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}; create it first")
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
    # only for a user at a terminal: scripts, and machines without a screen, just get the file
    opened = not arguments.no_open and sys.stderr.isatty() and webbrowser.open(out.resolve().as_uri())
    rest = "opened in the browser" if opened else "open it in a browser"
    print(f"[{out}: {len(ids)} tokens, {len(content) / 1e6:.1f} MB; {rest}]", file=sys.stderr)
