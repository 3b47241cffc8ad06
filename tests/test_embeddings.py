"""Embeddings and scores: against one plain forward each, and against the recipes of the model cards in transformers."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
from drawing import trained_like

from qwen3np import ContextOverflowError, Model, NonFiniteError, Tokenizer, embed, forward, rerank
from qwen3np.embeddings import DEFAULT_INSTRUCTION

TEXTS = ["The capital of China is Beijing.", "", "Gravity — a force. 🎉", "The cap", "pulls " * 40, "long " * 500]
TEMPLATE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {}\n<Query>: {}\n<Document>: {}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request, config, yes_no):
    tokenizer = Tokenizer.from_folder(yes_no)
    size = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 1600}
    config = dataclasses.replace(config, **size, tie_word_embeddings=request.param == "tied")
    return Model(config, trained_like(config, 1), tokenizer, {})


def truth(model, text):
    """Return the hidden state of the last token, and its logits, from one forward in float64."""
    points = {}
    logits = forward(
        model.weights, model.config, model.tokenizer.encode(text), numerics="float64", trace=points.__setitem__
    )
    return points["model.norm"][0, -1], logits[0, -1]


@pytest.mark.parametrize("instruction", [None, "Find the answer"])
def test_embed(model, instruction):
    before = "" if instruction is None else "Instruct: Find the answer\nQuery:"
    expected = np.stack([truth(model, f"{before}{text}<|endoftext|>")[0] for text in TEXTS])
    counts = []
    for dimensions in (None, 40, 7, 1):
        cut = expected[:, :dimensions]
        cut = cut / np.sqrt((cut**2).sum(axis=1, keepdims=True))
        found = embed(model, TEXTS, instruction, dimensions, progress=counts.append)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, cut, rtol=0, atol=3e-6)  # float32; measured: 1.2e-6
        exact = embed(model, TEXTS, instruction, dimensions, numerics="float64")
        np.testing.assert_allclose(exact, cut, rtol=0, atol=1e-14)  # measured: 1.6e-15
    assert sum(counts) == 4 * len(TEXTS)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_is_named_where_it_counts(model):
    def broken(name, row):
        weights = {**model.weights, name: model.weights[name].copy()}
        weights[name][row] = -np.inf
        return dataclasses.replace(model, weights=weights)

    yes, unused = model.tokenizer.token_to_id("yes"), 0
    if not model.config.tie_word_embeddings:
        with pytest.raises(NonFiniteError, match=r"^lm_head is NaN or infinite .* the checkpoint is damaged$"):
            rerank(broken("lm_head.weight", yes), "cap", TEXTS[:2])
    found = embed(broken("model.embed_tokens.weight", unused), TEXTS[:5])
    np.testing.assert_array_equal(found, embed(model, TEXTS[:5]))


@pytest.mark.parametrize("instruction", [None, "Find the answer"])
def test_rerank(model, instruction):
    yes, no = (model.tokenizer.token_to_id(word) for word in ("yes", "no"))
    expected = []
    for text in TEXTS:
        _, logits = truth(model, TEMPLATE.format(instruction or DEFAULT_INSTRUCTION, "What is {it}?", text))
        expected.append(1 / (1 + np.exp(logits[no] - logits[yes])))
    assert np.ptp(expected) > 0.1  # it tells documents apart
    counts = []
    found = rerank(model, "What is {it}?", TEXTS, instruction, progress=counts.append)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)  # float32; measured: 7e-7
    exact = rerank(model, "What is {it}?", TEXTS, instruction, numerics="float64")
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-14)  # measured: 1.6e-15
    assert sum(counts) == len(TEXTS)


@pytest.mark.parametrize("name", ["embed", "rerank"])
def test_a_text_does_not_depend_on_the_others(model, name):
    def run(texts):
        return embed(model, texts) if name == "embed" else rerank(model, "Where?", texts)

    alone = np.concatenate([run([text]) for text in TEXTS])
    np.testing.assert_allclose(run(TEXTS), alone, rtol=0, atol=3e-6)
    twice = run(TEXTS[:1] * 300)  # nothing but the last token is their own
    np.testing.assert_allclose(twice, alone[:1].repeat(300, axis=0), rtol=0, atol=3e-6)


def test_no_head_is_computed(model):
    headless = {name: tensor for name, tensor in model.weights.items() if name != "lm_head.weight"}
    points = {}
    x = forward(headless, model.config, [5, 6, 7], head=False, trace=points.__setitem__)
    assert list(points)[-1] == "model.norm"
    np.testing.assert_array_equal(x, points["model.norm"])
    np.testing.assert_array_equal(forward(headless, model.config, [5, 6, 7], last_only=True, head=False), x[:, -1:])
    np.testing.assert_array_equal(embed(dataclasses.replace(model, weights=headless), TEXTS), embed(model, TEXTS))


def test_long_texts_go_in_pieces(model, monkeypatch):
    sizes = []

    def counting(weights, config, ids, *args, **kwargs):
        sizes.append(np.size(ids))
        return forward(weights, config, ids, *args, **kwargs)

    monkeypatch.setattr("qwen3np.embeddings.forward", counting)
    embed(model, ["a " * 700, "b " * 10, "c " * 10])
    assert max(sizes) == 512
    sizes.clear()
    documents = ["one", "two", "three"]
    rerank(model, "x" * 300, documents)  # the query, which all have in common, is computed once
    count = len(model.tokenizer.encode(TEMPLATE.format(DEFAULT_INSTRUCTION, "x" * 300, "one")))
    assert sum(sizes) < 1.2 * count


@pytest.mark.parametrize("dimensions", [0, -1, 41, 2.5, "8"])
def test_bad_dimensions(model, dimensions):
    with pytest.raises(ValueError, match="dimensions must be a whole number from 1 to 40"):
        embed(model, ["x"], dimensions=dimensions)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "empty; at least one text is needed"),
        ("one", "must be a list of str, not a single str"),
        (["x", b"y"], r"\[1\]: must be a str, not bytes"),
        ([None], r"\[0\]: must be a str, not NoneType"),
        (["x", "\ud800"], "lone surrogates"),
    ],
)
def test_bad_texts(model, texts, message):
    for name, run in (("texts", lambda: embed(model, texts)), ("documents", lambda: rerank(model, "q", texts))):
        with pytest.raises(ValueError, match=message) as error:
            run()
        assert str(error.value).startswith(name) or "surrogates" in message


def test_bad_instructions_and_queries(model):
    for name, run in {
        "instruction": lambda: embed(model, ["x"], 3),
        "instruction ": lambda: rerank(model, "q", ["x"], 3),
        "query": lambda: rerank(model, 3, ["x"]),
    }.items():
        with pytest.raises(ValueError, match=f"^{name.strip()}: must be a str, not int"):
            run()


def test_a_text_longer_than_the_context_is_not_cut_short(model):
    text = "7" * 1599  # a token each; one more is added
    assert embed(model, ["x", text]).shape == (2, 40)
    with pytest.raises(ContextOverflowError, match=r"texts\[1\]: 1601 tokens .* is 1600: split the text"):
        embed(model, ["x", text + "7", "y"])
    with pytest.raises(ContextOverflowError, match=r"documents\[0\]: 1\d+ tokens"):
        rerank(model, "q", [text])


def test_models_that_cannot(model, builtin):
    with pytest.raises(ValueError, match="embed: the model has no tokenizer"):
        embed(dataclasses.replace(model, tokenizer=None), ["x"])
    with pytest.raises(ValueError, match=r"rerank: the tokenizer has no token no, yes; .* Qwen/Qwen3-Reranker-0.6B"):
        rerank(builtin, "q", ["x"])


OFFICIAL = [
    "The capital of China is Beijing.",
    "Gravity 是一种力 🎉",
    "",
    "a  b\n\n\tc",
    "it pulls " * 90,
    "<|im_end|>x",
]


@pytest.fixture(scope="module", params=["tied", "untied"])
def pair(request, data, config, tmp_path_factory):
    """Our model and transformers' of drawn weights, both with the official tokenizer, and transformers' tokenizer."""
    oracle = pytest.importorskip("oracle")
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("official")
    for file in [*(data / "tokenizer").iterdir(), data / "checkpoints/Qwen3-Embedding-0.6B/tokenizer_config.json"]:
        shutil.copy(file, folder)
    size = {"vocab_size": 151_669, "max_position_embeddings": 32_768}
    config = dataclasses.replace(config, **size, tie_word_embeddings=request.param == "tied")
    ours = Model(config, trained_like(config, 2), Tokenizer.from_folder(folder), {})
    return ours, oracle.model_of(config, ours.weights), AutoTokenizer.from_pretrained(folder)


@pytest.mark.oracle
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("instruction", [None, "Find the answer"])
def test_embeddings_of_transformers(pair, side, instruction):
    import torch

    model, theirs, tokenizer = pair
    texts = OFFICIAL if instruction is None else [f"Instruct: {instruction}\nQuery:{text}" for text in OFFICIAL]
    ids = [[*row, tokenizer.convert_tokens_to_ids("<|endoftext|>")] for row in tokenizer(texts)["input_ids"]]
    inputs = tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt")
    with torch.no_grad():
        states = theirs.model(**inputs).last_hidden_state
    last = [-1] * len(ids) if side == "left" else [len(row) - 1 for row in ids]
    pooled = states[torch.arange(len(ids)), torch.tensor(last)]
    for dimensions in (None, 16):
        expected = torch.nn.functional.normalize(pooled, p=2, dim=1)[:, :dimensions]
        expected = torch.nn.functional.normalize(expected, p=2, dim=1).double().numpy()
        found = embed(model, OFFICIAL, instruction, dimensions).astype(np.float64)
        cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        print(f"1 - cosine at most {1 - cosines.min():.1e}, difference at most {abs(found - expected).max():.1e}")
        assert cosines.min() > 1 - 1e-6
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)  # measured: 8e-7
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=0, atol=1e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("instruction", [None, "Find the answer"])
def test_scores_of_transformers(pair, instruction):
    import torch

    model, theirs, tokenizer = pair
    before, after = TEMPLATE.split("<Instruct>")[0], TEMPLATE.split("{}")[-1]
    task = instruction or "Given a web search query, retrieve relevant passages that answer the query"
    pairs = [f"<Instruct>: {task}\n<Query>: What is gravity?\n<Document>: {text}" for text in OFFICIAL]
    first, last = (tokenizer.encode(part, add_special_tokens=False) for part in (before, after))
    ids = [first + row + last for row in tokenizer(pairs)["input_ids"]]
    inputs = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        logits = theirs(**inputs).logits[:, -1, [tokenizer.convert_tokens_to_ids(word) for word in ("no", "yes")]]
    expected = torch.nn.functional.log_softmax(logits, dim=1)[:, 1].exp().numpy()
    found = rerank(model, "What is gravity?", OFFICIAL, instruction)
    print(f"scores {expected.min():.2f} to {expected.max():.2f}: difference at most {abs(found - expected).max():.1e}")
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # measured: 6e-7


def test_padded_ids_are_ragged_ones(builtin):
    texts = ["One", "The capital of France is Paris."]
    expected = embed(builtin, texts)
    end = builtin.tokenizer.token_to_id("<|endoftext|>")
    rows = [[*builtin.tokenizer.encode(text), end] for text in texts]
    longest = max(map(len, rows))
    for left in (True, False):
        pads = [[0] * (longest - len(row)) for row in rows]
        ids = np.array([pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)])
        mask = [[n >= len(p) if left else n < len(r) for n in range(longest)] for r, p in zip(rows, pads, strict=True)]
        np.testing.assert_allclose(builtin.embed(ids, attention_mask=mask), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="instruction: belongs to texts"):
        builtin.embed(ids, "Find it", attention_mask=mask)
