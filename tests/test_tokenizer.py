"""Text <-> ids, against published vectors and the `tokenizers` library itself."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qwen3np.files.checkpoint import CheckpointError
from qwen3np.tokenizer import Tokenizer

DATA = os.environ.get("QWEN3NP_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="QWEN3NP_DATA does not name the folder of official Qwen3 files")
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a byte-level BPE of a few hundred entries, and odd added tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["to be or not to be, 北京大学 北京 ÄÖÜ äöü 😀😁😂 żółć"] * 3, trainer)
    backend.add_tokens([AddedToken("<|end|>", special=True), "<think>", "two words", "é", "Ġx"])
    folder = tmp_path_factory.mktemp("small")
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def official():
    return Tokenizer.from_folder(Path(DATA) / "tokenizer")


@pytest.fixture(scope="module")
def official_parts(tmp_path_factory):
    """The same tokenizer without tokenizer.json."""
    folder = tmp_path_factory.mktemp("parts")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(Path(DATA) / "tokenizer" / name, folder)
    shutil.copy(Path(DATA) / "checkpoints/Qwen3-0.6B/tokenizer_config.json", folder)
    return Tokenizer.from_folder(folder)


@needs_data
@pytest.mark.parametrize("name", ["official", "official_parts"])
def test_published_vectors(name, request):
    tokenizer = request.getfixturevalue(name)
    vectors = json.loads((Path(DATA) / "vectors/token_vectors.json").read_bytes())["vectors"]
    assert len(vectors) == 1200
    for vector in vectors:
        text = unicodedata.normalize("NFC", vector["text"])
        assert tokenizer.encode(vector["text"]) == vector["ids"]
        assert tokenizer.decode(vector["ids"]) == text
        assert "".join(tokenizer.stream(vector["ids"])) == text


@needs_data
@pytest.mark.parametrize("name", ["official", "official_parts"])
def test_llama_cpp_vectors(name, request):
    tokenizer = request.getfixturevalue(name)
    stem = Path(DATA) / "vectors/ggml-vocab-qwen2.gguf"
    texts = stem.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = stem.with_suffix(".gguf.out").read_text().split("\n")
    assert len(texts) == 47
    assert [tokenizer.encode(text) for text in texts] == [[int(i) for i in line.split()] for line in lines]


@needs_data
@pytest.mark.parametrize("name", ["official", "official_parts"])
def test_official_tokens(name, request):
    tokenizer = request.getfixturevalue(name)
    assert tokenizer.vocab_size == 151_669
    assert list(tokenizer.special_tokens.values()) == list(range(151_643, 151_657))
    assert tokenizer.special_tokens["<|im_end|>"] == 151_645
    names = ["<|endoftext|>", "<tool_call>", "<think>", "</think>", "Ġthe", "no such token"]
    assert [tokenizer.token_to_id(name) for name in names] == [151_643, 151_657, 151_667, 151_668, 279, None]
    ids = tokenizer.encode("<|im_start|><think>a<|im_end|>")
    assert ids == [151_644, 151_667, 64, 151_645]
    assert tokenizer.decode(ids) == "<|im_start|><think>a<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a"
    assert "".join(tokenizer.stream(ids, skip_special_tokens=True)) == "<think>a"
    padding = [64, *range(151_669, 151_936), 64]
    assert tokenizer.decode(padding) == "".join(tokenizer.stream(padding)) == "aa"


@needs_data
def test_both_forms_are_made_of_the_same_parts(official, official_parts):
    one, other = (json.loads(tokenizer._backend.to_str()) for tokenizer in (official, official_parts))
    assert one["normalizer"] == other["normalizer"]
    assert one["added_tokens"] == other["added_tokens"]
    assert one["model"]["vocab"] == other["model"]["vocab"]
    assert one["model"]["merges"] == other["model"]["merges"]
    assert one["pre_tokenizer"]["pretokenizers"][0] == other["pre_tokenizer"]["pretokenizers"][0]


@needs_data
@settings(deadline=None)
@given(st.text())
def test_both_forms_agree_on_any_text(official, official_parts, text):
    assert official.encode(text) == official_parts.encode(text)


def check_stream(tokenizer, ids, skip):
    """What is printed after each id is decode's text of the ids so far, but for one incomplete character at most.

    decode shows that one as U+FFFD, or as two: Python waits for the third byte of a surrogate as well (ED A0..BF).
    """
    fed, printed = [], ""

    def feed():
        for i in ids:
            text = tokenizer.decode(fed, skip)
            assert text in (printed, printed + "\ufffd", printed + "\ufffd\ufffd")
            fed.append(i)
            yield i

    for piece in tokenizer.stream(feed(), skip):
        assert piece
        printed += piece
    assert printed == tokenizer.decode(ids, skip)


def id_lists(tokenizer, vocab_size):
    """Streams as models emit them, with much broken UTF-8, special tokens, and ids beyond the tokenizer's."""
    single_bytes = [tokenizer.token_to_id(byte) for byte in sorted(pre_tokenizers.ByteLevel.alphabet())]
    special = sorted(tokenizer.special_tokens.values())
    ids = st.sampled_from(single_bytes) | st.integers(0, vocab_size - 1) | st.sampled_from(special)
    return st.lists(ids, max_size=30)


