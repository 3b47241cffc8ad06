"""`qwen3np train`: train a small Qwen3 on a corpus."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from qwen3np.commands import add_threads
from qwen3np.loading import load
from qwen3np.training.documents import read_documents
from qwen3np.training.loop import SIZES, STATE, Settings, train

EXAMPLE = "qwen3np train stories.txt --out my-qwen3 --steps 2000"
HELP = "train a tokenizer and a small model on a corpus"

_SETTINGS = {
    "steps": "weight updates",
    "batch_size": "rows per step",
    "sequence_length": "tokens per row, and the context of the model",
    "learning_rate": "the peak, reached linearly and left on a cosine",
    "warmup_steps": "steps until the learning rate peaks",
    "weight_decay": "for matrices",
    "max_norm": "clip gradients to this norm",
    "seed": "for the initial weights and the order of documents",
    "save_every": "steps between saved states and lines of the log",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument(
        "corpus",
        metavar="CORPUS",
        type=Path,
        help="a .txt file (lines of <|endoftext|> separate its documents, blank lines do not), a .jsonl file (an "
        'object per line: {"text": ...} or {"messages": [...]}), or a folder of such files',
    )
    parser.add_argument("-o", "--out", metavar="FOLDER", type=Path, required=True, help="the new checkpoint")
    parser.add_argument("--held-out", metavar="CORPUS", type=Path, help="more documents, whose loss is logged as well")
    parser.add_argument(
        "--resume", action="store_true", help="continue an interrupted run: repeat its command with this flag"
    )
    base = "fine-tune: start from this checkpoint, with its tokenizer and sizes"
    parser.add_argument("--from", dest="base", metavar="M", help=base)
    group = parser.add_argument_group("sizes (keys of config.json)")
    for name, size in SIZES.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", default=size, help=f"({size})")
    group = parser.add_argument_group("training")
    for name, value in asdict(Settings()).items():
        kind, metavar = (int, "N") if isinstance(value, int) else (float, "X")
        text = f"{_SETTINGS[name]} ({value})"
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, default=value, help=text)
    add_threads(group)


def run(arguments: argparse.Namespace) -> None:
    """Train, and report where the model is."""
    settings = Settings(**{name: getattr(arguments, name) for name in _SETTINGS})
    out: Path = arguments.out
    sizes = {name: getattr(arguments, name) for name in SIZES}
    documents = read_documents(arguments.corpus)
    if len(documents) == 1 and isinstance(documents[0], str) and "\n" in documents[0]:
        print(
            f"[{arguments.corpus} is one document: lines of <|endoftext|> separate documents, blank and other lines do "
            "not, and a model learns when to stop from the ends of documents]",
            file=sys.stderr,
        )
    held_out = read_documents(arguments.held_out) if arguments.held_out else ()
    base = None if arguments.base is None else load(arguments.base)
    try:
        train(documents, out, sizes, settings, held_out=held_out, resume=arguments.resume, base=base)
    except KeyboardInterrupt:
        if (out / STATE).exists():
            print(f"\n[stopped; {out} keeps the last saved step: --resume continues from there]", file=sys.stderr)
        raise
    print(f"[{out}: trained; use it with --model; --resume with more --steps continues training]", file=sys.stderr)
