"""`qwen3np rerank`: documents sorted by how well they answer a query."""

from __future__ import annotations

import argparse
import json

import numpy as np

from qwen3np.commands import add_texts_and_model, progress_bar, table, text, texts_and_model
from qwen3np.embeddings import DEFAULT_INSTRUCTION, rerank

EXAMPLE = 'qwen3np rerank --model Qwen/Qwen3-Reranker-0.6B "capital of China" --file documents.txt --lines'
HELP = "sort documents by how well they answer a query"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("query", type=text, metavar="QUERY", help="what to look for")
    document = "a document (default: stdin)"
    parser.add_argument("documents", nargs="*", type=text, metavar="DOCUMENT", help=document)
    parser.add_argument("--instruction", type=text, metavar="TASK", help=f"the task (default: {DEFAULT_INSTRUCTION})")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line: index, score, document")
    add_texts_and_model(parser, "document", "Reranker")


def run(arguments: argparse.Namespace) -> None:
    """Print the documents with their scores, best first."""
    documents, model = texts_and_model(arguments.documents, arguments, "document", "Reranker")
    with progress_bar(len(documents), "ranked", "document") as bar:
        scores = rerank(
            model,
            arguments.query,
            documents,
            arguments.instruction,
            numerics=arguments.numerics,
            engine=arguments.engine,
            progress=bar.update,
        )
    order: list[int] = np.argsort(-scores, kind="stable").tolist()
    if arguments.json:
        for n in order:
            result = {"index": n, "score": float(scores[n]), "document": documents[n]}
            print(json.dumps(result, ensure_ascii=False))
        return
    print(table([(f"{scores[n]:.6f}", " ".join(documents[n].split())) for n in order]))
