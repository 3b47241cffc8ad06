"""A byte-level BPE tokenizer like Qwen3's, trained on a corpus, and the files of a checkpoint that go with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3np.tokenizer import byte_level_bpe

if TYPE_CHECKING:
    import tokenizers

# Qwen3's added tokens in its order; skip_special_tokens drops the special ones.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PLAIN_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip

# ChatML. chat.py recognises its hash, and renders it without a separate process.
CHAT_TEMPLATE = """\
{%- if tools or messages | selectattr('tool_calls') | list %}
    {{- raise_exception('this model knows no tools') }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant') %}
        {{- raise_exception('this model knows the roles system, user and assistant, not ' ~ message.role) }}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A BPE tokenizer with the 256 bytes, merges learned from `texts`, and Qwen3's 26 added tokens at the end.

    vocab_size counts all three; short texts give fewer merges. The same texts give the same tokenizer. Raises
    ValueError if vocab_size is too small for the bytes and the added tokens.
    """
    from tokenizers import AddedToken, models, pre_tokenizers, trainers

    alphabet, added = pre_tokenizers.ByteLevel.alphabet(), SPECIAL_TOKENS + PLAIN_TOKENS
    if vocab_size < len(alphabet) + len(added):
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {len(alphabet)} bytes and {len(added)} added tokens need "
            f"{len(alphabet) + len(added)}"
        )
    tokenizer = byte_level_bpe(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        min_frequency=2,  # a pair seen once teaches nothing
        initial_alphabet=alphabet,
        show_progress=False,
    )
    # The trainer would learn merges from the letters of added tokens, which BPE never sees in use.
    cuts = re.compile("|".join(re.escape(token) for token in added))
    tokenizer.train_from_iterator((part for text in texts for part in cuts.split(text)), trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=t in SPECIAL_TOKENS) for t in added])
    return tokenizer


def write_tokenizer(folder: str | Path, tokenizer: tokenizers.Tokenizer, model_max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template), as AutoTokenizer reads them.

    model_max_length is the context of the model. The folder is created if necessary.
    """
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": model_max_length,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    files = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())


def generation_config(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """Return the contents of generation_config.json: greedy, until the end of the answer or the text."""
    end_of_text, end_of_message = (tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|im_end|>"))
    return {
        "do_sample": False,
        "eos_token_id": [end_of_message, end_of_text],
        "pad_token_id": end_of_text,
        "max_new_tokens": 256,
    }
