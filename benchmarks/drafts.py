"""Measure guesses at the next tokens: texts that repeat their prompt, texts that do not, and a draft model.

    python benchmarks/drafts.py FOLDER TOKENIZER [--draft FOLDER] [--tokens N] [--weights-dtype mapped]

With random weights a model says nothing sensible, so each answer is forced: a processor leaves one id at each step.
Every pass is computed as ever; only what comes out of it is known. FOLDER is a checkpoint of any weights (see
random_checkpoint.py), TOKENIZER a folder with Qwen3's tokenizer. With a draft model, four of five of its guesses are
made right, whatever it computes. The two sides take turns; the figure is the ratio of the times, without the prompt's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from qwen3np import Tokenizer, drafts, load
from qwen3np.generate import steps
from qwen3np.model import Model
from qwen3np.numerics import Array

PARAGRAPH = (
    "The harbour was built in 1842, when the coal trade moved north. Its two piers are 310 and 240 metres long, and "
    "the gap between them faces away from the wind. In 1911 a storm took the lamp of the longer pier; it was found "
    "eight miles away, unbroken, and it burns there to this day. Ships of more than four metres draught wait for the "
    "tide, which comes in twice a day and leaves the inner basin dry for an hour."
)
CODE = '''def area(width: float, height: float) -> float:
    """Return the area of a rectangle."""
    if width < 0 or height < 0:
        raise ValueError("width and height must not be negative")
    return width * height


def perimeter(width: float, height: float) -> float:
    """Return the perimeter of a rectangle."""
    if width < 0 or height < 0:
        raise ValueError("width and height must not be negative")
    return 2 * (width + height)
'''
SETTINGS = """[server]
host = "127.0.0.1"
port = 8000
workers = 4
timeout = 30

