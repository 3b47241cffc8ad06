"""A kit for the test suite of a port: tiny checkpoints that show the bugs, with their golden values."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np

import qwen3np
from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.files.checkpoint import save_checkpoint
from qwen3np.files.gguf_writer import write_gguf
from qwen3np.files.tokenizer_files import byte_level_bpe
from qwen3np.guard import forward
from qwen3np.numerics import BFLOAT16, Array
from qwen3np.porting.floors import LEAST, MARGIN
from qwen3np.porting.points import split_pass
from qwen3np.porting.record import Recording, record
from qwen3np.weights import Weights, init_weights

PROMPT, STEPS = 256, 3
# Nothing is equal by chance: Dh is not D / H, G is 3, no size is another's.
TIED = Config(
    vocab_size=101,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=1e6,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
UNTIED = replace(TIED, tie_word_embeddings=False)
MOE = replace(
    UNTIED,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    norm_topk_prob=True,
)
# For kernels that take no other sizes: heads of 128, as released models have, and multiples of 64.
WIDE = replace(
    TIED,
    vocab_size=320,
    hidden_size=128,
    intermediate_size=192,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
)
CONFIGS = {"tied": TIED, "untied": UNTIED, "moe": MOE, "wide": WIDE}
# The character of each id, so that a prompt is a text, too. None is a line's end, which programs cut off at the end.
TEXT = bytes([*range(32, 127), 9, 11, 12, 27, 28, 29])
GAP = 0.08  # of the norm of a token's router logits, of which bfloat16 moves a difference by 0.02
VALUES = "values"  # a separate folder: some programs load every .safetensors file next to config.json
README = f"""# Golden values for a port of Qwen3

Four checkpoints: `tied` and `untied` (whether the head is the embedding), `moe`, which sends each token to 2 of 8
experts, and `wide`, with heads of 128 and sizes that are multiples of 64, for kernels that accept no others. They are
small enough for a test suite and made so that bugs show: norm weights other than 1, several query heads for each key
head, head_dim other than hidden_size / heads, {PROMPT} positions, and {STEPS} steps with the cache. In each folder:

| file | what it holds |
|---|---|
| `config.json`, `model.safetensors` | the checkpoint, in bfloat16, as Hugging Face lays it out |
| `tokenizer.json`, `tokenizer_config.json` | a tokenizer with an id for each character, for programs that ask for one |
| `model.gguf` | the same in F32, for llama.cpp, whose converter only accepts tokenizers that it lists |
| `{VALUES}/prompt.txt` | the prompt as the text that the tokenizer turns into these ids |
| `{VALUES}/ids.json` | `prompt`: the {PROMPT} ids to feed at once; `decode`: {STEPS} to feed one by one after them |
| `{VALUES}/golden.safetensors` | every intermediate value, in float32; decode steps are `decode.0.lm_head` and so on |
| `{VALUES}/golden.npz` | the same arrays, and all `ids`; keep whichever file your language can read |
| `{VALUES}/hashes.json` | point -> SHA-256 of its float32 numbers, for a port that rounds each operation correctly |
| `{VALUES}/tolerances.json` | precision -> point -> the distance that is still rounding, in order of computation |

The test, in any language: load the checkpoint, feed the ids, and at each point that you have, in the order of
`tolerances.json`,

    sqrt(sum((mine - golden)^2)) <= tolerance * sqrt(sum(golden^2))

with sums in float64 over the whole array. Of `scores`, take them where golden is finite; where it is -inf, yours must
be -inf or below -9000. The first point that fails is the wrong step. Take the tolerances of "float32" for a port that
computes in float32, and those of "float16" or "bfloat16" for one that rounds to those anywhere. They are measured, not
guessed: {MARGIN:g} times the error that rounding causes in the reference itself, point by point.

The values come from the exact engine: each operation's result is the float32 nearest to the exact one, so they have the
same bits on every machine.

Shapes are (1, positions, features); `q_norm` and `k_norm` are (1, positions, heads, head_dim), `q_rope` and `k_rope`
(1, heads, positions, head_dim), `scores` and `probs` (1, heads, positions, all positions so far).

In `moe`, `router_indices` are integers: compare them as sets, token by token; their tolerance is the share that may be
others. The ids are chosen such that no two experts are so near that 16 bits could choose the other one.

To find out why it fails, write your values under the same names to a .safetensors, a .npz or a folder of .npy files:

    qwen3np compare tied/{VALUES}/golden.safetensors mine.safetensors --model tied

