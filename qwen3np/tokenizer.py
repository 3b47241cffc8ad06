"""Text <-> token ids: Qwen3's byte-level BPE, run by the `tokenizers` library, and the checkpoint's chat template."""

from __future__ import annotations

import codecs
import json
import operator
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, cast, overload

from qwen3np.chat import render_chat
from qwen3np.errors import CheckpointError
from qwen3np.files.limits import MOST_BYTES, check_links, parse_json, read_json, readable

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import models

# How Qwen3's tokenizer.json splits text before BPE; a folder with vocab.json and merges.txt alone does not say it.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SPLITS = ("qwen2", "deepseek-r1-qwen")  # llama.cpp's names of it
_UNUSED = 5  # the type of tokens that pad a vocabulary in a .gguf file

# Byte-level BPE writes each byte as one visible character: itself where Latin-1 shows it, else the next from U+0100.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + n): byte for n, byte in enumerate(_HIDDEN)}

# The files of a tokenizer. A folder may have both forms; the last two are read by transformers, but not here.
_FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.jinja"),
    *("added_tokens.json", "special_tokens_map.json"),
)

# The names under which templates see special tokens (transformers' special_tokens_map).
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


_APART = "\ufdd0"  # no character, so in no text: where `escaped` cuts what would be a special token


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a checkpoint folder; its files are read at first use."""

    folder: Path
    model_vocab_size: int | None = None  # of the model it belongs to, to notice when it does not

    @classmethod
    def from_folder(cls, path: str | Path, model_vocab_size: int | None = None) -> Tokenizer:
        """The tokenizer of `path`: tokenizer.json, else vocab.json + merges.txt; CheckpointError without them.

        Its first use raises CheckpointError for broken files, and for more entries than `model_vocab_size`.
        """
        folder = Path(path)
        files = {name: (folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt")}
        if not (files["tokenizer.json"] or (files["vocab.json"] and files["merges.txt"])):
            raise CheckpointError(f"{folder}: no tokenizer.json, nor vocab.json with merges.txt")
        check_links(folder)
        return cls(folder, model_vocab_size)

    def files(self) -> dict[str, bytes]:
        """Return the files of this tokenizer, for a copy of its checkpoint: name in the folder -> contents.

        Raises CheckpointError where the folder no longer holds a tokenizer.
        """
        Tokenizer.from_folder(self.folder)  # raises if files are gone, or lead out of the folder by now
        paths = [*(self.folder / name for name in _FILES), *self.folder.glob("additional_chat_templates/*.jinja")]
        try:
            return {
                path.relative_to(self.folder).as_posix(): readable(path, 2 * MOST_BYTES).read_bytes()
                for path in paths
                if path.exists()
            }
        except OSError as error:
            raise CheckpointError(f"{error.filename}: {error.strerror}") from error

    @overload
    def encode(self, text: str) -> list[int]: ...  # pyright: ignore[reportOverlappingOverload]  # a str is a sequence
    @overload
    def encode(self, text: Sequence[str]) -> list[list[int]]: ...
    def encode(self, text: str | Sequence[str]) -> list[int] | list[list[int]]:
        """Encode a text, or several.

        Parameters
        ----------
        text
            A text, or a list of texts. Special tokens written in it become their ids.

        Returns
        -------
        list[int], or a list of them for several texts. No special tokens are added.

        Raises
        ------
        TypeError
            For anything but str.
        ValueError
            For lone surrogates, which UTF-8 cannot represent. CheckpointError where the tokenizer itself fails, for
            example on a pattern that would take forever.

        Examples
        --------
        >>> qwen3np.load().text.encode("The capital of France is")
        [281, 297, 272, 1132, 259]
        """
        if not isinstance(text, str):
            if isinstance(text, (list, tuple)):  # pyright: ignore[reportUnnecessaryIsInstance]
                return [self.encode(one) for one in text]
            raise TypeError(f"encode: a str or a list of str is needed, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("only a str without lone surrogates (U+D800 to U+DFFF) can be encoded") from error
        backend = self._backend
        with _refused(f"{self.folder}: its tokenizer fails"):
            return backend.encode(text, add_special_tokens=False).ids

    def encode_whole(self, text: str) -> list[int]:
        """The ids of a text with what the checkpoint's tokenizer.json puts around it. Errors as for encode."""
        self.encode(text)
        with _refused(f"{self.folder}: its tokenizer fails"):
            return self._backend.encode(text, add_special_tokens=True).ids

    def decode(self, ids: Iterable[SupportsIndex], skip_special_tokens: bool = False) -> str:
        """The text of `ids`; ids that the tokenizer does not know (the model's padding) have none.

        Bytes that are not UTF-8 become U+FFFD. ValueError for anything that is no token id.
        """
        return self._backend.decode([_token_id(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def stream(self, ids: Iterable[SupportsIndex], skip_special_tokens: bool = False) -> Iterator[str]:
        """The text of `ids` in pieces, each given out as soon as it is whole; together they equal `decode`.

        Incomplete UTF-8 waits for its rest: it becomes U+FFFD when it can no longer be completed.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            if piece := decoder.decode(self.token_bytes(i, skip_special_tokens)):
                yield piece
        if piece := decoder.decode(b"", final=True):
            yield piece

    def token_bytes(self, token_id: SupportsIndex, skip_special_tokens: bool = False) -> bytes:
        """The bytes of one token, as the library's ByteLevel decoder reads them; ids it does not know have none."""
        token = self._backend.id_to_token(_token_id(token_id))
        if token is None or (skip_special_tokens and token in self.special_tokens):
            return b""
        try:
            return bytes([_BYTE_OF[character] for character in token])
        except KeyError:  # an added token in plain text
            return token.encode()

    def token_to_id(self, name: str) -> int | None:
        """The id of the token written `name` (added tokens as they read, others in byte-level form), or None."""
        return self._backend.token_to_id(name)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The tokens that `skip_special_tokens` drops, with their ids (`<think>` and `<tool_call>` are not special)."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: i for i, token in sorted(added.items()) if token.special}

    @property
    def vocab_size(self) -> int:
        """The number of entries, added tokens included (the model's own vocabulary may be padded beyond it)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token_id(self) -> int | None:
        """The id of tokenizer_config.json's eos_token; None where it names none."""
        token = _content(self._config.get("eos_token"))
        return self.token_to_id(token) if isinstance(token, str) else None

    @cached_property
    def turn_ends(self) -> frozenset[int]:
        """The ids that end an answer in a chat: eos_token_id, and the special token after one in the chat template."""
        found = {self.eos_token_id}
        said = "ANSWER"
        with suppress(ValueError):  # a template of another kind
            messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": said}]
            _, _, after = self.apply_chat_template(messages, add_generation_prompt=False).rpartition(said)
            found |= {i for token, i in self.special_tokens.items() if after.startswith(token)}
        return frozenset(i for i in found if i is not None)

    def escaped(self, text: str) -> str:
        """`text` in which every special token is only text for `encode_escaped`, so that it cannot end a turn."""
        text = text.replace(_APART, "\ufffd")
        for token in self._control_tokens:
            text = text.replace(token, f"{token[:1]}{_APART}{token[1:]}")
        return text

    @staticmethod
    def unescaped(text: str) -> str:
        """`text` as it was before `escaped`."""
        return text.replace(_APART, "")

    def encode_escaped(self, text: str) -> list[int]:
        """The ids of a text with parts that are `escaped`; decoded, they give these parts as they were."""
        return [i for part in text.split(_APART) for i in self.encode(part)]

    @cached_property
    def _control_tokens(self) -> list[str]:
        """Every added token, longest first: `<think>` and `<tool_call>` change what follows, too."""
        added = self._backend.get_added_tokens_decoder()
        return sorted((token.content for token in added.values()), key=len, reverse=True)

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        *,
        continue_final_message: bool = False,
        tokenize: Literal[False] = False,
        **kwargs: Any,
    ) -> str: ...
    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        *,
        continue_final_message: bool = False,
        tokenize: Literal[True],
        **kwargs: Any,
    ) -> list[int]: ...
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        *,
        continue_final_message: bool = False,
        tokenize: bool = False,
        **kwargs: Any,
    ) -> str | list[int]:
        """Render messages with the checkpoint's chat template (chat.render_chat): the text it was trained on.

        If there are several templates, "tool_use" is for calls with tools and "default" for all others. With
        continue_final_message the text ends inside the last message, for the model to continue it, without a generation
        prompt. With tokenize it is returned as ids. Raises ValueError if there is no template, and as render_chat.
        """
        templates = self._chat_templates
        name = "tool_use" if tools is not None and "tool_use" in templates else "default"
        if name not in templates:
            found = f"only the chat templates {sorted(templates)}" if templates else "no chat template"
            raise ValueError(f"{self.folder}: {found}; a chat needs chat_template.jinja in this folder")
        tokens = {name: _content(self._config[name]) for name in _NAMED if self._config.get(name) is not None}
        text = render_chat(
            templates[name],
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=enable_thinking,
            continue_final_message=continue_final_message,
            **tokens | kwargs,
        )
        return self.encode(text) if tokenize else text

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's own template for chats without tools, or None."""
        return self._chat_templates.get("default")

    @cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        backend = self._from_files()
        size = backend.get_vocab_size(with_added_tokens=True)
        if self.model_vocab_size is not None and size > self.model_vocab_size:
            raise CheckpointError(
                f"{self.folder}: the tokenizer has {size} entries, the model's vocabulary {self.model_vocab_size}: "
                "they do not belong together"
            )
        return backend

    def _from_files(self) -> tokenizers.Tokenizer:
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models

        file = self.folder / "tokenizer.json"
        if not file.is_file():
            return self._from_vocab_and_merges()
        with _refused(f"{file}: not a tokenizer"):
            backend = Backend.from_buffer(readable(file, 2 * MOST_BYTES).read_bytes())
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise CheckpointError(f"{file}: the decoder is {backend.decoder}, where Qwen3 has ByteLevel")
        if backend.normalizer is not None:
            normalizer = json.loads(backend.normalizer.__getstate__())
            # others may make texts longer, by any factor
            if any(part != {"type": "NFC"} for part in normalizer.get("normalizers", [normalizer])):
                raise CheckpointError(f"{file}: the normalizer is {backend.normalizer}, where Qwen3 has NFC")
        # What a training run may have saved: encode would silently cut, pad or choose at random.
        backend.no_truncation()
        backend.no_padding()
        if isinstance(backend.model, models.BPE):
            backend.model.dropout = None
        return backend

    def _from_vocab_and_merges(self) -> tokenizers.Tokenizer:
        from tokenizers import AddedToken, models

        vocab, merges = self.folder / "vocab.json", self.folder / "merges.txt"
        with _refused(f"{vocab} with {merges.name}: not a BPE vocabulary"):
            files = [str(readable(file)) for file in (vocab, merges)]
            backend = byte_level_bpe(models.BPE.from_file(*files))
        config = self.folder / "tokenizer_config.json"
        try:
            if "added_tokens_decoder" in self._config or not (self.folder / "added_tokens.json").is_file():
                added = {int(i): AddedToken(**token) for i, token in self._config["added_tokens_decoder"].items()}
            else:  # an older spelling, without what is special
                ids = read_json(self.folder / "added_tokens.json")
                added = {
                    i: AddedToken(text, special=text.startswith("<|"), normalized=False) for text, i in ids.items()
                }
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{config}: no usable added_tokens_decoder: {error!r}") from error
        backend.add_tokens([token for _, token in sorted(added.items())])
        for i, token in added.items():
            if backend.token_to_id(token.content) != i:
                raise CheckpointError(f"{config}: {token.content} has id {i}, which {vocab.name} does not lead to")
        return backend

    @cached_property
    def _config(self) -> dict[str, Any]:
        file = self.folder / "tokenizer_config.json"
        if not file.is_file():
            return {}
        try:
            config = parse_json(_read(file))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: not JSON: {error}") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{file}: not a JSON object")
        return cast("dict[str, Any]", config)

    @cached_property
    def _chat_templates(self) -> dict[str, str]:
        """Name -> template: files of their own win over tokenizer_config.json, as in transformers."""
        files = {file.stem: file for file in self.folder.glob("additional_chat_templates/*.jinja")}
        if (file := self.folder / "chat_template.jinja").is_file():
            files["default"] = file
        if files:
            return {name: _read(file) for name, file in files.items()}
        found: Any = self._config.get("chat_template") or {}
        if isinstance(found, str):
            return {"default": found}
        try:
            templates = {entry["name"]: entry["template"] for entry in found}
            if all(isinstance(text, str) for text in (*templates, *templates.values())):
                return templates
        except (TypeError, KeyError):
            pass
        raise CheckpointError(f"{self.folder / 'tokenizer_config.json'}: no usable chat_template")


