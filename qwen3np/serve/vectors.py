"""/v1/embeddings and /v1/rerank: texts as vectors, documents ranked for a query."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from qwen3np.embeddings import encoded, rerank, vectors
from qwen3np.numerics import Array
from qwen3np.serve.service import Service


async def embeddings(service: Service, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a request, one text at a time between the tokens of answers."""
    model, options = service.model, service.scheduler.options
    sequences, skipped = await asyncio.to_thread(encoded, model, texts(fields), fields["instruction"])
    calls = [partial(vectors, model, [ids], skipped, fields["dimensions"], **options) for ids in sequences]
    rows = np.concatenate(await service.computed(calls))
    return await asyncio.to_thread(embeddings_body, service, fields, list(zip(sequences, rows, strict=True)))


def texts(fields: Mapping[str, Any]) -> list[str]:
    """The texts to embed."""
    return [fields["input"]] if isinstance(fields["input"], str) else fields["input"]


def embeddings_body(
    service: Service, fields: Mapping[str, Any], found: Sequence[tuple[list[int], Array]]
) -> dict[str, Any]:
    """The reply with the vector (D,) of each text; its ids, with the prompt and the end, are what is counted."""
    data: list[Any] = []
    for n, (_, vector) in enumerate(found):
        packed = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        value = vector.tolist() if fields["encoding_format"] == "float" else packed
        data.append({"object": "embedding", "index": n, "embedding": value})
    tokens = sum(len(ids) for ids, _ in found)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": service.name, "usage": usage}


async def ranking(service: Service, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a request, one document at a time between the tokens of answers."""
    query, options = fields["query"], service.scheduler.options
    calls = [
        partial(rerank, service.model, query, [one], fields["instruction"], **options) for one in fields["documents"]
    ]
    return ranking_body(service, fields, np.concatenate(await service.computed(calls)))


def ranking_body(service: Service, fields: Mapping[str, Any], scores: Array) -> dict[str, Any]:
    """The reply with these scores (N,) of its N documents."""
    results: list[Any] = []
    for n in np.argsort(-scores, kind="stable")[: fields["top_n"]].tolist():
        result = {"index": n, "relevance_score": float(scores[n])}
        document = {"document": {"text": fields["documents"][n]}} if fields["return_documents"] else {}
        results.append({**result, **document})
    return {"model": service.name, "results": results}
