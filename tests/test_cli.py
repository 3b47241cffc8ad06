"""The command line, driven as its users drive it: arguments, pipes, and a terminal."""

from __future__ import annotations

import io
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qwen3np import Config, forward, generate, init_weights, save_checkpoint
from qwen3np.cli import main
from qwen3np.files.hub import BUILTIN
from qwen3np.ops.fast.threads import num_threads

PROMPT = "The capital of France is"
NOISE = ("--temperature", "5", "--seed", "5")  # such an answer hardly ever ends on its own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shutil.copytree(BUILTIN, tmp_path_factory.mktemp("cli") / "a folder with ünïcode")


@pytest.fixture(scope="module")
def model(builtin):
    return builtin


@pytest.fixture(scope="module")
def endless(model):
    """Flags without which the greedy text could end: instead of the usual tokens, one that it never says ends it."""
    return "--set", f"stop_ids=[{model.tokenizer.token_to_id('<|video_pad|>')}]"


@pytest.fixture
def run(folder, capsys):
    """Run a command on the checkpoint and return its stdout; stderr is in run.stderr, the status in run.status."""

    def run(command, *arguments, model=folder):
        run.status = 0
        try:
            main([command, *arguments, *(["--model", str(model)] if model else [])])
        except SystemExit as end:
            run.status = end.code
        out, run.stderr = capsys.readouterr()
        return out

    return run


def new_ids(model, text, count, stops=("<|im_end|>", "<|endoftext|>"), **sampling):
    ids, stop_ids = model.tokenizer.encode(text), [model.tokenizer.token_to_id(stop) for stop in stops]
    return generate(model.weights, model.config, ids, max_new_tokens=count, stop_ids=stop_ids, **sampling)[0]


def process(*arguments, **options):
    # the C locale, and without the UTF-8 mode that Python would turn on
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    # and opening a text without an encoding warns
    environment |= {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "error::EncodingWarning"}
    return subprocess.run(
        [sys.executable, "-m", "qwen3np", *arguments], capture_output=True, env=environment, check=False, **options
    )


def test_generate_prints_the_greedy_text(run, model):
    out = run("generate", "--temperature", "0", "--max-new-tokens", "12", PROMPT)
    ids, new = model.tokenizer.encode(PROMPT), new_ids(model, PROMPT, 12)
    assert out == model.tokenizer.decode(new, skip_special_tokens=True) + "\n"
    counts = rf"\[prompt {len(ids)} tokens in .* s; answer {len(new)} tokens, .* tokens/s\]\n"
    assert re.fullmatch(counts, run.stderr)


def test_generate_samples(run, model):
    new = new_ids(model, PROMPT, 12, temperature=5.0, top_k=40, seed=5)
    out = run("generate", *NOISE, "--top-k", "40", "--max-new-tokens", "12", PROMPT)
    assert out == model.tokenizer.decode(new, skip_special_tokens=True) + "\n"


