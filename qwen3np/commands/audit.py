"""`qwen3np audit`: an engine's log-probabilities held against the reference."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from pathlib import Path

from qwen3np.audit.causes import Cause
from qwen3np.audit.court import MARGIN
from qwen3np.audit.endpoint import ask
from qwen3np.audit.page import page
from qwen3np.audit.report import Audit, Group, audited
from qwen3np.audit.rollouts import NAMES, Fields, read_rollouts
from qwen3np.commands import add_model, add_threads, load_named, progress_bar, table
from qwen3np.errors import one_line
from qwen3np.files.writing import written_aside
from qwen3np.loading import load
from qwen3np.model import Model
from qwen3np.porting.compare import per_cent
from qwen3np.study.view import visible

EXAMPLE = "qwen3np audit rollouts.jsonl --model Qwen/Qwen3-0.6B -o report.html"
HELP = "hold an engine's log-probabilities against the reference; exit status 0 rounding, 1 different, 2 unusable"
WIDTH, INDENT = 80, " " * 21


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    rollouts = (
        "JSON lines with ids and log-probabilities, as vLLM, SGLang, TRL, verl, llama.cpp or a server writes them"
    )
    parser.add_argument("rollouts", nargs="?", type=Path, metavar="ROLLOUTS", help=rollouts)
    url = "instead: ask an OpenAI-compatible server, such as http://127.0.0.1:8000/v1 (key: QWEN3NP_API_KEY)"
    parser.add_argument("--url", metavar="URL", help=url)
    parser.add_argument(
        "--served-name", metavar="NAME", help="the name of the model at the server (default: the only one it has)"
    )
    field = f"the key of a field with another name (repeatable); fields: {', '.join(NAMES)}"
    parser.add_argument("--field", action="append", default=[], metavar="FIELD=KEY", help=field)
    other = "a checkpoint that the engine may run instead (repeatable)"
    parser.add_argument("--other", action="append", default=[], metavar="M", help=other)
    known = "what the engine computes in: larger rounding is then a difference (default: any of them)"
    parser.add_argument("--computed-in", choices=tuple(MARGIN), help=known)
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="also write a page, which needs no network")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model(parser)
    add_threads(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the report and exit with its status."""
    given = dict(_pair(written) for written in arguments.field)
    fields = Fields(given)
    if arguments.out and (arguments.out.is_dir() or not arguments.out.parent.is_dir()):
        raise ValueError(f"{arguments.out}: must be a file in a folder that exists")
    if (arguments.rollouts is None) == (arguments.url is None):
        raise ValueError("give either a file of rollouts or --url")
    arguments.weights_dtype = "auto"
    model = load_named(arguments)
    try:
        found = _audited(model, fields, arguments)
    except ValueError as error:
        if arguments.json:
            print(json.dumps({"verdict": "unusable", "causes": [], "reason": one_line(str(error))}))
        raise
    if arguments.out:
        with written_aside(arguments.out) as part:
            part.write_bytes(page(found, model, arguments.model or "the small built-in checkpoint").encode())
        print(f"[{arguments.out}: open it in a browser]", file=sys.stderr)
    print(json.dumps(found.as_json()) if arguments.json else summary(found, model, fields))
    sys.exit(found.verdict == "different")


def _audited(model: Model, fields: Fields, arguments: argparse.Namespace) -> Audit:
    vocabulary = model.config.vocab_size
    if arguments.url is None:
        rollouts = read_rollouts(arguments.rollouts, model.tokenizer, vocabulary, fields)
    else:
        rollouts = ask(
            arguments.url,
            arguments.served_name,
            model.text,
            vocabulary,
            key=os.environ.get("QWEN3NP_API_KEY"),
            context=model.config.max_position_embeddings,
            say=lambda text: print(f"[{text}]", file=sys.stderr),
        )
    others = {name: load(name) for name in arguments.other}
    with progress_bar(sum(len(r.prompt) + len(r.ids) for r in rollouts), "audited") as bar:
        return audited(
            rollouts,
            model,
            others={name: (m.weights, m.config) for name, m in others.items()},
            computed_in=arguments.computed_in,
            fields=fields.used,
            progress=bar.update,
        )


def _pair(written: str) -> tuple[str, str]:
    name, found, key = written.partition("=")
    if not (found and key):
        raise ValueError(f"--field {written}: must be FIELD=KEY, such as logprobs=old_log_probs")
    return name, key


