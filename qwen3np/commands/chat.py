"""`qwen3np chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Collection, Generator, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from qwen3np.commands import (
    Ends,
    add_chat,
    add_computation,
    add_generation,
    add_model,
    chat_files,
    flags_of_generation,
    generation_options,
    load_model,
    progress_bar,
    read_objects,
    read_text,
    setting,
    utf8,
)
from qwen3np.conversation import Conversation
from qwen3np.errors import ContextOverflowError, one_line
from qwen3np.files.writing import written_aside
from qwen3np.terminal import Page, style, thinking_styled

EXAMPLE = "qwen3np chat --model Qwen/Qwen3-0.6B --think off"
HELP = "hold a conversation"
COMMANDS = """\
/reset            forget the conversation (the system message stays)
/drop N           forget the N oldest turns (without N: one)
/undo             take back the last turn
/regen            answer the last message again
/history          show the conversation
/system TEXT      set the system message (alone: show it; none: remove it)
/set NAME VALUE   a generation setting, such as temperature 0.7 (alone: show them)
/think on|off     reasoning before the answer
/save FILE        write the conversation as JSON
/load FILE        go on with a saved conversation
/help, /?         this list
/exit             leave, as /quit, /bye and Ctrl-D do
//TEXT            a message that starts with a slash
Ctrl-C stops an answer."""
NAMES = tuple(line.split()[0].strip("/,") for line in COMMANDS.splitlines() if line.startswith("/") and line[1] != "/")
LEAVE = ("exit", "quit", "bye")
REMEMBERED = 1000  # lines of history


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    add_chat(parser)
    lines = "each line of stdin is a message or a command (otherwise all of a pipe is one message)"
    parser.add_argument("--lines", action="store_true", help=lines)
    history = "do not keep what is typed for the arrow keys of later runs"
    parser.add_argument("--no-history", action="store_true", help=history)
    add_generation(parser)
    add_model(parser)
    add_computation(parser)


def run(arguments: argparse.Namespace) -> None:
    """Read messages from the terminal, or from stdin, until its end, and print the answers as they come."""
    flags_of_generation(arguments)
    messages, tools = chat_files(arguments)
    typed = sys.stdin.isatty()
    given = "" if typed or arguments.lines else read_text("-")
    model, tokenizer = load_model(arguments)
    if messages[1:]:  # the template refuses what is no conversation
        tokenizer.apply_chat_template(messages)
    conversation = Conversation(model, messages, escape=not arguments.special_tokens)
    chat = Chat(conversation, arguments, generation_options(model, arguments), tools)
    if typed:
        # in this order: readline passes the signal of a new size on to the handler that it finds
        with chat.page.redrawn(), history(None if arguments.no_history else history_file()):
            _typed(chat)
    elif arguments.lines:
        line = b""
        for line in sys.stdin.buffer:  # as they come: another program may read each answer first
            if not chat.take(utf8(line, "stdin").removeprefix("\ufeff")):
                return
        if not line:
            raise ValueError("stdin is empty; give a message a line there")
    else:
        chat.answer(given.removesuffix("\n").removesuffix("\r"))


def _typed(chat: Chat) -> None:
    """Take what is typed, until it is enough."""
    chat.say("Ask something; /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            if not sys.stdout.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = chat.page.ask("> " if sys.stdout.isatty() else "")
            if line.strip().lower() in LEAVE or not chat.take(line):
                return
        except KeyboardInterrupt:
            chat.say("\nCtrl-D leaves.")
        except EOFError:
            chat.say("")
            return
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            chat.say(f"error: {one_line(' '.join(str(error).split()))}")


def history_file() -> Path:
    """Return where the lines of earlier runs are: in the user's state folder."""
    state = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "qwen3np" / "history"


