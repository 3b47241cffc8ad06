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
    Ends,
    add_computation,
    add_generation,
    add_model,
    generation_options,
    load_model,
    progress_bar,
    read_text,
    text,
    utf8,
)
from qwen3np.conversation import Conversation
from qwen3np.errors import one_line
from qwen3np.files.limits import readable
from qwen3np.files.writing import written_aside

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
    parser.add_argument("--system", type=text, metavar="TEXT", help="a system message")
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
    chat = Chat(conversation, arguments, generation_options(model, arguments))
    if not sys.stdin.isatty():
        for line in sys.stdin.buffer:
            chat.take(utf8(line, "stdin"))
        return
    with contextlib.suppress(ImportError):  # line editing and history, where the system has it
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # several pasted lines are one message
    _say("Ask something; /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            if not sys.stdout.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            chat.take(input("> " if sys.stdout.isatty() else ""))
        except KeyboardInterrupt:
            _say("\nCtrl-D leaves.")
        except EOFError:
            _say("")
            return
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            _say(f"error: {one_line(' '.join(str(error).split()))}")


class Chat:
    """The terminal's side of a conversation."""

    def __init__(self, conversation: Conversation, arguments: argparse.Namespace, options: dict[str, Any]) -> None:
        """Take the switches from the command line."""
        self.conversation = conversation
        self.options = options
        self.ends = Ends(conversation.tokenizer, options["stop_ids"], arguments.stop)
        self.hide_thinking: bool = arguments.hide_thinking
        self.thinking = None if arguments.think is None else arguments.think == "on"

    def take(self, line: str) -> None:
        """Do what a line asks for: a command if it begins with a slash, else an answer."""
        line = line.strip()
        if line.startswith("/"):
            self.command(*line[1:].partition(" ")[::2])
        elif line:
            self.answer(line)

    def answer(self, message: str) -> None:
        """Print the answer to a message as it comes, and on stderr what it cost. In a terminal, Ctrl-C ends it."""
        conversation, context = self.conversation, self.conversation.model.config.max_position_embeddings
        bar = progress_bar(None, "prompt")
        began = time.perf_counter()
        times: list[float] = []
        ids: list[int] = []
        reply = conversation.reply(message, options=self.options, progress=bar.update, enable_thinking=self.thinking)

        def timed() -> Iterator[int]:
            for token in reply:
                bar.close()
                times.append(time.perf_counter())
                ids.append(token)
                yield token

        interrupts = [KeyboardInterrupt] if sys.stdin.isatty() else []
        try:
            with contextlib.suppress(*interrupts), contextlib.closing(bar), contextlib.closing(reply):
                for piece in self.shown(self.ends.text(timed())):
                    print(piece, end="", flush=True)
        finally:
            print(_style("0"), flush=True)
        if not ids:
            _say("[interrupted before the answer began; the message is dropped]")
            return
        cost = f"{len(ids)} tokens, first after {times[0] - began:.1f} s"
        if len(ids) > 1:
            cost += f", then {(len(ids) - 1) / (times[-1] - times[0]):.1f} tokens/s"
        if conversation.cache is not None:
            cost += f"; context {conversation.cache.lengths[0]} of {context}"
        if len(ids) == self.options["max_new_tokens"] and not self.ends.reached(ids):
            cost += "; cut at --max-new-tokens"
        _say(f"[{cost}]")

    def shown(self, pieces: Iterator[str]) -> Iterator[str]:
        """Yield what is to be printed of an answer: the reasoning dimmed, or left out."""
        thinking: bool | None = None
        for piece in pieces:
            rest = piece
            if thinking is None:  # some templates open the reasoning themselves, at the end of the prompt
                thinking = self.conversation.opens_thinking
                yield _style("2") if thinking and not self.hide_thinking else ""
            while rest:
                before, marker, rest = rest.partition("</think>" if thinking else "<think>")
                if not (thinking and self.hide_thinking):
                    yield before
                if marker:
                    thinking = not thinking
                    if not self.hide_thinking:
                        yield _style("2") + marker if thinking else marker + _style("0")

    def command(self, name: str, argument: str) -> None:
        """Do what a line that begins with a slash asks for. Raises ValueError for what is not known."""
        conversation, argument = self.conversation, argument.strip()
        if name in ("save", "load", "think") and not argument:
            raise ValueError(f"/{name} needs {'on or off' if name == 'think' else 'a file'}")
        if name == "reset":
            conversation.reset()
            _say("The conversation is forgotten.")
        elif name == "system":
            conversation.set_system(argument or None)
            _say("The system message is set." if argument else "There is no system message now.")
        elif name == "think" and argument in ("on", "off"):
            self.thinking = argument == "on"
            _say(f"Reasoning is {argument}, where the checkpoint's template knows it.")
        elif name == "save":
            file = Path(os.path.expanduser(argument))
            content = json.dumps({"messages": conversation.messages}, ensure_ascii=False, indent=1)
            with written_aside(file) as part:
                part.write_text(content + "\n", encoding="utf-8")
            _say(f"Saved {len(conversation.messages)} messages.")
        elif name == "load":
            messages = _messages(Path(os.path.expanduser(argument)))
            if messages:  # the template refuses what is no conversation
                conversation.tokenizer.apply_chat_template(messages)
            conversation.messages = messages
            _say(f"Loaded {len(messages)} messages.")
        elif name == "help":
            _say(COMMANDS)
        else:
            raise ValueError(f"/{name} {argument}".strip() + " is not a command; /help lists them")


def _messages(path: Path) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]]
    try:
        messages = json.loads(read_text(str(readable(path))))["messages"]
        good = type(messages) is list and all(type(message) is dict for message in messages)
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
        good, messages = False, []
    if not good:
        raise ValueError(f"{path}: not a saved conversation")
    return messages


def _style(code: str) -> str:
    """Return the escape sequence of a text style; nothing where stdout is no terminal."""
    return f"\x1b[{code}m" if sys.stdout.isatty() else ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
