"""What engines and trainers write, read as the same rollout; anything else is one line with its place."""

from __future__ import annotations

import base64
import json
import math

import numpy as np
import pytest

from qwen3np.audit import rollouts as module
from qwen3np.audit.rollouts import Fields, read_rollouts

PROMPT, IDS, LOGPROBS = [281, 297, 272], [1132, 259, 410], [-1.5, -0.25, -3.0]
SECOND = [617, 410, 259]  # another likely id at each position, with SECOND_LOGPROBS
SECOND_LOGPROBS = [-2.0, -2.5, -0.5]


def entries(model, number=lambda i: {"id": i}, top="top_logprobs"):
    """Each token as an object, with another one below it."""

    def entry(i, x):
        return {**number(i), "token": model.tokenizer.token_bytes(i).decode(), "logprob": x}

    rows = zip(IDS, LOGPROBS, SECOND, SECOND_LOGPROBS, strict=True)
    return [{**entry(i, x), top: [entry(i, x), entry(j, y)]} for i, x, j, y in rows]


def forms(model):
    """Return one rollout in the forms of different programs, and whether each has the second id."""
    text = model.tokenizer.decode
    pairs = [[[i, x], [j, y]] for i, x, j, y in zip(IDS, LOGPROBS, SECOND, SECOND_LOGPROBS, strict=True)]
    vllm = [{str(i): {"logprob": x, "rank": 1}, str(j): {"logprob": y}} for (i, x), (j, y) in pairs]
    triples = [[x, i, None] for i, x in zip(IDS, LOGPROBS, strict=True)]
    tokens = [text([i]) for i in IDS]
    completions = {
        "tokens": tokens,
        "token_logprobs": LOGPROBS,
        "top_logprobs": [{text([i]): x, text([j]): y} for (i, x), (j, y) in pairs],
    }
    masked = {"prompts": [0, 0, *PROMPT], "attention_mask": [0, 0, 1, 1, 1, 1, 1, 1]}
    return {
        "plain": ({"prompt_ids": PROMPT, "ids": IDS, "logprobs": LOGPROBS}, False),
        "pairs": ({"prompt_ids": PROMPT, "ids": IDS, "logprobs": LOGPROBS, "top": pairs}, True),
        "vLLM": ({"prompt_token_ids": PROMPT, "outputs": [{"token_ids": IDS, "logprobs": vllm}]}, True),
        "SGLang": ({"input_ids": PROMPT, "output_ids": IDS, "meta_info": {"output_token_logprobs": triples}}, False),
        "TRL": ({"prompt_ids": [PROMPT], "completion_ids": [IDS], "logprobs": [LOGPROBS]}, False),
        "verl": ({**masked, "responses": IDS, "rollout_log_probs": LOGPROBS}, False),
        "slime": ({"prompt_ids": PROMPT, "tokens": PROMPT + IDS, "rollout_log_probs": LOGPROBS}, False),
        "llama.cpp": ({"prompt": PROMPT, "completion_probabilities": entries(model)}, True),
        "completions": ({"prompt": text(PROMPT), "choices": [{"logprobs": completions}]}, True),
        "chat": ({"prompt_ids": PROMPT, "choices": [{"logprobs": {"content": entries(model, lambda i: {})}}]}, True),
        "named tokens": (
            {
                "prompt_ids": PROMPT,
                "choices": [{"logprobs": {**completions, "tokens": [f"token_id:{i}" for i in IDS]}}],
            },
            True,
        ),
        "logged": ({"request": {"prompt": PROMPT}, "response": {"ids": IDS, "logprobs": LOGPROBS}}, False),
        "the whole vocabulary": (
            {
                "prompt_ids": PROMPT,
                "ids": IDS,
                "logprobs": [
                    [dict(row).get(i, -9.0) for i in range(model.config.vocab_size)]
                    for row in ([*map(tuple, p)] for p in pairs)
                ],
            },
            True,
        ),
    }


def read(model, row, **options):
    return read_rollouts([row], model.tokenizer, model.config.vocab_size, **options)


def test_every_form_is_the_same_rollout(builtin):
    for name, (row, second) in forms(builtin).items():
        [found] = read(builtin, row)
        assert (found.prompt, found.ids) == (PROMPT, IDS), name
        assert found.found[:, 0].tolist() == IDS, name
        assert found.logprobs[:, 0].tolist() == LOGPROBS, name
        if second:
            there = [
                dict(zip(i, x, strict=True)) for i, x in zip(found.found.tolist(), found.logprobs.tolist(), strict=True)
            ]
            assert [row[j] for row, j in zip(there, SECOND, strict=True)] == SECOND_LOGPROBS, name