@contextlib.contextmanager
def history(file: Path | None) -> Generator[None]:
    """Give input() line editing, where the system has it, with the history of a file, which gets the new lines."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.parse_and_bind("set enable-bracketed-paste on")  # several pasted lines are one message
    if file is None:
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a full disk must not end a conversation with an error
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file.touch(mode=0o600)
            readline.set_history_length(REMEMBERED)
            readline.write_history_file(file)


class Chat:
    """The terminal's side of a conversation."""

    def __init__(
        self,
        conversation: Conversation,
        arguments: argparse.Namespace,
        options: dict[str, Any],
        tools: list[dict[str, Any]] | None = None,
    ) -> None:
        """Take the switches from the command line."""
        self.conversation = conversation
        self.page = Page()
        self.options: dict[str, Any] = options
        self.tools = tools
        self.stop: list[str] = arguments.stop
        self.hide_thinking: bool = arguments.hide_thinking
        self.thinking = None if arguments.think is None else arguments.think == "on"

    def take(self, line: str) -> bool:
        """Do what a line asks for: a command if it begins with a slash, else an answer. False: leave."""
        line = line.strip()
        if line.startswith("//"):
            self.answer(line[1:])
        elif line.startswith("/"):
            name, _, argument = line[1:].partition(" ")
            if name in LEAVE:
                return False
            self.command(name, argument.strip())
        elif line:
            self.answer(line)
        return True

    def answer(self, message: str | Mapping[str, Any]) -> None:
        """Print the answer to a message as it comes, and on stderr what it cost. In a terminal, Ctrl-C ends it."""
        conversation, context = self.conversation, self.conversation.model.config.max_position_embeddings
        ends = Ends(
            conversation.tokenizer,
            conversation.tokenizer.turn_ends | frozenset(cast("Collection[int]", self.options["stop_ids"])),
            self.stop,
        )
        bar = progress_bar(None, "prompt")
        began = time.perf_counter()
        times: list[float] = []
        ids: list[int] = []
        reply = conversation.reply(
            message, options=self.options, progress=bar.update, enable_thinking=self.thinking, tools=self.tools
        )

        def timed() -> Iterator[int]:
            for token in reply:
                bar.close()
                times.append(time.perf_counter())
                ids.append(token)
                yield token

        interrupts = [KeyboardInterrupt] if sys.stdin.isatty() else []
        try:
            with contextlib.suppress(*interrupts), contextlib.closing(bar), contextlib.closing(reply):
                for piece in self.shown(ends.text(timed())):
                    self.page.write(piece)
        except ContextOverflowError as error:
            what = str(error).replace("input_ids: prompt 0", "the conversation")
            raise ValueError(f"{what}: {self.offers()}") from None
        finally:
            if ids:
                self.page.write(style("0"))
                self.page.write("\n")
        if not ids:
            self.say("\n[interrupted before the answer began; the message is dropped]")
            return
        cost = f"{len(ids)} tokens, first after {times[0] - began:.1f} s"
        if len(ids) > 1:
            cost += f", then {(len(ids) - 1) / (times[-1] - times[0]):.1f} tokens/s"
        if conversation.guessed:
            cost += f", {len(ids) / (len(ids) - conversation.guessed):.1f} a pass"
        held = 0 if conversation.cache is None else int(conversation.cache.lengths[0])
        if held:
            cost += f"; context {held} of {context}"
        if not ends.reached(ids):
            if len(ids) == self.options["max_new_tokens"]:
                cost += "; cut at --max-new-tokens"
            elif held >= context:
                cost += f"; cut, since the context is full: {self.offers()}"
        self.say(f"[{cost}]")
        for call in conversation.messages[-1].get("tool_calls", ()):
            self.say(f"[it calls {call['function']['name']} with {json.dumps(call['function']['arguments'])}]")

    def say(self, text: str) -> None:
        """Show a remark, on stderr."""
        self.page.write(f"{text}\n", sys.stderr)

    def offers(self) -> str:
        """Say what to do about a full context."""
        larger = "" if self.conversation.model.config.rope_scaling else ", --rope-scaling yarn:4 makes it larger"
        return f"/drop N forgets the N oldest turns, /reset all{larger}"

    def shown(self, pieces: Iterator[str]) -> Iterator[str]:
        """Yield what is to be printed of an answer; whether the template opened the reasoning shows with the first."""
        first = next(pieces, "")
        yield from thinking_styled(_chained(first, pieces), self.conversation.opens_thinking, self.hide_thinking)

    def command(self, name: str, argument: str) -> None:
        """Do what a line that begins with a slash asks for. Raises ValueError for what is not known."""
        do = getattr(self, f"_{ {'?': 'help'}.get(name, name) }", None) if name == "?" or name in NAMES else None
        if do is None:
            near = get_close_matches(name, (*NAMES, *LEAVE), 1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them"
            raise ValueError(f"/{name} is not a command; {hint} (//{name} is a message)")
        do(argument)

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self.say("The conversation is forgotten.")

    def _drop(self, argument: str) -> None:
        count = int(argument or 1) if (argument or "1").isdecimal() else 0
        if count < 1:
            raise ValueError(f"/drop {argument}: needs how many turns to forget")
        self.say(f"Forgot {self.conversation.drop(count)} of the oldest turns.")

    def _undo(self, _: str) -> None:
        taken = self.conversation.undo()
        self.say(
            "There is nothing to take back." if taken is None else f"Taken back: {one_line(taken['content'])[:60]}"
        )

    def _regen(self, _: str) -> None:
        message = self.conversation.undo()
        if message is None:
            raise ValueError("/regen: there is no message to answer again")
        self.answer(message)

    def _history(self, _: str) -> None:
        for message in self.conversation.messages:
            content = message.get("content") or ""
            shown = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
            self.say(f"{message['role']}: {shown}")
        if not self.conversation.messages:
            self.say("Nothing has been said.")

    def _system(self, argument: str) -> None:
        if argument:
            self.conversation.set_system(None if argument == "none" else argument)
        system = self.conversation.system
        self.say("There is no system message." if system is None else f"The system message is: {system}")

    def _set(self, argument: str) -> None:
        if argument:
            self.options = {**self.conversation.model.generation_settings({**self.options, **setting(argument)})}
        shown = {k: v for k, v in self.options.items() if v is not None and not callable(v) and k != "stop_ids"}
        self.say("\n".join(f"{name} {value}" for name, value in shown.items()))

    def _think(self, argument: str) -> None:
        if argument not in ("on", "off"):
            raise ValueError("/think needs on or off")
        self.thinking = argument == "on"
        self.say(f"Reasoning is {argument}, where the checkpoint's template knows it.")

    def _save(self, argument: str) -> None:
        if not argument:
            raise ValueError("/save needs a file")
        content = json.dumps({"messages": self.conversation.messages}, ensure_ascii=False, indent=1)
        with written_aside(Path(os.path.expanduser(argument))) as part:
            part.write_text(content + "\n", encoding="utf-8")
        self.say(f"Saved {len(self.conversation.messages)} messages.")

    def _load(self, argument: str) -> None:
        if not argument:
            raise ValueError("/load needs a file")
        messages = read_objects(os.path.expanduser(argument), "messages")
        if messages:  # the template refuses what is no conversation
            self.conversation.tokenizer.apply_chat_template(messages)
        self.conversation.messages = messages
        self.say(f"Loaded {len(messages)} messages.")

    def _help(self, _: str) -> None:
        self.say(COMMANDS)


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest
