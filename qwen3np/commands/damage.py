"""`qwen3np damage`: what quantisation costs, and which tensors are to blame."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import shorten

from qwen3np.audit.damage import Damage, damage
from qwen3np.audit.damage_activations import Largest, activations
from qwen3np.audit.damage_kinds import CACHES, KINDS
from qwen3np.audit.damage_parts import Part, Sources
from qwen3np.audit.damage_picture import draw, require_drawable
from qwen3np.audit.damage_runs import WINDOW
from qwen3np.commands import add_model, add_threads, load_named, read_text, scaled, table
from qwen3np.errors import one_line
from qwen3np.loading import load
from qwen3np.porting.points import split_layer

EXAMPLE = "qwen3np damage --reference Qwen/Qwen3-0.6B --model Qwen3-0.6B-Q4_K_M.gguf --file text.txt"
HELP = "measure what quantisation costs, and which tensors are to blame"
SHOWN = 20  # parts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    reference = "the model before quantisation: a folder, a .gguf file, or a Hub id (default: the built-in checkpoint)"
    parser.add_argument("--reference", metavar="R", help=reference)
    parser.add_argument(
        "--file", metavar="F", required=True, help="a UTF-8 text like those the model will see; -: stdin"
    )
    parser.add_argument("--what-if", choices=KINDS, help="instead of --model: quantise the reference to this kind")
    parser.add_argument("--kv", choices=tuple(CACHES), help="keep the model's keys and values in this kind")
    window = f"tokens seen at once, of which the second half is scored (default: {WINDOW}, at most the context)"
    parser.add_argument("--window", type=int, metavar="N", help=window)
    ranked = "measure the parts on N windows, evenly spread (default: 1 from 0.6 billion weights, more below)"
    parser.add_argument("--ranked", type=int, metavar="N", help=ranked)
    parser.add_argument("--totals", action="store_true", help="only compare the models as wholes, which is quick")
    largest = "show the largest magnitudes in the reference, next to the ranges of float16 and fp8"
    parser.add_argument("--activations", action="store_true", help=largest)
    parser.add_argument("--json", action="store_true", help="print one JSON object, with all parts")
    picture = "draw where the damage comes from, and the curve; .svg, .png or .pdf (needs matplotlib)"
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help=picture)
    add_model(parser, default="none; see --what-if and --kv")
    add_threads(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the totals, the parts that do most damage, and the curve."""
    compares = arguments.model is not None or arguments.what_if or arguments.kv
    if arguments.model is not None and arguments.what_if:
        raise ValueError("both --model and --what-if are given; use one of them")
    if not (compares or arguments.activations):
        raise ValueError("nothing to compare the reference with: give --model, --what-if, --kv, or --activations")
    if arguments.ranked is not None and arguments.ranked < 1:
        raise ValueError(f"--ranked {arguments.ranked} must be at least 1; --totals leaves the parts out")
    if arguments.out and (arguments.totals or not compares):
        raise ValueError("--out draws the parts; leave --totals out, and give --model, --what-if or --kv")
    if arguments.out:
        require_drawable(arguments.out)
    text = read_text(arguments.file)
    reference = load(arguments.reference, weights_dtype="mapped")
    reference = replace(reference, config=scaled(reference.config, arguments))
    arguments.weights_dtype = "mapped"
    model = arguments.what_if if arguments.model is None else load_named(arguments)
    ids = reference.text.encode(text)
    ranked = 0 if arguments.totals else arguments.ranked
    found = damage(reference, model, ids, kv=arguments.kv, window=arguments.window, ranked=ranked) if compares else None
    largest = activations(reference, ids, window=arguments.window) if arguments.activations else None
    if arguments.json:
        result = {} if found is None else asdict(found)
        print(json.dumps(result | ({} if largest is None else {"activations": [asdict(one) for one in largest]})))
    else:
        print(_report(found, largest))
    if arguments.out and found:
        draw(found, arguments.out)


def _report(found: Damage | None, largest: list[Largest] | None) -> str:
    pieces = [] if found is None else [_totals(found), *([_sources(found.sources, found)] if found.sources else [])]
    return "\n\n".join(pieces + ([] if largest is None else [_activations(largest)]))


