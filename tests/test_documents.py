"""A corpus on disk, documents as ids with a mask, and documents packed into rows."""

import json
import shutil
import unicodedata

import numpy as np
import pytest
from drawing import SEEDS
from hypothesis import given
from hypothesis import strategies as st

from qwen3np.tokenizer import Tokenizer
from qwen3np.training.bpe import train_tokenizer, write_tokenizer
from qwen3np.training.documents import encode, pack, read_documents, texts

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
MARKS = ["<think>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"]

contents = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n\r ae\u0301'<|1"), max_size=12)
marked = st.lists(contents | st.sampled_from(MARKS), max_size=4).map("".join)


def conversations(contents):
    """System or not, some turns, each with an answer; perhaps a last question without one."""
    user, answer, system = (
        contents.map(lambda text, role=role: {"role": role, "content": text})
        for role in ("user", "assistant", "system")
    )
    turns = st.lists(st.tuples(user, answer), min_size=1, max_size=3).map(lambda turns: [m for t in turns for m in t])
    parts = st.tuples(st.lists(system, max_size=1), turns, st.lists(user, max_size=1))
    return parts.map(lambda parts: [message for part in parts for message in part])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, train_tokenizer(["the user and the assistant\n\n\nsay aé aé"] * 3, 320), 64)
    return Tokenizer.from_folder(folder)


# --- reading


def test_text_files(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeff\none\r\ntwo <|endoftext|> three\r\n<|endoftext|>\r\n \n<|endoftext|> \n\n four\n".encode())
    assert read_documents(file) == ["one\ntwo <|endoftext|> three", " four"]
    file.write_text("all of it\n\nis one\n")
    assert read_documents(str(file)) == ["all of it\n\nis one"]


def test_jsonl_files(tmp_path):
    file = tmp_path / "a.jsonl"
    unusual = {"text": "line\u2028separator\x85\x0b\n<|endoftext|>\n", "source": "x"}
    lines = [unusual, {"text": " \n"}, {"messages": [message | {"tool_calls": None} for message in HI]}]
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\r\n", encoding="utf-8")
    assert read_documents(file) == [unusual["text"], HI]


def test_folders(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a.txt", "c.jsonl", "b/c/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    (tmp_path / "README.md").write_text("no part of it")
    (tmp_path / "z.txt").mkdir()
    assert read_documents(tmp_path) == ["a.txt", "b/10.txt", "b/2.txt", "b/c/d.txt", "c.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.md", b"text", r"folder: a corpus is a \.txt or \.jsonl file"),
        ("a.txt", b" \n<|endoftext|>\n", "folder: no document with any text"),
        ("a.txt", b"caf\xc3\xa9 caf\xe9", r"a\.txt: not UTF-8: byte 9 is 0xe9"),
    ],
)
def test_folders_that_are_no_corpus(tmp_path, name, content, words):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_documents(folder)


