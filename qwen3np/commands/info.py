"""`qwen3np info`: describe a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys

from qwen3np.commands import add_model, named, scaled, table
from qwen3np.config import Config
from qwen3np.errors import one_line
from qwen3np.files.adapter import adapted
from qwen3np.files.checkpoint import read_checkpoint
from qwen3np.files.folders import gguf_of
from qwen3np.files.gguf import read_gguf
from qwen3np.files.hub import has_weights, resolve
from qwen3np.memory import available_memory
from qwen3np.stored import kind
from qwen3np.weights import count_parameters

EXAMPLE = "qwen3np info --model Qwen/Qwen3-0.6B"
HELP = "describe a checkpoint: architecture, parameters, memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    text = "report the memory for a context of N positions (default: 1000)"
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--positions", type=int, metavar="N", default=1000, help=text)
    add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the architecture table. A folder with nothing but a config.json is enough."""
    positions: int = arguments.positions
    if positions < 1:
        raise ValueError(f"--positions={positions} must be at least 1")
    # people ask whether a model fits before they download its weights
    folder = resolve(named(arguments), revision=arguments.revision, gguf_file=arguments.gguf_file, weights=False)
    file = gguf_of(folder, arguments.gguf_file) if folder.is_file() or arguments.gguf_file else None
    if file is None and not (folder / "config.json").exists():
        file = gguf_of(folder)
    if file is not None or has_weights(folder) or not (folder / "config.json").exists():
        config, weights = read_gguf(file)[:2] if file is not None else read_checkpoint(folder)
        if arguments.adapter is not None:
            config, weights = adapted(config, weights, resolve(arguments.adapter, adapter=True))
        stored = sum(path.stat().st_size for path in weights.files)
        formats = " and ".join(sorted({kind(tensor) for tensor in weights.values()}))
        bits = 8 * sum(tensor.nbytes for tensor in weights.values()) / sum(tensor.size for tensor in weights.values())
        count = len(weights.files)
        disk = f"{stored:,} bytes in {count} file{'s' * (count > 1)}, {formats}: {bits:.3g} bits per weight"
        for remark in weights.remarks:
            print(f"[{one_line(remark)}]", file=sys.stderr)
    else:
        config = Config.from_file(folder)
        stored = 2 * count_parameters(config)["unique"]
        there = "only some" if any(folder.glob("*.safetensors")) else "no"
        disk = f"{stored:,} bytes in bfloat16 ({there} weights in this folder)"
    config = scaled(config, arguments)
    count = count_parameters(config)
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * positions
    mapped, copied = stored + 4 * cache, 4 * (count["unique"] + cache)
    if arguments.json:
        result = {"checkpoint": str(folder), "config": config.to_dict(), "parameters": count, "stored_bytes": stored}
        result |= {"positions": positions, "cache_bytes": {"float32": 4 * cache, "bfloat16": 2 * cache}}
        result |= {"memory_bytes": {"mapped": mapped, "copied": copied, "free": available_memory()}}
        print(json.dumps(result, ensure_ascii=False))
        return
    layers = range(config.num_hidden_layers)
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
        ("  active", f"{count['active']:,} for each token"),
        ("on disk", disk),
        ("cache", f"{4 * cache:,} bytes per {positions:,} positions in float32, {2 * cache:,} in bfloat16"),
        (
            "memory",
            f"{mapped / 1e9:,.1f} GB with the file mapped and this cache, {copied / 1e9:,.1f} with a float32 copy",
        ),
        ("this machine", _fits(mapped, copied)),
    ]
    if yarn := config.rope_scaling:
        original = yarn.original_max_position_embeddings
        rows.insert(8, ("  YaRN", f"factor {yarn.factor:g} over {original:,} positions"))
    if any(config.window(layer) for layer in layers):
        sliding = sum(config.window(layer) is not None for layer in layers)
        rows.insert(5, ("  window", f"{config.sliding_window:,} positions in {sliding} layers"))
    if config.num_experts:
        sparse = sum(config.is_sparse(layer) for layer in layers)
        text = f"{config.num_experts} of size {config.moe_intermediate_size:,} in {sparse} layers"
        rows.insert(4, ("  experts", f"{text}, {config.num_experts_per_tok} of them for each token"))
    print(table(rows))


def _fits(mapped: int, copied: int) -> str:
    """Say whether these sizes, with the file mapped or with a float32 copy, fit into the free memory."""
    free = available_memory()
    if not free:
        return "free memory is unknown"
    room = f"into {free / 1e9:,.1f} GB of free memory"
    if mapped > free:
        return f"does not fit {room}: weights would be read from disk repeatedly"
    return f"fits {room}, {'mapped or copied' if copied <= free else 'mapped'}"
