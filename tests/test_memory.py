"""Allocations that exceed the free memory raise an error stating both sizes first; others do not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen3np import (
    Conversation,
    KVCache,
    count_parameters,
    forward,
    generate,
    init_weights,
    load,
    score,
    stream,
)
from qwen3np import memory as module
from qwen3np.files.hub import BUILTIN
from qwen3np.numerics import BFLOAT16
from qwen3np.training.loop import SIZES, Settings, train

POSITION = 2 * 2 * 2 * 16 * 4  # bytes of the test config: k and v, L, K, Dh, float32
linux = pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux")


@pytest.fixture
def free(monkeypatch):
    """Return a function that says how many bytes are free from now on."""
    return lambda size: monkeypatch.setattr(module, "available_memory", lambda: size)


def refusal(size, free):
    return f"would take {size / 1e9:,.1f} GB, but only {free / 1e9:,.1f} GB of memory is free; ask for fewer positions"


def test_a_cache_that_fits_is_made_and_one_that_does_not_is_refused(config, free):
    free(3 * 100 * POSITION)
    KVCache.allocate(config, 3, 100)
    KVCache.allocate(config, 6, 100, BFLOAT16)
    for batch, length, dtype in ((3, 101, np.float32), (4, 100, np.float32), (6, 101, BFLOAT16), (3, 51, np.float64)):
        with pytest.raises(ValueError, match=r"cache: .* positions in .* ask for fewer positions"):
            KVCache.allocate(config, batch, length, dtype)
    free(0)  # not known
    KVCache.allocate(config, 3, 101)


def test_the_numbers_are_said(config, free):
    free(2 * 10**9)
    with pytest.raises(ValueError, match=f"^cache: 20,000,000 positions in float32 {refusal(2e7 * POSITION, 2e9)}"):
        KVCache.allocate(config, 1, 20_000_000)
    with pytest.raises(ValueError, match=r"cache: 3 sequences of 9,000,000 positions in float32 would take 13.8 GB"):
        KVCache.allocate(config, 3, 9_000_000)


def test_logits_that_do_not_fit_are_refused(weights, config, free):
    config = replace(config, vocab_size=1_000_000)
    embedding = np.zeros((config.vocab_size, config.hidden_size), BFLOAT16)
    weights = {**weights, "model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    free(3 * 10**8)
    with pytest.raises(ValueError, match=r"^logits: 80 positions in float32 would take 0.3 GB, but .*last_only=True"):
        forward(weights, config, [1] * 80)
    assert forward(weights, config, [1] * 80, last_only=True).shape == (1, 1, config.vocab_size)


def test_weights_that_do_not_fit_are_not_made(config, free, tmp_path):
    size = 4 * count_parameters(config)["unique"]
    free(size - 1)
    with pytest.raises(ValueError, match=r"^random weights in float32 would take .* choose smaller sizes$"):
        init_weights(config, 0)
    free(size)
    init_weights(config, 0)
    with pytest.raises(ValueError, match=r"^training: weights, .* would take .* choose smaller sizes$"):
        train(["a b c"], tmp_path / "model", SIZES, Settings(), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_longest_context_is_no_request(weights, config, free):
    # memory is taken as positions are used; nothing asks for all of them
    config = replace(config, max_position_embeddings=262_144)
    free(11 * POSITION)
    cache = KVCache.allocate(config)
    assert len(generate(weights, config, [1, 2], max_new_tokens=10, cache=cache)[0]) == 10
    cache = KVCache.allocate(config)
    with pytest.raises(ValueError, match=r"12 positions .* ask for fewer"):
        generate(weights, config, [1, 2, 3], max_new_tokens=10, cache=cache)
    assert not cache.lengths.any()


def test_calls_ask_for_the_positions_they_may_use(weights, config, free):
    free(11 * POSITION)
    for call in (
        lambda: generate(weights, config, [1, 2, 3], max_new_tokens=10),
        lambda: generate(weights, config, [[1, 2], [1]], max_new_tokens=10),
        lambda: next(stream(weights, config, [1, 2, 3], max_new_tokens=10)),
        lambda: score(weights, config, list(range(12))),
    ):
        with pytest.raises(ValueError, match="ask for fewer positions"):
            call()
    assert len(score(weights, config, list(range(11)))) == 10


def test_what_a_cache_held_has_its_memory_already(weights, config, free):
    cache = KVCache.allocate(config, 1, 20)
    new, _ = generate(weights, config, [1, 2], max_new_tokens=9, cache=cache)  # 10 positions
    expected, _ = generate(weights, config, [*new, 1, 2], max_new_tokens=6)
    for length in (10, 0):
        cache.lengths[:] = length
        free(6 * POSITION)
        with pytest.raises(ValueError, match="ask for fewer positions"):
            generate(weights, config, [*new, 1, 2], max_new_tokens=7, cache=cache)
    assert generate(weights, config, [*new, 1, 2], max_new_tokens=6, cache=cache)[0] == expected
    free(1)
    assert generate(weights, config, [*new, 1, 2], max_new_tokens=6, cache=cache)[0] == expected


def test_a_cache_that_moves_has_two_copies_for_a_while(weights, config, free):
    new, cache = generate(weights, config, [1, 2], max_new_tokens=9)  # 10 positions
    expected, _ = generate(weights, config, [1, 2, *new], max_new_tokens=6)
    free(10 * POSITION - 1)
    with pytest.raises(ValueError, match=r"^cache: 10 positions in float32 would take .* ask for fewer positions"):
        generate(weights, config, [1, 2, *new], max_new_tokens=6, cache=cache)
    free(10 * POSITION)
    assert generate(weights, config, [1, 2, *new], max_new_tokens=6, cache=cache)[0] == expected
    cache.lengths[:] = 3
    cache.reserve(40)  # of what it held only three positions have memory now
    free(17 * POSITION - 1)
    with pytest.raises(ValueError, match="20 positions in float32 would take"):
        generate(weights, config, [1, 2], max_new_tokens=19, cache=cache)


def test_a_turn_that_is_refused_leaves_the_conversation(builtin, free):
    conversation = Conversation(builtin)
    free(1000)
    with pytest.raises(ValueError, match="ask for fewer positions"):
        list(conversation.reply("Hello"))
    assert conversation.messages == []
    free(10**9)
    assert list(conversation.reply("Hello"))


def test_a_float32_copy_is_refused_where_it_does_not_fit(free):
    size = 4 * sum(w.size for w in load(weights_dtype="bfloat16", progress=False).weights.values())
    free(size)
    load(weights_dtype="float32", progress=False)
    free(size - 1)
    with pytest.raises(ValueError, match=f"{BUILTIN}: a float32 copy .* would take 0.0 GB, .* uses the file as it is"):
        load(weights_dtype="float32", progress=False)
    load(weights_dtype="bfloat16", progress=False)


def test_addresses_that_the_system_refuses_are_told():
    pytest.importorskip("resource", reason="only POSIX limits addresses")
    code = """
