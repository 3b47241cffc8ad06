"""How often `qwen3np audit` is right, on rollouts that transformers generates, right and wrong in known ways.

    PYTHONPATH=tests python benchmarks/audit.py verdicts  [--model dense|moe|built-in] [--given full|top|chosen]
    PYTHONPATH=tests python benchmarks/audit.py tokens    [--model dense]     the fewest tokens that give a sure verdict
    PYTHONPATH=tests python benchmarks/audit.py rounding  [--from 0 --to 50]  right engines on drawn models: alarms
    PYTHONPATH=tests python benchmarks/audit.py time --checkpoint FOLDER [--tokens 10000] [--rounded]

A verdict is right if it is "rounding" for engines that only round, and otherwise "different" with the true cause first
and no other cause called sure. A checkpoint that was trained on must be "different", and no cause sure.

`time` audits numbers at random, for which no cause is found, which takes longest. With --rounded the rollouts that the
verdict rests on are those of an engine in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import oracle
import planted
import pytest
import torch
from drawing import draw_any_config, draw_ids, trained_like
from ml_dtypes import float8_e4m3fn
from transformers import DynamicCache

import qwen3np
from qwen3np import Config, Model
from qwen3np.audit.formats import q8_0, scaled_e4m3
from qwen3np.audit.measure import Variant
from qwen3np.audit.processed import NEUTRAL, Settings
from qwen3np.audit.rollouts import Rollout
from qwen3np.porting.floors import numerics_of
from qwen3np.porting.settings import blocks

PROMPT, NEW, ROWS, TOP = 24, 32, 8, 20
ROUNDED = 4  # rollouts with the shortest prompts, of which a large model's sample is taken
DENSE = Config(
    vocab_size=512,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    rope_theta=1e6,
    max_position_embeddings=2048,
)
MOE = replace(
    DENSE,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=40,
    norm_topk_prob=True,
    mlp_only_layers=(1,),
)


@dataclass(frozen=True)
class Case:
    """An engine: how it differs from transformers in float32, and what the audit should say."""

    expected: str  # part of the name of the cause; "" for rounding, "?" for a cause that cannot be known
    dtype: str = "float32"
    weights: Callable[[np.ndarray], np.ndarray] | None = None
    plant: Any = None
    settings: Settings = NEUTRAL
    short: Callable[[np.ndarray], np.ndarray] | None = None  # what the cache does to keys and values
    prompt: Callable[[list[int]], list[int]] | None = None  # what the engine sees
    shift: int = 0
    trained: bool = False
    models: tuple[str, ...] = ("dense", "moe", "built-in")


def short_fp8(x: np.ndarray) -> np.ndarray:
    """Keep numbers as e4m3, at most its largest."""
    return np.clip(x, -448, 448).astype(float8_e4m3fn).astype(np.float32)


def bug(name: str, expected: str, *models: str) -> Case:
    """Return the case of a bug that tests/planted.py plants in transformers."""
    return Case(expected, plant=(planted.BUGS | planted.FORMS)[name][0], models=models or ("dense", "built-in"))


ALL = ("dense", "moe", "built-in")
CASES = {
    "float32": Case(""),
    "bfloat16": Case("", "bfloat16"),
    "float16": Case("", "float16"),
    "int8 weights": Case("in int8, a scale for each row", weights=blocks(0, 8)),
    "q8_0 weights": Case("groups of 32 (Q8_0)", weights=q8_0),
    "fp8 weights": Case("fp8 (e4m3), a scale for each row", weights=scaled_e4m3((-1,))),
    "fp8 weights, bfloat16": Case("fp8 (e4m3), a scale for each row", "bfloat16", scaled_e4m3((-1,))),
    "temperature 0.7": Case("processed by temperature 0.7", settings=Settings(temperature=0.7)),
    "temperature 0.6, top-p 0.95": Case(
        "temperature 0.6 and top_p 0.95", settings=Settings(temperature=0.6, top_p=0.95)
    ),
    "top-k 20": Case("processed by top_k 20", settings=Settings(top_k=20)),
    "repetition penalty 1.1": Case("repetition_penalty 1.1", settings=Settings(repetition_penalty=1.1)),
    "temperature 0.7, bfloat16": Case("processed by temperature 0.7", "bfloat16", settings=Settings(temperature=0.7)),
    "shifted": Case("shifted: of the next token", shift=1),
    "first token lost": Case("without its first token", prompt=lambda ids: ids[1:]),
    "a token before": Case("a token before the prompt", prompt=lambda ids: [2024, *ids], models=("built-in",)),
    "KV cache in fp8": Case("KV cache in float8 (e4m3)", short=short_fp8),
    "KV cache in fp8, bfloat16": Case("KV cache in float8 (e4m3)", "bfloat16", short=short_fp8),
    "trained a little": Case("?", trained=True),
    "theta 10,000": bug("theta 10,000", "rope_theta is 10,000", "dense", "moe"),
    "theta 500,000": Case("rope_theta is 500,000", plant=planted.theta(5e5)),
    "theta 250,000": Case("rope_theta is 250,000", plant=planted.theta(2.5e5)),
    "eps 1e-5": bug("eps 1e-5 everywhere", "rms_norm_eps is 1e-5", *ALL),
    "norm after rotation": bug("norm after rotation", "q/k norm after RoPE"),
    "q/k norms missing": bug("q/k norms missing", "q/k norm missing", *ALL),
    "q/k norms over all heads": bug("q/k norms over all heads", "over all heads together", *ALL),
    "q_norm and k_norm swapped": bug("q_norm and k_norm swapped", "q_norm and k_norm swapped", *ALL),
    "norms times 1 + weight": bug("norms times 1 + weight", "multiplied by 1 + weight", *ALL),
    "interleaved rotation": bug("interleaved rotation", "interleaved"),
    "bfloat16 frequencies": bug("bfloat16 frequencies", "inv_freq in bfloat16", *ALL),
    "sign of sin": bug("sign of sin", "sign of sin flipped"),
    "KV heads tiled": bug("KV heads tiled", "KV heads tiled"),
    "position off in decode": bug("position off in decode", "one too high in decode", *ALL),
    "position reset in decode": bug("position reset in decode", "start again in decode", *ALL),
    "gate and up swapped": bug("gate and up swapped", "gate and up swapped"),
    "gelu": bug("gelu", "GELU instead of SiLU"),
    "final norm missing": bug("final norm missing", "norm: left out", *ALL),
    "experts not normalised": Case(
        "weights not normalised", plant=planted.FAMILY_BUGS["weights not normalised"][1], models=("moe",)
    ),
    "logits as weights": Case(
        "router logits as weights", plant=planted.FAMILY_BUGS["logits as weights"][1], models=("moe",)
    ),
    "gelu in experts": Case(
        "GELU instead of SiLU",
        plant=planted.both(planted.FAMILY_BUGS["gelu in experts"][1], planted.BUGS["gelu"][0]),
        models=("moe",),
    ),
}


class ShortCache(DynamicCache):
    """A cache that keeps fewer digits."""

    short: Any = None

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Shorten what is stored."""
        k, v = (torch.from_numpy(self.short(x.float().numpy())).to(x.dtype) for x in (key_states, value_states))
        return super().update(k, v, *args, **kwargs)