[database]
url = "postgresql://localhost/stock"
pool_size = 10
timeout = 5
"""
ROWS = [
    ("Ada Brown", "Leeds", "2019-03-04", 41200),
    ("Bilal Khan", "Bradford", "2020-11-16", 38900),
    ("Chiara Conti", "York", "2018-07-23", 45750),
    ("David Osei", "Hull", "2021-01-11", 36400),
    ("Elin Berg", "Sheffield", "2017-09-05", 52300),
]
COLUMNS = ("name", "city", "since", "salary")
TABLE = " | ".join(COLUMNS) + "\n" + "\n".join(" | ".join(map(str, row)) for row in ROWS)
JSON = "[" + ", ".join(json.dumps(dict(zip(COLUMNS, row, strict=True))) for row in ROWS) + "]"
CSV = ",".join(COLUMNS) + "\n" + "\n".join(",".join(map(str, row)) for row in ROWS)
MINUTES = (
    "Present: Ms Field, Mr Ito, Dr Rahman. The budget for the library roof was approved with five votes to two. Mr Ito "
    "asked that the contract name a date; Dr Rahman will send a draft by 14 June. The reading room stays open during "
    "the work, except on the first two Mondays of July."
)
QUOTES = (
    'The minutes record three decisions. First, "the budget for the library roof was approved with five votes to two." '
    'Second, "Dr Rahman will send a draft by 14 June." Third, "the reading room stays open during the work, except on '
    'the first two Mondays of July."'
)
EMAIL = (
    "Dear Mr Novak,\n\nthank you for your order 58-1147 of three oak shelves (180 x 40 cm). They leave our workshop on "
    "2 May and reach you within four days. Please check the parcels before you sign for them.\n\nKind regards,\n"
    "Joan Price\nWorkshop Price & Daughters"
)

REPEATING = {
    "edit a function": (f"Rename width to w everywhere:\n{CODE}", CODE.replace("width", "w")),
    "add a check": (f"Name the parameters in the error:\n{CODE}", CODE.replace("not be negative", "be 0 or more")),
    "edit settings": (f"Set the port to 9000:\n{SETTINGS}", SETTINGS.replace("8000", "9000")),
    "two changes in settings": (
        f"Double both timeouts:\n{SETTINGS}",
        SETTINGS.replace("= 30", "= 60").replace("= 5\n", "= 10\n"),
    ),
    "JSON from a table": (f"{TABLE}\n\nAs JSON:\n", JSON),
    "CSV from JSON": (f"{JSON}\n\nAs CSV:\n", CSV),
    "table from CSV": (f"{CSV}\n\nAs a table with bars:\n", TABLE),
    "summary with quotes": (f"{MINUTES}\n\nSummarise, with quotes.\n", QUOTES),
    "correct the spelling": (
        PARAGRAPH.replace("metres", "meters").replace("harbour", "harbor") + "\n\nIn British spelling:\n",
        PARAGRAPH,
    ),
    "answer with the sentence": (
        f"{PARAGRAPH}\n\nWhere was the lamp found? Quote the passage.\n",
        'It was found eight miles away: "In 1911 a storm took the lamp of the longer pier; it was found eight miles '
        'away, unbroken, and it burns there to this day."',
    ),
    "change the addressee": (f"{EMAIL}\n\nThe same for Ms Weber:\n", EMAIL.replace("Mr Novak", "Ms Weber")),
    "explain line by line": (
        f"{SETTINGS}\nExplain each line.\n",
        'host = "127.0.0.1": only this machine can connect.\nport = 8000: where the server listens.\nworkers = 4: four '
        'processes.\ntimeout = 30: in seconds.\nurl = "postgresql://localhost/stock": the database.\npool_size = 10: '
        "connections kept open.\ntimeout = 5: in seconds, too.\n",
    ),
}
NEW = {
    "a story": (
        "Tell a short story.\n",
        "Mira kept bees on the roof of the old cinema. Nobody in the street knew, although some wondered why their "
        "window boxes had never looked so well. One evening in June a swarm settled on the bus stop, and the driver of "
        "the number nine, who was afraid of nothing else, refused to open his doors. Mira came down with a cardboard "
        "box, a bed sheet and a song her grandmother had taught her. Twenty people watched her fold the cloud away.",
    ),
    "an explanation": (
        "Why is the sea salty?\n",
        "Rain takes up a little carbon dioxide from the air and becomes a weak acid. As it runs over rock it dissolves "
        "minerals, which rivers carry to the ocean. Water evaporates from there, but whatever it had dissolved stays "
        "behind. Hot springs along the ridges of the deep add more. Over hundreds of millions of years this has "
        "reached a balance: clay, shells and evaporating lagoons remove about as much as arrives.",
    ),
}


def seconds(model: Model, ids: list[int], answer: list[int], **settings: Any) -> tuple[float, int]:
    """Return how long the answer takes after its first token, and how many passes."""

    def force(so_far: Array, logits: Array) -> Array:
        forced = np.full_like(logits, -np.inf)
        forced[answer[len(so_far) - len(ids)]] = 0
        return forced

    found = steps(
        model.weights,
        model.config,
        [ids],
        max_new_tokens=len(answer),
        stop_ids=(),
        logits_processors=[force],
        **settings,
    )
    next(found)
    began, passes = time.perf_counter(), 0
    for step in found:
        passes += not step.guessed
    return time.perf_counter() - began, passes


def agreeing(small_model: Callable[..., Any], answers: dict[int, list[int]], share: float) -> Callable[..., Any]:
    """Return small_model with this share of right guesses, at random places; it computes what it did."""

    def made(model: Model, room: int) -> Any:
        guess, rng = small_model(model, room), np.random.default_rng(0)

        def right(ids: Array, most: int, choose: Any) -> list[int]:
            def forced(logits: Array, guesses: list[int]) -> int:
                start, answer = next(iter(answers.items()))
                place = len(ids) - start + len(guesses)
                wanted = answer[place] if place < len(answer) else 0
                return wanted if rng.random() < share else int(wanted == 0)

            return guess(ids, most, forced)

        return right

    return made


def main() -> None:
    """Print a line for each text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--draft", help="the folder of a draft model, tried instead of look-up")
    parser.add_argument("--weights-dtype", default="auto", help="as in load: auto, float32 or mapped")
    parser.add_argument("--tokens", type=int, default=1000, help="at most this many of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = load(arguments.folder, weights_dtype=arguments.weights_dtype)
    tokenizer = Tokenizer.from_folder(arguments.tokenizer)
    guesses: dict[str, Any] = {"prompt_lookup_num_tokens": drafts.MOST}
    if arguments.draft:
        guesses = {"assistant_model": load(arguments.draft, weights_dtype=arguments.weights_dtype)}
    for kind, texts in (("repeats its prompt", REPEATING), ("new", NEW)):
        ratios: list[float] = []
        for name, (prompt, answer) in texts.items():
            ids, forced = tokenizer.encode(prompt), tokenizer.encode(answer)[: arguments.tokens]
            drafts.small_model = agreeing(SMALL_MODEL, {len(ids): forced}, 0.8)
            times: dict[bool, list[float]] = {False: [], True: []}
            passes = 0
            for _ in range(arguments.rounds):
                for guessing in times:
                    taken, passes = seconds(model, ids, forced, **(guesses if guessing else {}))
                    times[guessing].append(taken)
            ratios.append(median(times[False]) / median(times[True]))
            print(
                f"{name:26} {len(forced):4} ids, {(len(forced) - 1) / passes:4.2f} a pass, {ratios[-1]:5.2f} x",
                flush=True,
            )
        print(f"{kind + ', median':26} {median(ratios):29.2f} x\n", flush=True)


SMALL_MODEL = drafts.small_model

if __name__ == "__main__":
    main()
