"""A notebook, executed by nbclient: what a person sees there of loading, generating, tracing, training and errors."""

from __future__ import annotations

import importlib.util
import os

import pytest
from loopback_hub import LoopbackHub

from qwen3np.files.hub import BUILTIN

if not all(importlib.util.find_spec(name) for name in ("ipykernel", "nbclient", "nbformat")):
    pytest.skip("needs the extra `study`", allow_module_level=True)

CELLS = {
    "load": "import numpy as np\nimport qwen3np\nmodel = qwen3np.load()\nmodel",
    "complete": 'model.complete("The capital of France is", max_new_tokens=8)',
    "generate": (
        'new, cache = model.generate([model.text.encode("One two")] * 2, temperature=3.0, seed=1, max_new_tokens=6)\n'
        "print(new[0] == new[1], len(new[0]))\ncache"
    ),
    "config": "model.config",
    "chat": 'qwen3np.Conversation(model).say("What is the capital of Spain?")',
    "score": 'model.score("The capital of France is Paris.").round(1)',
    "trace": (
        'model.trace("One two", points="*.0.*.probs")["model.layers.0.self_attn.probs"].shape, '
        'model.hidden_states("One two").shape, model.attention_maps("One two").shape'
    ),
    "edit": (
        'france, spain = (model.text.encode(f"The capital of {name} is") for name in ("France", "Spain"))\n'
        "state = model.hidden_states(spain)[-1, -1]\n"
        "def patch(name, x):\n"
        '    if name == "model.layers.3":  # what Spain came to takes the place of what France came to\n'
        "        return np.concatenate([x[:, :-1], np.broadcast_to(state, x[:, -1:].shape)], axis=1)\n"
        "first = [model.generate(ids, max_new_tokens=1, edit=edit)[0]\n"
        "         for ids, edit in ((france, None), (spain, None), (france, patch))]\n"
        "print(first[0] != first[1] == first[2])"
    ),
    "embed": 'model.embed(["a", "b"]).shape',
    "bars": (
        "from qwen3np import terminal\n"
        "with terminal.counted(True, 3, 'generated') as count:\n"
        "    for _ in range(3):\n"
        "        import time; time.sleep(0.8)\n"
        "        count(1)"
    ),
    "train": (
        "import tempfile\nfrom qwen3np.training.loop import Settings, train\n"
        "folder = tempfile.mkdtemp() + '/small'\n"
        "sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=16)\n"
        'train(["Ada has an apple."] * 50, folder, sizes, Settings(steps=12, batch_size=2, sequence_length=16))\n'
        "qwen3np.load(folder)"
    ),
    "download": 'qwen3np.load("Qwen/Tiny")',
    "a setting of another library": 'model.complete("One", max_tokens=3)',
    "no text": "model.text.encode(3)",
    "a transposed tensor": (
        'name = "model.layers.0.mlp.up_proj.weight"\n'
        "qwen3np.forward({**model.weights, name: model.weights[name].T}, model.config, [1])"
    ),
    "a missing tensor": ("qwen3np.forward({n: w for n, w in model.weights.items() if n != name}, model.config, [1])"),
    "no checkpoint": 'qwen3np.load("Qwen3-0.6B")',
}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Every cell's outputs: the value it ends with, what it printed on stdout and on stderr, and its error."""
    import nbclient
    import nbformat

    cells = [nbformat.v4.new_code_cell(source) for source in CELLS.values()]
    book = nbformat.v4.new_notebook(cells=cells)
    with LoopbackHub() as hub:
        files = (file for file in BUILTIN.iterdir() if file.suffix in (".json", ".safetensors"))
        hub.repos["Qwen/Tiny"] = {"main": {file.name: file.read_bytes() for file in files}}
        place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path_factory.mktemp("hub")), "NO_PROXY": "127.0.0.1"}
        environment = os.environ | place | {"HF_HUB_OFFLINE": "0"}
        nbclient.NotebookClient(book, timeout=120, allow_errors=True, kernel_name="python3").execute(env=environment)
    found = {}
    for name, cell in zip(CELLS, book.cells, strict=True):
        said = {"stdout": "", "stderr": "", "value": "", "error": ""}
        for output in cell.outputs:
            if output.output_type == "stream":
                said[output.name] += output.text
            elif output.output_type == "error":
                said["error"] = f"{output.ename}: {output.evalue}"
            else:
                said["value"] = output.data["text/plain"]
        found[name] = said
    return found


def test_values_and_their_reprs(shown):
    for name, words in {
        "load": "Model(1.7 M parameters in float32: 4 layers of 160, 4 heads, 2 KV heads; context 256; Tokenizer(",
        "complete": "' Paris.",
        "generate": "KVCache(",
        "config": "Config(vocab_size=2048",
        "chat": "{'role': 'assistant', 'content': 'The capital of Spain is Madrid.'}",
        "score": "array([",
        "trace": "((1, 4, 2, 2), (5, 2, 160), (4, 4, 2, 2))",
        "embed": "(2, 160)",
        "train": "Model(0.0 M parameters",
        "download": "Model(1.7 M parameters",
    }.items():
        assert not shown[name]["error"]
        assert shown[name]["value"].startswith(words), (name, shown[name])
        assert len(shown[name]["value"]) < 1000  # no arrays written out
    assert shown["generate"]["stdout"] == "False 6\n"
    assert shown["edit"]["stdout"] == "True\n"


def test_progress(shown):
    assert "generated:" in shown["bars"]["stderr"]
    told = shown["train"]["stderr"]
    assert "50 documents, " in told
    assert "to go]" in told
    assert "training: 100%" in told
    assert "100%" in shown["download"]["stderr"]
    for name in ("load", "complete", "generate", "score", "embed"):  # too soon for a bar
        assert shown[name]["stderr"] == ""


def test_errors_say_what_to_do(shown):
    for name, words in {
        "a setting of another library": "'max_tokens' is not a generation setting; here it is max_new_tokens",
        "no text": "TypeError: encode: a str or a list of str is needed, not int",
        "a transposed tensor": "up_proj.weight is (160, 480), and must be (480, 160)",
        "a missing tensor": "model.layers.0.mlp.up_proj.weight",
        "no checkpoint": "CheckpointError: there is no folder Qwen3-0.6B; did you mean Qwen/Qwen3-0.6B, on the Hub?",
    }.items():
        assert words in shown[name]["error"], (name, shown[name])
        assert "\n" not in shown[name]["error"]
