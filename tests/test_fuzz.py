"""A short run of the fuzzer; `python tests/fuzz.py --cases 100000` is the long one."""

import json
import os
import sys

import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen3np
from qwen3np import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def originals():
    return fuzz.originals()


@settings(max_examples=150)
@given(draw=st.randoms(use_true_random=False))
def test_changed_files_are_refused_or_read_as_the_safetensors_library_reads_them(originals, tmp_path, draw):
    fuzz.run(fuzz.mutate(draw.choice(originals), draw), tmp_path)


def test_unchanged_files_load(originals, tmp_path):
    assert [fuzz.run(files, tmp_path) for files in originals] == ["loaded"] * 6


@pytest.fixture
def folder(originals, tmp_path):
    for name, data in originals[0].items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json"])
def test_a_link_that_leads_out_of_the_folder_is_refused(folder, tmp_path_factory, name):
    outside = tmp_path_factory.mktemp("outside") / name
    os.rename(folder / name, outside)
    os.symlink(outside, folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: leads to {outside}, outside the checkpoint's folder"):
        qwen3np.load(folder, progress=False)


def test_the_links_of_the_hub_cache_are_followed(folder, tmp_path_factory):
    repository = tmp_path_factory.mktemp("hub") / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for n, path in enumerate(sorted(folder.iterdir())):
        os.rename(path, repository / "blobs" / str(n))
        os.symlink(f"../../blobs/{n}", snapshot / path.name)
    qwen3np.load(snapshot, progress=False)


def test_a_number_of_layers_takes_no_memory(folder):
    text = (folder / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 4000000000')
    (folder / "config.json").write_text(text)
    with pytest.raises(
        ConfigError, match="num_hidden_layers = 4000000000 is not supported; supported: whole numbers from 1 to 1,000"
    ):
        qwen3np.load(folder, progress=False)


def test_a_header_of_any_length_takes_no_memory(folder):
    path = folder / "model-00001-of-00002.safetensors"
    with path.open("r+b") as file:
        file.write((2 * 10**12).to_bytes(8, "little"))
        file.truncate(2 * 10**12 + 100)  # sparse
    with pytest.raises(CheckpointError, match="its header has 2000000000000 bytes; at most 16777216 are read"):
        qwen3np.load(folder, progress=False)


def used(folder):
    tokenizer = qwen3np.load(folder, progress=False).tokenizer
    tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]))


READ_WHOLE = [
    *("config.json", "generation_config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt"),
]


@pytest.mark.parametrize("name", READ_WHOLE)
def test_a_file_of_any_size_takes_no_memory(originals, folder, name):
    if name not in originals[0]:
        for other in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            (folder / other).write_bytes(originals[1][other])
        (folder / "tokenizer.json").unlink()
    with (folder / name).open("r+b") as file:
        file.truncate(10**11)  # sparse
    with pytest.raises((CheckpointError, ConfigError), match=f"{name}.*100000000000 bytes; at most"):
        used(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "additional_chat_templates/x.jinja"])
def test_a_pipe_is_not_waited_for(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises((CheckpointError, ConfigError), match=f"{name}.*not a regular file"):
        used(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_a_name_that_is_given_twice_is_refused(folder, file):
    text = (folder / file).read_text()
    (folder / file).write_text(text.replace("{", '{"num_hidden_layers": 1, "weight_map": {}, ', 1))
    with pytest.raises((CheckpointError, ConfigError), match="is given twice"):
        qwen3np.load(folder, progress=False)


def test_a_panic_of_the_tokenizers_library_is_an_error_of_the_file(folder):
    value = json.loads((folder / "tokenizer.json").read_text())
    value["model"]["continuing_subword_prefix"] = "longer than a token"
    (folder / "tokenizer.json").write_text(json.dumps(value))
    tokenizer = qwen3np.load(folder, progress=False).tokenizer
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer: "):
        tokenizer.encode("a")


def test_links_that_nobody_reads_do_no_harm_and_loops_are_refused(folder):
    os.symlink("/tmp", folder / "logs")
    qwen3np.load(folder, progress=False)
    os.rename(folder / "config.json", folder / "kept")
    os.symlink("config.json", folder / "config.json")
    with pytest.raises((CheckpointError, ConfigError), match=r"config\.json"):
        qwen3np.load(folder, progress=False)
