"""`qwen3np info`: describe a checkpoint."""

from __future__ import annotations

import argparse

from qwen3np.checkpoint import count_parameters, read_checkpoint
from qwen3np.commands import add_model, named, table
from qwen3np.hub import resolve

EXAMPLE = "qwen3np info --model Qwen/Qwen3-0.6B"
HELP = "describe a checkpoint: architecture, parameters, memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the architecture table."""
    folder = resolve(named(arguments), revision=arguments.revision)
    config, weights = read_checkpoint(folder)
    count = count_parameters(config)
    files = sorted(folder.glob("*.safetensors"))
    stored = sum(file.stat().st_size for file in files)
    dtypes = sorted({str(tensor.dtype) for tensor in weights.values()})
    positions = 1000
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * positions
    group = config.num_attention_heads // config.num_key_value_heads
    rows = [
        ("checkpoint", str(folder)),
        ("layers", f"{config.num_hidden_layers}"),
        ("hidden size", f"{config.hidden_size:,}"),
        ("MLP size", f"{config.intermediate_size:,}"),
        (
            "attention heads",
            f"{config.num_attention_heads} query, {config.num_key_value_heads} key and value (groups of {group}), "
            f"of {config.head_dim}" + (", with bias" if config.attention_bias else ""),
        ),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("head", "tied to the embedding" if config.tie_word_embeddings else "its own matrix"),
        ("context", f"{config.max_position_embeddings:,} positions, rope_theta {config.rope_theta:,.10g}"),
        ("norm epsilon", f"{config.rms_norm_eps:g}"),
        ("parameters", f"{count['total']:,} in total, {count['unique']:,} unique"),
        ("  non-embedding", f"{count['non_embedding']:,}"),
        ("on disk", f"{stored:,} bytes in {len(files)} file{'s' * (len(files) > 1)}, {', '.join(dtypes)}"),
        ("cache", f"{4 * values:,} bytes per {positions:,} positions in float32, {2 * values:,} in bfloat16"),
    ]
    print(table(rows))