def named(name: str, seed: int = 0) -> Model:
    """Return one of the models."""
    if name == "built-in":
        return qwen3np.load(weights_dtype="float32")
    config = {"dense": DENSE, "moe": MOE}[name]
    return Model(config, trained_like(config, seed), None, {})


def prompts(model: Model, rng: np.random.Generator, rows: int) -> list[list[int]]:
    """Return prompts of one length: texts the built-in model knows, or random ids."""
    if model.tokenizer is None:
        return draw_ids(rng, model.config, rows, PROMPT).tolist()
    ids = model.generate(
        [[int(i)] for i in rng.integers(300, 2000, rows)],
        max_new_tokens=PROMPT - 1,
        temperature=1.0,
        seed=int(rng.integers(1000)),
        stop_ids=(),
    )[0]
    return [[int(i) for i in row][:PROMPT] for row in ids]


def generated(
    model: Model, case: Case, seed: int, rows: int = ROWS, new: int = NEW, top: int | None = TOP
) -> list[Rollout]:
    """Let transformers generate, token by token with a cache, and report log-probabilities as the engine would."""
    rng, config = np.random.default_rng(seed), model.config
    weights = {
        name: case.weights(np.asarray(w, np.float32))
        if case.weights and w.ndim == 2 and not name.endswith("mlp.gate.weight")
        else w
        for name, w in model.weights.items()
    }
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        engine = oracle.model_of(config, weights, case.dtype)
        if case.trained:
            _train(engine, config, seed)
        if case.plant:
            case.plant(oracle, engine, patch)
        given = prompts(model, rng, rows)
        seen = [case.prompt(ids) if case.prompt else ids for ids in given]
        cache = ShortCache(config=engine.config) if case.short else DynamicCache(config=engine.config)
        if case.short:
            cache.short = case.short
        part, answers, reports = np.array(seen), [[] for _ in seen], [[] for _ in seen]
        for step in range(new):
            logits = oracle.array(engine(torch.from_numpy(part), past_key_values=cache, use_cache=True).logits.float())[
                :, -1
            ]
            for row, (x, answer, report) in enumerate(zip(logits, answers, reports, strict=True)):
                so_far = Rollout(seen[row], answer, np.zeros((0, 1)), np.zeros((0, 1)), "")
                logp = case.settings.view(x[None], so_far, slice(step, step + 1))[0]
                token = int(rng.choice(len(logp), p=np.exp(logp) / np.exp(logp).sum()))
                best = np.argsort(-logp, kind="stable")[:top]
                answer.append(token)
                report.append(([token, *best.tolist()], [logp[token], *logp[best]]))
            part = np.array([[answer[-1]] for answer in answers])
    found = list[Rollout]()
    for ids, answer, report in zip(given, answers, reports, strict=True):
        found_ids, logprobs = np.array([r[0] for r in report]), np.array([r[1] for r in report])
        if case.shift:  # the engine hands out the numbers of the following token
            found_ids, logprobs = found_ids[case.shift :], logprobs[case.shift :]
            answer = answer[: -case.shift]
            found_ids[:, 0] = answer
        found.append(Rollout(ids, answer, found_ids, logprobs.astype(np.float32).astype(np.float64), ""))
    return found


