"""Answers that follow a grammar: a JSON schema, a regular expression or a Lark grammar, as a logits processor.

llguidance (extra `serve`) computes which tokens may come next; every other logit becomes -inf. The answer can end only
where the grammar allows it, so an answer that ends before its length limit is always complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from qwen3np.numerics import Array
from qwen3np.tokenizer import Tokenizer

Processor: TypeAlias = Callable[[Array, Array], Array]


class Grammars:
    """Compiles grammars for a model's tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Collection[int]) -> None:
        """`ends` are the ids that may end an answer once the grammar is satisfied."""
        self._tokenizer, self._size, self._ends = tokenizer, vocab_size, sorted(ends)

    def json_schema(self, schema: Any, after: int | None = None) -> Processor:
        """Return the processor for JSON that a schema describes, without optional white space. ValueError if bad."""
        return self.lark(f"start: {json_rule(schema)}", after)

    def regex(self, pattern: str, after: int | None = None) -> Processor:
        """Return the processor for texts that match a regular expression."""
        return self._compiled(self._library.LLMatcher.grammar_from_regex(pattern), after)

    def lark(self, grammar: str, after: int | None = None) -> Processor:
        """Return the processor for a grammar in llguidance's Lark syntax.

        It is for one answer. With `after`, an id, it applies from that id on: the end of the reasoning.
        """
        return self._compiled(self._library.LLMatcher.grammar_from_lark(grammar), after)

    def _compiled(self, grammar: str, after: int | None) -> Processor:
        matcher = self._library.LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"grammar: {' '.join(matcher.get_error().split())[:500]}")
        return _Follower(matcher, self._size, after)

    @cached_property
    def _library(self) -> Any:
        try:
            import llguidance
        except ImportError:
            raise ValueError("grammars need llguidance: pip install qwen3np[serve]") from None
        return llguidance

    @cached_property
    def _vocabulary(self) -> Any:
        tokenizer = self._tokenizer

        class Vocabulary:
            """What llguidance asks of a tokenizer."""

            eos_token_id, bos_token_id = self._ends[0], None
            tokens = [tokenizer.token_bytes(i) for i in range(self._size)]  # noqa: RUF012
            special_token_ids = list(tokenizer.special_tokens.values())  # noqa: RUF012

            def __call__(self, text: bytes) -> list[int]:
                return tokenizer.encode(text.decode(errors="replace"))

        wrapped = self._library.TokenizerWrapper(Vocabulary())
        return self._library.LLTokenizer(wrapped, n_vocab=self._size, eos_token=self._ends)


def json_rule(schema: Any) -> str:
    """The part of a Lark grammar that stands for JSON of this schema, without optional white space."""
    compact = {"x-guidance": {"whitespace_flexible": False}}
    return f"%json {json.dumps({**schema, **compact} if isinstance(schema, dict) else schema)}"


class _Follower:
    """The state of one answer within its grammar."""

    def __init__(self, matcher: Any, size: int, after: int | None) -> None:
        self._matcher, self._size, self._after = matcher, size, after
        self._seen: int | None = None  # how many ids were read

    def __call__(self, ids: Array, logits: Array) -> Array:
        """Return the logits with -inf for every id that the grammar does not allow next."""
        new = [] if self._seen is None else [int(i) for i in ids[self._seen :]]
        self._seen = len(ids)
        if self._after is not None:
            if self._after not in new:
                return logits
            new = new[new.index(self._after) + 1 :]
            self._after = None
        for i in new:
            self._matcher.consume_token(i)
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ValueError(f"grammar: {' '.join(self._matcher.get_error().split())[:500]}")
        allowed = np.unpackbits(mask, bitorder="little")[: self._size].astype(bool)
        return np.where(allowed, logits, np.float32(-np.inf))
