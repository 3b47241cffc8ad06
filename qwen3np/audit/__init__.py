"""Log-probabilities and quantisation held to account."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen3np.audit.report import Audit
    from qwen3np.model import Model


def audit(
    rollouts: str | Path | Iterable[Mapping[str, Any]],
    model: Model,
    *,
    others: Mapping[str, Model] | None = None,
    computed_in: str | None = None,
    fields: Mapping[str, str] | None = None,
) -> Audit:
    """Hold log-probabilities that an engine reported against the reference's, and say why they differ.

    Parameters
    ----------
    rollouts
        A file of JSON lines, or the objects themselves: {"prompt_ids": [...], "ids": [...], "logprobs": [...]}, or what
        vLLM, SGLang, TRL, verl, llama.cpp and OpenAI-style servers write.
    model
        What the engine is supposed to run.
    others
        Other checkpoints that it may run instead, by name.
    computed_in
        "float32", "float16" or "bfloat16" if it is known what the engine computes in: larger rounding is then a
        difference. None: any of them may be it.
    fields
        The keys of fields with unknown names, such as {"logprobs": "my_logps"}.

    Returns
    -------
    The verdict ("rounding" or "different"), its causes, and all measured numbers.

    Raises
    ------
    ValueError
        For rollouts that cannot be used; it says where and why.

    Examples
    --------
    >>> model = qwen3np.load()
    >>> ids = [281, 297, 272, 1132, 259, 1592]
    >>> logprobs = model.score(ids)[2:].tolist()
    >>> qwen3np.audit([{"prompt_ids": ids[:3], "ids": ids[3:], "logprobs": logprobs}], model).verdict
    'rounding'
    """
    from qwen3np.audit.report import audited
    from qwen3np.audit.rollouts import Fields, read_rollouts

    names = Fields(fields or {})
    found = read_rollouts(rollouts, model.tokenizer, model.config.vocab_size, names)
    models = {name: (other.weights, other.config) for name, other in (others or {}).items()}
    return audited(found, model, others=models, computed_in=computed_in, fields=names.used)
