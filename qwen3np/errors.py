"""The named errors. Messages about untrusted files are kept to one line."""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"  # within Persian and Indic words, and emoji


def visible(text: str, keep: str = "\n") -> str:
    """Make text safe for a terminal: control characters, escapes and bidirectional marks appear as their codes."""
    if text.isprintable():
        return text
    return "".join(
        c
        if c.isprintable() or c in keep or c in _JOINERS or unicodedata.category(c) == "Zs"
        else c.encode("unicode_escape").decode()
        for c in text.replace("\t", "    ")
    )


def one_line(text: object) -> str:
    """Make untrusted text safe for an error message: one line, no terminal codes, long text cut in the middle."""
    shown = str(text)
    if len(shown) > 4000:
        shown = f"{shown[:2000]} ... {shown[-2000:]}"
    return visible(shown, keep="")


class _OneLine(ValueError):
    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(_OneLine):
    """A config.json that cannot be read, or that asks for something this package does not support."""


class CheckpointError(_OneLine):
    """An unusable checkpoint; the message lists everything that is wrong with it."""


class ContextOverflowError(ValueError):
    """More positions than there is room for. Nothing was written."""


class NonFiniteError(ValueError):
    """NaN or infinity in a result; the message names the first affected point and token."""
