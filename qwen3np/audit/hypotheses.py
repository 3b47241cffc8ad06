"""What else an engine may have computed: each hypothesis predicts its log-probabilities of the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from qwen3np.audit.formats import COMMON, formats, places
from qwen3np.audit.measure import Variant, View, away, is_large, shortened, size
from qwen3np.audit.rollouts import Rollout
from qwen3np.config import Config
from qwen3np.numerics import Array
from qwen3np.porting.catalogue import BUGS
from qwen3np.porting.changes import Bug
from qwen3np.porting.fits import FAMILIES
from qwen3np.porting.settings import SETTINGS
from qwen3np.tokenizer import Tokenizer

ROUNDING, QUANTISED, CACHE, BUG = "rounding", "quantised weights", "KV cache", "bug"
IDS, SHIFT, PROCESSED, CHECKPOINT, ROUTING = "other ids", "shifted", "processed", "another checkpoint", "routing"
RAW = "ask the engine for raw log-probabilities (vLLM: logprobs_mode=raw_logprobs)"
STEPPED = ("attention: causal mask", "attention: a position does not see itself")  # see more in one pass than in steps
STEPS = 32  # tokens that run one by one, of at most two answers; in large models STEPS // 8


@dataclass(frozen=True)
class Hypothesis:
    """A name, of which kind it is, what to do about it, and what it predicts: (N, 1 + K), NaN where it says nothing."""

    name: str
    kind: str
    look: str
    predict: Callable[[View], Array]
    variant: Variant | None = None  # the model that it runs on all rollouts
    rollouts: Sequence[Rollout] = ()
    states: Callable[[], list[Array]] = list[Array]  # the final hidden states of that run


# --- other models -----------------------------------------------------------------------------------------------------


def as_run(name: str, kind: str, look: str, variant: Variant, rollouts: Sequence[Rollout]) -> Hypothesis:
    """Return the hypothesis that the engine has this model, which runs once for all views."""
    states = cache(lambda: list(variant.states(rollouts)))

    def predict(view: View) -> Array:
        return variant.predicted(rollouts, view, states())

    return Hypothesis(name, kind, look, predict, variant, rollouts, states)


def bugs(right: Variant, rollouts: Sequence[Rollout]) -> Iterator[Hypothesis]:
    """Yield the catalogue's bugs; those of decode steps alone token by token, on a few rollouts.

    Bugs that may be at several points are also tried at each of them, except in large models.
    """
    for whole in BUGS:
        apart = [] if is_large(right.config) else whole.parts
        for bug in (whole, *(replace(one, name=f"{one.name}, {one.points[0]} alone") for one in apart)):
            if not bug.applies(right.config):
                continue
            variant = replace(right, table=bug.planted(right.table))
            in_steps = bug.name.startswith(STEPPED)
            if "decode step" not in bug.name:
                yield as_run(bug.name, BUG, bug.look, replace(variant, alone=in_steps), rollouts)
            if "decode step" in bug.name or in_steps:
                yield _in_steps(bug.name, BUG, bug.look, variant, rollouts)
    if right.config.rope_scaling is None:
        for factor in (2.0, 4.0):
            look = "rope_scaling is set in the engine, but not in this config.json"
            variant = replace(right, config=right.config.extended(factor))
            yield as_run(f"rotary: YaRN with factor {factor:g}", BUG, look, variant, rollouts)


def _in_steps(name: str, kind: str, look: str, variant: Variant, rollouts: Sequence[Rollout]) -> Hypothesis:
    """Return the hypothesis of a model that differs token by token: it is tried on the start of a few answers."""
    variant, lengths = replace(variant, stepped=True), [len(r.ids) for r in rollouts]
    steps, count = (STEPS // 8, 1) if is_large(variant.config) else (STEPS // 2, 2)
    few = [shortened(r, steps, variant.config) for r in rollouts[:count]]
    states = cache(lambda: list(variant.states(few)))

    def predict(view: View) -> Array:
        found = variant.predicted(few, view, states())
        whole, start, at = np.full((sum(lengths), found.shape[1]), np.nan), 0, 0
        for r, length in zip(few, lengths, strict=False):
            whole[start : start + len(r.ids)] = found[at : at + len(r.ids)]
            start, at = start + length, at + len(r.ids)
        return whole

    return Hypothesis(name, kind, look, predict)


def settings(right: Variant, rollouts: Sequence[Rollout], rounds: bool) -> Iterator[Hypothesis]:
    """Yield what an author may choose: caches and products in few digits; where it `rounds`, norms and more in 16 bits.

    Where the difference is rounding anyway, only the former would change the verdict.
    """
    for setting in SETTINGS:
        if setting.name.startswith("weights"):
            continue
        short = any(word in setting.name for word in ("8 bits", "4 bits", "float8"))
        kind = ROUNDING if not short else CACHE if setting.name.startswith("KV cache") else QUANTISED
        if (kind == ROUNDING and not rounds) or (kind == QUANTISED and is_large(right.config)):
            continue
        yield as_run(setting.name, kind, setting.look, replace(right, table=setting.planted(right.table)), rollouts)
        if kind == CACHE and not is_large(
            right.config
        ):  # the prompt often attends to keys and values that are not shortened yet
            late = replace(right, table=replace(setting, decode=True).planted(right.table))
            yield _in_steps(setting.name, kind, setting.look, late, rollouts)


def quantised(right: Variant, rollouts: Sequence[Rollout]) -> Iterator[Hypothesis]:
    """Yield weights in fewer bits: in the layers, there and in the head, or in all matrices."""
    look = "name the file that the engine loads with --model, or add --other FILE: only rounding should remain"
    large = is_large(right.config)
    for name, (short, inputs) in formats().items():
        if large and not name.startswith(COMMON):
            continue
        whole, heads, within = places(short, inputs)
        tried = (within,) if large else (whole, within) if right.config.tie_word_embeddings else (whole, heads, within)
        for points in tried:
            bug = Bug(name, points, look)
            yield as_run(name, QUANTISED, look, replace(right, table=bug.planted(right.table)), rollouts)


def checkpoints(
    right: Variant, rollouts: Sequence[Rollout], others: Mapping[str, tuple[Mapping[str, Array], Config]]
) -> Iterator[Hypothesis]:
    """Yield other checkpoints that the user names."""
    for name, (weights, config) in others.items():
        variant = replace(right, weights=weights, config=config)
        yield as_run(f"another checkpoint: {name}", CHECKPOINT, f"the engine runs {name}", variant, rollouts)


# --- a number that is fitted ------------------------------------------------------------------------------------------


def fits(right: Variant, rollouts: Sequence[Rollout], theirs: Array, base: Array, view: View) -> Iterator[Hypothesis]:
    """Yield rope_theta and rms_norm_eps as the numbers fit them best (Gauss-Newton in their logarithm)."""
    for family in FAMILIES:
        for pattern in family.patterns[:1]:

            def run(value: float, pattern: str = pattern, family: Any = family) -> Array:
                bug = family.bug(pattern, value)
                return replace(right, table=bug.planted(right.table)).predicted(rollouts, view)

            def error(x: Array) -> float:
                return size(away(theirs, x))

            starts = family.starts(right.config)
            if family.key == "rope_theta":
                starts = sorted({*starts, 5e4, 2e5, 3e5, 2e6, 3e6, 2e7, 1e8} - {right.config.rope_theta})
            if is_large(right.config):
                starts = starts[::2]
            own: tuple[float, float, Array] = (error(base), getattr(right.config, family.key), base)
            least, value, at = min([own, *((error(x := run(v)), v, x) for v in starts)], key=lambda t: t[0])
            for _ in range(6):
                h = 1e-3
                with np.errstate(invalid="ignore"):  # of what filters drop
                    slope, gap = (run(value * float(np.exp(h))) - at) / h, theirs - at
                seen = np.isfinite(slope) & np.isfinite(gap)
                step = float(slope[seen] @ gap[seen] / max(slope[seen] @ slope[seen], 1e-300))
                nearer = value * float(np.exp(np.clip(step, -1, 1)))
                x = run(nearer)
                if not error(x) < least:
                    break
                gain, least, value, at = least / error(x), error(x), nearer, x
                if gain < 1.01:
                    break
            if not least < (0.8 if is_large(right.config) else 0.95) * own[0]:
                continue
            for h in () if is_large(right.config) else (0.2, 0.1, 0.05, 0.02, 0.01):  # where other experts hide slopes
                tried = [(error(x := run(v)), v, x) for v in (value * float(np.exp(s)) for s in (-h, h))]
                least, value, at = min(((least, value, at), *tried), key=lambda t: t[0])
            for digits in (3, 2, 1):  # a rounder number, if it is as good
                rounder = float(f"{value:.{digits}g}")
                if error(x := run(rounder)) <= 1.02 * least:
                    value, at = rounder, x
            bug = family.bug(pattern, value)
            yield as_run(bug.name, BUG, family.look, replace(right, table=bug.planted(right.table)), rollouts)


# --- other ids, and other places --------------------------------------------------------------------------------------


def prompts(
    right: Variant, rollouts: Sequence[Rollout], config: Config, tokenizer: Tokenizer | None
) -> Iterator[Hypothesis]:
    """Yield other prompts: a token more or less, another chat template."""
    look = "compare the ids that the engine saw with those of the file, one by one"

    def other(name: str, change: Callable[[Rollout], list[int]]) -> Iterator[Hypothesis]:
        changed = [replace(r, prompt=change(r) or r.prompt, experts=None) for r in rollouts]
        if any(a.prompt != b.prompt for a, b in zip(changed, rollouts, strict=True)):
            yield as_run(name, IDS, look, right, changed)

    yield from other("the prompt without its first token", lambda r: r.prompt[1:])
    yield from other("the prompt without its last token", lambda r: r.prompt[:-1])
    starts = {*config.eos_token_id}
    if tokenizer is not None and not is_large(config):
        starts |= {*tokenizer.special_tokens.values()}
    for token in sorted(i for i in starts if i < config.vocab_size):
        name = f"a token before the prompt: {token}"
        yield from other(name, lambda r, token=token: [token, *r.prompt])
    if tokenizer is None:
        return
    for name, edit in TEMPLATES.items():
        yield from other(
            f"another chat template: {name}", lambda r, edit=edit: tokenizer.encode(edit(tokenizer.decode(r.prompt)))
        )


EMPTY, ASSISTANT = "<think>\n\n</think>\n\n", "<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def _user(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n{ASSISTANT}"


def _without_system(text: str) -> str:
    return text.partition("<|im_end|>\n")[2] if text.startswith("<|im_start|>system") else text


TEMPLATES: Mapping[str, Callable[[str], str]] = {
    "thinking off (an empty <think> block)": lambda t: t + EMPTY if t.endswith(ASSISTANT) else t,
    "thinking begun (<think> in the prompt)": lambda t: t + "<think>\n" if t.endswith(ASSISTANT) else t,
    "thinking not off (no empty <think> block)": lambda t: t.removesuffix(EMPTY),
    "no generation prompt": lambda t: t.removesuffix(EMPTY).removesuffix(ASSISTANT),
    "no line break at the end": lambda t: t.removesuffix("\n"),
    "a line break at the end": lambda t: t + "\n",
    "a space at the end": lambda t: t + " ",
    "a default system message": lambda t: SYSTEM + t if t.startswith("<|im_start|>") else t,
    "no system message": _without_system,
    "the prompt as a user's message": lambda t: t if "<|im_start|>" in t else _user(t),
    "the prompt as a user's message, thinking off": lambda t: t if "<|im_start|>" in t else _user(t) + EMPTY,
    "the ids of the same text, encoded again": lambda t: t,
}


def shifts(right: Variant, rollouts: Sequence[Rollout], states: Sequence[Array]) -> Iterator[Hypothesis]:
    """Yield log-probabilities that belong to a neighbour: its own, or this token's at its place."""
    look = "logits at position i belong to the token at i + 1"
    for by, where in ((1, "the next"), (-1, "the previous")):
        for own in (True, False):
            name = f"shifted: of {where} token" if own else f"shifted: this token's, at {where} position"

            def predict(view: View, by: int = by, own: bool = own) -> Array:
                moved = list[Rollout]()
                for r in rollouts:
                    found = np.roll(r.found, by, 0)  # row i gets what is reported at i - by
                    if own:
                        found[:, 0] = r.ids
                    moved.append(replace(r, found=found))
                x = right.predicted(moved, view, states)
                out, start = np.full(x.shape, np.nan), 0
                for r in rollouts:
                    n = len(r.ids)
                    rows = np.roll(x[start : start + n], -by, 0)
                    rows[-1 if by == 1 else 0] = np.nan
                    out[start : start + n], start = rows, start + n
                return out

            yield Hypothesis(name, SHIFT, look, predict)


def units(base: Array) -> Iterator[Hypothesis]:
    """Yield other ways to write a log-probability."""
    look = "a log-probability is the natural logarithm, at most 0"
    for name, f in {
        "its sign is flipped": np.negative,
        "logarithms to base 2": lambda x: x / np.log(2),
        "logarithms to base 10": lambda x: x / np.log(10),
        "probabilities": np.exp,
    }.items():
        yield Hypothesis(f"other units: {name}", PROCESSED, look, lambda view, f=f: f(base))