def test_generate_reads_stdin_and_files(run, monkeypatch, tmp_path):
    expected = run("generate", "--max-new-tokens", "6", PROMPT)
    (tmp_path / "prompt").write_text(PROMPT)
    assert run("generate", "--max-new-tokens", "6", "--file", str(tmp_path / "prompt")) == expected
    for given in (PROMPT, PROMPT + "\n"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
        assert run("generate", "--max-new-tokens", "6") == expected


@pytest.mark.parametrize("sampling", [(), NOISE])
def test_generate_several_prompts(run, sampling):
    prompts = [PROMPT, "One", "Two, three"]
    seeds = [("--set", f"seed=[5,{row}]") if sampling else () for row in range(3)]  # how to get one of them alone
    singles = [
        run("generate", "--max-new-tokens", "9", *sampling, *seed, prompt)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert run("generate", "--max-new-tokens", "9", *sampling, *prompts) == "".join(singles)


def test_generate_json(run, model, endless):
    flags = ("--json", "--top-logprobs", "3", "--max-new-tokens", "5", *endless)
    lines = run("generate", *flags, PROMPT, "Hi").splitlines()
    for line, prompt in zip(lines, (PROMPT, "Hi"), strict=True):
        result = json.loads(line)
        ids = model.tokenizer.encode(prompt)
        assert (result["prompt"], result["prompt_ids"], result["ids"]) == (prompt, ids, new_ids(model, prompt, 5, ()))
        logits = forward(model.weights, model.config, ids + result["ids"][:-1], numerics="float64")[0]
        for row, token, logprob, top in zip(
            logits[len(ids) - 1 :], result["ids"], result["logprobs"], result["top_logprobs"], strict=True
        ):
            expected = row - math.log(np.exp(row).sum())
            assert logprob == pytest.approx(expected[token], abs=1e-4)  # float32 logits of size 15; measured: 1e-5
            assert [entry["id"] for entry in top] == np.argsort(-expected)[:3].tolist()
            assert top[0]["logprob"] == logprob  # greedy
        assert result["finish_reason"] == "length"
        assert result["timings"].keys() == {"load_seconds", "prompt_seconds", "generation_seconds"}


def test_generate_stops_before_a_stop_string(run, endless):
    stop = "nce is P"  # three tokens or more, the first and the last of them in part
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    arguments = ("generate", *endless, "--max-new-tokens", "60", prompt)
    text = run(*arguments)
    assert text.startswith("The capital of France is Paris.")
    assert "<|im_end|>" not in text  # which comes next, but is not text
    assert "answer 60 tokens" in run.stderr
    assert "cut at --max-new-tokens" in run.stderr
    assert run(*arguments, "--stop", stop) == "The capital of Fra\n"
    count = int(re.search(r"answer (\d+) tokens", run.stderr)[1])
    assert count < 20  # and it ended there
    result = json.loads(run(*arguments, "--stop", stop, "--json"))
    assert (result["text"], result["finish_reason"]) == ("The capital of Fra", "stop")


def test_generate_chat_applies_the_template(run):
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    expected = run("generate", "--max-new-tokens", "8", text)
    arguments = ("generate", "--chat", "--system", "Be brief.", "--max-new-tokens", "8", "Hi")
    assert run(*arguments) == expected
    assert json.loads(run(*arguments, "--json"))["prompt"] == text


def test_score(run, model, tmp_path):
    text = "Colourless green ideas sleep — furiously. " * 3
    (tmp_path / "text").write_text(text, encoding="utf-8")
    ids = model.tokenizer.encode(text)
    logits = forward(model.weights, model.config, ids, numerics="float64")[0, :-1]
    logprobs = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]
    result = json.loads(run("score", "--json", str(tmp_path / "text")))
    assert result["logprobs"][0] is None
    np.testing.assert_allclose(result["logprobs"][1:], logprobs, atol=1e-4)  # float32; measured: 1e-5
    assert result["perplexity"] == pytest.approx(math.exp(-logprobs.mean()), rel=1e-5)
    out = run("score", str(tmp_path / "text"), "--window", "40", "--stride", "10")
    assert "40 tokens, every 10" in out


def test_info(run, model):
    out = run("info")
    unique = sum(tensor.size for tensor in model.weights.values())
    assert f"{unique:,} unique" in out
    assert f"{2 * 4 * 2 * 64 * 1000 * 4:,} bytes per 1,000 positions in float32" in out  # k and v, L, K, Dh
    assert "bfloat16" in out


def test_info_of_every_official_config(run, data):
    published = json.loads((data / "param_counts.json").read_text())
    for name, counts in published.items():
        out = run("info", "--positions", "4096", model=data / "checkpoints" / name)
        config = json.loads((data / "checkpoints" / name / "config.json").read_text())
        unique = counts["total_params"]
        cache = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 4096
        assert f"{unique:,} unique" in out
        assert f"{counts['non_embedding']:,}" in out
        assert f"on disk          {2 * unique:,} bytes in bfloat16 (no weights in this folder)" in out
        assert f"{4 * cache:,} bytes per 4,096 positions in float32" in out
        mapped, copied = (2 * unique + 4 * cache) / 1e9, 4 * (unique + cache) / 1e9
        assert f"{mapped:,.1f} GB with the file mapped and this cache, {copied:,.1f} with a float32 copy" in out
        assert re.search(r"this machine +(does not fit|fits) into [\d.]+ GB of free memory", out)
        assert ("128 of size" in out) == ("num_experts" in config)


def test_info_says_what_fits(run, model, monkeypatch):
    unique, cache = sum(tensor.size for tensor in model.weights.values()), 4 * 2 * 4 * 2 * 64 * 1000
    mapped, copied = sum(file.stat().st_size for file in BUILTIN.glob("*.safetensors")) + cache, 4 * unique + cache
    for free, said in (
        (copied, "fits into 0.0 GB of free memory, mapped or copied\n"),
        (copied - 1, "fits into 0.0 GB of free memory, mapped\n"),
        (mapped, "fits into 0.0 GB of free memory, mapped\n"),
        (mapped - 1, "does not fit into 0.0 GB of free memory: weights would be read from disk repeatedly\n"),
        (0, "free memory is unknown\n"),
    ):
        monkeypatch.setattr("qwen3np.commands.info.available_memory", lambda free=free: free)
        assert run("info").endswith(f"this machine     {said}")


def test_rope_scaling(run, model, endless):
    flags = ("generate", "--max-new-tokens", "5", *endless, PROMPT)
    ids, config = model.tokenizer.encode(PROMPT), model.config.extended(4)
    new = generate(model.weights, config, ids, max_new_tokens=5)[0]
    assert run(*flags, "--rope-scaling", "yarn:4") == model.tokenizer.decode(new, skip_special_tokens=True) + "\n"
    out = run("info", "--rope-scaling", "yarn:4")
    assert "1,024 positions" in out
    assert "factor 4 over 256 positions" in out
    for wrong, message in (
        ("linear:2", "type 'linear' is not supported; supported: yarn:FACTOR"),
        ("yarn", "no factor; example: yarn:4"),
        ("yarn:x", "'x' is not a number"),
        ("yarn:0.5", "rope_scaling.factor = 0.5 is not supported; supported: finite numbers from 1"),
        ("yarn:nan", "rope_scaling.factor = NaN"),
    ):
        assert run("info", "--rope-scaling", wrong) == ""
        assert (run.status, run.stderr.count("\n")) == (2, 1)
        assert message in run.stderr


def test_bench(run, model):
    result = json.loads(run("bench", "--json", "--weights-dtype", "bfloat16"))
    assert result["weights_dtype"] == "bfloat16"
    rates = result["prefill_tokens_per_second"] | result["decode_ms_per_token"]
    assert list(rates) == ["256", "32", "255"]  # the context of 256 is too short for 512
    assert all(figure > 0 for figure in (result["load_seconds"], *rates.values()))
    assert result["memory"]["peak_bytes"] > sum(tensor.nbytes for tensor in model.weights.values())
    assert all(line.startswith("[measuring") for line in run.stderr.splitlines())
    out = run("bench", "--weights-dtype", "float32")
    pattern = (
        r"weights +float32, .* MB\nload +[\d.]+ s\nprefill of 256 +[\d,.]+ tokens/s\n"
        r"(decode at (32|255) +[\d,.]+ ms/token, [\d,.]+ tokens/s\n){2}(memory, .* MB\n)+machine .* threads; .*\n"
    )
    assert re.fullmatch(pattern, out)
    assert f"NumPy {np.__version__}" in out


def test_threads(run, monkeypatch):
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", "1")  # put back at the end
    expected = run("generate", "--max-new-tokens", "5", PROMPT)
    assert num_threads() == 1
    assert run("generate", "--threads", "3", "--max-new-tokens", "5", PROMPT) == expected
    assert num_threads() == 3


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5", ""])
@pytest.mark.parametrize("command", ["generate", "chat", "score", "embed", "rerank", "bench"])
def test_errors_of_threads(run, command, count, monkeypatch):
    monkeypatch.setenv("QWEN3NP_NUM_THREADS", "1")
    assert run(command, f"--threads={count}", *["-"] * (command in ("score", "rerank"))) == ""
    assert run.status == 2
    assert re.fullmatch(rf"error: --threads={count!r} is not a whole number from 1\n", run.stderr)
    assert num_threads() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--top-p", "1.5", "x"), "top_p must be a number in (0, 1], got 1.5"),
        (("generate", "--temperature", "-1", "x"), "temperature must be a finite number >= 0 (0 is greedy), got -1.0"),
        (("generate", "--file", "nowhere", "x"), "both a prompt and --file are given; use one of them"),
        (("generate", "--file", "nowhere"), "No such file or directory"),
        (("generate", "--think", "on", "x"), "--system, --think, --hide-thinking and --tools need --chat"),
        (("generate", ""), "input_ids: empty; a prompt needs at least one token"),
        (("generate", "--stop", "", "x"), "stop strings must not be empty"),
        (("generate", "--seed", "-1", "x"), "seed must be a whole number >= 0, or several, got -1"),
        (("generate", "--top-logprobs", "2", "x"), "--top-logprobs 2 must be 0 or more, and needs --json"),
        (("generate", "--top-logprobs", "-1", "--json", "x"), "--top-logprobs -1 must be 0 or more"),
        (("generate", "7" * 300), "prompt 0 has 300 tokens; the context of this model is 256"),
        (("score", "nowhere"), "No such file or directory"),
        (("embed", "--file", "nowhere"), "No such file or directory"),
        (("embed", "--file", "nowhere", "x"), "both a text and --file are given; use one of them"),
        (("embed", "--dimensions", "0", "x"), "--dimensions 0 must be at least 1"),
        (("embed", "--out", "x.csv", "x"), "--out x.csv: the name must end with one of .npy, .npz, .jsonl"),
        (("embed", "--out", "no/x.npy", "x"), f"--out {Path('no/x.npy')}: no such folder: no"),
        (
            ("embed", "x", "7" * 300),
            "texts[1]: 301 tokens including the template; the context of this model is 256",
        ),
        (("trace", "x", "-o", "no\x1b[2J/x.safetensors"), r"there is no folder no\x1b[2J"),
        (("rerank", "q", "x"), "rerank: the tokenizer has no token no, yes; load a model that was trained for this"),
    ],
)
def test_errors_are_one_line(run, arguments, message):
    assert run(*arguments) == ""
    assert run.status == 2
    assert re.fullmatch(r"error: .*\n", run.stderr)
    assert message in run.stderr


