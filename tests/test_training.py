"""The training loop and `qwen3np train`: the result of a run, however often it is interrupted."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from qwen3np import CheckpointError, Config, count_parameters, load, score
from qwen3np.cli import main
from qwen3np.ops.fast.threads import WORTH_SHARING
from qwen3np.training import loop
from qwen3np.training.loop import STATE, Settings, State, batches, mean_loss, train

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
# More than one epoch; the number of steps is not a multiple of save_every.
SETTINGS = Settings(8, batch_size=4, sequence_length=24, learning_rate=0.01, warmup_steps=2, save_every=3)
LONG = replace(SETTINGS, steps=400)  # long enough to be stopped from outside
NAMES = ["Ada", "Bo", "Cleo", "Dov"]
DOCUMENTS = [
    *[f"{name} has {n} apples." for n, name in enumerate(NAMES * 3)],
    *[[{"role": "user", "content": f"{name}?"}, {"role": "assistant", "content": f"{name}!"}] for name in NAMES],
]
OTHERS = [text.replace("apples", "pears") if isinstance(text, str) else text for text in DOCUMENTS]
FILES = {
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "training_log.csv", STATE),
}


def trained(folder, settings=SETTINGS, documents=DOCUMENTS, **options):
    """Train, and return the bytes of the weights."""
    train(documents, folder, options.pop("sizes", SIZES), settings, progress=False, **options)
    assert {file.name for file in folder.iterdir()} == FILES
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of the weights of a run that was not stopped."""
    return trained(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def computed(monkeypatch):
    """Return the losses of all steps that are computed, and at which of them to stop (count from 1; 0: never)."""
    real = loop.loss_and_gradients
    losses = []

    def stopping(*arguments):
        loss, gradients = real(*arguments)
        losses.append(loss)
        if len(losses) == stopping.at:
            raise KeyboardInterrupt
        return loss, gradients

    stopping.at = 0
    monkeypatch.setattr(loop, "loss_and_gradients", stopping)
    return losses, stopping


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.jsonl"
    lines = [{"text": document} if isinstance(document, str) else {"messages": document} for document in DOCUMENTS]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


def command(corpus, folder, settings=SETTINGS, *arguments, **changed):
    """Return the arguments of `qwen3np train` that ask for what `trained` asks for."""
    flags = SIZES | asdict(settings) | changed
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in flags.items()]
    return ["train", str(corpus), "--out", str(folder), *[word for pair in pairs for word in pair], *arguments]


# --- the same bytes


def test_the_seed_decides_every_byte(whole, tmp_path):
    assert trained(tmp_path / "again") == whole
    assert trained(tmp_path / "other", replace(SETTINGS, seed=1)) != whole


@pytest.mark.parametrize("at", [1, 3, 4, 5, 8])
def test_a_stopped_run_goes_on_to_the_same_bytes(at, whole, computed, tmp_path):
    folder, (losses, stopping) = tmp_path / "model", computed
    stopping.at = at
    with pytest.raises(KeyboardInterrupt):
        trained(folder)
    saved = max(at - 2, 0) // 3 * 3  # a state is saved when the next loss is known to be finite
    assert State.load(folder).step == saved
    assert not (folder / "model.safetensors").exists()
    assert trained(folder, resume=True) == whole
    assert len(losses) == at + SETTINGS.steps + 1 - saved  # it did not start over; the last loss is a check
    assert [line["step"] for line in read_log(folder)] == ["3", "6", "8"]


def test_a_run_stopped_twice_goes_on_to_the_same_bytes(whole, computed, tmp_path):
    losses, stopping = computed
    stopping.at = 5  # its last state is that of step 3
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "model")
    losses.clear()  # then that of step 6
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "model", resume=True)
    assert State.load(tmp_path / "model").step == 6
    stopping.at = 0
    assert trained(tmp_path / "model", resume=True) == whole


