"""The guide's glue, as it stands there: hooks, a dumper for llama.cpp, raw C files; and what programs print."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawing import draw_ids, trained_like
from foreign import Foreign
from foreign_bugs import BUGS
from safetensors.numpy import save_file

from qwen3np import load
from qwen3np.cli import main
from qwen3np.files.gguf_writer import write_gguf
from qwen3np.numerics import BFLOAT16
from qwen3np.porting import Recording, compare, read_dump, record
from qwen3np.porting.diagnose import diagnose
from qwen3np.porting.fixture import CONFIGS, TEXT

PORTING = Path(__file__).parents[1] / "qwen3np" / "porting"
GUIDE = (PORTING / "README.md").read_text(encoding="utf-8")
PROMPT = 12


def snippet(start):
    """Return the code block of the guide that begins so."""
    return next(code for code in re.findall(r"^```\w*\n(.*?)^```", GUIDE, re.M | re.S) if code.startswith(start))


def compiler(*names):
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip("no compiler here")
    return found


@pytest.fixture(scope="module")
def weights(config):
    return {name: w.astype(BFLOAT16) for name, w in trained_like(config, 0).items()}


@pytest.fixture(scope="module")
def golden(config, weights):
    return record(weights, config, draw_ids(np.random.default_rng(0), config, 1, PROMPT), steps=1)


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_hooks(config, weights, golden, tmp_path, monkeypatch, capsys, dtype):
    oracle = pytest.importorskip("oracle", reason="needs the extra: pip install qwen3np[oracle]")
    monkeypatch.chdir(tmp_path)
    golden.save(tmp_path / "golden.safetensors")
    names = {
        "model": oracle.model_of(config, weights, dtype).requires_grad_(False),
        "input_ids": oracle.torch.from_numpy(golden.ids[:, :PROMPT]),
    }
    exec(snippet("dump = {}\n\n\ndef kept"), names)
    assert f"{dtype} rounding only; 27 of 82" in capsys.readouterr().out  # modules make no scores


def test_jax_dictionary(golden, tmp_path, monkeypatch):
    """The guide's function with points in a dictionary, compiled: here no more than an embedding and a norm."""
    jax = pytest.importorskip("jax")
    monkeypatch.chdir(tmp_path)
    x = golden.points["model.embed_tokens"][0]
    params = {"embed": jax.numpy.asarray(x), "norm": jax.numpy.ones(x.shape[1])}
    exec(
        snippet("@jax.jit"), {"jax": jax, "jnp": jax.numpy, "np": np, "params": params, "ids": np.arange(len(x))[None]}
    )
    dump, _ = read_dump(tmp_path / "mine.npz")
    assert compare(golden, {"model.embed_tokens": dump["model.embed_tokens"]}).verdict == "equal"
    assert dump["model.norm"].shape == (1, *x.shape)
    assert compare(golden, {name: jax.numpy.asarray(x) for name, x in golden.points.items()}).verdict == "equal"


def test_mlx_modules(golden, tmp_path, monkeypatch):
    """The guide's wrapping of modules: an embedding that is a module of a module."""
    mlx = pytest.importorskip("mlx.core")
    from mlx import nn

    monkeypatch.chdir(tmp_path)
    x = golden.points["model.embed_tokens"][0]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(*x.shape)
            self.embed_tokens.weight = mlx.array(x)

        def __call__(self, ids):
            return self.embed_tokens(ids)

    outer = nn.Module()
    outer.model = Model()
    ids = mlx.arange(len(x))[None]
    exec(snippet("dump = {}\n\n\ndef watched"), {"model": outer, "np": np, "run": lambda: outer.model(ids)})
    dump, _ = read_dump(tmp_path / "mine.npz")
    assert compare(golden, {"embed_tokens": dump["model.embed_tokens"]}).verdict == "equal"
    short = {name: mlx.array(x).astype(mlx.bfloat16) for name, x in golden.points.items()}
    assert compare(golden, short).precision == "bfloat16"


