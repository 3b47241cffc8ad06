"""Corrupts files of a checkpoint at random, loads and runs the result, and reports errors that are not handled well.

    python tests/fuzz.py --cases 100000 --seed 0    # in processes of 500 cases
    python tests/fuzz.py --atheris                      # guided by coverage, until it is stopped; needs atheris

A case is good if it is refused by a named error, one line that says where, or loads and has the numbers that the
safetensors library reads from the same files. A case that crashes its process, takes more than 5 seconds, needs much
memory or ends in another exception is not.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import qwen3np
from qwen3np import CheckpointError, Config, ConfigError, ContextOverflowError, NonFiniteError
from qwen3np.config import Yarn
from qwen3np.files.gguf_writer import write_gguf
from qwen3np.files.hub import BUILTIN
from qwen3np.stored import Stored

SECONDS = 5
BYTES = 4 << 30  # of addresses; a process takes 1.5 before its first case
PER_PROCESS = 500
CONFIG = Config(
    vocab_size=2048,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    rope_theta=1e4,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
OTHER = replace(
    CONFIG,
    tie_word_embeddings=False,
    attention_bias=True,
    rope_scaling=Yarn(4.0, 16),
    sliding_window=3,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    mlp_only_layers=(0,),
)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
SNIPPETS = [
    "{{ 'a' * 10**9 }}", "{{ [0] * 10**12 }}", "{{ 'a' | center(10**10) }}", "{% for a in range(10**9) %}{% endfor %}",
    "{{ messages[0].__class__.__mro__ }}", "{% set ns = namespace(a=[]) %}{% set ns.a = [ns] %}{{ ns }}", "{{ 1 / 0 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'config.json' %}", "{{ raise_exception('\x1b') }}",
    "{{ messages | tojson(indent=10**10) }}", "{{ strftime_now('%Y' * 10**9) }}", "{{ cycler }}", "{% if %}",
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 3, 4, 8, 255, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400]
VALUES = [
    *NUMBERS, 0.5, 1e-300, 1e300, math.inf, -math.inf, math.nan, True, False, None, "", "x", "..", "/etc/passwd",
    "../model.safetensors", "\0", "\ud800", "F64", "BF16", "F32", "default", "yarn", [], {}, [[]], [1, 2], {"a": 1},
    "\x1b[2J\n\u202e", "x" * 10**5, [1] * 100, "(a+)+$",
]  # fmt: skip
Files = Mapping[str, bytes]


def originals() -> list[dict[str, bytes]]:
    """Return the files of small checkpoints; between them they have all that the package reads.

    The first has shards with an index, a tokenizer and a template; the second experts and a separate head in one
    file, YaRN, a window, biases, the older form of a tokenizer, and its template among the settings, which ask for
    sampling. Then quantised matrices, GGUF files and a LoRA adapter.
    """
    files, other = _saved(CONFIG), _saved(OTHER, "bfloat16")
    header, data = split(files.pop("model.safetensors"))
    names = [name for name in header if name != "__metadata__"]
    weight_map: dict[str, str] = {}
    for n, part in enumerate((names[:12], names[12:]), 1):
        shard, end, own, body = f"model-0000{n}-of-00002.safetensors", 0, {}, b""
        for tensor in part:
            a, b = header[tensor]["data_offsets"]
            own[tensor] = header[tensor] | {"data_offsets": [end, end + b - a]}
            body, end = body + data[a:b], end + b - a
            weight_map[tensor] = shard
        files[shard] = join(json.dumps(own).encode(), body)
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    for known in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        files[known] = (BUILTIN / known).read_bytes()
    files["chat_template.jinja"] = TEMPLATE.encode()
    tokenizer = json.loads(files["tokenizer.json"])
    model, added = tokenizer["model"], {token.pop("id"): token for token in tokenizer["added_tokens"]}
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    other["vocab.json"] = json.dumps(model["vocab"]).encode()
    other["merges.txt"] = "".join(f"{a} {b}\n" for a, b in model["merges"]).encode()
    other["tokenizer_config.json"] = json.dumps({"chat_template": TEMPLATE, "added_tokens_decoder": added}).encode()
    other["generation_config.json"] = json.dumps({**sampling, "repetition_penalty": 1.1, "eos_token_id": [1]}).encode()
    return [files, other, _packed(), _gguf(OTHER), _gguf(CONFIG), _lora()]


def _packed() -> dict[str, bytes]:
    """Return a checkpoint that has each quantised format in some of its matrices."""
    import safetensors.numpy

    rng = np.random.default_rng(0)
    config = replace(CONFIG, hidden_size=64, intermediate_size=64, head_dim=32)
    tensors: dict[str, np.ndarray] = {}

    def words(*shape: int) -> np.ndarray:
        return rng.integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32)

    for name, w in qwen3np.init_weights(config, 0, trained_like=True).items():
        (prefix, kind), (out, inputs) = name.rsplit(".", 1)[0].rsplit(".", 1), (*w.shape, 1)[:2]
        place = f"{prefix}.{kind}."
        scales, e4m3 = rng.random((2, out)).astype(np.float16) / 64, ml_dtypes.float8_e4m3fn
        if kind == "q_proj":
            tensors |= {f"{place}weight": w.astype(e4m3), f"{place}weight_scale_inv": np.ones((1, 1), np.float32)}
        elif kind == "down_proj":
            tensors |= {f"{place}weight": w.astype(e4m3), f"{place}weight_scale": np.ones((out, 1), np.float32)}
        elif kind == "k_proj":
            tensors |= {f"{place}qweight": words(inputs, out // 8), f"{place}qzeros": words(2, out // 8)}
            tensors[f"{place}scales"] = scales
        elif kind == "v_proj":
            tensors |= {f"{place}qweight": words(inputs // 8, out), f"{place}qzeros": words(2, out // 8) & 0x66666666}
            tensors |= {f"{place}scales": scales, f"{place}g_idx": np.arange(inputs, dtype=np.int32) % 2}
        elif kind == "o_proj":
            tensors |= {f"{place}qweight": words(inputs // 4, out), f"{place}qzeros": words(2, out // 4) & 0x7F7F7F7F}
            tensors[f"{place}scales"] = scales
        elif kind in ("gate_proj", "up_proj"):
            tensors |= {f"{place}weight": words(out, inputs // (8 if kind == "up_proj" else 4)).view(np.uint32)}
            tensors |= {f"{place}scales": scales.T.copy(), f"{place}biases": scales.T.copy()}
        else:
            tensors[name] = w
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return {
        "model.safetensors": safetensors.numpy.save(tensors),
        "config.json": json.dumps(config.to_dict() | {"quantization_config": settings}).encode(),
    }


def _gguf(config: Config) -> dict[str, bytes]:
    """Return a GGUF file with a tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "norm_topk_prob": True, "mlp_only_layers": ()}
    config = replace(config, **sizes, sliding_window=None, head_dim=16)
    config = replace(config, moe_intermediate_size=32) if config.num_experts else replace(config, norm_topk_prob=False)
    tokenizer = json.loads((BUILTIN / "tokenizer.json").read_text())
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.gguf"
        weights = qwen3np.init_weights(config, 0, trained_like=True)
        write_gguf(path, config, weights, tokenizer, kind="Q8_0", chat_template=TEMPLATE)
        return {path.name: path.read_bytes()}