@pytest.mark.parametrize(
    "arguments",
    [("generate", "--max-new-tokens", "abc"), ("score",), ("nothing",), ("embed", "x"), ("rerank", "q", "x")],
)
def test_errors_of_arguments_are_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert re.fullmatch(r"error: .*; qwen3np.* --help explains\n", capsys.readouterr().err)


def test_errors_of_checkpoints(run, folder, tmp_path):
    assert run("generate", "x", model=tmp_path / "nowhere") == ""
    assert (run.status, run.stderr.count("\n")) == (2, 1)
    (tmp_path / "model.safetensors").write_bytes(b"")
    run("info", model=tmp_path)
    assert "config.json: no such file" in run.stderr
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    run("info", model=tmp_path)
    assert "truncated" in run.stderr
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    run("generate", "x", model=tmp_path)
    assert "no tokenizer.json" in run.stderr
    shutil.copy(folder / "tokenizer.json", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    small = Config.from_dict(config | {"vocab_size": 200, "eos_token_id": 0})
    save_checkpoint(tmp_path / "small", small, init_weights(small, 0))
    shutil.copy(folder / "tokenizer.json", tmp_path / "small")
    run("generate", "x", model=tmp_path / "small")
    assert "the tokenizer has 2048 entries, the model's vocabulary 200: they do not belong together" in run.stderr
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    run("generate", "--file", str(tmp_path / "latin1"))
    assert "not UTF-8: unexpected end of data at byte 3" in run.stderr


def test_only_what_a_command_needs_is_imported(folder):
    def imported(*arguments):
        code = """if True:
            import atexit, sys
            from qwen3np.cli import main
            atexit.register(lambda: print(*sys.modules, file=sys.stderr))
            main(sys.argv[1:])"""
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        return set(done.stderr.split())

    found = imported("info", "--model", str(folder))
    assert "qwen3np.commands.info" in found
    assert not found & {"tokenizers", "jinja2", "huggingface_hub", "tqdm", "threadpoolctl"}
    found |= imported("generate", "--model", str(folder), "--max-new-tokens", "1", PROMPT)
    assert {"tokenizers", "qwen3np.commands.generate"} <= found
    assert not found & {"jinja2", "huggingface_hub", "qwen3np.training", "qwen3np.commands.bench"}


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    files = (Path(sys.modules["qwen3np"].__file__).parent / "commands").glob("[a-z]*.py")
    assert {line.split()[0] for line in lines if re.match(r"    \w", line)} == {file.stem for file in files}


def test_ctrl_c_while_a_command_is_imported(monkeypatch, capsys):
    monkeypatch.setattr("qwen3np.cli.import_module", lambda name: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        main(["generate", PROMPT])
    assert end.value.code == 130
    assert capsys.readouterr() == ("", "\n")


def test_utf8_whatever_the_locale(folder, model):
    arguments = ("generate", "--model", str(folder), "--max-new-tokens", "200", *NOISE)
    done = process(*arguments, "Wörld ∑ 🎉")
    assert done.returncode == 0, done.stderr
    new = new_ids(model, "Wörld ∑ 🎉", 200, temperature=5.0, seed=5)
    expected = model.tokenizer.decode(new, skip_special_tokens=True)
    assert done.stdout.decode() == expected + "\n"
    assert not expected.isascii()  # the bytes of no character, among others
    assert process(*arguments, input="Wörld ∑ 🎉".encode()).stdout == done.stdout


def test_chat_from_a_pipe(folder, tmp_path):
    saved = tmp_path / "saved.json"
    lines = ["Hello", "/think sideways"]
    done = process("chat", "--lines", "--model", str(folder), "--max-new-tokens", "5", input="\n".join(lines).encode())
    assert done.returncode == 2
    assert b"/think needs on or off" in done.stderr
    lines = ["/system Be brief.", "Hello", "Again", f"/save {saved}", "/reset", f"/load {saved}", "More", ""]
    done = process(
        *("chat", "--lines", "--model", str(folder), "--max-new-tokens", "5", "--temperature", "0"),
        input="\n".join(lines).encode(),
    )
    assert done.returncode == 0, done.stderr
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert done.stderr.decode().count("context") == 3
    assert b"Loaded 5 messages." in done.stderr
    assert b"\x1b" not in done.stdout
    saved.write_text("{}")
    done = process("chat", "--lines", "--model", str(folder), input=f"/load {saved}\n".encode())
    assert b"must hold a list of messages" in done.stderr
    # without --lines all of it is one message, whatever it begins with
    done = process("chat", "--model", str(folder), "--max-new-tokens", "5", input=b"/reset\nis what?\n")
    assert (done.returncode, done.stderr.count(b"context")) == (0, 1)


def test_files_of_messages_and_tools(run, tmp_path, model):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "The capital of"}]
    (tmp_path / "m.json").write_text(json.dumps(messages))
    (tmp_path / "t.json").write_text(json.dumps([{"type": "function", "function": {"name": "add"}}]))
    result = json.loads(run("generate", "--json", "--messages", str(tmp_path / "m.json")))
    template = model.tokenizer.apply_chat_template
    assert result["prompt"] == template(messages, continue_final_message=True)
    more = ("--messages", str(tmp_path / "m.json"), "--system", "Be short.")
    result = json.loads(run("generate", "--json", *more, "And?"))
    system, asked = {"role": "system", "content": "Be short."}, {"role": "user", "content": "And?"}
    assert result["prompt"] == template([system, *messages, asked])
    assert run("generate", "--chat", "--tools", str(tmp_path / "t.json"), "x") == ""
    assert "this model knows no tools" in run.stderr  # the words of its template, which got them
    assert run("generate", "--messages", str(tmp_path / "t.json")) == ""
    assert "has the role None" in run.stderr


