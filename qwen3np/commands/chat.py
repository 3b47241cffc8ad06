"""`qwen3np chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen3np.commands import (
    add_computation,
    add_generation,
    add_model,
    generation_options,
    load_model,
    progress_bar,
    read_text,
)
from qwen3np.conversation import Conversation

EXAMPLE = "qwen3np chat --model Qwen/Qwen3-0.6B --think off"
HELP = "hold a conversation"
COMMANDS = """\
/reset            forget the conversation (the system message stays)
/system TEXT      set the system message
/think on|off     reasoning before the answer
/save FILE        write the conversation as JSON
/load FILE        go on with a saved conversation
/help             this list
Ctrl-C stops an answer, Ctrl-D leaves."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument("--think", choices=("on", "off"), help="reasoning before the answer")
    parser.add_argument("--hide-thinking", action="store_true", help="do not show the reasoning")
    add_generation(parser)
    add_model(parser)
    add_computation(parser)


def run(arguments: argparse.Namespace) -> None:
    """Read messages from stdin, a line each, until its end, and print the answers as they come."""
    model, _ = load_model(arguments)
    conversation = Conversation(model)
    conversation.set_system(arguments.system)
    chat = _Chat(conversation, arguments, generation_options(model, arguments))
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # line editing and history, where the system has it
            import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]
        _say("Ask something; /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            line = input("> " if interactive else "").strip()
            if line.startswith("/"):
                chat.command(*line[1:].partition(" ")[::2])
            elif line:
                chat.answer(line)
        except KeyboardInterrupt:
            _say("\nCtrl-D leaves.")
        except EOFError:
            if interactive:
                _say("")
            return
        except (ValueError, OSError) as error:
            _say(f"error: {' '.join(str(error).split())}")
            if not interactive:
                raise


class _Chat:
    """The terminal's side of a conversation."""

    def __init__(self, conversation: Conversation, arguments: argparse.Namespace, options: dict[str, Any]) -> None:
        self.conversation = conversation
        self.options = options
        self.hide_thinking: bool = arguments.hide_thinking
        self.thinking = None if arguments.think is None else arguments.think == "on"

    def answer(self, text: str) -> None:
        """Print the answer to a message as it comes, and on stderr what it cost. Ctrl-C ends it where it is."""
        conversation, stop_ids = self.conversation, self.options["stop_ids"]
        bar = progress_bar(None, "prompt")
        times: list[float] = []
        reply = conversation.reply(text, options=self.options, progress=bar.update, enable_thinking=self.thinking)

        def timed() -> Iterator[int]:
            for token in reply:
                bar.close()
                times.append(time.perf_counter())
                if token not in stop_ids:
                    yield token

        with contextlib.closing(bar), contextlib.closing(reply), contextlib.suppress(KeyboardInterrupt):
            for piece in self.shown(conversation.tokenizer.stream(timed(), skip_special_tokens=True)):
                print(piece, end="", flush=True)
        print(_style("0"))
        used = 0 if conversation.cache is None else int(conversation.cache.lengths[0])
        rate = f"{(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s, " if len(times) > 1 else ""
        _say(f"[{len(times)} tokens, {rate}context {used} of {conversation.model.config.max_position_embeddings}]")

    def shown(self, pieces: Iterator[str]) -> Iterator[str]:
        """Yield what is to be printed of an answer: the reasoning dimmed, or left out."""
        thinking = None
        for piece in pieces:
            if thinking is None:  # some templates open the reasoning themselves, at the end of the prompt
                thinking = self.conversation.opens_thinking
                if thinking and not self.hide_thinking:
                    yield _style("2")
            if piece == "<think>":
                thinking, piece = True, _style("2") + piece
            if not (thinking and self.hide_thinking):
                yield piece
            if piece == "</think>":
                thinking = False
                yield _style("0")

    def command(self, name: str, argument: str) -> None:
        """Do what a line that begins with a slash asks for. Raises ValueError for what is not known."""
        conversation = self.conversation
        if name == "reset":
            conversation.reset()
            _say("The conversation is forgotten.")
        elif name == "system":
            conversation.set_system(argument or None)
            _say("The system message is set." if argument else "There is no system message now.")
        elif name == "think" and argument in ("on", "off"):
            self.thinking = argument == "on"
            _say(f"Reasoning is {argument}.")
        elif name == "save" and argument:
            aside = Path(f"{argument}.part")  # written aside, so that no earlier file is lost half way
            text = json.dumps({"messages": conversation.messages}, ensure_ascii=False, indent=1)
            aside.write_text(text + "\n", encoding="utf-8")
            os.replace(aside, argument)
            _say(f"Saved {len(conversation.messages)} messages.")
        elif name == "load" and argument:
            conversation.messages = _messages(Path(argument))
            _say(f"Loaded {len(conversation.messages)} messages.")
        elif name == "help":
            _say(COMMANDS)
        else:
            raise ValueError(f"/{name} {argument}".strip() + " is not a command; /help lists them")


def _messages(path: Path) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]]
    try:
        messages = json.loads(read_text(path))["messages"]
        good = all({"role", "content"} <= message.keys() for message in messages)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        good, messages = False, []
    if not good:
        raise ValueError(f"{path}: not a saved conversation")
    return messages


def _style(code: str) -> str:
    """Return the escape sequence of a text style; nothing where stdout is no terminal."""
    return f"\x1b[{code}m" if sys.stdout.isatty() else ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
