"""Many requests at once, in OpenAI's batch format: here, or on the workers of a Dask cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qwen3np.batches.answers import Answers, Recipe
from qwen3np.batches.requests import packets, requests_of
from qwen3np.batches.run import here
from qwen3np.batches.spread import Spread
from qwen3np.model import Model

BUILTIN_NAME = "qwen3np-builtin"


def batch(
    requests: Iterable[Mapping[str, Any]],
    model: Model | str | os.PathLike[str] | None = None,
    *,
    client: Any = None,
    name: str | None = None,
    numerics: str = "float32",
    engine: str = "fast",
) -> Iterator[dict[str, Any]]:
    """Answer requests in OpenAI's batch format, in this process or on a Dask cluster.

    Parameters
    ----------
    requests
        Objects with custom_id, url and body, as in the lines of a batch file.
    model
        A loaded model, or what load takes; with a client what load takes on every worker.
    client
        A distributed.Client, whose workers share the requests. None: this process answers them.
    name
        The name of the model, for requests that name one (default: model, if it is a name).
    numerics, engine
        As in forward.

    Yields
    ------
    dict
        The line of each request's result, as it comes. A request that is wrong has a result that says so.

    Raises
    ------
    ValueError
        For a loaded model with a client, and workers that do not have the same model. CheckpointError as load.

    Examples
    --------
    >>> request = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "The opposite of hot is"}}
    >>> (result,) = qwen3np.batch([request])
    >>> result["response"]["body"]["choices"][0]["text"]
    ' cold.'
    """
    work = packets(requests_of(json.dumps(request).encode() for request in requests))
    given = None if model is None or isinstance(model, Model) else os.fspath(model)
    recipe = Recipe(given, name or given or BUILTIN_NAME, numerics, engine)
    if client is not None:
        if isinstance(model, Model):
            raise ValueError("batch: with a client, give the name or folder of the model; each worker loads it")
        for _, line in Spread(client, recipe)(work):
            yield json.loads(line)
        return
    answers = Answers(model, recipe.name, numerics, engine) if isinstance(model, Model) else recipe.answers()
    try:
        for _, line in here(answers)(work):
            yield json.loads(line)
    finally:
        answers.close()
