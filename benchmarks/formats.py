"""Time decoding from every stored format, mapped and copied, next to mapped bfloat16: ms a step and peak memory.

    pip install -e ".[gguf]"
    python benchmarks/formats.py FOLDER [--size 4B] [--rounds 8] [--only bfloat16,Q8_0]

FOLDER gets the files of one random checkpoint in bfloat16, FP8, Q8_0 and Q4_K, unless it has them (2.9 GB at the 0.6B
size). Each row of the table is a process of its own; they take turns, three steps at a time, so that all of them meet
the same noise. Linux: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy
from random_checkpoint import add_checkpoint, make_if_missing
from tables import markdown, value

import qwen3np
from qwen3np.commands.bench import machine, memory
from qwen3np.files.checkpoint import read_checkpoint
from qwen3np.files.gguf_writer import write_gguf

PLACES = {"bfloat16": "bfloat16", "FP8": "fp8", "Q8_0": "Q8_0.gguf", "Q4_K": "Q4_K.gguf"}
PROMPT, STEPS = 16, 3


def make(folder: Path) -> None:
    """Write the files that are missing, from the checkpoint in bfloat16."""
    config, weights = read_checkpoint(folder / PLACES["bfloat16"])
    if not (folder / PLACES["FP8"]).exists():
        _write_fp8(folder / PLACES["FP8"], config, weights)
    if not (folder / PLACES["Q8_0"]).exists():
        write_gguf(folder / PLACES["Q8_0"], config, weights, kind="Q8_0")
    if not (folder / PLACES["Q4_K"]).exists():
        _write_q4_k(folder / PLACES["Q4_K"], folder / PLACES["Q8_0"])


def _write_fp8(folder: Path, config: qwen3np.Config, weights: qwen3np.Weights) -> None:
    """Write the checkpoint as the official FP8 ones are: codes for the projections, a scale for each 128 x 128."""
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in weights.items():
        tensors[name] = tensor
        if name.endswith("_proj.weight"):
            blocks = tensor.astype(np.float32).reshape(len(tensor) // 128, 128, -1, 128)
            scales = np.abs(blocks).max((1, 3), keepdims=True) / 448
            tensors[name] = (blocks / scales).astype(ml_dtypes.float8_e4m3fn).reshape(tensor.shape)
            tensors[f"{name}_scale_inv"] = scales[:, 0, :, 0].astype(ml_dtypes.bfloat16)
    folder.mkdir()
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": settings}))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def _write_q4_k(path: Path, other: Path) -> None:
    """Write a file with the sizes of another one, and blocks of random numbers: the gguf package does not make Q4_K."""
    import gguf

    reader, writer = gguf.GGUFReader(other), gguf.GGUFWriter(path, "qwen3")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(field.name, field.contents(), field.types[0], *field.types[1:2])
    rng = np.random.default_rng(0)
    for tensor in reader.tensors:
        if tensor.tensor_type != gguf.GGMLQuantizationType.Q8_0:
            writer.add_tensor(tensor.name, np.array(tensor.data))
            continue
        inputs, out = tensor.shape.tolist()
        blocks = rng.integers(0, 256, (out, inputs // 256, 144), np.uint8)
        blocks[:, :, :4] = np.array([1e-4, 8e-4], np.float16).view(np.uint8)  # the factors of scales and minima
        writer.add_tensor(tensor.name, blocks.reshape(out, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def work(path: str, weights_dtype: str) -> None:
    """Load a checkpoint; for each line of stdin, time some steps and print them in ms with the peak memory so far."""
    model = qwen3np.load(path, weights_dtype=weights_dtype, progress=False)
    cache = qwen3np.KVCache.allocate(model.config, max_length=256)
    model.forward(list(range(PROMPT)), cache, last_only=True)
    print("ready", flush=True)
    for _ in sys.stdin:
        times: list[float] = []
        for token in range(STEPS):
            began = time.perf_counter()
            model.forward([token], cache, last_only=True)
            times.append(1e3 * (time.perf_counter() - began))
        print(json.dumps([times, memory()["peak_bytes"]]), flush=True)


def main() -> None:
    """Measure what the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", default=",".join(PLACES), metavar="NAMES", help="formats, separated by commas")
    parser.add_argument("--work", metavar="DTYPE", help=argparse.SUPPRESS)
    add_checkpoint(parser)
    a = parser.parse_args()
    if a.work:
        work(str(a.folder), a.work)
        return
    make_if_missing(a.folder / PLACES["bfloat16"], a)
    make(a.folder)
    rows = [(name, dtype) for name in a.only.split(",") for dtype in ("mapped", "float32")]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(a.folder / PLACES[name]), "--work", dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, dtype in rows
    ]
    for worker in workers:  # none is measured while another still loads
        assert worker.stdout
        worker.stdout.readline()
    found: list[tuple[list[float], int]] = [([], 0) for _ in rows]
    for _ in range(a.rounds):
        for n, worker in enumerate(workers):
            assert worker.stdin
            assert worker.stdout
            worker.stdin.write("\n")
            worker.stdin.flush()
            times, peak = json.loads(worker.stdout.readline())
            found[n] = [*found[n][0], *times], peak
    for worker in workers:
        worker.communicate()
    first, at_first = float(np.median(found[0][0])), found[0][1]
    table = [
        [
            f"{name}, {dtype}",
            *(value(x) for x in (float(np.median(times)), min(times), float(np.median(times)) / first)),
            *(value(x) for x in (peak / 1e9, peak / at_first)),
        ]
        for (name, dtype), (times, peak) in zip(rows, found, strict=True)
    ]
    print(machine())
    header = ["stored as", "ms a step (median)", "(best)", f"x {rows[0][0]}", "peak GB", f"x {rows[0][0]}"]
    print(markdown(header, table))


if __name__ == "__main__":
    main()
