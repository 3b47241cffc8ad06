"""The tokenizer and the chat template in the metadata of a .gguf file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qwen3np.errors import CheckpointError
from qwen3np.files.tokenizer_files import byte_level_bpe, refused
from qwen3np.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

_SPLITS = ("qwen2", "deepseek-r1-qwen")  # llama.cpp's names of how Qwen3's tokenizer splits texts
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # token types; unused ones pad the vocabulary


@dataclass(frozen=True)
class FromGGUF(Tokenizer):
    """The tokenizer in the metadata of a .gguf file, which `folder` is here."""

    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def files(self) -> dict[str, bytes]:
        """Return tokenizer.json and tokenizer_config.json with the same tokens and the same template."""
        config = {**self._config, "tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False}
        if self._chat_templates:
            config["chat_template"] = self._chat_templates["default"]
        return {
            "tokenizer.json": self._backend.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
        }

    def _from_files(self) -> tokenizers.Tokenizer:
        from tokenizers import AddedToken, models

        kind, split = self._of("model"), self._of("pre")
        if kind != "gpt2" or split not in _SPLITS:
            raise CheckpointError(
                f"{self.folder}: its tokenizer is {kind!r} with {split!r}, where Qwen3 has 'gpt2' with 'qwen2'"
            )
        tokens, kinds, merges = (self._of(key) for key in ("tokens", "token_type", "merges"))
        with refused(f"{self.folder}: not a BPE vocabulary"):
            kinds = [1] * len(tokens) if kinds is None else kinds
            vocab = {token: n for n, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED}
            backend = byte_level_bpe(models.BPE(vocab, [tuple(merge.split(" ", 1)) for merge in merges]))
            added = [
                (token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _USER_DEFINED)
            ]
            backend.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False) for token, kind in added])
        return backend

    def _of(self, key: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    @cached_property
    def _config(self) -> dict[str, Any]:
        tokens, found = self._of("tokens"), dict[str, Any]()
        for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
            token = self._of(f"{key}_token_id")
            if type(token) is int and 0 <= token < len(tokens):
                found[name] = tokens[token]
        return found

    @cached_property
    def _chat_templates(self) -> dict[str, str]:
        text = self.metadata.get("tokenizer.chat_template")
        return {"default": text} if isinstance(text, str) else {}