Made by `qwen3np fixture`, version {qwen3np.__version__}, in a few seconds; a CI job can make it again.
The guide for port authors is qwen3np/porting/README.md in the source of qwen3np.
"""


def write_fixture(folder: str | Path) -> None:
    """Write the kit, whole or not at all. Raises ValueError if the folder exists."""
    folder = Path(folder).resolve()
    if folder.exists():
        raise ValueError(f"{folder}: is there already; choose a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as partial:
        kit = Path(partial) / folder.name
        for seed, (name, config) in enumerate(CONFIGS.items()):
            weights = {key: w.astype(BFLOAT16) for key, w in init_weights(config, seed, trained_like=True).items()}
            save_checkpoint(kit / name, config, weights)
            if config.num_experts:
                _complete(kit / name / "config.json")
            tokenizer = _write_tokenizer(kit / name, config.vocab_size)
            write_gguf(kit / name / "model.gguf", config, weights, tokenizer, kind="F32", name=f"qwen3np {name}")
            prompt, fed = np.split(ids_without_ties(weights, config, seed), [PROMPT], 1)
            golden = record(weights, config, prompt, fed=fed, engine="exact")
            values = kit / name / VALUES
            values.mkdir()
            golden.save(values / "golden.safetensors")
            cast("Any", np.savez_compressed)(values / "golden.npz", ids=golden.ids, **golden.points)
            parts = {"prompt": golden.ids[0, :PROMPT].tolist(), "decode": golden.ids[0, PROMPT:].tolist()}
            (values / "ids.json").write_text(json.dumps(parts), encoding="utf-8")
            (values / "prompt.txt").write_bytes(bytes(TEXT[i] for i in parts["prompt"]))
            (values / "hashes.json").write_text(json.dumps(golden.sha256, indent=1), encoding="utf-8")
            (values / "tolerances.json").write_text(json.dumps(tolerances(golden), indent=1), encoding="utf-8")
        (kit / "README.md").write_text(README, encoding="utf-8")
        os.replace(kit, folder)


def ids_without_ties(weights: Weights, config: Config, seed: int) -> Array:
    """Draw the ids (1, PROMPT + STEPS) of a set: of experts only such that 16 bits choose the same.

    An id is drawn again where, in any layer, the last expert that is chosen and the first that is not are so near that
    rounding decides. Without that a set with experts would have tolerances of 0.6 in bfloat16, and show nothing there.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, len(TEXT), (1, PROMPT + STEPS))
    if not config.num_experts:
        return ids
    cache, k = KVCache.allocate(config, 1, PROMPT + STEPS), config.num_experts_per_tok
    gaps: list[float] = []

    def measure(name: str, x: Array) -> None:
        if name.endswith("mlp.gate"):
            best = np.sort(x[0, 0])[::-1]
            gaps.append(float((best[k - 1] - best[k]) / np.linalg.norm(best)))

    for i in range(PROMPT + STEPS):
        while True:
            gaps.clear()
            forward(weights, config, ids[:, i : i + 1], cache, engine="exact", trace=measure)
            if min(gaps) > GAP:
                break
            cache.keep_prefix(0, ids[0, :i].tolist())
            ids[0, i] = rng.integers(0, len(TEXT))
    return ids


def _write_tokenizer(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Write a tokenizer of single characters, and return what tokenizer.json holds."""
    from tokenizers import models

    # A byte-level token is spelt with a visible letter for each byte: those that have none follow from U+0100 on.
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in TEXT]
    letters += [f"[{i}]" for i in range(len(letters), vocab_size)]
    vocab = {letter: i for i, letter in enumerate(letters)}
    text = byte_level_bpe(models.BPE(vocab=vocab, merges=[])).to_str()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    about: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": PROMPT + STEPS}
    about |= dict.fromkeys(("unk_token", "eos_token", "pad_token"))  # else transformers adds <|endoftext|>
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
    return json.loads(text)


def _complete(path: Path) -> None:
    """Add keys to a config.json that change nothing here, but that converters and other programs need."""
    found = json.loads(path.read_text(encoding="utf-8"))
    found |= {"router_aux_loss_coef": 0.001, "output_router_logits": False}
    path.write_text(json.dumps(found, indent=2), encoding="utf-8")


def tolerances(golden: Recording) -> dict[str, dict[str, float]]:
    """Return the relative L2 distance up to which compare says rounding, for each precision and point."""

    def floor(precision: str, name: str) -> float:
        of = golden.floors[precision]
        return max(LEAST[precision], of[name][0], of[split_pass(name)[1]][0])

    return {
        p: {name: MARGIN * math.hypot(floor(p, name), floor(golden.numerics, name)) for name in golden.points}
        for p in golden.floors
    }
