"""How often the verdicts of compare and diagnose are right, on ports by another implementation (tests/foreign.py).

    PYTHONPATH=tests python benchmarks/verdicts.py right [--from 0 --to 2000] [--numerics float32] [--part diagnose]
    PYTHONPATH=tests python benchmarks/verdicts.py orders [--from 0 --to 300]
    PYTHONPATH=tests python benchmarks/verdicts.py hidden [--from 0 --to 25]
    PYTHONPATH=tests python benchmarks/verdicts.py bugs [--numerics float32] [--part all]
    PYTHONPATH=tests python benchmarks/verdicts.py settings [--layers 4] [--part all]
    PYTHONPATH=tests python benchmarks/verdicts.py logprobs [--part top]

`right`: right ports on models drawn over the family, tiny ones and one-token prompts among them: alarms. `orders`: the
same at 28 layers, 1,000 tokens, and other sizes that programs have. `hidden`: bugs smaller than rounding, which only
their pattern shows. `bugs`: the bugs of tests/foreign_bugs.py, which no catalogue has: the first wrong point, and
causes that are called sure. `settings`: what a port's author may choose, at the widths of Qwen3-0.6B. `logprobs`: the
catalogue's bugs from logits, and from log-probabilities. `views`: right ports, seen through log-probabilities alone.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np
from drawing import draw_any_config, draw_ids, trained_like
from foreign import Foreign
from foreign_bugs import BUGS
from foreign_right import draw_port
from foreign_settings import SETTINGS, chosen

from qwen3np.numerics import BFLOAT16
from qwen3np.porting import compare, record
from qwen3np.porting.diagnose import diagnose
from qwen3np.porting.fixture import UNTIED

SHORT = {"float32": np.float32, "float16": np.float16, "bfloat16": BFLOAT16}
KIT = replace(UNTIED, max_position_embeddings=2048)
WIDE = replace(  # the widths of Qwen3-0.6B, with fewer ids
    KIT,
    vocab_size=2048,
    hidden_size=1024,
    intermediate_size=3072,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
)
NARROW = replace(
    KIT,
    hidden_size=16,
    intermediate_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
PARTS = {
    "all": lambda name: True,
    "no scores": lambda name: not name.endswith(("scores", "probs")),
    "layers": lambda name: name.endswith("lm_head") or name.rpartition(".")[2].isdigit(),
    "logits": lambda name: name.endswith("lm_head"),
}


def part_of(dump, part):
    """Return the points of a dump that a port of this kind writes."""
    return {name: x for name, x in dump.items() if PARTS[part](name)}


def short_weights(config, seed):
    """Return weights in bfloat16, as released ones are."""
    return {name: w.astype(BFLOAT16) for name, w in trained_like(config, seed).items()}


# --- right ports ------------------------------------------------------------------------------------------------------


def tell(found):
    """Return how far the first wrong point is, in floors."""
    if found.first_point is None or not hasattr(found, "points"):
        return found.meaning
    r = next(r for r in found.points if r.name == found.first_point)
    added = "" if r.added is None else f", added {r.added / r.added_floor:.1f} floors"
    return f"{found.meaning} ({(r.rel_l2 or 0) / r.floor:.1f} floors{added})"


def judged(seed, config, length, batch, steps, numerics, rng, by=compare):
    """Hold a drawn right port against a recording; return the verdict, and what was compared."""
    weights = short_weights(config, seed)
    golden = record(weights, config, draw_ids(rng, config, batch, length), steps=steps)
    port, forms = draw_port(rng, config, weights, SHORT[numerics])
    dump = port.run(golden)
    # without the weights nothing can follow another choice of experts, and the verdict says so
    alone = not config.num_experts and rng.random() < 0.3 and by is compare
    part = str(rng.choice(["all", "all", "no scores", "layers", "logits"]))
    if config.num_experts and numerics != "float32":
        part = "all"
    found = compare(
        golden,
        part_of(dump, part),
        weights=None if alone else weights,
        precision=None if numerics == "float32" else numerics,
    )
    said = f"seed {seed}, {numerics}, {length} tokens, {part}, {'without' if alone else 'with'} the weights; {forms}"
    return found, said


def right(arguments):
    """Right ports on drawn models."""
    by = diagnose if arguments.part == "diagnose" else compare
    alarms = total = 0
    for seed in range(arguments.first, arguments.last):
        rng = np.random.default_rng([18, seed])
        config = replace(draw_any_config(rng), rope_scaling=None)
        if rng.random() < 0.3:  # tiny
            config = replace(config, hidden_size=8, intermediate_size=8, head_dim=4, vocab_size=16)
        length = 1 if rng.random() < 0.25 else int(rng.integers(2, 40))
        numerics = arguments.numerics or str(rng.choice(["float32", "float32", "float32", "bfloat16", "float16"]))
        found, said = judged(seed, config, length, int(rng.integers(1, 3)), int(rng.integers(0, 3)), numerics, rng, by)
        total += 1
        if found.verdict == "different" or getattr(found, "settings", None):
            alarms += 1
            print(f"ALARM {said}: {tell(found)}", flush=True)
    print(f"right ports: {alarms} alarms of {total}")


def orders(arguments):
    """Right ports at sizes that programs have: 28 layers, 1,000 tokens, wide rows, one token."""
    shapes = {
        "28 layers": (replace(KIT, num_hidden_layers=28), 12),
        "1,000 tokens": (NARROW, 1000),
        "wide": (replace(KIT, hidden_size=2048, intermediate_size=3072), 16),
        "heads of 128": (replace(KIT, head_dim=128, num_attention_heads=8, num_key_value_heads=2), 40),
        "one token": (KIT, 1),
        "2 layers": (KIT, 40),
    }
    alarms = total = 0
    for seed in range(arguments.first, arguments.last):
        rng = np.random.default_rng([19, seed])
        name = list(shapes)[seed % len(shapes)]
        config, length = shapes[name]
        if seed % 60 == 1:
            name, config = "28 layers, 1,000 tokens", replace(NARROW, num_hidden_layers=28)
        found, said = judged(seed, config, length, 1, 1, arguments.numerics or "float32", rng)
        total += 1
        if found.verdict == "different" or found.settings:
            alarms += 1
            print(f"ALARM {name}, {said}: {tell(found)}", flush=True)
    print(f"other orders of summation: {alarms} alarms of {total}")


def hidden(arguments):
    """Bugs of 16-bit ports that are smaller than rounding at each point: how often their pattern is found."""

    def coarse(port):
        return port.frequencies().astype(BFLOAT16).astype(np.float64)

    def rope(own, at, x, positions):
        port = own.__self__
        turns = np.exp(1j * positions[:, None] * coarse(port))[:, None]
        half = x.shape[-1] // 2
        z = (x[..., :half].astype(np.float64) + 1j * x[..., half:]) * turns
        return np.moveaxis(np.concatenate((z.real, z.imag), -1), 2, 1)

    planted = {
        "norm: rms_norm_eps is 1e-5": {"norm": lambda own, at, x: own(x, eps=1e-5)},
        "rotary: inv_freq in bfloat16": {"rope": rope},
    }
    counts = {name: [0, 0, 0, 0] for name in planted}  # runs; different by distance; by pattern; of these named right
    for seed in range(arguments.first, arguments.last):
        rng = np.random.default_rng([21, seed])
        config = replace(draw_any_config(rng), rope_scaling=None, num_experts=0, rms_norm_eps=1e-6)
        weights = short_weights(config, seed)
        golden = record(weights, config, draw_ids(rng, config, 1, int(rng.integers(16, 62))), steps=2)
        for name, replaced in planted.items():
            for short in (np.float16, BFLOAT16):
                dump = Foreign(config, weights, short, **replaced).run(golden)
                apart = compare(golden, dump, weights=weights).verdict == "different"
                found = diagnose(golden, dump, weights=weights)
                named = bool(found.causes) and name in (found.causes[0].name, *found.causes[0].alike)
                by_pattern = not apart and found.verdict == "different"
                for i, hit in enumerate((True, apart, by_pattern, by_pattern and named)):
                    counts[name][i] += hit
    for name, (total, apart, by_pattern, named) in counts.items():
        print(f"{name}: {total} ports; {apart} seen by distance; of the others {by_pattern} by pattern, {named} named")


# --- bugs, settings, log-probabilities --------------------------------------------------------------------------------


def bugs(arguments):
    """Bugs that no catalogue has: is the first wrong point right, and is a cause called sure?"""
    numerics = arguments.numerics or "float32"
    weights = short_weights(KIT, 0)
    golden = record(weights, KIT, draw_ids(np.random.default_rng(0), KIT, 1, 40), steps=2)
    order, hits, sure, total = list(golden.points), 0, 0, 0
    for name, (replaced, first) in list(BUGS.items())[arguments.first : arguments.last]:
        dump = part_of(Foreign(KIT, weights, SHORT[numerics], **replaced).run(golden), arguments.part)
        after = order[order.index(first) :]
        expected = next(n for n in after if n in dump and n.startswith("decode") >= first.startswith("decode"))
        found = diagnose(golden, dump, weights=weights, precision=None if arguments.part == "all" else numerics)
        total += 1
        hits += found.first_point == expected
        if found.first_point != expected:
            print(f"PLACE {name}: {found.first_point} instead of {expected}", flush=True)
        if any(cause.sure for cause in found.causes):
            sure += 1
            print(f"SURE {name}: {found.meaning[:200]}", flush=True)
    print(f"{numerics}, {arguments.part}: first point right in {hits} of {total}; {sure} called sure, to be judged")


def settings(arguments):
    """Settings at the widths of Qwen3-0.6B: named as such, and what they explain."""
    config = replace(WIDE, num_hidden_layers=arguments.layers)
    weights = {name: w.astype(np.float32) for name, w in short_weights(config, 0).items()}
    golden = record(weights, config, draw_ids(np.random.default_rng(0), config, 1, 48), steps=1)
    named = total = 0
    for name in list(SETTINGS)[arguments.first : arguments.last]:
        start = time.perf_counter()
        replaced, own = chosen(name, weights)
        dump = part_of(Foreign(config, own, **replaced).run(golden), arguments.part)
        found = compare(golden, dump, weights=weights)
        expected = name.partition(", embedding")[0]
        hit = found.verdict == "rounding" and [s.name for s in found.settings] == [expected]
        named, total = named + hit, total + 1
        shares = ", ".join(f"{s.name} {100 * s.explained:.3f} %" for s in found.settings)
        took = f"{time.perf_counter() - start:.0f} s"
        print(f"{'named' if hit else 'MISSED'} {name}: {shares or found.meaning[:160]} ({took})", flush=True)
    print(f"{arguments.layers} layers, {arguments.part}: {named} of {total} settings named")


def log_softmax(x):
    """Return log-probabilities in float32, as programs print them."""
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return (x - np.log(np.exp(x).sum(-1, keepdims=True))).astype(np.float32)


def likeliest(x, count):
    """Return the log-probabilities of the likeliest ids, and the ids."""
    ids = np.argsort(-x, -1)[..., :count]
    return np.take_along_axis(log_softmax(x), ids, -1), ids


def viewed(dump, form):
    """Return of a dump what a program gives: logits, all log-probabilities, or the 20 likeliest."""
    heads = {name: x for name, x in dump.items() if name.endswith("lm_head")}
    if form == "logits":
        return heads
    if form == "full":
        return {name: log_softmax(x) for name, x in heads.items()}
    views = {}
    for name, x in heads.items():
        views[f"{name}.top_logprobs"], views[f"{name}.top_ids"] = likeliest(x, 20)
    return views


def logprobs(arguments):
    """Bugs of the catalogue, planted in transformers, from logits and from log-probabilities of 64 positions."""
    import oracle
    import pytest
    from planted import BUGS as PLANTED
    from planted import FORMS, recorded
    from test_diagnose import CAUSES

    forms = ("logits", "full", "top") if arguments.part == "all" else (arguments.part,)
    weights = trained_like(KIT, 0)
    golden = record(weights, KIT, draw_ids(np.random.default_rng(0), KIT, 1, 62), steps=2)
    seen, named, wrong, total = dict.fromkeys(forms, 0), dict.fromkeys(forms, 0), dict.fromkeys(forms, 0), 0
    for bug, (plant, _) in list((PLANTED | FORMS).items())[arguments.first : arguments.last]:
        with pytest.MonkeyPatch.context() as patch:
            model = oracle.model_of(KIT, weights).requires_grad_(False)
            plant(oracle, model, patch)
            dump = recorded(oracle, model, golden.ids, golden.steps)
        total += 1
        for form in forms:
            found = diagnose(golden, viewed(dump, form), weights=weights)
            seen[form] += found.verdict == "different"
            best = found.causes[0] if found.causes else None
            hit = best is not None and CAUSES[bug] in (best.name, *best.alike)
            named[form] += hit
            wrong[form] += best is not None and best.sure and not hit
            if not hit:
                print(f"{form}, {bug}: {found.meaning[:180]}", flush=True)
    for form in forms:
        print(f"{form}: {seen[form]} of {total} seen, {named[form]} named, {wrong[form]} wrong and sure")


def views(arguments):
    """Right ports, of which only log-probabilities are seen: float32, 16 bits, a cache in float16."""
    alarms = total = 0
    for seed in range(arguments.first, arguments.last):
        rng = np.random.default_rng([20, seed])
        config = replace(draw_any_config(rng), rope_scaling=None, num_experts=0)
        weights = short_weights(config, seed)
        golden = record(weights, config, draw_ids(rng, config, 1, int(rng.integers(2, 62))), steps=2)
        replaced, _ = chosen("KV cache in float16", {})
        for said, port in (
            ("float32", draw_port(rng, config, weights)[0]),
            ("float16", draw_port(rng, config, weights, np.float16)[0]),
            ("bfloat16", draw_port(rng, config, weights, BFLOAT16)[0]),
            ("float16 cache", Foreign(config, weights, **replaced)),
        ):
            dump = port.run(golden)
            for form in ("full", "top"):
                found = compare(golden, viewed(dump, form), weights=weights)
                total += 1
                if found.verdict == "different":
                    alarms += 1
                    print(f"ALARM seed {seed}, {said}, {form}: {tell(found)}", flush=True)
    print(f"log-probabilities of right ports: {alarms} alarms of {total}")


if __name__ == "__main__":
    measures = (right, orders, hidden, bugs, settings, logprobs, views)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[f.__name__ for f in measures])
    parser.add_argument("--from", dest="first", type=int, default=0, help="the first seed, bug or setting")
    parser.add_argument("--to", dest="last", type=int, help="the one after the last")
    parser.add_argument("--numerics", choices=list(SHORT))
    parser.add_argument(
        "--part", default="all", help="the points that are compared: all, no scores, layers, logits; full, top"
    )
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    defaults = {"right": 2000, "orders": 300, "views": 25, "hidden": 25}
    arguments.last = defaults.get(arguments.what) if arguments.last is None else arguments.last
    with np.errstate(all="ignore"):
        next(f for f in measures if f.__name__ == arguments.what)(arguments)
