"""`qwen3np convert`: write any checkpoint as plain safetensors, or as a GGUF file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from qwen3np.files.checkpoint import save_checkpoint
from qwen3np.files.gguf_writer import KINDS, write_gguf
from qwen3np.loading import load
from qwen3np.numerics import BFLOAT16

EXAMPLE = "qwen3np convert Qwen/Qwen3-0.6B-FP8 plain --dtype bfloat16"
HELP = "write a checkpoint (FP8, AWQ, GPTQ, MLX, GGUF; optionally with a LoRA adapter) as plain weights or GGUF"
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a .gguf file, or a Hub id")
    parser.add_argument("to", metavar="FOLDER", help="a new folder, or with --gguf a new file")
    parser.add_argument(
        "--dtype",
        choices=tuple(_DTYPES),
        default="float32",
        help="dtype of the weights (default: float32, which is exact)",
    )
    parser.add_argument("--gguf", choices=tuple(KINDS), help="write a GGUF file of this type instead of a folder")
    parser.add_argument("--adapter", metavar="A", help="a LoRA adapter to merge: a folder, or a Hub id")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit on the Hub")
    parser.add_argument("--gguf-file", metavar="F", help="the GGUF file to read, in the folder or on the Hub")


def run(arguments: argparse.Namespace) -> None:
    """Write the folder or the file, and report it."""
    model = load(
        arguments.model,
        revision=arguments.revision,
        gguf_file=arguments.gguf_file,
        adapter=arguments.adapter,
        weights_dtype="mapped",
    )
    to = Path(arguments.to)
    if arguments.gguf is None:
        save_checkpoint(
            to,
            model.config,
            model.weights,
            dtype=_DTYPES[arguments.dtype],
            tokenizer=model.tokenizer,
            generation_config=model.generation_config,
        )
    else:
        if to.exists():
            raise ValueError(f"{to}: already exists; choose a new file")
        files = model.tokenizer.files() if model.tokenizer else {}
        tokenizer = json.loads(files["tokenizer.json"]) if "tokenizer.json" in files else None
        template = model.tokenizer.chat_template if model.tokenizer else None
        write_gguf(
            to,
            model.config,
            model.weights,
            tokenizer,
            kind=arguments.gguf,
            name=Path(arguments.model).stem,
            chat_template=template,
        )
    print(f"[wrote {to}]", file=sys.stderr)