def _lora() -> dict[str, bytes]:
    """Return the files of a checkpoint with an adapter for it, which run applies."""
    import safetensors.numpy

    place = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = {
        f"{place}.lora_A.weight": np.ones((2, 8), np.float32),
        f"{place}.lora_B.weight": np.ones((8, 2), np.float32),
    }
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"q_proj": 2}, "use_rslora": True}
    return _saved(CONFIG) | {
        "adapter_config.json": json.dumps(settings).encode(),
        "adapter_model.safetensors": safetensors.numpy.save(pair),
    }


def _saved(config: Config, dtype: str | None = None) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        qwen3np.save_checkpoint(folder, config, qwen3np.init_weights(config, 0, trained_like=True), dtype=dtype)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def split(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a safetensors file."""
    length = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def join(header: bytes, data: bytes) -> bytes:
    """Return a safetensors file."""
    return len(header).to_bytes(8, "little") + header + data


def mutate(files: Files, draw: random.Random) -> dict[str, bytes]:
    """Return the files with one to three changes."""
    changed = dict(files)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        name = draw.choice(sorted(changed))
        change = draw.choice([_change_bytes, _change_json, _change_json, _change_json])
        if len(changed) > 1 and draw.random() < 0.02:
            del changed[name]
        elif draw.random() < 0.02:
            other = draw.choice(sorted(changed))
            changed[name], changed[other] = changed[other], changed[name]
        elif name.endswith(".jinja") and draw.random() < 0.2:
            changed[name] += draw.choice(SNIPPETS).encode()
        elif name.endswith(".safetensors") and change is _change_json:
            header, data = split(files[name]) if name in files else ({}, b"")
            changed[name] = join(_mutated_json(header, draw).encode(errors="surrogatepass"), data)
        else:
            changed[name] = change(changed[name], draw)
    return changed


def _change_bytes(data: bytes, draw: random.Random) -> bytes:
    """Flip, cut, repeat, insert or drop some bytes, near the front more often."""
    at = int(min(draw.expovariate(1 / 64), len(data))) if draw.random() < 0.5 else draw.randint(0, len(data))
    to = int(min(at + draw.expovariate(1 / 8), len(data)))
    some = bytes(draw.randrange(256) for _ in range(draw.randint(1, 8)))
    kind = draw.randrange(6)
    return [
        data[:at] + some + data[at + len(some) :],
        data[:at],
        data[:at] + data[at:to] * 2 + data[to:],
        data[:at] + some + data[at:],
        data[:at] + data[to:],
        data[:at] + bytes([255] * (to - at)) + data[to:],
    ][kind]


def _change_json(data: bytes, draw: random.Random) -> bytes:
    """Change a value somewhere in a JSON file; any other file, its bytes."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _change_bytes(data, draw)
    return _mutated_json(value, draw).encode(errors="surrogatepass")


def _mutated_json(value: Any, draw: random.Random) -> str:
    """Return JSON with one change: another value, a key or entry less or twice, another key, nesting, an exchange."""
    value = json.loads(json.dumps(value))

    def place(x: Any) -> tuple[Any, Any]:  # by way of its holders: a long list is no likelier than one switch
        key = draw.choice(list(x) if isinstance(x, dict) else range(len(x)))
        return place(x[key]) if x[key] and isinstance(x[key], (dict, list)) and draw.random() < 0.8 else (x, key)

    if not value or not isinstance(value, (dict, list)):
        return json.dumps(draw.choice(VALUES))
    holder, key = place(value)
    kind = draw.randrange(9)
    if kind <= 2:
        holder[key] = draw.choice(VALUES)
    elif kind == 3:
        del holder[key]
    elif kind == 4 and isinstance(holder[key], int):
        holder[key] += draw.choice([-8, -1, 1, 8, 2**32])
    elif kind == 5 and isinstance(holder, dict):
        holder[draw.choice([*holder, "x", "rope_scaling", "quantization_config", "__class__", "\x1b[2J"])] = holder[key]
    elif kind == 6:
        text = json.dumps(value)
        return "[" * draw.choice([10, 100_000]) + text
    elif kind == 7:
        other, its = place(value)
        if json.dumps(holder[key]) not in json.dumps(other[its]) or holder is other:  # else a holder would hold itself
            holder[key], other[its] = other[its], holder[key]
    elif isinstance(holder, dict):  # the same key twice
        text, other = json.dumps(value), json.dumps(draw.choice(VALUES))
        return f"{{{json.dumps(key)}: {other}, {text[1:]}" if text.startswith("{") else text
    return json.dumps(value)


def run(files: Files, folder: Path) -> str:
    """Load the files and use what comes out. Return the name of the error that refused them, or "loaded".

    Raises any other exception, and AssertionError for an error that does not say where or is more than a line, and for
    numbers that are not those of the safetensors library.
    """
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    try:
        adapter = folder if "adapter_model.safetensors" in files else None
        model = qwen3np.load(folder, adapter=adapter, weights_dtype="mapped", progress=False)
    except (CheckpointError, ConfigError) as error:
        _one_line(error, str(folder))
        return type(error).__name__
    _same_numbers(model.weights, folder)
    outcome = "loaded"
    try:
        model.generate([1, 2, 3], max_new_tokens=2)
    except (NonFiniteError, ContextOverflowError, CheckpointError) as error:
        outcome = type(error).__name__
    except ValueError as error:  # of values in generation_config.json, which are named in the message
        known = "outside the vocabulary", "must be", "leave the range", "of memory is free", "makes embeddings"
        if not any(words in str(error) for words in known):
            raise
        _one_line(error)
        outcome = "ValueError"
    if model.tokenizer is not None:
        try:
            text = model.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
            model.tokenizer.decode(model.tokenizer.encode(text))
        except ValueError as error:
            _one_line(error)
            outcome = f"tokenizer: {type(error).__name__}"
    return outcome


def _one_line(error: Exception, where: str = "") -> None:
    assert str(error).isprintable(), f"more than a line: {error!r}"
    assert len(str(error)) < 5000, f"a long line: {error!r}"
    assert where in str(error), f"does not say where: {error!r}"


def _same_numbers(weights: Mapping[str, np.ndarray], folder: Path) -> None:
    """Raise AssertionError unless the safetensors library reads the same from the files that count."""
    from safetensors.numpy import load_file

    stored: dict[str, Any] = {}
    single = folder / "model.safetensors"
    if any(isinstance(tensor, Stored) for tensor in weights.values()):
        return
    for path in [single] if single.exists() else sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    for name, tensor in weights.items():
        if name not in stored:  # it has another name in the file
            continue
        other = stored[name].astype(np.float32)
        assert np.array_equal(tensor.astype(np.float32), other, equal_nan=True), name


def cases(seed: int, count: int, report: Callable[[int, str], object]) -> None:
    """Run these cases, each within SECONDS, and report each outcome."""
    both = originals()
    with suppress(ImportError):  # Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))

    def too_long(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as name:
        for n in range(seed, seed + count):
            draw, began = random.Random(n), time.monotonic()
            signal.alarm(SECONDS)
            try:
                outcome = run(mutate(draw.choice(both), draw), Path(name))
                if time.monotonic() - began > SECONDS:  # in a library, which the alarm does not interrupt
                    too_long()
            except Exception as error:
                outcome = f"BAD: {type(error).__name__}: {error}"
            finally:
                signal.alarm(0)
            report(n, outcome)


def _in_processes(seed: int, count: int) -> None:
    outcomes: Counter[str] = Counter()
    bad: list[str] = []
    for first in range(seed, seed + count, PER_PROCESS):
        size = min(PER_PROCESS, seed + count - first)
        command = [sys.executable, __file__, "--worker", "--seed", str(first), "--cases", str(size)]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line]  # libraries print, too
        for n, outcome in lines:
            if outcome.startswith("BAD"):
                bad.append(f"{n}: {outcome}")
            outcomes[outcome.split(":")[0]] += 1
        if done.returncode:
            bad.append(f"{first + len(lines)}: the process ended with {done.returncode}: {done.stderr[-300:]}")
    print(*bad, sep="\n")
    print(f"{count} cases from seed {seed}: {dict(outcomes.most_common())}; {len(bad)} bad")
    sys.exit(bool(bad))


def _guided() -> None:
    import atheris  # pyright: ignore[reportMissingImports]

    folder = Path(tempfile.mkdtemp())
    names = [(files, name) for files in originals() for name in sorted(files)]

    def one(data: bytes) -> None:
        if data:
            files, name = names[data[0] % len(names)]
            run({**files, name: data[1:]}, folder)

    atheris.instrument_all()
    corpus = Path(tempfile.mkdtemp())
    for n, (files, name) in enumerate(names):
        (corpus / str(n)).write_bytes(bytes([n]) + files[name])
    atheris.Setup([sys.argv[0], str(corpus), f"-timeout={SECONDS}"], one)
    atheris.Fuzz()


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.atheris:
        _guided()
    elif a.worker:
        cases(a.seed, a.cases, lambda n, outcome: print(n, ascii(outcome)[1:-1], sep="\t", flush=True))
    else:
        _in_processes(a.seed, a.cases)


if __name__ == "__main__":
    main()