def test_batches_and_several_answers_are_rollouts_each(builtin):
    batch = {"prompt_ids": [PROMPT, PROMPT[:2]], "completion_ids": [IDS, IDS[:2]], "logprobs": [LOGPROBS, LOGPROBS[:2]]}
    assert [len(r.ids) for r in read(builtin, batch)] == [3, 2]
    outputs = [{"token_ids": IDS[:n], "logprobs": LOGPROBS[:n]} for n in (1, 3)]
    assert [len(r.ids) for r in read(builtin, {"prompt_token_ids": PROMPT, "outputs": outputs})] == [1, 3]


def test_messages_become_the_prompt_by_the_template(builtin):
    messages = [{"role": "user", "content": "What comes after Monday?"}]
    [found] = read(builtin, {"messages": messages, "ids": IDS, "logprobs": LOGPROBS})
    assert found.prompt == builtin.tokenizer.apply_chat_template(messages, tokenize=True)


def test_masked_and_missing_numbers_are_unknown_and_impossible_ones_infinite(builtin):
    row = {"prompt_ids": PROMPT, "ids": IDS, "logprobs": [None, -9999.0, -1.0], "response_mask": [1, 1, 0]}
    [found] = read(builtin, row)
    x = found.logprobs[:, 0].tolist()
    assert math.isnan(x[0])
    assert x[1] == -math.inf
    assert math.isnan(x[2])


def test_log_probabilities_of_the_prompt_are_left_out_unless_it_is_echoed(builtin):
    whole = {"prompt_ids": PROMPT, "ids": PROMPT + IDS, "logprobs": [None, -7.0, -8.0, *LOGPROBS]}
    [plain], [echoed] = read(builtin, {**whole, "ids": IDS}), read(builtin, whole, echoed=True)
    assert plain.ids == IDS
    assert plain.logprobs[:, 0].tolist() == LOGPROBS
    assert echoed.prompt == PROMPT[:1]
    assert echoed.ids == PROMPT[1:] + IDS
    assert echoed.logprobs[:, 0].tolist() == [-7.0, -8.0, *LOGPROBS]


def test_an_unknown_text_ends_the_answer(builtin):
    logprobs = {"tokens": [builtin.tokenizer.decode(IDS[:1]), "\ufffd", "x"], "token_logprobs": LOGPROBS}
    [found] = read(builtin, {"prompt_ids": PROMPT, "choices": [{"logprobs": logprobs}]})
    assert found.ids == IDS[:1]


def test_fields_are_found_shown_and_named_by_hand(builtin):
    row = {
        "prompt_ids": PROMPT,
        "ids": IDS,
        "mine": LOGPROBS,
        "rollout_log_probs": [0.0] * 3,
        "old_log_probs": [1.0] * 3,
    }
    fields = Fields()
    [found] = read(builtin, row, fields=fields)
    assert found.logprobs[:, 0].tolist() == [0.0] * 3
    assert fields.used["logprobs"] == "rollout_log_probs"
    assert fields.unused == {"old_log_probs"}
    [found] = read(builtin, row, fields=Fields({"logprobs": "mine"}))
    assert found.logprobs[:, 0].tolist() == LOGPROBS
    with pytest.raises(ValueError, match="no such field"):
        Fields({"logprob": "mine"})


def test_recorded_experts_are_lists_or_bytes(builtin):
    experts = np.arange(24).reshape(4, 2, 3)
    for written in (experts.tolist(), base64.b64encode(experts.astype("<i4").tobytes()).decode()):
        [found] = read(builtin, {"prompt_ids": PROMPT, "ids": IDS, "logprobs": LOGPROBS, "routed_experts": written})
        np.testing.assert_array_equal(found.experts.reshape(4, 2, 3), experts)


def test_files_are_json_lines_or_one_value(builtin, tmp_path):
    row, path = {"prompt_ids": PROMPT, "ids": IDS, "logprobs": LOGPROBS}, tmp_path / "rollouts.jsonl"
    for text in (f"{json.dumps(row)}\n\n{json.dumps(row)}\n", json.dumps([row, row]), json.dumps([row, row], indent=1)):
        path.write_text(text)
        assert len(read_rollouts(path, None, 2048)) == 2


