"""How answers are counted, and how two checkpoints are compared, on hand-made answers and weights."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from qwen3np import read_checkpoint, save_checkpoint
from qwen3np.files.hub import BUILTIN
from qwen3np.training.corpus import Question
from qwen3np.training.evaluate import Outcome, evaluate, report
from qwen3np.training.recipe import differences

ASKED = [{"role": "user", "content": "Capital of Peru?"}]
CHAT = Question("phrasing", "capital", ASKED, "The capital of Peru is Lima.")
TEXT = Question("phrasing", "capital", "The capital of Peru is", " Lima.")


@pytest.mark.parametrize(
    ("question", "text", "ended", "right"),
    [
        (CHAT, "The capital of Peru is Lima.", True, True),
        (CHAT, "The capital of Peru is Lima.", False, False),
        (CHAT, "The capital of Peru is Lima. It is", True, False),
        (CHAT, "The capital of Peru is Quito.", True, False),
        (CHAT, "", True, False),
        (TEXT, " Lima.", False, True),
        (TEXT, " Lima. Two and two make four.", False, True),
        (TEXT, " Lima", False, False),
        (TEXT, " Quito.", True, False),
    ],
)
def test_what_is_right(question, text, ended, right):
    assert Outcome(question, text, ended).right == right


def test_the_report_counts():
    outcomes = [Outcome(CHAT, CHAT.answer, True), Outcome(CHAT, "Quito.", False), Outcome(TEXT, " Quito.", False)]
    lines = [line.split() for line in report(outcomes).splitlines()]
    assert ["all", "1/3", "33.3%", "1/2"] in lines
    assert ["phrasing,", "chat", "1/2", "50.0%", "1/2"] in lines
    assert ["phrasing,", "text", "0/1", "0.0%"] in lines


def test_earlier_answers_are_the_models_own(builtin):
    asked = [
        {"role": "user", "content": "What is the capital of Italy?"},
        {"role": "assistant", "content": "The opposite of hot is cold."},
        {"role": "user", "content": "What is the capital of Spain?"},
    ]
    prompts = []
    recording = type("Recording", (), {"text": builtin.text})()

    def generate(ids, **options):
        prompts.extend(builtin.tokenizer.decode(row) for row in ids)
        return builtin.generate(ids, **options)

    recording.generate = generate
    (outcome,) = evaluate(recording, [Question("two turns", "capital", asked, "The capital of Spain is Madrid.")])
    assert outcome.right
    assert "The capital of Italy is Rome.<|im_end|>" in prompts[-1]
    assert "hot" not in prompts[-1]


def test_differences(tmp_path):
    shutil.copytree(BUILTIN, tmp_path / "same")
    assert all(line.endswith(": equal") for line in differences(BUILTIN, tmp_path / "same")[:-1])
    assert " 0 of 1,742,752 weights differ, relative L2 distance 0.0e+00" in differences(BUILTIN, tmp_path / "same")[-1]

    config, weights = read_checkpoint(BUILTIN)
    weights = {name: np.array(w) for name, w in weights.items()}
    weights["model.norm.weight"][:3] *= 2
    for name in ("config.json", "model.safetensors", "training_log.csv"):
        (tmp_path / "same" / name).unlink()
    save_checkpoint(tmp_path / "same", config, weights)
    lines = differences(BUILTIN, tmp_path / "same")
    assert "training_log.csv: not in" in lines[-2]
    assert "model.safetensors: 3 of 1,742,752 weights differ" in lines[-1]
