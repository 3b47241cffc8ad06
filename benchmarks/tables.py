"""Markdown tables of measurements."""

from __future__ import annotations

from collections.abc import Sequence


def value(x: float) -> str:
    """Return three digits, or all digits before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first column is text, the others are numbers."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows)) + "\n"
