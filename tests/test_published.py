"""The released Qwen3-0.6B-Base, against published figures.

They come from transformers 4.51.0 in float32, eager, on an Apple M4 (torch 2.6.0), at revision
da87bfb608c14b7cf20ba1ce41287e8de496c0cd: https://github.com/moderately-ai/tiler (MIT OR Apache-2.0).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen3np import Config, KVCache, forward, read_checkpoint
from qwen3np.rope import rotary_tables

PROMPT = [785, 3974, 13876, 38835, 34208, 916, 279, 15678, 5562, 13]  # The quick brown fox jumps over the lazy dog.
GREEDY = [576, 3974, 13876, 38835, 34208, 916, 279, 15678, 5562]  # each fed back for the next

TOP_LOGITS = {  # position: {id: logit}
    0: {2701: 16.972336, 220: 13.760785, 2629: 13.541582, 1372: 13.397348},
    4: {916: 22.325531, 198: 16.894987, 6157: 16.755711, 13: 16.550264},
    9: {576: 17.541784, 220: 17.236763, 3555: 16.991070, 1096: 16.594086},
    10: {3974: 22.534874, 5562: 22.268795, 15678: 21.246965, 38835: 21.124191},
    17: {5562: 23.506567, 8251: 19.602806, 1304: 18.609890, 38835: 18.572205},
}

NORMS = {  # position: L2 norm of each layer's output
    0: """
        11.80673 19.45008 6479.215 6478.551 6478.098 6478.055 6476.255 6474.48 6470.71 6465.231 6464.023
        6460.67 6458.359 6456.104 6452.002 6450.676 6448.954 6449.632 6454.103 6462.971 6468.234 6478.097
        6483.824 6491.324 6497.078 6499.828 6203.075 654.4418
    """,
    5: """
        8.767349 11.11295 13.95002 15.93157 17.46187 24.85835 28.6876 30.89046 37.2306 43.3973 43.37797
        51.2101 51.77715 54.06764 54.95605 59.4484 72.31246 83.37172 102.6446 135.7149 159.1009 193.7638
        232.2021 279.2321 337.2092 453.1814 474.8669 554.4036
    """,
    17: """
        10.88304 13.35194 15.61958 18.33774 21.55019 23.36586 24.38808 24.98491 28.50801 34.30543 37.9261
        48.07848 46.49737 50.33171 52.72609 56.94684 77.0413 93.85359 112.5964 152.13 186.6972 233.495
        289.5705 347.8515 449.48 544.24 646.0158 716.2057
    """,
}

# the rotary tables at position 17, lanes 0 to 63: float32 in hexadecimal
COS_17 = """
be8ce236 3ed91587 3d33cfe6 bf5d0c34 3f21fe00 3f5fe45b bd69a780 bf51d9e5 bf7e3443 bf42e4f5 bec3c2c2 bc371ab5
3e955644 3f046285 3f2d2cc8 3f491dd8 3f5be3ee 3f6859f7 3f708ef2 3f75efca 3f79732e 3f7bbd77 3f7d3b23 3f7e3362
3f7ed4c3 3f7f3da1 3f7f81c2 3f7fae03 3f7fcac1 3f7fdd6c 3f7fe98c 3f7ff16b 3f7ff688 3f7ff9da 3f7ffc02 3f7ffd68
3f7ffe51 3f7ffee8 3f7fff4a 3f7fff8a 3f7fffb4 3f7fffce 3f7fffe0 3f7fffeb 3f7ffff3 3f7ffff7 3f7ffffa 3f7ffffc
3f7ffffe 3f7fffff 3f7fffff 3f7fffff 3f800000 3f800000 3f800000 3f800000 3f800000 3f800000 3f800000 3f800000
3f800000 3f800000 3f800000 3f800000
"""
SIN_17 = """
bf761e26 3f67d9b6 bf7fc0d2 3f0120a8 3f463a7d bef842c9 bf7f9549 bf129fa7 3df22816 3f25fd0f 3f6c8c8b 3f7ffbe8
3f74de5b 3f5b1cc8 3f3c89a3 3f1e646e 3f0316b2 3ed6ee4c 3eaf2162 3e8e2498 3e6627fa 3e3a076a 3e163403 3df26321
3dc37c97 3d9d9d99 3d7e1d61 3d4cd290 3d25142b 3d050a42 3cd66e8d 3cacce1e 3c8b41de 3c60714e 3c34de07 3c11c064
3beae813 3bbd4c56 3b988b75 3b75dab5 3b461eb4 3b1fa74c 3b00a7d3 3acf5a2a 3aa717db 3a86a697 3a5903b8 3a2ee125
3a0cecdd 39e32085 39b7074f 39937dfc 396db5f4 393f8eaf 391a5d71 38f8c9a5 38c87bcd 38a18ee2 388230bc 3851d366
38291622 380841cb 37db9a71 37b0f731
"""


def test_rotary_tables():
    """Float32 cosines of another machine: the same numbers, or neighbours where its functions are not exact."""
    config = Config(
        vocab_size=1,
        hidden_size=1024,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=1e6,
    )
    for ours, text in zip(rotary_tables(config, np.array([[17]])), (COS_17, SIN_17), strict=True):
        theirs = np.array([int(word, 16) for word in text.split()], np.uint32).view(np.int32).astype(np.int64)
        away = np.abs(ours.ravel().view(np.int32) - theirs)
        assert away.max() <= 1
        assert np.count_nonzero(away) <= 6, away


def test_rotary_tables_at_every_published_position(data):
    """All rows of that machine's float32 tables, lanes 0 to 127: the same numbers, or neighbours."""
    path = data / "published" / "qwen3-0.6b-base-f32-eager" / "rotary.tsv"
    rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    positions, lanes = np.array([[int(row[0]), int(row[1])] for row in rows]).T
    config = Config.from_file(data / "checkpoints" / "Qwen3-0.6B-Base")
    assert len(rows) == 128 * len(np.unique(positions))
    for table, column in zip(rotary_tables(config, np.arange(positions.max() + 1)[None]), (2, 4), strict=True):
        ours = table[0, 0, positions, lanes % 64].view(np.int32).astype(np.int64)
        away = np.abs(ours - np.array([int(row[column], 16) for row in rows], np.uint32).view(np.int32))
        print(f"\n{np.count_nonzero(away)} of {len(rows)} published entries differ, by {away.max()}", end="")
        assert away[lanes % 64 != 37].max() <= 1
        assert away.max() <= 2  # of lane 37 torch has the frequency itself a last bit off
        assert np.count_nonzero(away) <= 0.1 * len(rows)


