"""Write a checkpoint with random, trained-like weights: a stand-in of the real size where the real one is not at hand.

    python benchmarks/random_checkpoint.py FOLDER                                a small one (5 MB) of its own
    python benchmarks/random_checkpoint.py FOLDER --like DIR --tokenizer DIR     the sizes of DIR/config.json

The small one gets a tokenizer whose tokens are the 256 bytes, --like copies the one it is given.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import ml_dtypes

from qwen3np import Config, init_weights, save_checkpoint

SMALL = {
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "eos_token_id": 257,
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer.json without merges: a token for each byte, and the marks of chats and reasoning."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))


def write_random_checkpoint(
    folder: Path, *, like: Path | None = None, tokenizer: Path | None = None, seed: int = 0
) -> None:
    """Write a checkpoint with the sizes of like/config.json, or a small one. The files of like come along."""
    config = Config.from_file(like) if like else Config.from_dict(SMALL)
    save_checkpoint(folder, config, init_weights(config, seed, trained_like=True), dtype=ml_dtypes.bfloat16)
    copied = [like / name for name in ("tokenizer_config.json", "generation_config.json")] if like else []
    for file in [*copied, *([tokenizer / "tokenizer.json"] if tokenizer else [])]:
        if file.exists():
            shutil.copyfile(file, folder / file.name)
    if not like and not tokenizer:
        write_byte_tokenizer(folder)


def main() -> None:
    """Write the folder that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--like", type=Path, help="a folder with the config.json to take the sizes from")
    parser.add_argument("--tokenizer", type=Path, help="a folder with the tokenizer.json to copy")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_random_checkpoint(arguments.folder, like=arguments.like, tokenizer=arguments.tokenizer, seed=arguments.seed)


if __name__ == "__main__":
    main()