def summary(found: Audit, model: Model, fields: Fields) -> str:
    """Return the report as text, at most WIDTH columns wide."""
    j = found.judgement
    keys = ", ".join(f"{name} from {one_line(key)}" for name, key in fields.used.items())
    pieces = [
        _filled(f"{j.verdict}{'' if j.sure else ' (not sure)'}: {j.meaning}"),
        *map(_filled, j.notes),
        *([_causes(j.causes)] if j.causes else []),
        table(_numbers(found)),
        _floors(found),
        _groups("position", found.positions, "{:.0f}"),
        _groups("entropy", found.entropies, "{:.1f}"),
        _worst(found, model),
        _filled(
            f"Read: {keys}. The floors and causes are from {j.sample:,} of these tokens; {j.tried} causes were tried."
        ),
    ]
    if fields.unused:
        pieces.append(_filled(f"Also there: {', '.join(sorted(fields.unused))}; --field logprobs=KEY audits these."))
    return "\n\n".join(pieces)


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(one_line(text), WIDTH, initial_indent=indent, subsequent_indent=indent)


def _causes(causes: list[Cause]) -> str:
    lines = [f"{'explained':>9}  {'left':>8}  cause"]
    for cause in causes:
        share = "" if cause.explained is None else per_cent(cause.explained)
        names = " or ".join((cause.name, *cause.alike)) + ("" if cause.sure else " (not sure)")
        lines.append(f"{share:>9}  {cause.left:>8.2g}  {_filled(names, INDENT).lstrip()}")
        lines.append(_filled(f"-> {cause.look}", INDENT))
    return "\n".join(lines)


def _numbers(found: Audit) -> list[tuple[str, str]]:
    q = ", ".join(f"{name} below {x:.2g}" for name, x in found.quantiles.items())
    kl = found.kl
    rows = [
        ("compared", f"{found.tokens:,} tokens of {found.rollouts:,} rollouts, in nats"),
        ("difference", f"mean {found.mean_abs:.3g}, largest {found.max_abs:.3g}"),
        ("of the tokens", q),
        ("bias", f"{found.bias:+.2g} (theirs - ours)"),
        ("ratios", ", ".join(f"{share:.1%} outside {bounds}" for bounds, share in found.outside.items())),
        ("KL(theirs||ours)", f"k1 {kl['theirs||ours k1']:.2g}, k3 {kl['theirs||ours k3']:.2g}"),
        ("KL(ours||theirs)", f"k1 {kl['ours||theirs k1']:.2g}, k3 {kl['ours||theirs k3']:.2g}"),
    ]
    j = found.judgement
    if j.routing is not None:
        rows.append(
            ("other experts", f"{per_cent(max(j.routing, 0))} of the squared difference: gone if theirs are used")
        )
    if j.routing_of_rounding is not None:
        rows.append(
            (
                "other experts",
                f"{per_cent(j.routing_of_rounding)} of the squared rounding of bfloat16; theirs are not in the file",
            )
        )
    if found.others_mean_abs is not None:
        rows.insert(2, ("other likely ids", f"mean {found.others_mean_abs:.3g}"))
    return rows


def _floors(found: Audit) -> str:
    floors = found.judgement.floors
    rows = [f"  {name:<14}{x:>9.2g}  {_times(found.mean_abs, x):>10}" for name, x in floors.items()]
    return "\n".join(["What rounding makes of these tokens, and how far they are from there:", *rows])


def _times(x: float, floor: float) -> str:
    """Return how many floors a difference is, in three digits."""
    if not floor:
        return "-"
    ratio = x / floor
    return f"{ratio:,.0f} x" if ratio >= 100 else f"{ratio:.3g} x" if ratio >= 0.001 else "< 0.001 x"


def _groups(what: str, groups: list[Group], form: str) -> str:
    lines = [f"{what:>14}  {'tokens':>7}  {'mean':>8}  {'bias':>9}"]
    for g in groups:
        span = (
            f"{form.format(g.start)} to {form.format(g.end)}"
            if g.end < float("inf")
            else f"above {form.format(g.start)}"
        )
        lines.append(f"{span:>14}  {g.tokens:>7,}  {g.mean_abs:>8.2g}  {g.bias:>+9.2g}")
    return "\n".join(lines)


def _worst(found: Audit, model: Model) -> str:
    def shown(ids: list[int]) -> str:
        if model.tokenizer is None:
            return " ".join(map(str, ids))
        return "".join(visible(model.tokenizer.token_bytes(i)) or f"#{i}" for i in ids)

    lines = [f"{'theirs':>8}  {'ours':>8}  {'at':>6}  the tokens that differ most, after ..."]
    for w in found.worst:
        text = f"{shown(w.context)} → {shown([w.id])}"
        lines.append(f"{w.theirs:>8.3f}  {w.ours:>8.3f}  {w.position:>6}  {text[-(WIDTH - 28) :]}")
    return "\n".join(lines)