@settings(deadline=None)
@given(st.data(), st.booleans())
def test_stream_equals_decode(small, data, skip):
    tokenizer = Tokenizer.from_folder(small)
    check_stream(tokenizer, data.draw(id_lists(tokenizer, tokenizer.vocab_size + 20)), skip)


@needs_data
@settings(deadline=None)
@given(st.data(), st.booleans())
def test_stream_equals_decode_officially(official, data, skip):
    check_stream(official, data.draw(id_lists(official, 151_936)), skip)


@pytest.mark.slow
@needs_data
@settings(max_examples=10_000, deadline=None)
@given(st.data(), st.booleans())
def test_stream_equals_decode_ten_thousand_times(official, data, skip):
    check_stream(official, data.draw(id_lists(official, 151_936)), skip)


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_stream_of_text_has_no_broken_character(small, text):
    tokenizer = Tokenizer.from_folder(small)
    text = unicodedata.normalize("NFC", text)
    assume(not {*text} & {"é", "Ġ"})  # these added tokens are bytes to the library's decoder
    pieces = list(tokenizer.stream(tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_gives_each_piece_before_it_asks_for_more(small):
    tokenizer = Tokenizer.from_folder(small)
    letter = tokenizer.token_to_id("b")
    assert list(itertools.islice(tokenizer.stream(itertools.repeat(letter)), 3)) == ["b", "b", "b"]


def test_ids_may_be_numpy(small):
    tokenizer = Tokenizer.from_folder(small)
    ids = np.array(tokenizer.encode("to be 北京"))
    assert tokenizer.decode(ids) == "".join(tokenizer.stream(ids)) == "to be 北京"


@pytest.mark.parametrize("wrong", [-1, 2**32, 1.0, "1", None, np.array([1, 2])])
def test_what_is_no_id(small, wrong):
    tokenizer = Tokenizer.from_folder(small)
    with pytest.raises(ValueError, match="not a token id"):
        tokenizer.decode([0, wrong])
    with pytest.raises(ValueError, match="not a token id"):
        list(tokenizer.stream([0, wrong]))


def test_what_is_no_text(small):
    with pytest.raises(ValueError, match="lone surrogates"):
        Tokenizer.from_folder(small).encode("a\ud800b")


def test_a_folder_is_not_read_before_it_is_needed(small):
    code = f"""
import sys
from qwen3np.tokenizer import Tokenizer
tokenizer = Tokenizer.from_folder({str(small)!r})
assert "tokenizers" not in sys.modules
tokenizer.encode("a")
assert "tokenizers" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_what_a_saved_tokenizer_cuts_or_adds_is_ignored(small, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(small / "tokenizer.json"))
    want = backend.encode("to be or not to be").ids
    backend.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", backend.token_to_id("<|end|>"))]
    )
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.model.dropout = 1.0
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).encode("to be or not to be") == want


@pytest.mark.parametrize("names", [[], ["vocab.json"], ["merges.txt", "tokenizer_config.json"]])
def test_folder_without_tokenizer(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff\xfe\x00", "half"])
def test_broken_tokenizer_json(small, tmp_path, damage):
    whole = (small / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    tokenizer = Tokenizer.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        tokenizer.encode("a")


@pytest.mark.parametrize("part", [decoders.Metaspace(), normalizers.Replace("a", "a" * 10**6), normalizers.NFKC()])
def test_other_kinds_of_tokenizer_are_refused(small, tmp_path, part):
    backend = tokenizers.Tokenizer.from_file(str(small / "tokenizer.json"))
    setattr(backend, "decoder" if isinstance(part, decoders.Decoder) else "normalizer", part)
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=f"is {type(part).__name__}"):
        _ = Tokenizer.from_folder(tmp_path).vocab_size


def test_a_pattern_that_would_take_for_ever_is_an_error_of_the_checkpoint(small, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(small / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"its tokenizer fails: .*retry-limit"):
        Tokenizer.from_folder(tmp_path).encode("a" * 60 + "b")


PARTS = {
    "vocab.json": json.dumps({"a": 0, "b": 1, "ab": 2}),
    "merges.txt": "#version: 0.2\na b\n",
    "tokenizer_config.json": json.dumps({"added_tokens_decoder": {"3": {"content": "<|end|>", "special": True}}}),
}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return Tokenizer.from_folder(folder)


def test_vocab_and_merges(tmp_path):
    tokenizer = write(tmp_path, PARTS)
    assert tokenizer.encode("abba<|end|>") == [2, 1, 0, 3]
    assert tokenizer.special_tokens == {"<|end|>": 3}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vocab.json", "{"),
        ("merges.txt", "#version: 0.2\na c\n"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{}"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<|end|>"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"3": {"text": "<|end|>"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {"content": "<|end|>"}}}'),
    ],
)
def test_broken_vocab_and_merges(tmp_path, name, text):
    tokenizer = write(tmp_path, PARTS | {name: text})
    with pytest.raises(CheckpointError, match=name):
        tokenizer.encode("a")


# The files of a folder, and what a chat without and with tools renders to.
NAMED = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
LAYOUTS = [
    ({"tokenizer_config.json": json.dumps({"chat_template": "config"})}, "config", "config"),
    ({"tokenizer_config.json": json.dumps({"chat_template": NAMED})}, "d", "t"),
    ({"tokenizer_config.json": json.dumps({"chat_template": NAMED}), "chat_template.jinja": "file"}, "file", "file"),
    ({"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "more"}, "file", "more"),
    (
        {
            "tokenizer_config.json": json.dumps(
                {"eos_token": {"__type": "AddedToken", "content": "<|end|>"}, "pad_token": None}
            ),
            "chat_template.jinja": "{{ eos_token }}{{ pad_token is defined }}{{ messages[0].content }}",
        },
        "<|end|>Falsehi",
        "<|end|>Falsehi",
    ),
]


@pytest.mark.parametrize(("files", "plain", "with_tools"), LAYOUTS)
def test_which_chat_template(small, tmp_path, files, plain, with_tools):
    tokenizer = write(tmp_path, files | {"tokenizer.json": (small / "tokenizer.json").read_text(encoding="utf-8")})
    assert tokenizer.apply_chat_template(USER) == plain
    assert tokenizer.apply_chat_template(USER, tools=[]) == with_tools


@pytest.mark.oracle
@pytest.mark.parametrize(("files", "plain", "with_tools"), LAYOUTS)
def test_which_chat_template_transformers_takes(small, tmp_path, files, plain, with_tools):
    from transformers import PreTrainedTokenizerFast

    write(tmp_path, files | {"tokenizer.json": (small / "tokenizer.json").read_text(encoding="utf-8")})
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(USER, tokenize=False) == plain
    assert theirs.apply_chat_template(USER, tools=[], tokenize=False) == with_tools


@pytest.mark.parametrize(
    "config", ["{}", '{"chat_template": null}', '{"chat_template": [{"name": "x", "template": ""}]}']
)
def test_no_chat_template(tmp_path, config):
    tokenizer = write(tmp_path, PARTS | {"tokenizer_config.json": config})
    with pytest.raises(ValueError, match=r"chat template.*needs chat_template\.jinja"):
        tokenizer.apply_chat_template(USER)


@pytest.mark.parametrize(
    "config",
    ["[]"]
    + [f'{{"chat_template": {value}}}' for value in ("3", "[1]", "[{}]", '[{"name": 1, "template": ""}]')]
    + ['{"chat_template": [{"name": "default", "template": 1}]}'],
)
def test_broken_chat_template_entry(tmp_path, config):
    tokenizer = write(tmp_path, PARTS | {"tokenizer_config.json": config})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: no"):
        tokenizer.apply_chat_template(USER)


def test_a_batch_of_texts(builtin):
    small = builtin.tokenizer
    assert small.encode(["a b", "c"]) == [small.encode("a b"), small.encode("c")]
    with pytest.raises(TypeError, match="a str or a list of str is needed, not int"):
        small.encode(3)


def test_ids_of_a_chat(builtin):
    messages = [{"role": "user", "content": "Hi"}]
    text = builtin.tokenizer.apply_chat_template(messages)
    assert builtin.tokenizer.apply_chat_template(messages, tokenize=True) == builtin.tokenizer.encode(text)
    assert builtin.tokenizer.eos_token_id == builtin.tokenizer.token_to_id("<|im_end|>")
    assert builtin.tokenizer.turn_ends == {builtin.tokenizer.token_to_id("<|im_end|>")}


@given(text=st.text(), special=st.sampled_from(["<|im_end|>", "<think>", "<|im_<|im_end|>end|>", "\ufdd0"]))
def test_escaped_text_is_text(builtin, text, special):
    tokenizer = builtin.tokenizer
    written = f"{text}{special}{text}"
    ids = tokenizer.encode_escaped(tokenizer.escaped(written))
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(written.replace("\ufdd0", "\ufffd")))