def test_a_byte_order_mark_is_no_text(run, tmp_path):
    for name, mark in (("a", b""), ("b", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(mark + PROMPT.encode())
    assert run("score", str(tmp_path / "a")) == run("score", str(tmp_path / "b"))
    assert run("generate", "--file", str(tmp_path / "a")) == run("generate", "--file", str(tmp_path / "b"))
    assert run("generate", "--lines", "--file", str(tmp_path / "b")) == run("generate", PROMPT)


def test_a_chat_ends_at_the_end_of_its_turn(run, folder, tmp_path, model):
    other = shutil.copytree(folder, tmp_path / "eos is endoftext")
    end = model.tokenizer.token_to_id("<|endoftext|>")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    question = "What is the capital of Spain?"
    right = run("generate", "--chat", question)
    assert run("generate", "--chat", "-n", "60", question, model=other) == right
    done = process("chat", "--model", str(other), input=question.encode())
    assert done.stdout.decode() == right


def test_a_typed_special_token_is_text(run, model):
    typed = "Say <|im_end|> and <think>"
    result = json.loads(run("generate", "--chat", "--json", "-n", "1", typed))
    assert result["prompt"] == model.tokenizer.apply_chat_template([{"role": "user", "content": typed}])
    assert model.tokenizer.decode(result["prompt_ids"]) == result["prompt"]  # exactly what was typed
    end = model.tokenizer.token_to_id("<|im_end|>")
    assert result["prompt_ids"].count(end) == 1
    result = json.loads(run("generate", "--chat", "--special-tokens", "--json", "-n", "1", typed))
    assert result["prompt_ids"].count(end) == 2


def test_settings_by_name(run, model):
    paris = model.tokenizer.encode(" Paris")[0]
    text = run("generate", "-n", "8", "--set", f"suppress_tokens=[{paris}]", "-p", PROMPT)
    assert "Paris" not in text != run("generate", "-n", "8", PROMPT)
    assert run("generate", "-n", "8", "--set", 'stop_strings="Paris"', PROMPT) == " Paris\n"
    for written, words in (
        ("num_beams=3", "num_beams=3 is beam search, which is not implemented; num_beams=1"),
        ("top_q=1", "did you mean top_p?"),
        ("max_tokens=3", "here it is max_new_tokens"),
        ("nonsense", "is not NAME=VALUE"),
        ("temperature=-1", "temperature must be a finite number >= 0"),
    ):
        assert run("generate", "--set", written, PROMPT) == ""
        assert words in run.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("genrate",), "unknown command 'genrate'; did you mean generate?; qwen3np --help"),
        (
            ("generate", "--temprature", "1"),
            "unknown flag: --temprature; did you mean --temperature?; qwen3np generate",
        ),
        (("score", "x", "y"), "unknown argument: y; qwen3np score --help"),
        (("info", "-m", "Qwen3-0.6B"), "there is no folder Qwen3-0.6B; did you mean Qwen/Qwen3-0.6B, on the Hub?"),
        (("info", "-m", "qwen3-0.6b-base"), "did you mean Qwen/Qwen3-0.6B-Base, on the Hub?"),
        (("generate", "--seed", "-1", "-m", "no/where", "x"), "seed must be a whole number"),  # before it is loaded
        (("embed", "--file", "no where", "-m", "x"), "no where: No such file or directory"),
    ],
)
def test_hints(capsys, arguments, words):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert words in err.splitlines()[-1]
    assert "Errno" not in err


