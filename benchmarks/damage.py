"""Check what `qwen3np damage` claims: its ranking against the exhaustive truth, its figures against llama.cpp's.

    python benchmarks/damage.py truth FOLDER --what-if q4_0 [--file TEXT] [--tokens 2048] [--window 512] [--ranked 1]
    python benchmarks/damage.py llama FOLDER --bin DIR --file TEXT [--what-if q4_0] [--window 128]

`truth` ranks the parts as `damage` does, on a few hundred tokens, and then on all, which takes an hour or more at
the 0.6B size; without --file the ids are random. If FOLDER does not exist, it gets a random checkpoint (--size)
whose matrices quantise unequally well. Random weights are a poor judge: what tells them apart is what we put there.

`llama` quantises FOLDER with llama.cpp's llama-quantize and compares with its llama-perplexity (both in --bin), on the
quantised file itself and on the same numbers written as F32: on quantised files llama.cpp rounds its activations, too.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from random_checkpoint import SIZES
from tables import markdown

import qwen3np
from qwen3np import Model, init_weights, load, save_checkpoint
from qwen3np.audit.damage_kinds import KINDS, what_if
from qwen3np.audit.damage_parts import Sources, grouped, parts_of, sources
from qwen3np.audit.damage_runs import Pair, Runner, scored, windows
from qwen3np.commands.bench import machine
from qwen3np.files.gguf_writer import write_gguf
from qwen3np.files.limits import read_json
from qwen3np.numerics import named
from qwen3np.weights import LoadedWeights

TOP = 5
# What each of our figures is called there.
PRINTED = {
    "kl": r"Mean +KLD: +(\S+)",
    "kl_median": r"Median +KLD: +(\S+)",
    "kl_99": r"99\.0% +KLD: +(\S+)",
    "kl_max": r"Maximum KLD: +(\S+)",
    "perplexity": r"Mean PPL\(Q\) +: +(\S+)",
    "same likeliest (%)": r"Same top p: +(\S+)",
}


def write_uneven_checkpoint(folder: Path, size: str) -> None:
    """Write random weights, each matrix with outlying columns of another size, and a peaked head."""
    config = SIZES[size]
    weights = init_weights(config, 0, trained_like=True)
    for index, (name, w) in enumerate(weights.items()):
        rng = np.random.default_rng([1, index])
        if w.ndim == 2:
            w[:, rng.choice(w.shape[1], w.shape[1] // 64, replace=False)] *= np.float32(rng.choice([1, 2, 4, 8]))
            w *= np.float32(np.exp(0.5 * rng.standard_normal()) if ".layers." in name else 1)
    weights["model.norm.weight"] *= 4
    save_checkpoint(folder, config, weights, dtype=ml_dtypes.bfloat16)


def truth(model: Model, kind: str, ids: list[int], window: int, ranked: int | None) -> str:
    """Return how far the ranking by `damage` is from that over all tokens."""
    start, cpu = time.perf_counter(), time.process_time()
    found = qwen3np.damage(model, kind, ids, window=window, ranked=ranked).sources
    assert found
    lines = [f"damage: {time.perf_counter() - start:,.0f} s, {time.process_time() - cpu:,.0f} s of processor time"]
    num, all_ids = named("float32"), windows(ids, model.config, window)
    quantised = Model(model.config, LoadedWeights(what_if(model.weights, kind)), None, {})
    pair = Pair.of(model, quantised)
    parts = parts_of(pair)
    start = time.perf_counter()
    with num.ops.session(pair.reference, pair.config, all_ids.size, window, num):
        whole = sources(pair, Runner(pair.config, all_ids, num), parts, *grouped(parts, pair))
    lines.append(
        f"all of {whole.tokens:,} predictions instead of {found.tokens:,}: {time.perf_counter() - start:,.0f} s\n"
    )
    rows: list[list[str]] = []
    for level in ("parts", "layers", "kinds"):
        for figure in ("alone", "saved", "share"):
            ours, theirs = (_figures(one, level, figure) for one in (found, whole))
            best, true = (sorted(one, key=lambda name: -one[name])[:TOP] for one in (ours, theirs))
            ranks = [np.argsort(np.argsort([one[name] for name in theirs])) for one in (ours, theirs)]
            same = f"{len({*best} & {*true})} of {len(true)}{', in this order' if best == true else ''}"
            rows.append([f"{level}, by {figure}", str(len(theirs)), same, f"{np.corrcoef(ranks)[0, 1]:.3f}"])
    lines.append(markdown(["ranking", "entries", f"the same top {TOP}", "rank correlation"], rows))
    rows = [
        [part.name, *(f"{getattr(part, figure):.6f}" for figure in ("alone", "saved")), f"{part.share:.1%}"]
        for part in whole.parts[: 2 * TOP]
    ]
    lines.append(markdown(["all predictions", "alone", "saved", "share"], rows))
    return "\n".join(lines)


def _figures(found: Sources, level: str, figure: str) -> dict[str, float]:
    return {part.name: getattr(part, figure) for part in getattr(found, level)}


def llama(model: Model, tools: Path, text: Path, kind: str, window: int) -> str:
    """Return our figures next to llama.cpp's."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.gguf" for name in ("reference", "quantised", "numbers")}
        base = Path(folder) / "base.dat"

        def run(tool: str, *arguments: object) -> str:
            command = [str(tools / tool), *map(str, arguments)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
            return done.stdout

        def perplexity(file: Path, *arguments: object) -> str:
            where = ("-m", file, "-f", text, "-c", window, "-b", window, "-ub", window)
            exact = ("-t", 1, "-ctk", "f32", "-ctv", "f32", "-fa", "off")  # nothing else in 16 bits
            while True:  # some runs end before their last lines are written
                printed = run("llama-perplexity", *where, *exact, "--kl-divergence-base", base, *arguments)
                if re.search(r"Final estimate|Same top p:", printed):
                    return printed

        tokenizer = read_json(model.text.folder / "tokenizer.json")
        write_gguf(files["reference"], model.config, model.weights, tokenizer, kind="F32")
        run("llama-quantize", "--pure", files["reference"], files["quantised"], kind.upper())
        quantised = load(files["quantised"], weights_dtype="mapped")
        write_gguf(files["numbers"], quantised.config, quantised.weights, tokenizer, kind="F32")
        before = re.search(r"PPL = (\S+)", perplexity(files["reference"]))
        printed = {name: perplexity(files[name], "--kl-divergence") for name in ("quantised", "numbers")}
        ids = model.text.encode(text.read_text(encoding="utf-8"))
        t = qwen3np.damage(model, quantised, ids, window=window, ranked=0).totals
        kl = as_llama_stores(model, quantised, ids, window)
    short = {"kl": kl.mean(), "kl_median": np.median(kl), "kl_99": np.quantile(kl, 0.99), "kl_max": kl.max()}
    rows = [["perplexity of the reference", f"{t.perplexity_reference:.4f}", "", before[1] if before else "?", ""]]
    for figure, pattern in PRINTED.items():
        ours = f"{getattr(t, figure):.6f}" if hasattr(t, figure) else f"{100 * (1 - t.flips):.3f}"
        theirs = [
            match[1] if (match := re.search(pattern, printed[name])) else "?" for name in ("numbers", "quantised")
        ]
        rows.append([figure, ours, f"{short[figure]:.6f}" if figure in short else "", *theirs])
    return markdown(
        [f"{t.tokens:,} predictions, {kind}", "qwen3np", "from 16 bits", "llama.cpp, same numbers", "its own file"],
        rows,
    )


def as_llama_stores(model: Model, quantised: Model, ids: list[int], window: int) -> np.ndarray:
    """Return the KL of each prediction as llama-perplexity computes it: from log-probabilities in 16 bits.

    A row's codes, 0 to 65,535, reach from its largest log-probability to its smallest, or to 16 below the largest;
    what is below e^-16 does not count.
    """
    found: list[np.ndarray] = []
    for one in windows(ids, model.config, window):
        before, after = (
            qwen3np.forward(each.weights, each.config, one)[0, scored(window)] for each in (model, quantised)
        )
        top = before.max(-1, keepdims=True)
        low = np.maximum(before.min(-1, keepdims=True), top - 16)
        step = (top - low) / np.float32(65535)
        total = np.log(np.exp(before - top).sum(-1, keepdims=True, dtype=float)).astype(np.float32)
        stored = step * np.rint(np.maximum(before - low, 0) / step) + (low - top - total)
        terms = np.exp(stored) * (stored - qwen3np.log_probabilities(after))
        found.append(np.where(stored > -16, terms, 0).sum(-1))
    return np.concatenate(found)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("truth", "llama"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--what-if", choices=KINDS, default="q4_0")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--ranked", type=int)
    parser.add_argument("--size", choices=SIZES, default="0.6B")
    parser.add_argument("--bin", type=Path)
    a = parser.parse_args()
    if not a.folder.exists():
        print(f"[making {a.folder}]", file=sys.stderr)
        write_uneven_checkpoint(a.folder, a.size)
    model = load(a.folder, weights_dtype="mapped")
    window = min(a.window, model.config.max_position_embeddings)
    print(machine())
    if a.what == "llama":
        print(llama(model, a.bin, a.file, a.what_if, window))
        return
    rng = np.random.default_rng(0)
    ids = (
        model.text.encode(a.file.read_text(encoding="utf-8"))
        if a.file
        else rng.integers(0, model.config.vocab_size, a.tokens).tolist()
    )
    print(truth(model, a.what_if, ids[: a.tokens], window, a.ranked))


if __name__ == "__main__":
    main()
