"""Whether this machine computes the same bits as others: the exact logits of a fixed prompt, and their hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen3np.guard import require_finite
from qwen3np.model import Model
from qwen3np.numerics import Array

BUILTIN = Path(__file__).parent / "published" / "builtin.json"
ROWS = Path(__file__).parent / "published" / "Qwen3-0.6B-Base.json"
COUNT = 32  # ids in the prompt: several rows in every product, and a triangle of scores
# Float32 over 28 layers on two machines: logits around 20 differ by about 2e-4, norms by a factor below 1e-5.
LOGITS, NORMS = 1e-3, 1e-4


def hashed_ids(model: Model) -> list[int]:
    """Return the fixed prompt: ids that depend on the size of the vocabulary alone (Knuth's multiplicative hashing)."""
    return [2654435761 * (n + 1) % 2**32 % model.config.vocab_size for n in range(COUNT)]


def sha256(x: Array) -> str:
    """Return the SHA-256 of an array's numbers, little-endian and in C order, with 0 for -0."""
    x = x + 0 if x.dtype.kind == "f" else x
    return hashlib.sha256(np.ascontiguousarray(x, x.dtype.newbyteorder("<")).tobytes()).hexdigest()


def exact_hash(model: Model, ids: Sequence[int]) -> str:
    """Return the SHA-256 of the exact float32 logits (1, S, V) of ids."""
    return sha256(model(ids, engine="exact"))


@dataclass(frozen=True)
class Verification:
    """The result on this machine."""

    sha256: str  # of the exact logits
    published: str | None  # the expected hash, if it is known
    fast_distance: float  # of the fast engine's logits from the exact ones: relative L2
    fast_equal: float  # the fraction of them with the same bits
    rows: RowsReport | None = None  # of a model with published rows

    @property
    def passed(self) -> bool:
        """Whether everything that could be compared agrees."""
        return self.published in (None, self.sha256) and (self.rows is None or self.rows.passed)


@dataclass(frozen=True)
class RowsReport:
    """Published rows against ours."""

    positions: int
    same_greedy: int  # positions whose largest logit belongs to the same id
    largest_logit_difference: float
    largest_norm_difference: float  # relative

    @property
    def passed(self) -> bool:
        """Whether the rows are equal to within float32 rounding on two machines."""
        return (
            self.same_greedy == self.positions
            and self.largest_logit_difference <= LOGITS
            and self.largest_norm_difference <= NORMS
        )


def verify(model: Model, published: str | None = None, rows: dict[str, Any] | None = None) -> Verification:
    """Compute the exact logits of a fixed prompt, and compare them with published values.

    Parameters
    ----------
    model
        The model.
    published
        The expected SHA-256 of the logits; None if it is not known.
    rows
        The contents of ROWS, for the model they were computed with.

    Returns
    -------
    Verification
        The hash, and what was compared.

    Raises
    ------
    NonFiniteError
        Where the logits hold NaN or infinity.
    ValueError
        As forward.

    Examples
    --------
    >>> from qwen3np.verify import published_hash, verify
    >>> verify(qwen3np.load(), published_hash()).passed
    True
    """
    ids = hashed_ids(model)
    exact, fast = model(ids, engine="exact"), model(ids)
    require_finite(exact, model.weights, model.config, ids, "float32")
    distance = float(np.linalg.norm((fast - exact).astype(np.float64)) / np.linalg.norm(exact.astype(np.float64)))
    report = None
    if rows is not None:
        norms: list[Array] = []

        def keep(name: str, x: Array) -> None:
            if name.removeprefix("model.layers.").isdigit():
                norms.append(np.linalg.norm(x[0].astype(np.float64), axis=-1))

        logits = model(rows["ids"], engine="exact", trace=keep)[0]
        report = compared(logits, np.array(norms), rows)
    return Verification(sha256(exact), published, distance, float(np.mean(fast == exact)), report)


def compared(logits: Array, norms: Array, rows: dict[str, Any]) -> RowsReport:
    """Compare logits (S, V) and the norms (L, S) of the layers' outputs with published rows."""
    ids = np.array([[token for token, _ in row] for row in rows["top"]])
    theirs = np.array([[logit for _, logit in row] for row in rows["top"]])
    expected = np.array(rows["norms"])
    return RowsReport(
        len(ids),
        int(np.sum(logits.argmax(axis=-1) == ids[:, 0])),
        float(np.max(np.abs(np.take_along_axis(logits, ids, axis=-1) - theirs))),
        float(np.max(np.abs(norms - expected) / expected)),
    )


def published_hash() -> str:
    """Return the SHA-256 that the built-in checkpoint's exact logits should have."""
    return json.loads(BUILTIN.read_text(encoding="utf-8"))["sha256"]


def published_rows(name: str | None) -> dict[str, Any] | None:
    """Return the published rows of the model with this name or folder, if any."""
    if name is not None and Path(name).name == ROWS.stem:
        return json.loads(ROWS.read_text(encoding="utf-8"))
    return None
