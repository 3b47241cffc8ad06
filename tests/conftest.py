"""Fixtures that several test files share, and hypothesis profiles."""

from __future__ import annotations

import os
import signal
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core: more threads would only wait for each other
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("QWEN3NP_NUM_THREADS", "1")

import numpy as np
import pytest
from browsing import chromium
from drawing import trained_like
from hypothesis import HealthCheck, Phase, settings
from threadpoolctl import threadpool_limits

from qwen3np import Model, forward, load
from qwen3np.config import Config
from qwen3np.files.hub import BUILTIN
from qwen3np.numerics import BFLOAT16

# A shell that starts the tests in the background lets them ignore Ctrl-C, and so all processes that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run. `--hypothesis-profile=fresh` draws new ones.
settings.register_profile(
    "fresh", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.register_profile("reproducible", settings.get_profile("fresh"), derandomize=True)
# The same examples again, but no time goes into making one that fails small: for runs that are to fail.
settings.register_profile(
    "unshrunk", settings.get_profile("reproducible"), phases=[Phase.explicit, Phase.reuse, Phase.generate]
)
settings.load_profile("reproducible")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of official config.json files and published figures."""
    if "QWEN3NP_DATA" not in os.environ:
        pytest.skip("the official Qwen3 files are not here: set QWEN3NP_DATA to their folder")
    return Path(os.environ["QWEN3NP_DATA"])


@pytest.fixture(scope="session")
def kit(tmp_path_factory) -> Path:
    """The golden values that `qwen3np fixture` writes, which takes some seconds; only to be read."""
    from qwen3np.cli import main  # a bug that breaks the command line fails tests, not the loading of this file

    folder = tmp_path_factory.mktemp("kit") / "Satz 雪"
    main(["fixture", "-o", str(folder)])
    return folder


@pytest.fixture(scope="session")
def browser():
    """Chromium, for the tests of pages; skips them where it is missing."""
    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def config() -> Config:
    """A model that tells apart what is equal by chance in others: Dh is not D / H, G is 3, nothing is a square."""
    return Config(
        vocab_size=101,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=1e6,
        max_position_embeddings=256,
    )


@pytest.fixture(scope="session")
def weights(config) -> dict[str, np.ndarray]:
    """Weights of that model as after training; read-only, as those of a mapped checkpoint are."""
    weights = trained_like(config, 0)
    for tensor in weights.values():
        tensor.setflags(write=False)
    return weights


@pytest.fixture(scope="session")
def short_weights(weights) -> dict[str, np.ndarray]:
    """The same weights as a checkpoint in bfloat16 stores them."""
    return {name: tensor.astype(BFLOAT16) for name, tensor in weights.items()}


@pytest.fixture(scope="session")
def builtin() -> Model:
    """The checkpoint that comes with the package. Tests hold for any weights that know what it was trained for."""
    return load(progress=False)


@pytest.fixture(scope="session")
def yes_no(tmp_path_factory) -> Path:
    """A folder with the built-in tokenizer, to which the words yes and no are added as tokens."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(BUILTIN / "tokenizer.json"))
    backend.add_tokens(["yes", "no"])
    folder = tmp_path_factory.mktemp("yes_no")
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many positions each forward of a generation computed; it is the real one that runs."""
    sizes: list[int] = []

    def counting(weights, config, input_ids, *args, **kwargs):
        sizes.append(np.size(input_ids))
        return forward(weights, config, input_ids, *args, **kwargs)

    monkeypatch.setattr("qwen3np.guard.forward", counting)
    return sizes


@pytest.fixture(scope="module")
def oracle():
    module = pytest.importorskip("oracle", reason="needs the extra: pip install qwen3np[oracle]")
    with threadpool_limits(1):  # models this small only lose time to more
        yield module