def _train(engine: Any, config: Config, seed: int) -> None:
    """Take a few small steps on sequences that repeat themselves."""
    rng = np.random.default_rng(seed + 1)
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(engine.parameters(), lr=2e-5)
        for _ in range(20):
            ids = torch.from_numpy(np.tile(draw_ids(rng, config, 4, 16), (1, 2)))
            loss = engine(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def given(rollouts: list[Rollout], what: str, tokens: int | None = None) -> list[Rollout]:
    """Return what of it the audit sees: chosen tokens alone, or the others that were kept; perhaps only some tokens."""
    found = list[Rollout]()
    for r in rollouts:
        n = len(r.ids) if tokens is None else min(len(r.ids), tokens)
        k = 1 if what == "chosen" else None
        if n:
            found.append(replace(r, ids=r.ids[:n], found=r.found[:n, :k], logprobs=r.logprobs[:n, :k]))
        tokens = None if tokens is None else tokens - n
    return found


def judged(model: Model, rollouts: list[Rollout], case: Case) -> tuple[bool, bool, str]:
    """Return whether the verdict is right, whether it is sure, and what it says."""
    from qwen3np.audit.report import audited

    j = audited(rollouts, model).judgement
    first = " or ".join((j.causes[0].name, *j.causes[0].alike)) if j.causes else ""
    said = f"{j.verdict}{'' if j.sure else ' (not sure)'}: {first or j.meaning}"
    if case.expected == "":
        return j.verdict == "rounding", j.sure, said
    if case.expected == "?":
        return j.verdict == "different" and not any(c.sure for c in j.causes), j.sure, said
    return j.verdict == "different" and case.expected in first, j.sure and j.causes[0].sure, said


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """Yield the cases that this model can have."""
    for name, case in CASES.items():
        if arguments.model in case.models and (not arguments.only or name in arguments.only):
            yield name, case


def verdicts(arguments: argparse.Namespace) -> None:
    """Print each case, and how many are right."""
    right = total = alarms = 0
    for name, case in cases(arguments):
        model, start = named(arguments.model, arguments.seed), time.perf_counter()
        made = generated(model, case, arguments.seed, top=None if arguments.given == "full" else TOP)
        good, _sure, said = judged(model, given(made, arguments.given), case)
        right, total, alarms = right + good, total + 1, alarms + (case.expected == "" and not good)
        print(f"{'right' if good else 'WRONG'}  {name:<28} {said}  [{time.perf_counter() - start:.1f} s]", flush=True)
    print(f"{arguments.model}, {arguments.given}: {right} of {total} right; {alarms} alarms")


def tokens(arguments: argparse.Namespace) -> None:
    """Print the fewest tokens from which on each verdict is right and sure."""
    steps = (5, 10, 20, 50, 100, 256)
    for name, case in cases(arguments):
        model = named(arguments.model, arguments.seed)
        rollouts, row = generated(model, case, arguments.seed), list[str]()
        for what in ("chosen", "top"):
            fewest = ""
            for n in reversed(steps):
                good, sure, _ = judged(model, given(rollouts, what, n), case)
                if not (good and (sure or case.expected == "?")):
                    break
                fewest = str(n)
            row.append(fewest or "-")
        print(f"{name:<28} {row[0]:>8} {row[1]:>8}", flush=True)


def rounding(arguments: argparse.Namespace) -> None:
    """Print alarms on right engines in each dtype, over models drawn from the family."""
    alarms = total = 0
    for seed in range(arguments.start, arguments.stop):
        rng = np.random.default_rng(seed)
        config = replace(draw_any_config(rng), max_position_embeddings=1024)
        model = Model(config, trained_like(config, seed), None, {})
        for dtype in ("float32", "bfloat16", "float16"):
            case = Case("", dtype)
            rollouts = generated(model, case, seed, rows=4, new=int(rng.integers(2, 33)))
            good, _, said = judged(model, given(rollouts, ("chosen", "top")[seed % 2]), case)
            total, alarms = total + 1, alarms + (not good)
            if not good:
                print(f"seed {seed}, {dtype}: {said}", flush=True)
    print(f"{alarms} alarms in {total}")


def timed(arguments: argparse.Namespace) -> None:
    """Print the time of an audit of many tokens: of numbers at random, or of rounding in bfloat16."""
    from qwen3np.audit.report import audited

    start = time.perf_counter()
    model = qwen3np.load(arguments.checkpoint, progress=False)
    print(f"loaded in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    rng, new, rollouts = np.random.default_rng(0), 200, list[Rollout]()
    for _ in range(arguments.tokens // new):
        prompt, ids = draw_ids(rng, model.config, 40).tolist(), draw_ids(rng, model.config, new).tolist()
        rollouts.append(Rollout(prompt, ids, np.array(ids)[:, None], rng.normal(-12, 1, (new, 1)), ""))
    if arguments.rounded:
        engine = Variant(model.weights, model.config, numerics=numerics_of("bfloat16"))
        numbers = np.split(engine.predicted(rollouts[:ROUNDED]), ROUNDED)
        rollouts[:ROUNDED] = [replace(r, logprobs=x) for r, x in zip(rollouts, numbers, strict=False)]
    start = time.perf_counter()
    j = (found := audited(rollouts, model)).judgement
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"seconds": seconds, "tokens": found.tokens, "tried": j.tried, "meaning": j.meaning}))


def main() -> None:
    """Run the part that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("verdicts", "tokens", "rounding", "time"))
    parser.add_argument("--model", choices=("dense", "moe", "built-in"), default="dense")
    parser.add_argument("--given", choices=("chosen", "top", "full"), default="top")
    parser.add_argument("--only", action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", dest="start", type=int, default=0)
    parser.add_argument("--to", dest="stop", type=int, default=50)
    parser.add_argument("--checkpoint")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--rounded", action="store_true")
    arguments = parser.parse_args()
    {"verdicts": verdicts, "tokens": tokens, "rounding": rounding, "time": timed}[arguments.part](arguments)


if __name__ == "__main__":
    main()