def test_no_such_path(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such file or folder"):
        read_documents(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{", "not JSON: "),
        ("[" * 10**5, "not JSON: "),
        ("[]", "neither"),
        ('{"prompt": "hi"}', "neither"),
        ('{"messages": {}}', "neither"),
        ('{"text": "a", "messages": []}', "has both text and messages"),
        ('{"text": 3}', "text is not a string"),
        ('{"text": "\\ud800"}', "text has a lone surrogate"),
        ('{"messages": []}', "no message of the assistant"),
        (json.dumps({"messages": HI[:1]}), "no message of the assistant"),
        (json.dumps({"messages": [*HI, "hi"]}), r"messages\[2\] is not an object"),
        (json.dumps({"messages": [*HI, {"role": "tool", "content": "x"}]}), r"messages\[2\] has the role 'tool'"),
        (json.dumps({"messages": [{"content": "x"}]}), r"messages\[0\] has the role None"),
        (json.dumps({"messages": [{"role": "assistant"}]}), r"messages\[0\]: content is not a string"),
        (json.dumps({"messages": [{"role": "user", "content": []}]}), r"messages\[0\]: content is not a string"),
        (json.dumps({"messages": [HI[1] | {"tool_calls": [1], "name": "x"}]}), ".* has name, tool_calls; only"),
    ],
)
def test_lines_that_are_no_document(tmp_path, entry, words):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n\n{entry}\n')
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 3: {words}"):
        read_documents(tmp_path)


def test_texts_for_a_tokenizer():
    assert list(texts(["plain", HI])) == ["plain", "user", "hi", "assistant", "hello"]


# --- encoding


@given(marked)
def test_plain_text_counts_whole(tokenizer, text):
    ids, mask = encode(text, tokenizer)
    assert (ids.dtype, mask.dtype) == (np.int32, np.bool_)
    assert ids.tolist() == [*tokenizer.encode(text), tokenizer.token_to_id("<|endoftext|>")]
    assert mask.tolist() == [True] * len(ids)


@given(conversations(contents))
def test_conversations_are_chatml_and_answers_count(tokenizer, conversation):
    ids, mask = encode(conversation, tokenizer)
    assert (ids.dtype, mask.dtype, ids.shape) == (np.int32, np.bool_, mask.shape)
    said = [unicodedata.normalize("NFC", message["content"]) for message in conversation]
    chatml = [f"<|im_start|>{m['role']}\n{text}<|im_end|>\n" for m, text in zip(conversation, said, strict=True)]
    assert tokenizer.decode(ids) == "".join(chatml) + "<|endoftext|>"
    answers = [text for m, text in zip(conversation, said, strict=True) if m["role"] == "assistant"]
    assert tokenizer.decode(ids[mask]) == "".join(f"{text}<|im_end|>" for text in answers)
    starts = np.flatnonzero(mask & ~np.roll(mask, 1))
    header = tokenizer.encode("<|im_start|>assistant\n")
    assert [ids[start - len(header) : start].tolist() for start in starts] == [header] * len(answers)


@given(conversations(marked))
def test_the_first_answer_follows_what_inference_would_encode(tokenizer, conversation):
    answer = next(i for i, message in enumerate(conversation) if message["role"] == "assistant")
    prompt = tokenizer.encode(tokenizer.apply_chat_template(conversation[:answer]))
    ids, mask = encode(conversation, tokenizer)
    assert ids[: len(prompt)].tolist() == prompt
    assert np.argmax(mask) == len(prompt)


@given(conversations(marked))
def test_the_chat_template_writes_the_same(tokenizer, conversation):
    # An answer that begins with empty lines is one piece with the newline before it, in a text encoded at once.
    conversation = [message | {"content": message["content"].lstrip()} for message in conversation]
    ids, _ = encode(conversation, tokenizer)
    text = tokenizer.apply_chat_template(conversation, add_generation_prompt=False)
    assert ids.tolist() == [*tokenizer.encode(text), tokenizer.token_to_id("<|endoftext|>")]


def test_tokenizers_without_the_marks(tokenizer, tmp_path):
    shutil.copytree(tokenizer.folder, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|endoftext|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the tokenizer has no <\|endoftext\|>, which training needs"):
        encode("text", Tokenizer.from_folder(tmp_path))


# --- packing


def draw_encoded(rng, count, longest):
    """Documents of which no two share a token but the end, 0; a random half of all counts."""
    lengths = rng.integers(2, longest + 1, count)
    first = np.cumsum(lengths) - lengths + 1
    ids = [np.append(np.arange(a, a + n - 1), 0).astype(np.int32) for a, n in zip(first, lengths, strict=True)]
    return [(document, rng.random(len(document)) < 0.5) for document in ids]


@given(SEEDS, st.integers(1, 200), st.integers(2, 60), st.integers(1, 40))
def test_packing_loses_cuts_and_mixes_nothing(seed, count, longest, length):
    rng = np.random.default_rng(seed)
    encoded = draw_encoded(rng, count, longest)
    rows, masks = pack(encoded, length, rng)
    assert (rows.dtype, masks.dtype, rows.shape, masks.shape[1]) == (np.int32, np.bool_, masks.shape, length + 1)
    flat, counts, taken = rows.ravel(), masks.ravel(), np.zeros(rows.size, bool)
    for ids, mask in encoded:
        for i in range(0, len(ids), length + 1):
            piece = ids[i : i + length + 1]
            if piece[0] == 0:  # an end alone, of which there are many alike; it never counts
                continue
            (start,) = np.flatnonzero(flat == piece[0])
            assert start % (length + 1) + len(piece) <= length + 1
            here = slice(start, start + len(piece))
            np.testing.assert_array_equal(flat[here], piece)
            np.testing.assert_array_equal(counts[here], [False, *mask[i + 1 : i + len(piece)]])
            assert not taken[here].any()
            taken[here] = True
    assert not flat[~taken].any()
    assert not counts[~taken].any()
    assert np.count_nonzero(flat == 0) >= count


@pytest.mark.parametrize(("longest", "length"), [(200, 256), (200, 511), (1000, 512)])
def test_rows_are_full(longest, length):
    rng = np.random.default_rng(0)
    encoded = draw_encoded(rng, 2000, longest)
    rows, _ = pack(encoded, length, rng)
    assert sum(len(ids) for ids, _ in encoded) >= 0.95 * rows.size


def test_the_seed_decides_the_order():
    encoded = draw_encoded(np.random.default_rng(0), 300, 50)
    (a, b), (c, d), (e, _) = (pack(encoded, 64, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, c)
    np.testing.assert_array_equal(b, d)
    assert a.shape != e.shape or (a != e).mean() > 0.9
    assert sorted(a[a > 0]) != a[a > 0].tolist()


@pytest.mark.parametrize(("encoded", "length"), [([], 8), (draw_encoded(np.random.default_rng(0), 3, 9), 0)])
def test_nothing_to_pack(encoded, length):
    with pytest.raises(ValueError, match=f"nothing to pack: {len(encoded)} documents in rows of {length} tokens"):
        pack(encoded, length, np.random.default_rng(0))
