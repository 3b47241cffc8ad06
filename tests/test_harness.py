"""lm-evaluation-harness on this model, and on its own `hf` model: torch in float32, on the same checkpoint."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

import qwen3np
from qwen3np.files.hub import BUILTIN

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
lm_eval = pytest.importorskip("lm_eval", reason="needs the extra: pip install qwen3np[eval]")
pytest.importorskip("torch", reason="needs the extra: pip install qwen3np[oracle]")
serving = pytest.importorskip("serving", reason="the server and its tests need the extra `test`")
harness = pytest.importorskip("qwen3np.harness")

pytestmark = pytest.mark.oracle  # takes a minute: lm-eval and transformers are imported, and the tasks run three times

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "": "Bern"}
SUMS = {"Seven plus five": "twelve", "Two plus two": "four", "Nine plus one": "ten", "Three plus eight": "eleven"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three small tasks, one for each thing that lm-eval asks of a model."""
    rows = [
        {"prompt": f"The capital of {country} is" if country else "", "choices": list(CAPITALS.values()), "gold": n}
        for n, country in enumerate(CAPITALS)
    ]
    rows += [{"prompt": f"{a} is", "choices": list(SUMS.values()), "gold": n} for n, a in enumerate(SUMS)]
    for n, row in enumerate(rows):  # some texts exceed the context, 256 tokens
        row["text"] = f"{row['prompt']} {row['choices'][row['gold']]}. " * (n * 9 + 1)
    file = tmp_path_factory.mktemp("tasks") / "rows.json"
    file.write_text("\n".join(map(json.dumps, rows)))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    mean = {"aggregation": "mean", "higher_is_better": True}
    return [
        {
            **common, "task": "choices", "output_type": "multiple_choice", "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc", **mean}],
        },
        {
            **common, "task": "texts", "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "{{text}}", "metric_list": [{"metric": "byte_perplexity"}],
        },
        {
            **common, "task": "answers", "output_type": "generate_until", "doc_to_text": "{{prompt or 'So'}}",
            "doc_to_target": " {{choices[gold]}}", "metric_list": [{"metric": "exact_match", **mean}],
            "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 8},
        },
    ]  # fmt: skip


def evaluated(tasks, name, **options):
    """The result of each task, and what the model said to each of its items."""
    found = lm_eval.simple_evaluate(name, options, tasks=tasks, log_samples=True, batch_size=4, bootstrap_iters=0)
    said = {
        name: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in found["samples"].items()
    }
    figures = {name: {k: v for k, v in r.items() if k != "alias"} for name, r in found["results"].items()}
    return figures, said


@pytest.fixture(scope="module")
def truth(tasks):
    return evaluated(tasks, "hf", pretrained=str(BUILTIN), dtype="float32", device="cpu")


def check(found, truth, texts=slice(None)):
    """Equal generated texts and choices, and log-likelihoods within 1e-5; those of whole texts to float32 rounding."""
    (figures, said), (their_figures, theirs) = found, truth
    assert said["answers"] == theirs["answers"]
    for ours, other in zip(said["choices"], theirs["choices"], strict=True):
        np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in other], rtol=0, atol=1e-5)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in other]
    np.testing.assert_allclose(np.ravel(said["texts"])[texts], np.ravel(theirs["texts"])[texts], rtol=1e-6)
    for name in ("choices", "answers"):
        assert figures[name] == their_figures[name]


def test_all_kinds_of_tasks_equal_those_of_the_hf_model(tasks, truth):
    assert truth[0]["choices"]["acc,none"] > 0.5
    check(evaluated(tasks, "qwen3np", pretrained=str(BUILTIN)), truth)


def test_so_they_do_through_the_server(tasks, truth):
    with serving.serve() as (address, _):
        url = f"{address}/v1/completions"
        options = {"model": "tiny", "base_url": url, "tokenizer": str(BUILTIN), "tokenizer_backend": "huggingface"}
        found = evaluated(tasks, "local-completions", max_length=257, **options)
    check(found, truth, texts=slice(4))  # longer ones: through a server, lm-eval's windows are two tokens shorter


def test_chats_are_those_of_the_template():
    model, tokenizer = harness.Harness(), qwen3np.load().text
    messages = [{"role": "user", "content": "Hi"}]
    assert model.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    unfinished = [*messages, {"role": "assistant", "content": "Hel"}]
    assert model.apply_chat_template(unfinished, add_generation_prompt=False).endswith("Hel")
    assert model.chat_template(True) == tokenizer.chat_template