import resource
from qwen3np import KVCache, Config
from qwen3np.files.hub import BUILTIN
config = Config.from_file(BUILTIN)
cache = KVCache.allocate(config, 1, 100)
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
for call in (lambda: KVCache.allocate(config, 1, 1 << 18), lambda: cache.reserve(1 << 18)):
    try:
        call()
    except ValueError as error:
        print(error)
assert cache.max_length == cache.k.shape[3] == cache.v.shape[3] == 100
"""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    first, second = done.stdout.splitlines()
    for line in (first, second):
        assert line.startswith("cache: Unable to allocate 512. MiB")
        assert "ask for fewer positions" in line


@linux
def test_available_memory_is_what_the_system_says():
    found = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = 1024 * int(found["MemTotal"].split()[0])
    assert 0 < module.available_memory() <= total


@pytest.fixture
def group():
    """The file of processes of a real control group, with a limit of 400 MB."""
    for top, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        folder = Path(top, f"qwen3np-test-{os.getpid()}")
        with suppress(OSError):
            folder.mkdir()
            if (folder / limit).exists():
                (folder / limit).write_text("400000000")
                break
            folder.rmdir()
    else:
        pytest.skip("makes a control group, which only root may, and not everywhere")
    yield folder / "cgroup.procs"
    folder.rmdir()


@linux
def test_what_would_not_fit_into_a_control_group_is_refused_and_nobody_is_killed(group):
    code = """
