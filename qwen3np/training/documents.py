"""A corpus on disk -> documents -> ids with a mask of what counts in the loss -> packed rows."""

import json
import re
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from qwen3np.tokenizer import Tokenizer

Document: TypeAlias = str | list[dict[str, str]]
Encoded: TypeAlias = tuple[NDArray[np.int32], NDArray[np.bool_]]

_ROLES = ("system", "user", "assistant")
_SUFFIXES = (".jsonl", ".txt")
_SEPARATOR = re.compile(r"^[ \t]*<\|endoftext\|>[ \t]*$", re.MULTILINE)
_OPEN_ROWS = 64


def read_documents(path: str | Path) -> list[Document]:
    r"""The documents of a .txt file, a .jsonl file, or all such files in a folder and below, sorted by name.

    .txt: documents separated by lines that hold `<|endoftext|>` alone; line ends are read as "\n", those around a
    document dropped. .jsonl: an object a line, {"text": str} or {"messages": [{"role": str, "content": str}, ...]};
    other keys of the object are ignored. Documents without text are left out.

    Raises ValueError, naming the place, for anything else, for text that is not UTF-8, and if there are no documents.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in files if file.suffix.lower() in _SUFFIXES]
    if not files:
        raise ValueError(f"{path}: a corpus is a .txt or .jsonl file, or a folder that has some")
    documents = [document for file in files for document in _read(file)]
    if not documents:
        raise ValueError(f"{path}: no document with any text")
    return documents


def texts(documents: Iterable[Document]) -> Iterator[str]:
    """The texts a tokenizer is trained on: plain texts, and the roles and contents of conversations."""
    for document in documents:
        if isinstance(document, str):
            yield document
        else:
            for message in document:
                yield message["role"]
                yield message["content"]


def encode(document: Document, tokenizer: Tokenizer) -> Encoded:
    r"""The ids (T,) of a document, int32, and which of them count in the loss (T,), bool.

    Plain text counts whole, with the `<|endoftext|>` at its end. A conversation is
    `<|im_start|>role\ncontent<|im_end|>\n` per message, then `<|endoftext|>`; what the assistant says and its
    `<|im_end|>` count. As in inference, the text before an answer is encoded separately.

    Raises ValueError for a tokenizer without these special tokens, and for text that UTF-8 cannot represent.
    """
    if isinstance(document, str):
        marks, pieces = ["<|endoftext|>"], [(document + "<|endoftext|>", True)]
    else:
        marks, pieces = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], list[tuple[str, bool]]()
        prompt = ""
        for message in document:
            prompt += f"<|im_start|>{message['role']}\n"
            said = f"{message['content']}<|im_end|>"
            if message["role"] == "assistant":
                pieces += [(prompt, False), (said, True)]
                prompt = "\n"
            else:
                prompt += f"{said}\n"
        pieces.append((f"{prompt}<|endoftext|>", False))
    if missing := [mark for mark in marks if tokenizer.token_to_id(mark) is None]:
        raise ValueError(f"{tokenizer.folder}: the tokenizer has no {', '.join(missing)}, which training needs")
    encoded = [tokenizer.encode(text) for text, _ in pieces]
    ids = np.array([i for part in encoded for i in part], np.int32)
    return ids, np.repeat([counts for _, counts in pieces], [len(part) for part in encoded])


def pack(
    encoded: Sequence[Encoded], length: int, rng: np.random.Generator
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Shuffle documents and pack them into rows: ids (N, length + 1), int32, and a mask of the same shape, bool.

    Inputs are rows[:, :-1], targets rows[:, 1:], and masks[:, 1:] says which targets count. Only a document longer
    than a row is cut. The first token of a document or piece never counts: nothing before it belongs to it. Rows are
    padded with the `<|endoftext|>` that every document ends with. Documents of a row see those before them.

    encoded holds what `encode` returns for each. Raises ValueError without documents or for a length below 1.
    """
    if not encoded or length < 1:
        raise ValueError(f"nothing to pack: {len(encoded)} documents in rows of {length} tokens")
    size = length + 1
    order: list[int] = rng.permutation(len(encoded)).tolist()
    shuffled = [encoded[n] for n in order]
    pieces = [(ids[i : i + size], mask[i : i + size]) for ids, mask in shuffled for i in range(0, len(ids), size)]

    # Best fit: each piece goes where it leaves the least room. A few open rows are enough, and keep this fast.
    open_rows: list[tuple[int, int]] = []  # (free places, row), sorted
    starts: list[int] = []  # places in all rows laid end to end
    count = 0
    for ids, _ in pieces:
        best = bisect_left(open_rows, (len(ids), 0))
        if best == len(open_rows):
            open_rows.append((size, count))
            count += 1
        free, row = open_rows.pop(best)
        starts.append((row + 1) * size - free)
        insort(open_rows, (free - len(ids), row))
        if len(open_rows) > _OPEN_ROWS:
            del open_rows[0]

    tokens = np.concatenate([ids for ids, _ in pieces])
    lengths = np.array([len(ids) for ids, _ in pieces])
    shifts = np.array(starts) - (np.cumsum(lengths) - lengths)  # from places in tokens to places in rows
    places = np.arange(len(tokens)) + np.repeat(shifts, lengths)
    rows = np.full(count * size, encoded[0][0][-1], np.int32)
    rows[places] = tokens
    masks = np.zeros(count * size, np.bool_)
    masks[places] = np.concatenate([mask for _, mask in pieces])
    masks[starts] = False
    return rows.reshape(count, size), masks.reshape(count, size)


def _read(file: Path) -> Iterator[Document]:
    try:
        content = file.read_text(encoding="utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from error
    if file.suffix.lower() == ".txt":
        documents = (text.strip("\n") for text in _SEPARATOR.split(content))
    else:
        # not splitlines: a JSON string may hold U+2028 and similar characters
        lines = enumerate(content.split("\n"), 1)
        documents = (_document(line, f"{file}, line {number}") for number, line in lines if line.strip())
    yield from (document for document in documents if not isinstance(document, str) or document.strip())


def _document(line: str, where: str) -> Document:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    match entry:
        case {"text": _, "messages": _}:
            raise ValueError(f"{where}: has both text and messages; a document has one of them")
        case {"text": text}:
            return _checked(text, f"{where}: text")
        case {"messages": [*messages]}:
            conversation = [_message(message, f"{where}: messages[{i}]") for i, message in enumerate(messages)]
            if all(message["role"] != "assistant" for message in conversation):
                raise ValueError(f"{where}: no message of the assistant, so there is nothing to learn")
            return conversation
        case _:
            raise ValueError(f'{where}: neither {{"text": ...}} nor {{"messages": [...]}}')


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"{where} is not an object with role and content")
    message = cast("dict[str, Any]", message)
    # Anything the model would not learn (tool calls, reasoning) must not be dropped silently.
    if extra := {key for key, value in message.items() if value is not None} - {"role", "content"}:
        raise ValueError(f"{where} has {', '.join(sorted(extra))}; only role and content can be trained on")
    if message.get("role") not in _ROLES:
        raise ValueError(f"{where} has the role {message.get('role')!r}; roles are {', '.join(_ROLES)}")
    return {"role": message["role"], "content": _checked(message.get("content"), f"{where}: content")}


def _checked(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where} is not a string")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{where} has a lone surrogate, which UTF-8 cannot represent")
    return text
