"""Write a checkpoint with random, trained-like weights: a stand-in of the real size where the real one is not at hand.

    python benchmarks/random_checkpoint.py FOLDER --like DIR --tokenizer DIR

The sizes are those of DIR/config.json.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import ml_dtypes

from qwen3np import Config, init_weights, save_checkpoint


def write_random_checkpoint(folder: Path, *, like: Path, tokenizer: Path, seed: int = 0) -> None:
    """Write a checkpoint with the sizes of like/config.json. The files of like and tokenizer come along."""
    config = Config.from_file(like)
    save_checkpoint(folder, config, init_weights(config, seed, trained_like=True), dtype=ml_dtypes.bfloat16)
    for file in (like / "tokenizer_config.json", like / "generation_config.json", tokenizer / "tokenizer.json"):
        if file.exists():
            shutil.copyfile(file, folder / file.name)


def main() -> None:
    """Write the folder that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--like", type=Path, required=True, help="a folder with the config.json to take the sizes from")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with the tokenizer.json to copy")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_random_checkpoint(arguments.folder, like=arguments.like, tokenizer=arguments.tokenizer, seed=arguments.seed)


if __name__ == "__main__":
    main()