def test_without_arguments_the_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(())
    assert end.value.code == 0
    assert "continue a text" in capsys.readouterr().out


def test_info_as_json(run, model):
    found = json.loads(run("info", "--json"))
    assert Config.from_dict(found["config"]) == model.config
    assert found["cache_bytes"]["float32"] == 4 * 2 * 4 * 2 * 64 * 1000  # keys and values, L, K, Dh, positions


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as end:
        main(("--print-completion", shell))
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "--max-new-tokens" in out
    assert "rerank" in out


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_chat_in_a_terminal_survives_ctrl_c(folder, tmp_path):
    import pty

    endless = shutil.copytree(folder, tmp_path / "endless")
    (endless / "generation_config.json").write_text('{"eos_token_id": []}')
    config = json.loads((endless / "config.json").read_text())
    (endless / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32768}))
    parent, child = pty.openpty()
    chat = subprocess.Popen(
        [sys.executable, "-m", "qwen3np", "chat", "--model", str(endless), "--max-new-tokens", "20000", *NOISE],
        **{"stdin": child, "stdout": child, "stderr": child, "start_new_session": True},
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )
    os.close(child)
    seen = b""

    def until(pattern):
        nonlocal seen
        deadline = time.monotonic() + 60
        while not (found := re.search(pattern, seen)):
            assert time.monotonic() < deadline, seen
            if select.select([parent], [], [], 1)[0]:
                seen += os.read(parent, 65536)
        seen = seen[found.end() :]

    until(b"> ")
    os.write(parent, b"Hello\n")
    until(b"(?s)Hello\r\n.{200}")  # in the middle of an answer, after the bar that came before it
    os.write(parent, b"\x03")
    until(rb"\[\d+ tokens, first after [\d.]+ s, then [\d.]+ tokens/s; context \d+ of 32768\]")
    until(b"> ")
    os.write(parent, b"/reset\n")
    until(b"(?s)forgotten.*> ")
    time.sleep(0.5)  # a Ctrl-C between the prompt and readline's first look at the keyboard waits for the next key
    os.write(parent, b"\x03")
    until(b"(?s)Ctrl-D leaves.*> ")
    os.write(parent, b"\x04")
    assert chat.wait(30) == 0
    os.close(parent)


