"""Write a checkpoint with random, trained-like weights: a stand-in of the real size if the real one is not available.

    python benchmarks/random_checkpoint.py FOLDER [--size 4B]
    python benchmarks/random_checkpoint.py FOLDER --like DIR --tokenizer DIR    # other sizes, another tokenizer

It has the built-in checkpoint's tokenizer unless another is named; ids outside of it decode to nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import ml_dtypes

from qwen3np import Config, init_weights, save_checkpoint
from qwen3np.files.hub import BUILTIN

# what the config.json of Qwen3-0.6B and of Qwen3-4B say
COMMON = {
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "eos_token_id": 151645,
}
OWN = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}
SIZES = {size: Config.from_dict(COMMON | own) for size, own in OWN.items()}


def write_random_checkpoint(
    folder: Path, *, size: str = "0.6B", like: Path | None = None, tokenizer: Path = BUILTIN, seed: int = 0
) -> None:
    """Write a checkpoint of one of SIZES, or with the sizes of like/config.json.

    The tokenizer's files and stop ids are included; those that it lacks come from `like`.
    """
    config = Config.from_file(like) if like else SIZES[size]
    save_checkpoint(folder, config, init_weights(config, seed, trained_like=True), dtype=ml_dtypes.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        found = [source / name for source in (tokenizer, like) if source and (source / name).exists()]
        if found:
            shutil.copyfile(found[0], folder / name)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the flags for creating a checkpoint if there is none yet."""
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--size", choices=SIZES, default="0.6B", help="the sizes of a new checkpoint (0.6B)")
    sizes.add_argument("--like", type=Path, metavar="DIR", help="a folder with a config.json to take the sizes from")
    parser.add_argument("--tokenizer", type=Path, default=BUILTIN, metavar="DIR", help="a folder with a tokenizer.json")


def make_if_missing(folder: Path, arguments: argparse.Namespace) -> None:
    """Write the checkpoint that the flags describe, unless the folder has one."""
    if not (folder / "config.json").exists():
        print(f"[making {folder}]", file=sys.stderr)
        write_random_checkpoint(folder, size=arguments.size, like=arguments.like, tokenizer=arguments.tokenizer)


def main() -> None:
    """Write the folder that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    add_checkpoint(parser)
    a = parser.parse_args()
    write_random_checkpoint(a.folder, size=a.size, like=a.like, tokenizer=a.tokenizer, seed=a.seed)


if __name__ == "__main__":
    main()