@pytest.fixture(scope="module")
def released():
    """Config and weights of the released checkpoint, if its files are here already."""
    hub = pytest.importorskip("huggingface_hub")
    path = hub.try_to_load_from_cache("Qwen/Qwen3-0.6B-Base", "model.safetensors")
    if not isinstance(path, str):
        pytest.skip("not in the local cache: hf download Qwen/Qwen3-0.6B-Base")
    return read_checkpoint(Path(path).parent)


@pytest.mark.weights
def test_released_checkpoint(released):
    """The prompt, then greedy decoding: tokens, largest logits, and the norm of every layer's output."""
    config, weights = released
    cache = KVCache.allocate(config, max_length=len(PROMPT) + len(GREEDY) - 1)
    logits, layers = np.empty((0, config.vocab_size)), [[] for _ in range(config.num_hidden_layers)]

    def record(name, x):
        if name.removeprefix("model.layers.").isdigit():
            layers[int(name.rsplit(".")[-1])].extend(np.linalg.norm(x[0].astype(np.float64), axis=-1))

    new = PROMPT
    for greedy in GREEDY:
        logits = np.concatenate((logits, forward(weights, config, new, cache, trace=record)[0]))
        assert logits[-1].argmax() == greedy
        new = [greedy]
    for position, top in TOP_LOGITS.items():
        # float32 over 28 layers on two machines: some 1e-5 of the logits' size, which is 20
        np.testing.assert_allclose(logits[position, list(top)], list(top.values()), rtol=0, atol=1e-3)
        assert np.argsort(-logits[position])[: len(top)].tolist() == list(top)
    for position, norms in NORMS.items():
        np.testing.assert_allclose([layer[position] for layer in layers], np.array(norms.split(), float), rtol=1e-4)