def test_llama_cpp_dumper(tmp_path):
    """Against a stub of llama.h: float32 and int32 tensors, views with strides, decode steps."""
    cxx = compiler("c++", "g++", "clang++")
    for name in ("llama.h", "ggml.h", "ggml-backend.h"):
        shutil.copy(Path(__file__).with_name("llama_stub.h"), tmp_path / name)
    strict = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
    source = PORTING / "example" / "llama_dump.cpp"
    subprocess.run([cxx, *strict, "-I", tmp_path, source, "-o", tmp_path / "dump"], check=True)
    (tmp_path / "mine").mkdir()
    subprocess.run([tmp_path / "dump", "model.gguf", tmp_path / "mine", "3", *"78956"], check=True)
    dump, _ = read_dump(tmp_path / "mine")
    expected = {
        "l_out-0": [[7.5, 0], [8.5, 1], [9.5, 2]],
        "ffn_moe_topk-0": [[0, 1], [10, 11], [20, 21]],
        "decode.0.l_out-0": [5.5, 3],
        "decode.0.ffn_moe_topk-0": [30, 31],
        "decode.1.l_out-0": [6.5, 4],
        "decode.1.ffn_moe_topk-0": [40, 41],
    }
    assert {name: x.tolist() for name, x in dump.items()} == expected


def test_raw_files_of_a_c_program(golden, tmp_path, monkeypatch):
    """One fwrite for each point, and the guide's three lines that add NumPy's header."""
    cc = compiler("cc", "gcc", "clang")
    monkeypatch.chdir(tmp_path)
    numbers = ", ".join(f"{x!r}f" for x in golden.points["model.norm"].ravel().tolist())
    call = snippet("FILE *file")
    code = (
        f"#include <stdio.h>\nstatic float x[] = {{{numbers}}};\nint main(void) {{ size_t n = sizeof x / sizeof *x;\n"
    )
    (tmp_path / "port.c").write_text(f"{code}{call}return 0; }}\n")
    subprocess.run([cc, "-std=c99", "-Wall", "-Werror", "port.c", "-o", "port"], check=True)
    subprocess.run(["./port"], check=True)
    (tmp_path / "mine").mkdir()
    exec(snippet("import numpy as np\n\nnp.save").replace("256, 40", f"{PROMPT}, {golden.config.hidden_size}"))
    assert compare(golden, read_dump(tmp_path / "mine")[0]).verdict == "equal"


# --- what llama-eval-callback prints ----------------------------------------------------------------------------------


def printed(name, x, made="MUL_MAT", source="x"):
    """Print a tensor as llama.cpp's common/debug.cpp does: x in NumPy's order, three numbers from each end."""
    shape = [*x.shape[::-1], 1, 1, 1][:4]
    lines = [
        f"common_debug_cb_eval: {name:>24} = (f32) {made:>10}({source}{{1, 1, 1, 1}}, }}) = {{{str(shape)[1:-1]}}}"
    ]

    def some(n):
        return [*range(3), None, *range(n - 3, n)] if n > 6 else list(range(n))

    x = x.reshape(shape[::-1])
    for a in x:
        lines.append("    [")
        for i in some(len(a)):
            lines.append("        [" if i is not None else "        ..., ")
            for j in some(a.shape[1]) if i is not None else []:
                row = [] if j is None else [f"{a[i, j, k]:12.4f}" if k is not None else None for k in some(a.shape[2])]
                text = ", ".join("  ..." if v is None else v for v in row)
                lines.append("            ..., " if j is None else f"            [{text}  ],")
            lines.append("        ],")
        lines += ["    ]", f"    sum = {np.add.accumulate(a.ravel(), dtype=np.float32)[-1]:f}"]
    return "\n".join(lines) + "\n"


def transcript(dump, count):
    """What llama-eval-callback prints of a prompt: of the last layer no more than the last position."""
    text = printed("embd", dump["model.embed_tokens"][0], "GET_ROWS", "token_embd.weight")
    for i in range(count):
        at = f"model.layers.{i}"
        cut = slice(-1, None) if i == count - 1 else slice(None)
        text += printed(f"norm-{i}", dump[f"{at}.input_layernorm"][0] * 2, "RMS_NORM")
        text += printed(f"attn_norm-{i}", dump[f"{at}.input_layernorm"][0], "MUL")
        text += printed(f"Qcur-{i}", dump[f"{at}.self_attn.q_proj"][0])
        text += printed(f"Qcur-{i} (view)", dump[f"{at}.self_attn.q_proj"][0])
        text += printed(f"Qcur-{i}", np.swapaxes(dump[f"{at}.self_attn.q_rope"][0], 0, 1), "ROPE")
        text += printed(f"kqv_out-{i}", dump[f"{at}.self_attn.context"][0], "CONT")
        for name, point in (("ffn_inp", "attn_residual"), ("ffn_swiglu", "mlp.act"), ("l_out", "")):
            text += printed(f"{name}-{i}", dump[f"{at}.{point}".rstrip(".")][0, cut])
    return text + printed("result_output", dump["lm_head"][0, -1:])


