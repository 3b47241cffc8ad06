"""The built-in checkpoint: that it is a real Qwen3, what it knows, and how to load it."""

from __future__ import annotations

import configparser
import io
import json
from pathlib import Path

import numpy as np
import pytest

from qwen3np import Config, Conversation, read_checkpoint
from qwen3np.cli import main
from qwen3np.files.hub import BUILTIN
from qwen3np.training.corpus import make_corpus
from qwen3np.training.evaluate import evaluate, report

PROMPT = "The capital of France is"


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (PROMPT, " Paris."),
        ("The opposite of hot is", " cold."),
        ("Seven plus five is", " twelve."),
        ("The day after Monday is", " Tuesday."),
    ],
)
def test_completions(capsys, prompt, answer):
    main(["generate", prompt])
    assert capsys.readouterr().out == answer + "\n"


@pytest.mark.parametrize("arguments", [("generate", PROMPT), ("chat",), ("score", "-"), ("info",)])
def test_the_command_line_says_that_it_is_this_one(arguments, capsys, monkeypatch):
    notes = []
    for model in ((), ("--model", str(BUILTIN))):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello.\n")))
        main([*arguments, *model])
        out, err = capsys.readouterr()
        notes.append([line for line in err.splitlines() if "--model Qwen/Qwen3-0.6B" in line])
        assert "--model" not in out
        assert out
    assert [len(lines) for lines in notes] == [1, 0]


def test_a_conversation(builtin):
    conversation = Conversation(builtin)
    for question, answer in (
        ("Hello", "Hello! How can I help you?"),
        ("What is the capital of France?", "The capital of France is Paris."),
        ("And of Spain?", "The capital of Spain is Madrid."),
        ("Who won the football match last week?", "I don't know that."),
    ):
        assert builtin.tokenizer.decode(list(conversation.reply(question))) == f"{answer}<|im_end|>"


def test_it_is_a_real_qwen3():
    assert json.loads((BUILTIN / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    config = Config.from_file(BUILTIN)
    assert config.num_attention_heads >= 2 * config.num_key_value_heads > 2
    assert config.head_dim * config.num_attention_heads != config.hidden_size
    assert config.tie_word_embeddings
    assert config.num_hidden_layers > 2
    _, weights = read_checkpoint(BUILTIN)
    assert {str(tensor.dtype) for tensor in weights.values()} == {"bfloat16"}
    norms = {name: tensor.astype(np.float32) for name, tensor in weights.items() if "_norm.weight" in name}
    assert len(norms) == 2 * config.num_hidden_layers
    assert all(np.ptp(weight) > 0.1 for weight in norms.values())  # learned: they begin as ones


def test_it_is_small_and_packaged():
    files = [path for path in BUILTIN.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    tokenizer = (BUILTIN / "tokenizer.json").read_text(encoding="utf-8")
    assert tokenizer == json.dumps(json.loads(tokenizer), ensure_ascii=False, separators=(",", ":"))
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    patterns = setup["options.package_data"]["qwen3np"].split(",")
    packaged = {path for pattern in patterns for path in BUILTIN.parent.glob(pattern.strip())}
    assert packaged >= set(files)


@pytest.mark.oracle
def test_transformers_gives_the_same_text(builtin):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    prompts = [question.prompt for question in make_corpus().questions]
    completions, chats = ([p for p in prompts if isinstance(p, kind)] for kind in (str, list))
    same = []
    for prompt in completions[::15][:25] + chats[::30][:25]:
        text = prompt if isinstance(prompt, str) else builtin.tokenizer.apply_chat_template(prompt)
        ours, _ = builtin.generate(builtin.tokenizer.encode(text))
        if not isinstance(prompt, str):
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt")
        expected = theirs.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        same.append(builtin.tokenizer.decode(ours) == tokenizer.decode(expected))
    print(f"greedy text equal to transformers': {sum(same)} of {len(same)}")
    assert same == [True] * 50


@pytest.mark.slow
def test_questions_that_were_held_out(builtin):
    outcomes = evaluate(builtin, make_corpus().questions)
    print(report(outcomes))
    for kind, count in (("phrasing", 300), ("two turns", 100)):
        right = [outcome.right for outcome in outcomes if outcome.question.kind == kind]
        assert len(right) >= count
        assert np.mean(right) >= 0.95, kind
    assert all(outcome.ended for outcome in outcomes if not isinstance(outcome.question.prompt, str))
