"""The errors that have names; those about files strangers wrote are kept to one line."""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"  # within Persian and Indic words, and emoji


def visible(text: str, keep: str = "\n") -> str:
    """Return text as it may reach a terminal: control characters, escapes and bidirectional marks as their codes."""
    if text.isprintable():
        return text
    return "".join(
        c
        if c.isprintable() or c in keep or c in _JOINERS or unicodedata.category(c) == "Zs"
        else c.encode("unicode_escape").decode()
        for c in text.replace("\t", "    ")
    )


def one_line(text: object) -> str:
    """Return what may hold a stranger's words as an error shows it: one line, no terminal codes, cut in the middle."""
    shown = str(text)
    if len(shown) > 4000:
        shown = f"{shown[:2000]} ... {shown[-2000:]}"
    return visible(shown, keep="")


class _OneLine(ValueError):
    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(_OneLine):
    """A config.json that cannot be read, or that asks for something this package does not do."""


class CheckpointError(_OneLine):
    """A checkpoint that cannot be used; the message lists everything that is wrong with it."""


class ContextOverflowError(ValueError):
    """More positions than there is room for. Nothing was written."""


class NonFiniteError(ValueError):
    """NaN or infinity where there must be numbers; the message names the first recorded point and token."""
