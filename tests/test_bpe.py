"""Trained tokenizers, against Qwen3's own tokenizer.json and transformers."""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from qwen3np import chat
from qwen3np.tokenizer import Tokenizer
from qwen3np.training.bpe import CHAT_TEMPLATE, generation_config, train_tokenizer, write_tokenizer

CORPUS = ["The year 2024, the year 2024: don't shout, shouldn't they? <think>\n\n</think>\n\n  caf\u00e9 北京"] * 4
ADDED = 26
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello\n"},
    {"role": "user", "content": "bye"},
]
CHATML = (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    "<|im_start|>assistant\nhello\n<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n"
)

plain = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n\r\t aeé\u03012'’"), max_size=30)
marked = st.lists(plain | st.sampled_from(["<|im_end|>", "<think>", "</tool_call>", "<|im_"]), max_size=5).map("".join)


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(CORPUS, 330)


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "made"
    write_tokenizer(folder, trained, 512)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def official():
    if "QWEN3NP_DATA" not in os.environ:
        pytest.skip("the official Qwen3 files are not here: set QWEN3NP_DATA to their folder")
    return json.loads((Path(os.environ["QWEN3NP_DATA"]) / "tokenizer/tokenizer.json").read_bytes())


@given(marked)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    # NFC is that of the text between added tokens
    assert unicodedata.normalize("NFC", tokenizer.decode(ids)) == unicodedata.normalize("NFC", text)
    assert ids == tokenizer.encode(tokenizer.decode(ids))


def test_composed_and_decomposed_letters_are_the_same(tokenizer):
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"


def test_merges_are_learned_but_not_of_digits_or_added_tokens(tokenizer):
    assert len(tokenizer.encode("year")) == len(tokenizer.encode(" the")) == 1
    assert len(tokenizer.encode("2024")) == 4
    assert len(tokenizer.encode("<|im_start|><think>\n\n</think>\n\n")) == 5
    for corpus in ("2024 " * 99, "<think>" * 99, "<|im_end|><|im_end|>"):
        assert train_tokenizer([corpus], 400).get_vocab_size() == 256 + ADDED


def test_the_size_is_as_asked_for_or_as_the_corpus_allows():
    assert [train_tokenizer(CORPUS, size).get_vocab_size() for size in (256 + ADDED, 300)] == [256 + ADDED, 300]
    tokenizer = train_tokenizer(["ab", "ab", "once"], 400)
    assert tokenizer.get_vocab_size() == 257 + ADDED
    assert tokenizer.id_to_token(256) == "ab"
    assert tokenizer.token_to_id("<|endoftext|>") == 257
    assert train_tokenizer([], 400).get_vocab_size() == 256 + ADDED
    with pytest.raises(ValueError, match=r"vocab_size=281 is too small: 256 bytes and 26 added tokens need 282"):
        train_tokenizer(CORPUS, 281)


def test_added_tokens_are_the_official_ones_at_the_end(trained, official):
    end = trained.get_vocab_size() - 151_669
    ours = json.loads(trained.to_str())["added_tokens"]
    assert ours == [token | {"id": token["id"] + end} for token in official["added_tokens"]]


def test_text_is_split_as_officially(trained, official):
    ours = json.loads(trained.to_str())
    assert ours["normalizer"] == official["normalizer"]
    (split, to_bytes), (their_split, their_to_bytes) = (
        side["pre_tokenizer"]["pretokenizers"] for side in (ours, official)
    )
    assert split == their_split
    offsets = {"trim_offsets": None}  # of no use to ids
    assert to_bytes | offsets == their_to_bytes | offsets


def test_training_again_gives_the_same_file(folder):
    """Many pairs are equally frequent here; hashing, threads and processes must not decide among them."""
    code = (
        "import itertools, sys; from qwen3np.training.bpe import *\n"
        "words = [a + b + c + ' ' + c + b for a, b, c in itertools.product('abcdefghij', repeat=3)]\n"
        "sys.stdout.write(train_tokenizer(words * 2, 900).to_str())"
    )
    settings = [{"TOKENIZERS_PARALLELISM": p, "RAYON_NUM_THREADS": n} for p, n in (("true", "4"), ("true", "1"))]
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | setting)
        for setting in (*settings, {"TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "1"})
    ]
    files = {process.communicate()[0] for process in processes}
    assert len(files) == 1
    assert len(json.loads(files.pop())["model"]["merges"]) == 900 - 256 - ADDED


def test_files(folder, trained):
    assert sorted(file.name for file in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    assert "\n" not in text
    assert tokenizers.Tokenizer.from_str(text).get_vocab() == trained.get_vocab()


def test_generation_stops_where_answers_end(trained):
    config = generation_config(trained)
    assert [trained.id_to_token(i) for i in config["eos_token_id"]] == ["<|im_end|>", "<|endoftext|>"]
    assert trained.id_to_token(config["pad_token_id"]) == "<|endoftext|>"
    assert config["do_sample"] is False


def test_chat_text(tokenizer, monkeypatch):
    monkeypatch.delattr(chat, "_render_apart")  # the template is known: it needs no other process
    assert tokenizer.apply_chat_template(CHAT, add_generation_prompt=False) == CHATML
    assert tokenizer.apply_chat_template(CHAT, tools=[]) == CHATML + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("messages", "tools", "words"),
    [
        (CHAT, [{"name": "f"}], "line 2: TemplateError: this model knows no tools"),
        ([*CHAT, {"role": "assistant", "tool_calls": [{"name": "f"}]}], None, "this model knows no tools"),
        ([*CHAT, {"role": "tool", "content": "3"}], None, "system, user and assistant, not tool"),
    ],
)
def test_chats_it_cannot_write(messages, tools, words):
    with pytest.raises(ValueError, match=words):
        chat.render_chat(CHAT_TEMPLATE, messages, tools=tools)


@pytest.mark.oracle
def test_transformers_reads_the_same_files(folder, tokenizer, trained, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    theirs = AutoTokenizer.from_pretrained(folder)
    assert (len(theirs), theirs.model_max_length) == (tokenizer.vocab_size, 512)
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert theirs.bos_token is theirs.unk_token is None
    assert not theirs.clean_up_tokenization_spaces

    @given(marked)
    def same(text):
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)
        messages = [*CHAT, {"role": "assistant", "content": text}]
        for prompt in (False, True):
            chat_text = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
            assert tokenizer.apply_chat_template(messages, add_generation_prompt=prompt) == chat_text

    same()
    (tmp_path / "generation_config.json").write_text(json.dumps(generation_config(trained)))
    GenerationConfig.from_pretrained(tmp_path).validate(strict=True)