@dataclass(frozen=True)
class FromGGUF(Tokenizer):
    """The tokenizer in the metadata of a .gguf file, which `folder` is here."""

    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def files(self) -> dict[str, bytes]:
        """Return tokenizer.json and tokenizer_config.json with the same tokens and the same template."""
        config = {**self._config, "tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False}
        if self._chat_templates:
            config["chat_template"] = self._chat_templates["default"]
        return {
            "tokenizer.json": self._backend.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
        }

    def _from_files(self) -> tokenizers.Tokenizer:
        from tokenizers import AddedToken, models

        kind, split = self._of("model"), self._of("pre")
        if kind != "gpt2" or split not in _SPLITS:
            raise CheckpointError(
                f"{self.folder}: its tokenizer is {kind!r} with {split!r}, where Qwen3 has 'gpt2' with 'qwen2'"
            )
        tokens, kinds, merges = (self._of(key) for key in ("tokens", "token_type", "merges"))
        with _refused(f"{self.folder}: not a BPE vocabulary"):
            kinds = [1] * len(tokens) if kinds is None else kinds
            vocab = {token: n for n, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED}
            backend = byte_level_bpe(models.BPE(vocab, [tuple(merge.split(" ", 1)) for merge in merges]))
            added = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind in (3, 4)]
            backend.add_tokens([AddedToken(token, special=kind == 3, normalized=False) for token, kind in added])
        return backend

    def _of(self, key: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    @cached_property
    def _config(self) -> dict[str, Any]:
        tokens, found = self._of("tokens"), dict[str, Any]()
        for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
            token = self._of(f"{key}_token_id")
            if type(token) is int and 0 <= token < len(tokens):
                found[name] = tokens[token]
        return found

    @cached_property
    def _chat_templates(self) -> dict[str, str]:
        text = self.metadata.get("tokenizer.chat_template")
        return {"default": text} if isinstance(text, str) else {}


def byte_level_bpe(model: models.BPE) -> tokenizers.Tokenizer:
    """A tokenizer that does with text what Qwen3's tokenizer.json does before and after its BPE model."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    backend = Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


@contextmanager
def _refused(what: str) -> Generator[None]:
    """Turn what the library raises, which is a bare Exception or a panic of its Rust code, into CheckpointError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise CheckpointError(f"{what}: {error}") from error


def _token_id(value: SupportsIndex) -> int:
    try:
        token_id = operator.index(value)
    except TypeError:
        token_id = -1
    if not 0 <= token_id < 2**32:  # what the library's ids can hold
        raise ValueError(f"not a token id: {value!r}")
    return token_id


def _content(token: Any) -> Any:
    """The text of a token in tokenizer_config.json, which is that text or an object around it."""
    return cast("dict[str, Any]", token).get("content") if isinstance(token, dict) else token


def _read(file: Path) -> str:
    try:
        return readable(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def stop_at(pieces: Iterable[str], stop_strings: Collection[str]) -> Iterator[str]:
    """Yield text as it comes, up to the first stop string, none of which is yielded, however it is cut into pieces.

    Text that could still become a stop string is held back until that is known.
    """
    if "" in stop_strings:
        raise ValueError("stop strings must not be empty")
    held = ""
    for piece in pieces:
        held += piece
        found = [at for stop in stop_strings if (at := held.find(stop)) >= 0]
        if found:
            if min(found):
                yield held[: min(found)]
            return
        # the longest end of the text with which some stop string starts
        keep = max((n for stop in stop_strings for n in range(len(stop)) if held.endswith(stop[:n])), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held


def said_in(tokenizer: Tokenizer, strings: Collection[str]) -> Callable[[list[int]], bool]:
    """Return a rule `stop` for generate: whether the text of the newest ids ends, or goes past, one of the strings."""
    # every token that says something is a byte or more, so a stop string lies within this many tokens
    width = 4 + max((len(string.encode()) for string in strings), default=0)

    def ended(new: list[int]) -> bool:
        tail = tokenizer.decode(new[-width:], skip_special_tokens=True) if strings else ""
        return any(string in tail for string in strings)

    return ended
