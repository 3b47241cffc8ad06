"""`qwen3np embed`: texts as vectors."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np

from qwen3np.commands import add_texts_and_model, progress_bar, text, texts_and_model
from qwen3np.embeddings import DEFAULT_INSTRUCTION, embed
from qwen3np.files.writing import written_aside

EXAMPLE = "qwen3np embed --model Qwen/Qwen3-Embedding-0.6B --file documents.txt --lines --out documents.npy"
HELP = "turn texts into vectors whose dot products compare them"
FORMATS = (".npy", ".npz", ".jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("texts", nargs="*", type=text, metavar="TEXT", help="a text (default: stdin)")
    query = parser.add_mutually_exclusive_group()
    query.add_argument(
        "--query",
        action="store_const",
        dest="instruction",
        const=DEFAULT_INSTRUCTION,
        help="the texts are web search queries",
    )
    instruction = "the texts are queries for this task; --query uses: " + DEFAULT_INSTRUCTION
    query.add_argument("--instruction", type=text, metavar="TASK", help=instruction)
    parser.add_argument(
        "--dimensions", type=int, metavar="N", help="keep the first N dimensions, normalised again (default: all)"
    )
    out = ".npy: an array (texts, dimensions); .npz: embeddings and texts; .jsonl (default: JSON lines on stdout)"
    parser.add_argument("-o", "--out", metavar="FILE", type=Path, help=out)
    add_texts_and_model(parser, "text", "Embedding")


def run(arguments: argparse.Namespace) -> None:
    """Print or write a vector for each text."""
    out: Path | None = arguments.out
    if out is not None and out.suffix not in FORMATS:
        raise ValueError(f"--out {out}: the name must end with one of {', '.join(FORMATS)}")
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"--out {out}: no such folder: {out.parent}")
    if arguments.dimensions is not None and arguments.dimensions < 1:
        raise ValueError(f"--dimensions {arguments.dimensions} must be at least 1")
    texts, model = texts_and_model(arguments.texts, arguments, "text", "Embedding")
    with progress_bar(len(texts), "embedded", "text") as bar:
        embeddings = embed(
            model,
            texts,
            arguments.instruction,
            arguments.dimensions,
            numerics=arguments.numerics,
            engine=arguments.engine,
            progress=bar.update,
        )
    rows = ({"text": text, "embedding": row.tolist()} for text, row in zip(texts, embeddings, strict=True))
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out is None:
        sys.stdout.writelines(lines)
        return
    with written_aside(out) as part, part.open("wb") as file:
        if out.suffix == ".npy":
            np.save(file, embeddings)
        elif out.suffix == ".npz":
            archive = io.BytesIO()  # if written directly to a full disk, NumPy would report the error twice
            np.savez(archive, embeddings=embeddings, texts=np.array(texts))
            file.write(archive.getbuffer())
        else:
            file.writelines(line.encode() for line in lines)