GOOD = {"prompt_ids": PROMPT, "ids": IDS, "logprobs": LOGPROBS}
BAD = {
    "not JSON": b"{",
    "not UTF-8": b"\xff{}",
    "deep": b"[" * 100_000,
    "a number": b"7",
    "a list in a list": b"[[1]]",
    "a name twice": b'{"ids": [1], "ids": [2]}',
    "nothing": b"",
    "no log-probabilities": {**GOOD, "logprobs": None},
    "no prompt": {**GOOD, "prompt_ids": None},
    "no ids": {"prompt_ids": PROMPT, "logprobs": LOGPROBS},
    "an empty answer": {**GOOD, "ids": [], "logprobs": []},
    "another length": {**GOOD, "logprobs": LOGPROBS[:2]},
    "an id outside": {**GOOD, "ids": [1132, 259, 2048]},
    "a negative id": {**GOOD, "prompt_ids": [-1]},
    "a huge id": {**GOOD, "ids": [10**400, 1, 2]},
    "a true id": {**GOOD, "ids": [True, 259, 410]},
    "ids of text": {**GOOD, "ids": "1132"},
    "texts for numbers": {**GOOD, "logprobs": ["-1", "-2", "-3"]},
    "a huge number": {**GOOD, "logprobs": [10**400, -1, -1]},
    "objects for numbers": {**GOOD, "logprobs": [{}, {"a": []}, {"logprob": {}}]},
    "a top that is a number": {**GOOD, "top": 3},
    "too many at a position": {**GOOD, "top": [[[i, -1.0] for i in range(300)]] * 3},
    "messages that are none": {**GOOD, "prompt_ids": None, "messages": [{"role": 7}]},
    "experts of text": {**GOOD, "routed_experts": "!!"},
    "experts in two dimensions": {**GOOD, "routed_experts": [[1]]},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rollouts_are_one_line_with_their_place(builtin, tmp_path, name):
    path, bad = tmp_path / "rollouts.jsonl", BAD[name]
    good = json.dumps(GOOD).encode() + b"\n"
    path.write_bytes(b"" if name == "nothing" else good + (bad if isinstance(bad, bytes) else json.dumps(bad).encode()))
    with pytest.raises(ValueError, match="no rollouts" if name == "nothing" else "line 2") as error:
        read_rollouts(path, builtin.tokenizer, builtin.config.vocab_size)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_what_is_too_large_is_not_read(builtin, tmp_path, monkeypatch):
    path = tmp_path / "rollouts.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD))
    monkeypatch.setattr(module, "TOKENS", 10)
    with pytest.raises(ValueError, match="line 2: more than 10 tokens"):
        read_rollouts(path, None, 2048)
    monkeypatch.setattr(module, "TOKENS", 1000)
    monkeypatch.setattr(module, "NUMBERS", 5)
    with pytest.raises(ValueError, match="line 2: 6 tokens with up to 1 log-probabilities"):
        read_rollouts(path, None, 2048)
    monkeypatch.setattr(module, "LINE", 50)
    with pytest.raises(ValueError, match="line 1: longer than"):
        read_rollouts(path, None, 2048)
    with pytest.raises(ValueError, match="not a regular file"):
        read_rollouts("/dev/zero", None, 2048)


@pytest.mark.slow
def test_five_hundred_changed_files_are_read_or_refused_in_one_line(builtin, tmp_path):
    """Bytes and JSON values of good rollouts changed at random: no other exception, no long line."""
    rng, path, refused = np.random.default_rng(0), tmp_path / "rollouts.jsonl", list[str]()
    good = [json.dumps(row) for row, _ in forms(builtin).values() if len(json.dumps(row)) < 10_000]
    odd = ["null", "-1", "1e999", '"x"', "[]", "{}", "true", "[[[]]]", "NaN", "1" * 400, '"\\ud800"', '{"id": {}}']
    for _ in range(500):
        text = good[rng.integers(len(good))]
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(text)))
            text = (
                text[:at]
                + (odd[rng.integers(len(odd))] if rng.integers(2) else "")
                + text[at + int(rng.integers(12)) :]
            )
        path.write_text(text)
        try:
            read_rollouts(path, builtin.tokenizer, builtin.config.vocab_size)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 250
    assert all("\n" not in text and str(path) in text and len(text) < 5000 for text in refused)