@pytest.mark.parametrize("name", ["config.json.", "model.safetensors."])
def test_a_run_stopped_at_its_very_end_goes_on_to_the_same_bytes(name, whole, monkeypatch, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    unlink, move = type(tmp_path).unlink, os.replace
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "unlink", lambda p, **o: stop() if p.name == name else unlink(p, **o))
        patch.setattr(os, "replace", lambda a, b: stop() if name != STATE and name in Path(a).name else move(a, b))
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "model")
    assert trained(tmp_path / "model", resume=True) == whole


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("long") / "model", LONG)


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [("SIGKILL", -9, rb".*"), ("SIGINT", 130, rb".*keeps the last saved step: --resume continues from there\]\n+")],
)
def test_a_stopped_process_leaves_a_state_to_go_on_from(sent, status, said, long, corpus, tmp_path):
    folder, states, deadline = tmp_path / "model", set(), time.monotonic() + 600
    arguments = [sys.executable, "-m", "qwen3np", *command(corpus, folder, LONG)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while len(states) < 3:  # a new file each
            assert time.monotonic() < deadline
            assert process.poll() is None
            if (folder / STATE).exists():
                states.add((folder / STATE).stat().st_mtime_ns)
            time.sleep(0.001)
        process.send_signal(getattr(signal, sent))
        out, error = process.communicate()
    assert (process.returncode, out) == (status, b"")
    assert re.fullmatch(said, error, re.DOTALL)
    if not (folder / "config.json").exists():
        with pytest.raises(CheckpointError, match="an unfinished training run; repeat its command with --resume"):
            load(folder)
    assert 0 < State.load(folder).step < LONG.steps
    assert main(command(corpus, folder, LONG, "--resume")) is None
    assert {file.name for file in folder.iterdir()} == FILES
    assert (folder / "model.safetensors").read_bytes() == long


def test_the_number_of_threads_changes_no_byte(monkeypatch, tmp_path):
    sizes = SIZES | {"vocab_size": 1500, "hidden_size": 64}
    settings = replace(SETTINGS, steps=3, batch_size=14)
    parameters = count_parameters(Config.from_dict(sizes | {"rope_theta": 1e4}))["unique"]
    assert 10 * parameters >= WORTH_SHARING  # what is shared: the rows of a batch, and the weights of an update
    results = set()
    for threads in "123":
        monkeypatch.setenv("QWEN3NP_NUM_THREADS", threads)
        results.add(trained(tmp_path / threads, settings, sizes=sizes))
    assert len(results) == 1


# --- what is trained on


def numbered(count):
    """Documents of different lengths, encoded: each has its own number, and ends with 0."""
    lengths = np.random.default_rng(0).integers(2, 9, count)
    return [
        (np.array([*[n] * (length - 1), 0], np.int32), np.ones(length, bool)) for n, length in enumerate(lengths, 1)
    ]


def order(rows):
    """Return the numbers of the documents in rows, in their order."""
    return [int(b) for a, b in zip([0, *rows.flat], rows.flat, strict=False) if b and a != b]


def test_batches_have_every_document_once_in_each_epoch():
    settings = Settings(batch_size=3, sequence_length=12)
    drawn = list(islice(batches(numbered(23), settings), 40))
    assert all(rows.shape == masks.shape == (3, 13) for rows, masks in drawn)
    documents = order(np.concatenate([rows for rows, _ in drawn]))
    epochs = [documents[start : start + 23] for start in range(0, len(documents) - 22, 23)]
    assert len(epochs) > 10
    assert all(sorted(epoch) == list(range(1, 24)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == len(epochs)  # each in its own order
    other = islice(batches(numbered(23), replace(settings, seed=1)), 40)
    assert order(np.concatenate([rows for rows, _ in other])) != documents


def test_a_batch_may_be_larger_than_an_epoch():
    rows, _ = next(batches(numbered(5), Settings(batch_size=20, sequence_length=12)))
    assert sorted(order(rows)[:10]) == sorted([1, 2, 3, 4, 5] * 2)


def test_batches_go_on_where_they_were_left():
    settings = Settings(batch_size=3, sequence_length=12)
    drawn = list(islice(batches(numbered(23), settings), 12))
    for (rows, masks), (expected, counts) in zip(
        islice(batches(numbered(23), settings), 5, 12), drawn[5:], strict=True
    ):
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_array_equal(masks, counts)


def test_rows_in_which_nothing_counts_are_left_out():
    ids = np.arange(1, 41, dtype=np.int32)  # a long question, then a short answer: the last of four rows
    rows, masks = next(batches([(ids, ids > 38)], Settings(batch_size=2, sequence_length=9)))
    np.testing.assert_array_equal(rows, [range(31, 41)] * 2)
    np.testing.assert_array_equal(masks, [[False] * 8 + [True] * 2] * 2)
    with pytest.raises(ValueError, match="no token of the documents counts"):
        next(batches([(ids, ids > 40)], Settings(batch_size=2, sequence_length=9)))


# --- the log


def read_log(folder):
    with (folder / "training_log.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_mean_loss_is_that_of_score(config, weights):
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (3, 20))
    masks = np.random.default_rng(1).random(ids.shape) < 0.6
    expected = [-score(weights, config, row)[mask[1:]] for row, mask in zip(ids, masks, strict=True)]
    # float32; measured: 2e-8
    assert mean_loss(weights, config, (ids, masks)) == pytest.approx(np.mean(np.concatenate(expected)), rel=1e-6)


def test_the_log(computed, tmp_path):
    trained(tmp_path / "model", held_out=OTHERS)
    log, (losses, _) = read_log(tmp_path / "model"), computed
    assert [list(line) for line in log] == [["step", "learning_rate", "loss", "held_out_loss"]] * 3
    assert [line["step"] for line in log] == ["3", "6", "8"]
    means = [np.mean(losses[a:b]) for a, b in [(0, 3), (3, 6), (6, 8)]]
    assert [float(line["loss"]) for line in log] == pytest.approx(means, abs=1e-6)
    # a cosine over 6 steps after the warm-up: 30°, 90° - 0 and 150° are 1, 3 and 5 sixths of it
    rates = [0.01 * 0.5 * (1 + np.cos(np.pi * n / 6)) for n in (0, 3, 5)]
    assert [float(line["learning_rate"]) for line in log] == pytest.approx(rates, abs=1e-6)


def test_the_held_out_loss_is_that_of_the_saved_model(tmp_path):
    trained(tmp_path / "model", held_out=["Eve has 3 pears."])
    model = load(tmp_path / "model", progress=False)
    ids = model.tokenizer.encode("Eve has 3 pears.<|endoftext|>")
    last = read_log(tmp_path / "model")[-1]
    expected = -np.mean(score(model.weights, model.config, ids))
    assert float(last["held_out_loss"]) == pytest.approx(expected, rel=1e-3)  # weights rounded to bfloat16 after it
    assert float(last["held_out_loss"]) != pytest.approx(float(last["loss"]), rel=1e-2)


def test_a_resumed_run_may_have_held_out_documents_that_its_beginning_had_not(whole, computed, tmp_path):
    computed[1].at = 5
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "model")
    assert trained(tmp_path / "model", resume=True, held_out=OTHERS) == whole  # and they change nothing
    assert [bool(line["held_out_loss"]) for line in read_log(tmp_path / "model")] == [False, True, True]


# --- a model that has learned


TEXTS = ["A rolling stone gathers no moss.", "Still waters run deep in the valley.", "The quick brown fox jumps."]
CHATS = [
    [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small model."}],
    [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "Four."}],
]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of a model that knows its corpus by heart."""
    folder = tmp_path_factory.mktemp("learned") / "model"
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    settings = Settings(100, batch_size=4, sequence_length=48, learning_rate=0.01, warmup_steps=10, save_every=20)
    trained(folder, settings, TEXTS + CHATS, sizes=SIZES | sizes)
    return folder


def test_the_corpus_is_learned(learned):
    losses = [float(line["loss"]) for line in read_log(learned)]
    assert all(a > b for a, b in pairwise(losses))
    assert losses[-1] < 0.1 < 3 < losses[0]  # ln 320 = 5.8 nats at first
    model = load(learned, progress=False)
    for text in TEXTS:
        start = text.split(" ")[0]
        ids, _ = model.generate(model.tokenizer.encode(start))  # greedy, until it ends, says generation_config.json
        assert start + model.tokenizer.decode(ids) == text + "<|endoftext|>"
    for question, answer in CHATS:
        ids, _ = model.generate(model.tokenizer.encode(model.tokenizer.apply_chat_template([question])))
        assert model.tokenizer.decode(ids) == answer["content"] + "<|im_end|>"


def test_generate_and_chat_run_it(learned, capsys):
    main(["generate", "--model", str(learned), "Still"])
    assert capsys.readouterr().out == " waters run deep in the valley.\n"
    done = subprocess.run(
        [sys.executable, "-m", "qwen3np", "chat", "--model", str(learned)],
        **{"input": b"What is 2 + 2?\n", "capture_output": True, "check": False},
    )
    assert done.stdout == b"Four.\n"


@pytest.mark.oracle
def test_transformers_loads_it_unchanged(learned, monkeypatch, caplog):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            learned, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(learned)
        defaults = transformers.GenerationConfig.from_pretrained(learned)
    assert not any(info.values()), info
    assert caplog.text == ""
    ours = load(learned, progress=False)
    assert set(model.generation_config.eos_token_id) == set(ours.generation_defaults()["stop_ids"])
    assert (defaults.do_sample, defaults.max_new_tokens) == (False, 256)
    for prompt in [*TEXTS, "Who", "An unknown beginning"]:
        ids = tokenizer(prompt, return_tensors="pt")
        assert ids["input_ids"][0].tolist() == ours.tokenizer.encode(prompt)
        theirs = model.generate(**ids)[0, ids["input_ids"].shape[1] :].tolist()
        expected, _ = ours.generate(ours.tokenizer.encode(prompt), max_new_tokens=len(theirs))
        assert theirs == expected


# --- what cannot be done


@pytest.fixture
def refused(tmp_path):
    """Train in a way that cannot begin; return what the error says. No folder is left."""

    def refused(documents=DOCUMENTS, sizes=None, held_out=(), **settings):
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the tests look at what it says)
            train(
                documents,
                tmp_path / "model",
                SIZES | (sizes or {}),
                replace(SETTINGS, **settings),
                held_out=held_out,
                progress=False,
            )
        assert not (tmp_path / "model").exists()
        assert "\n" not in str(error.value)
        return str(error.value)

    return refused


QUESTION = [{"role": "user", "content": "no answer"}]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"documents": []}, "nothing to pack: 0 documents"),
        ({"documents": [QUESTION]}, "no token of the documents counts in the loss"),
        ({"held_out": [QUESTION]}, "no token of the documents counts in the loss"),
        ({"documents": ["lone \ud800"]}, "surrogate"),
        ({"sizes": {"num_attention_heads": 3, "num_key_value_heads": 2}}, "num_key_value_heads = 2"),
        ({"sizes": {"head_dim": 7}}, "head_dim = 7 is not supported; supported: even numbers"),
        ({"sizes": {"vocab_size": 281}}, "vocab_size=281 is too small"),
        ({"sizes": {"num_hidden_layers": 0}}, "num_hidden_layers = 0"),
        ({"steps": 0}, "steps = 0: it must be finite, and more than 0"),
        ({"batch_size": 0}, "batch_size = 0: it must be finite, and more than 0"),
        ({"sequence_length": 0}, "sequence_length = 0: it must be finite, and more than 0"),
        ({"save_every": 0}, "save_every = 0: it must be finite, and more than 0"),
        ({"warmup_steps": -1}, "warmup_steps = -1: it must be finite, and 0 or more"),
        ({"seed": -1}, "seed = -1: it must be finite, and 0 or more"),
        ({"learning_rate": -1e-3}, "learning_rate = -0.001: it must be finite, and more than 0"),
        ({"learning_rate": float("nan")}, "learning_rate = nan: it must be finite, and more than 0"),
        ({"learning_rate": float("inf")}, "learning_rate = inf: it must be finite, and more than 0"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1: it must be finite, and 0 or more"),
        ({"max_norm": 0.0}, "max_norm = 0.0: it must be finite, and more than 0"),
    ],
)
def test_what_cannot_begin_leaves_nothing(bad, message, refused):
    assert message in refused(**bad)


def test_a_start_that_is_stopped_leaves_nothing(monkeypatch, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(State, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.fixture
def stopped(computed, tmp_path):
    """The folder of a run whose last state is that of step 3."""
    computed[1].at = 5
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "model")
    computed[1].at = 0
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sizes": SIZES | {"hidden_size": 32}}, r"had other sizes: \{'hidden_size': 16\}"),
        ({"settings": replace(SETTINGS, sequence_length=32)}, r"had other sizes: \{'max_position_embeddings': 24\}"),
        ({"documents": OTHERS}, "had another corpus"),
        ({"held_out": [QUESTION]}, "no token of the documents counts in the loss"),
        ({"settings": replace(SETTINGS, steps=2)}, "is at step 3, beyond steps = 2"),
        ({"settings": replace(SETTINGS, seed=5, batch_size=3)}, r"other settings: \{'batch_size': 4, 'seed': 0\}"),
        ({"resume": False}, "exists; choose a new folder, or resume the run that was interrupted there"),
    ],
)
def test_another_training_does_not_go_on(changed, message, stopped, whole):
    with pytest.raises(ValueError, match=message):
        trained(stopped, **{"resume": True} | changed)
    assert trained(stopped, resume=True) == whole  # nothing is lost


@pytest.mark.parametrize("left", [0, 4, 1000])
def test_a_truncated_state_is_told(left, stopped):
    content = (stopped / STATE).read_bytes()
    (stopped / STATE).write_bytes(content[:left])
    with pytest.raises(ValueError, match=f"{STATE}: cannot be read: .*"):
        trained(stopped, resume=True)


@pytest.mark.parametrize("missing", ["metadata", "moments.1.model.norm.weight"])
def test_a_state_that_is_none_is_told(missing, stopped):
    with safetensors.safe_open(stopped / STATE, "np") as file:
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        metadata = file.metadata()
    tensors.pop(missing, None)
    safetensors.numpy.save_file(tensors, stopped / STATE, None if missing == "metadata" else metadata)
    with pytest.raises(ValueError, match=f"{STATE}: cannot be read: .*"):
        trained(stopped, resume=True)


def test_what_a_killed_start_left_is_no_obstacle(whole, tmp_path):
    (tmp_path / "model.part").mkdir()
    (tmp_path / "model.part" / "half").write_text("half")
    assert trained(tmp_path / "model") == whole
    assert not (tmp_path / "model" / "half").exists()
    assert not (tmp_path / "model.part").exists()


def test_there_must_be_a_training_to_resume(learned, tmp_path):
    before = {file.name: file.read_bytes() for file in learned.iterdir()}
    with pytest.raises(ValueError, match="so there is no training to resume"):
        trained(tmp_path / "nowhere", resume=True)
    with pytest.raises(ValueError, match="the interrupted run there had other sizes"):
        trained(learned, resume=True)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ValueError, match="exists; choose a new folder"):
        trained(learned)
    assert {file.name: file.read_bytes() for file in learned.iterdir()} == before


@pytest.mark.parametrize("save_every", [1, 3])
def test_a_loss_that_is_not_finite_leaves_a_state_to_go_on_from(save_every, recwarn, tmp_path):
    settings = replace(SETTINGS, save_every=save_every)
    too_high = replace(settings, learning_rate=1e15)
    message = r"^after step 1 the loss is .*nan.* keeps step 0: resume with a lower learning rate than 1000000000000000"
    with pytest.raises(ValueError, match=message):
        trained(tmp_path / "model", too_high)
    assert not recwarn.list  # the error says it all
    state = State.load(tmp_path / "model")
    assert all(np.isfinite(w).all() for w in state.weights.values())
    assert trained(tmp_path / "model", settings, resume=True) == trained(tmp_path / "other", settings)


def test_a_last_step_that_diverges_is_noticed(tmp_path):
    settings = replace(SETTINGS, steps=1, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(ValueError, match=r"^after step 1 the loss is .*nan; .* keeps step 0"):
        trained(tmp_path / "model", settings)
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_planted_weights_that_are_not_finite_are_told(stopped):
    state = State.load(stopped)
    state.weights["model.norm.weight"][3] = np.nan
    state.save(stopped)
    before = (stopped / STATE).read_bytes()
    with pytest.raises(ValueError, match=r"^after step 3 the loss is nan"):
        trained(stopped, resume=True)
    assert (stopped / STATE).read_bytes() == before


# --- the command


@pytest.fixture
def run(capsys):
    """Run a command and return its stdout; stderr is in run.stderr, the status in run.status."""

    def run(*arguments):
        run.status = 0
        try:
            main(arguments)
        except SystemExit as end:
            run.status = end.code
        out, run.stderr = capsys.readouterr()
        return out

    return run


def test_the_command_trains(run, whole, corpus, tmp_path):
    folder = tmp_path / "deep" / "model"
    assert run(*command(corpus, folder), "--held-out", str(corpus)) == ""
    assert run.status == 0
    assert run.stderr.endswith(
        f"[{folder}: trained; use it with --model; --resume with more --steps continues training]\n"
    )
    assert (folder / "model.safetensors").read_bytes() == whole
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in SIZES} == SIZES
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    assert config["eos_token_id"] == next(token["id"] for token in added if token["content"] == "<|im_end|>")
    assert (config["max_position_embeddings"], config["tie_word_embeddings"]) == (SETTINGS.sequence_length, True)


def test_the_flags_and_their_defaults(run, monkeypatch, corpus, tmp_path):
    given = []
    monkeypatch.setattr("qwen3np.commands.train.train", lambda *arguments, **named: given.append((arguments, named)))
    folder = tmp_path / "model"
    run("train", str(corpus), "--out", str(folder))
    assert given.pop() == ((DOCUMENTS, folder, loop.SIZES, Settings()), {"held_out": (), "resume": False, "base": None})
    settings = Settings(11, 12, 13, 0.14, 15, 0.16, 0.17, 18, 19)  # none is a default
    run(*command(corpus, folder, settings, "--resume", "--held-out", str(corpus)))
    assert given.pop() == ((DOCUMENTS, folder, SIZES, settings), {"held_out": DOCUMENTS, "resume": True, "base": None})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": "0"}, "steps = 0: it must be finite, and more than 0"),
        ({"steps": "1.5"}, "argument --steps: invalid int value: '1.5'; qwen3np train --help explains"),
        ({"learning_rate": "-1"}, "learning_rate = -1.0: it must be finite, and more than 0"),
        ({"learning_rate": "nan"}, "learning_rate = nan: it must be finite, and more than 0"),
        ({"vocab_size": "100"}, "vocab_size=100 is too small"),
        ({"head_dim": "5"}, "head_dim = 5 is not supported"),
        ({"num_attention_heads": "3", "num_key_value_heads": "2"}, "num_key_value_heads = 2 is not supported"),
    ],
)
def test_errors_are_one_line(changed, message, run, corpus, tmp_path):
    assert run(*command(corpus, tmp_path / "model", **changed)) == ""
    assert run.status == 2
    assert re.fullmatch(r"error: .*\n", run.stderr)
    assert message in run.stderr
    assert not (tmp_path / "model").exists()


def test_errors_of_a_corpus_are_one_line(run, tmp_path):
    corpora = {
        "empty.txt": (b"", "no document with any text"),
        "latin1.txt": (b"caf\xe9", "not UTF-8: byte 3 is 0xe9"),
        "question.jsonl": (json.dumps({"messages": QUESTION}).encode(), "no message of the assistant"),
        "broken.jsonl": (b"{", "line 1: not JSON"),
        "corpus.csv": (b"a,b", "a corpus is a .txt or .jsonl file"),
        "nowhere.txt": (None, "no such file or folder"),
    }
    for name, (content, message) in corpora.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert run(*command(tmp_path / name, tmp_path / "model")) == ""
        assert run.status == 2
        assert re.fullmatch(rf"error: .*{name}.*{message}.*\n", run.stderr)
        assert not (tmp_path / "model").exists()


def test_errors_of_a_resumed_run_are_one_line(run, stopped, whole, corpus):
    for changed, message in (
        ({}, "exists; choose a new folder"),
        ({"resume": True, "hidden_size": 32}, "had other sizes"),
        ({"resume": True, "learning_rate": 1e15}, "the loss is"),
    ):
        more = ["--resume"] if changed.pop("resume", False) else []
        assert run(*command(corpus, stopped, SETTINGS, *more, **changed)) == ""
        assert run.status == 2
        assert re.fullmatch(rf"(\[16 documents.*\]\n)?error: .*{message}.*\n", run.stderr)
    run(*command(corpus, stopped, SETTINGS, "--resume"))
    assert run.status == 0
    assert "trained" in run.stderr
    assert (stopped / "model.safetensors").read_bytes() == whole


def test_a_finished_run_goes_on_with_more_steps(whole, tmp_path, capsys):
    assert trained(tmp_path / "model") == whole
    assert trained(tmp_path / "model", resume=True) == whole  # nothing is left to do
    more = replace(SETTINGS, steps=SETTINGS.steps + 3)
    assert trained(tmp_path / "model", more, resume=True) != whole
    assert State.load(tmp_path / "model").step == more.steps
    assert load(tmp_path / "model", progress=False).generate([1], max_new_tokens=1)


def test_fine_tuning_starts_from_a_checkpoint(whole, tmp_path):
    trained(tmp_path / "model")
    base = load(tmp_path / "model", progress=False)
    before = {name: np.array(w, np.float32) for name, w in base.weights.items()}
    train(OTHERS, tmp_path / "tuned", {}, replace(SETTINGS, learning_rate=1e-9), progress=False, base=base)
    tuned = load(tmp_path / "tuned", progress=False)
    assert tuned.config == base.config
    assert tuned.text.encode("Ada has") == base.text.encode("Ada has")
    for name, w in tuned.weights.items():  # such a learning rate changes nothing that bfloat16 can hold
        np.testing.assert_array_equal(np.array(w, np.float32), before[name])
        np.testing.assert_array_equal(np.array(base.weights[name], np.float32), before[name])
    train(OTHERS, tmp_path / "more", {}, SETTINGS, progress=False, base=base)
    assert (tmp_path / "more" / "model.safetensors").read_bytes() != (
        tmp_path / "tuned" / "model.safetensors"
    ).read_bytes()


def test_sizes_that_are_left_out_are_those_of_the_built_in_checkpoint(tmp_path):
    small = {name: size for name, size in SIZES.items() if name != "num_hidden_layers"}
    train(DOCUMENTS, tmp_path / "model", small, SETTINGS, progress=False)
    assert load(tmp_path / "model", progress=False).config.num_hidden_layers == 4
    with pytest.raises(ValueError, match="sizes: 'layers' is none of vocab_size, hidden_size"):
        train(DOCUMENTS, tmp_path / "other", {"layers": 2}, SETTINGS)


def test_what_is_said_before_and_on_the_way(tmp_path, capsys):
    (tmp_path / "stories.txt").write_text(
        "\n\n".join(f"{name} has {n} apples." for n in range(40) for name in ("Ada", "Bo"))
    )
    main(command(tmp_path / "stories.txt", tmp_path / "m", replace(SETTINGS, steps=12)))
    err = capsys.readouterr().err
    assert "stories.txt is one document: lines of <|endoftext|> separate documents, blank and other" in err
    assert re.search(r"\[1 document, [\d,]+ tokens; [\d,]+ parameters; 12 steps of 96 tokens, about", err)
    assert re.search(r"\[about [\d.]+ (s|minutes|hours) to go\]", err)
    assert re.search(r"\[step 3, learning_rate .*, loss .*; of 12 steps\]", err)  # no terminal, so lines
    assert "--resume with more --steps continues training" in err