def _totals(found: Damage) -> str:
    """Return the comparison of the models as wholes."""
    t = found.totals
    scored = f"{t.tokens:,} predictions: the second half of {found.windows:,} windows of {found.window} tokens"
    kl = f"mean {t.kl:.6f} ± {t.kl_error:.6f}"
    quantiles = f"median {t.kl_median:.6f}, 99 % {t.kl_99:.6f}, largest {t.kl_max:.6f}"
    ratio = f"{t.perplexity / t.perplexity_reference - 1:+.2%}"
    before, after = (
        f"{bits:.2f} bits per weight, {nbytes / 1e6:,.1f} MB"
        for bits, nbytes in ((found.reference_bits, found.reference_nbytes), (found.bits, found.nbytes))
    )
    rows = [
        ("scored", scored),
        ("reference", f"perplexity {t.perplexity_reference:.4f}; {before}"),
        ("model", f"perplexity {t.perplexity:.4f} ({ratio}); {after}"),
        ("KL (nats)", kl),
        ("", quantiles),
        ("flips", f"{t.flips:.2%} of the likeliest tokens change"),
    ]
    return table(rows)


def _sources(sources: Sources, found: Damage) -> str:
    """Return the parts, kinds and layers that do most damage alone, and the curve."""
    lines = [
        f"Where it comes from, measured on {found.ranked} of {found.windows} windows, {sources.tokens:,} predictions,",
        f"where the KL of the model is {sources.kl:.6f}",
    ]
    for title, parts in (("part", sources.parts), ("kind", sources.kinds), ("layer", sources.layers)):
        lines += ["", f"{title:<36}{'alone':>10}{'saved':>10}{'share':>8}{'extra MB':>10}"]
        lines += map(_line, parts[:SHOWN])
        if len(parts) > SHOWN:
            rest = sum(part.share for part in parts[SHOWN:])
            lines.append(f"{f'{len(parts) - SHOWN} others (--json has them)':<56}{rest:>8.1%}")
    whole = sum(part.share for part in sources.parts)
    lines += [
        "",
        "alone: the KL if only this is quantised. saved: how much lower the KL is if this",
        "is as in the reference. share: the mean of both over the KL; those of all parts",
        f"add up to {whole:.0%}. extra: what it takes to keep this as in the reference.",
        "",
        "Mixes, in which the worst parts for their bytes are as in the reference",
        f"{'bits':>6}{'MB':>10}{'KL':>11}  parts",
    ]
    by_name = {part.name: part.kind for part in sources.parts}
    for mix in sources.curve:
        kinds = [by_name[name] for name in mix.kept]
        kept = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "none"
        shown = shorten(kept, 51, placeholder=" ...")
        lines.append(f"{mix.bits:>6.2f}{mix.nbytes / 1e6:>10,.1f}{mix.kl:>11.6f}  {shown}")
    return "\n".join(lines)


def _line(part: Part) -> str:
    name = one_line(part.name).removeprefix("model.")
    return f"{name:<36}{part.alone:>10.6f}{part.saved:>10.6f}{part.share:>8.1%}{part.extra / 1e6:>10,.2f}"


def _activations(largest: list[Largest]) -> str:
    """Return for each kind of point the layer where the largest magnitude is."""
    worst: dict[str, tuple[int | None, Largest]] = {}
    for one in largest:
        layer, kind = split_layer(one.point)
        if kind not in worst or one.largest > worst[kind][1].largest:
            worst[kind] = layer, one
    lines = ["Largest magnitudes; float16 ends at 65,504, fp8 (e4m3) at 448", ""]
    lines.append(f"{'point':<28}{'layer':>6}{'token':>8}{'largest':>12}{'float16':>10}{'fp8':>10}")
    for kind, (layer, one) in worst.items():
        place = f"{'-' if layer is None else layer:>6}{one.token:>8,}"
        lines.append(f"{kind:<28}{place}{one.largest:>12,.4g}{_of(one.float16):>10}{_of(one.fp8):>10}")
    over = [
        f"{name}: {sum(ratio > 1 for ratio in ratios)}"
        for name, ratios in (("float16", [one.float16 for one in largest]), ("fp8", [one.fp8 for one in largest]))
    ]
    return "\n".join([*lines, f"points that overflow, of {len(largest)}: {', '.join(over)}"])


def _of(ratio: float) -> str:
    return f"x {ratio:,.1f} !" if ratio > 1 else f"{ratio:.2%}"