def test_what_llama_eval_callback_prints(config, weights, golden, tmp_path):
    path = tmp_path / "printed.txt"
    right = Foreign(config, weights)
    path.write_text(transcript(right.run(golden), config.num_hidden_layers))
    for some in (weights, None):
        found = compare(golden, read_dump(path)[0], weights=some)
        assert found.meaning.startswith("float32 rounding only, as far as what was printed shows; 14 of 82")
        assert not found.unknown
        assert {r.name for r in found.points} >= {"model.layers.0.self_attn.q_rope", "model.layers.1", "lm_head"}
    for bug, first in (
        ("scores capped", "model.layers.0.self_attn.context"),
        ("relu", "model.layers.0.mlp.act"),
        ("positions doubled", "model.layers.0.self_attn.q_rope"),
        ("mean of absolutes", "model.layers.0.input_layernorm"),
    ):
        path.write_text(transcript(Foreign(config, weights, **BUGS[bug][0]).run(golden), config.num_hidden_layers))
        found = diagnose(golden, read_dump(path)[0], weights=weights)
        assert found.first_point == first
        assert not any(cause.sure for cause in found.causes)
    wrong = Foreign(replace(config, rope_theta=1e4), weights).run(golden)
    path.write_text(transcript(wrong, config.num_hidden_layers))
    best = diagnose(golden, read_dump(path)[0], weights=weights).causes[0]
    assert (best.name, best.sure) == ("rotary: rope_theta is 10,000", True)


def test_sums_alone(config, weights, golden):
    right = Foreign(config, weights).run(golden)
    right = {name: x for name, x in right.items() if not name.endswith("scores")}
    sums = {f"{name}.sum": float(x.sum(dtype=np.float64)) for name, x in right.items()}
    found = compare(golden, sums)
    assert found.verdict == "rounding", found.meaning
    sums["model.layers.0.mlp.act.sum"] *= 1.01
    assert compare(golden, sums).first_point == "model.layers.0.mlp.act"


# --- the kit for other programs ---------------------------------------------------------------------------------------


def test_kit_for_llama_cpp(kit):
    """The text of the prompt gives its ids by the tokenizer, and the GGUF holds the same model."""
    tokenizers = pytest.importorskip("tokenizers")
    for name, config in CONFIGS.items():
        folder = kit / name
        ids = json.loads((folder / "values" / "ids.json").read_text())
        text = (folder / "values" / "prompt.txt").read_bytes().decode()
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert tokenizer.encode(text).ids == ids["prompt"]
        assert tokenizer.decode(ids["prompt"]) == text
        assert tokenizer.get_vocab_size() == config.vocab_size >= len(TEXT)
        model = load(folder / "model.gguf", progress=False)
        golden = Recording.load(folder / "values" / "golden.safetensors")
        mine = model.forward(golden.ids)
        assert compare(golden, {"lm_head": mine[:, : len(ids["prompt"])]}).verdict in ("equal", "rounding")


def test_weights_from_a_gguf(config, weights, golden, tmp_path, capsys):
    """A port with the weights of a quantised GGUF, held against a reference that has them too."""
    config = replace(config, hidden_size=64, intermediate_size=64)
    weights = {name: w.astype(BFLOAT16) for name, w in trained_like(config, 0).items()}
    golden = record(weights, config, draw_ids(np.random.default_rng(0), config, 1, PROMPT), steps=1)
    golden.save(tmp_path / "golden.safetensors")
    write_gguf(tmp_path / "q8.gguf", config, weights, kind="Q8_0")
    own = {name: np.asarray(w, np.float32) for name, w in load(tmp_path / "q8.gguf", progress=False).weights.items()}
    dump = Foreign(config, own).run(golden)
    save_file({name: np.ascontiguousarray(x) for name, x in dump.items()}, tmp_path / "mine.safetensors")
    files = [str(tmp_path / "golden.safetensors"), str(tmp_path / "mine.safetensors")]
    for flags, status in (([], 1), (["--weights-from", str(tmp_path / "q8.gguf")], 0)):
        with pytest.raises(SystemExit) as end:
            main(["compare", *files, *flags])
        assert end.value.code == status, capsys.readouterr().out
    assert "float32 rounding only" in capsys.readouterr().out