import sys
from pathlib import Path
from qwen3np import KVCache, load
from qwen3np.memory import available_memory
Path(sys.argv[1]).write_text("0")
assert 2e8 < available_memory() < 4e8, available_memory()
model = load(progress=False)
position = 2 * 4 * 2 * 64 * 4  # bytes
cache = KVCache.allocate(model.config, 1, int(0.8 * available_memory() / position))
for array in (cache.k, cache.v):
    array[...] = 1
try:
    KVCache.allocate(model.config, 1, int(2e8 / position))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, group], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"cache: .* in float32 would take 0\.2 GB, but only 0\.[01] GB of memory is free; ", done.stdout)


@pytest.mark.skipif(not shutil.which("unshare"), reason="Linux, with its tool for namespaces")
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (":", "os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2"),
        (r"mkdir self; echo MemAvailable: 7 kB >meminfo; printf '0::/b\374ro\n' >self/cgroup", "7168"),  # not UTF-8
    ],
    ids=["nothing in it", "the name of a group"],
)
def test_another_proc(files, expected):
    code = "import os; from qwen3np.memory import available_memory; from qwen3np.commands.bench import processor; "
    code += f"assert available_memory() == {expected}; assert processor()"
    mount = f'mount -t tmpfs none /proc || exit 77; cd /proc && {files} && cd / && exec "$0" -c "$1"'
    root = str(Path(module.__file__).parents[1])
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, sys.executable, code],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
    )
    if done.returncode == 77 or done.stderr.startswith(b"unshare:"):
        pytest.skip("mounts, which only root may")
    assert not done.returncode, done.stderr.decode()


def test_the_limits_of_control_groups_count(tmp_path):
    def group(name, **files):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / file.replace("__", ".")).write_text(text)

    # the files as the kernel's documentation has them
    stat = "anon 1\ninactive_file 30\nactive_file 2\n"
    group("a/b", memory__max="9000\n", memory__current="5000\n", memory__stat=stat)
    group("a", memory__max="max\n", memory__current="6000\n", memory__stat=stat)
    group(".", memory__max="800\n", memory__current="900\n", memory__stat=stat)  # of a container
    stat = "inactive_file 1\nactive_file 1\ntotal_inactive_file 40\ntotal_active_file 3\n"
    group("memory", memory__limit_in_bytes="700\n", memory__usage_in_bytes="100\n", memory__stat=stat)
    # outside of the container it is in another group, which cannot be seen
    own = "12:cpu,cpuacct:/x\n4:memory:/docker/0123abc\n1:name=systemd:/\n0::/a/b\n"
    assert list(module.left_in_groups(own, tmp_path)) == [643, 4032, -68]
    assert list(module.left_in_groups("", tmp_path)) == []


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, BFLOAT16])
def test_memory_from_the_start_of_a_line(dtype):
    """Casts write whole lines of 64 bytes; the float32 copies of a checkpoint begin with one, too."""
    assert module.aligned((0, 3), dtype).shape == (0, 3)
    for shape in ((1,), (7, 11), (3, 5, 1000), (1 << 20,)):
        array = module.aligned(shape, dtype)
        assert (array.shape, array.dtype, array.ctypes.data % 64) == (shape, dtype, 0)
        assert array.flags.carray
    copies = load(BUILTIN, weights_dtype="float32").weights
    assert {copy.ctypes.data % 64 for copy in copies.values()} == {0}