def test_a_reader_who_has_seen_enough_is_no_error(folder):
    command = f'"{sys.executable}" -m qwen3np generate --model "{folder}" {" ".join(NOISE)} x | head -c 1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert b"Traceback" not in done.stderr
    assert b"error" not in done.stderr


def test_rope_scaling_of_recordings(run, tmp_path):
    """Trace records the extended model, and compare takes its weights only with the same flag."""
    golden, flags = str(tmp_path / "golden.safetensors"), ("--rope-scaling", "yarn:4")
    run("trace", "--ids", "1,2,3", *flags, "-o", golden)
    model = str(BUILTIN)
    assert "equal in every bit" in run("compare", golden, golden, "--model", model, *flags)
    run("compare", golden, golden, "--model", model)
    assert run.status == 2
    assert "its config differs from" in run.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_is_shown_what_a_pipe_gets_raw():
    import pty

    said = "\x1b]0;title\x07\x1b[2J"
    code = (
        "import sys, qwen3np.terminal as t\n"
        f"with t.guarded():\n    print({said!r} + 'x')\n    sys.stdout.writelines([{said!r}])"
    )
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=theirs, check=True)
    os.close(theirs)
    seen = os.read(ours, 10_000).decode().replace("\r\n", "\n")
    os.close(ours)
    assert seen == r"\x1b]0;title\x07\x1b[2J" + "x\n" + r"\x1b]0;title\x07\x1b[2J"
    piped = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout
    assert piped.decode().replace("\r\n", "\n") == f"{said}x\n{said}"


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_ctrl_c_while_all_is_imported_gives_no_traceback(tmp_path):
    # in the place of a package that is imported on the way
    (tmp_path / "ml_dtypes.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    for arguments, status, traceback in (
        (["-m", "qwen3np"], -signal.SIGINT, False),
        (["-c", "import qwen3np"], None, True),
    ):
        done = subprocess.run([sys.executable, *arguments], env=environment, stderr=subprocess.PIPE)
        assert (b"Traceback" in done.stderr) == traceback  # a program that imports the package gets its exception
        assert status in (None, done.returncode)
