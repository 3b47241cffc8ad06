"""How well a checkpoint answers the held-out questions: `python -m qwen3np.training.evaluate [--model FOLDER]`."""

from __future__ import annotations

import argparse
import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from qwen3np.loading import load
from qwen3np.model import Model
from qwen3np.numerics import ENGINES
from qwen3np.training.corpus import Message, Question, make_corpus

BATCH = 32
MAX_NEW_TOKENS = 48  # more than any right answer has
SHOWN = 20  # wrong answers to print


@dataclass(frozen=True)
class Outcome:
    """A checkpoint's answer to a question."""

    question: Question
    text: str
    ended: bool  # whether a chat answer ended with <|im_end|>

    @property
    def right(self) -> bool:
        """Whether the answer is exact; a completion may continue after its full stop."""
        if isinstance(self.question.prompt, str):
            return self.text.startswith(self.question.answer)
        return self.ended and self.text == self.question.answer


def evaluate(model: Model, questions: Sequence[Question], engine: str = "fast") -> list[Outcome]:
    """Return the greedy answer to each question, in order.

    Earlier turns of a conversation hold the model's own answers. Raises ValueError for a model without a tokenizer, and
    for chat questions if there is no chat template.
    """
    from tqdm import tqdm

    def answers(prompts: Sequence[str | list[Message]]) -> list[tuple[str, bool]]:
        return _answers(model, prompts, engine)

    outcomes: list[Outcome] = []
    with tqdm(total=len(questions), desc="questions", disable=None) as bar:
        for start in range(0, len(questions), BATCH):
            batch = questions[start : start + BATCH]
            prompts = _answered_before(answers, [question.prompt for question in batch])
            outcomes += [Outcome(question, *answer) for question, answer in zip(batch, answers(prompts), strict=True)]
            cast("Any", bar).update(len(batch))
    return outcomes


def _answered_before(
    answers: Callable[[Sequence[str | list[Message]]], list[tuple[str, bool]]], prompts: Sequence[str | list[Message]]
) -> list[str | list[Message]]:
    """Return the prompts with the model's own answers in the earlier turns."""
    asked = list(prompts)
    for turn in range(max((len(prompt) for prompt in prompts if not isinstance(prompt, str)), default=0)):
        rows = [
            row
            for row, prompt in enumerate(asked)
            if not isinstance(prompt, str) and turn < len(prompt) and prompt[turn]["role"] == "assistant"
        ]
        for row, (text, _) in zip(rows, answers([asked[row][:turn] for row in rows]), strict=True):
            prompt = cast("list[Message]", asked[row])
            asked[row] = [*prompt[:turn], {"role": "assistant", "content": text}, *prompt[turn + 1 :]]
    return asked


def _answers(model: Model, prompts: Sequence[str | list[Message]], engine: str) -> list[tuple[str, bool]]:
    """Return the greedy answer to each prompt, and whether it ended with <|im_end|>."""
    if not prompts:
        return []
    tokenizer = model.text
    texts = [prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt) for prompt in prompts]
    new, _ = model.generate(
        [tokenizer.encode(text) for text in texts],
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=0.0,
        engine=engine,
    )
    end = tokenizer.token_to_id("<|im_end|>")
    return [(tokenizer.decode(ids, skip_special_tokens=True), ids[-1] == end) for ids in new]


def report(outcomes: Sequence[Outcome]) -> str:
    """Return a table: exact answers in total, per kind and per relation; chat answers that end; some wrong answers."""
    lines = [f"{'':<32}{'exact':>12}{'':>8}{'ended':>12}"]

    def rows(key: Callable[[Outcome], str]) -> None:
        groups: dict[str, list[Outcome]] = defaultdict(list)
        for outcome in outcomes:
            groups[key(outcome)].append(outcome)
        for name, group in groups.items():
            right = sum(outcome.right for outcome in group)
            chats = [outcome.ended for outcome in group if not isinstance(outcome.question.prompt, str)]
            ended = f"{sum(chats)}/{len(chats)}" if chats else ""
            lines.append(f"{name:<32}{f'{right}/{len(group)}':>12}{right / len(group):>8.1%}{ended:>12}")

    rows(lambda outcome: "all")
    lines.append("")
    rows(lambda outcome: f"{outcome.question.kind}, {'text' if isinstance(outcome.question.prompt, str) else 'chat'}")
    lines.append("")
    rows(lambda outcome: outcome.question.relation)
    wrong = [outcome for outcome in outcomes if not outcome.right]
    shown = wrong[:: -(-len(wrong) // SHOWN)] if wrong else []  # of every kind and relation
    if wrong:
        lines += ["", f"wrong ({len(shown)} of {len(wrong)}):"]
    for outcome in shown:
        prompt = outcome.question.prompt
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        lines.append(f"  {outcome.question.kind}: {asked!r} -> {outcome.text!r}, not {outcome.question.answer!r}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask a checkpoint the questions held out from the built-in corpus, and print how many it answers."""
    parser = argparse.ArgumentParser(prog="python -m qwen3np.training.evaluate", description=main.__doc__)
    parser.add_argument("--model", help="a folder with a checkpoint (default: the built-in one)")
    parser.add_argument("--engine", choices=ENGINES, default="fast")
    given = parser.parse_args(arguments)
    try:
        outcomes = evaluate(load(given.model), make_corpus().questions, given.engine)
        said = hashlib.sha256("\n".join(outcome.text for outcome in outcomes).encode()).hexdigest()
        print(f"{report(outcomes)}\n\nall answers: SHA-256 {said}")
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
