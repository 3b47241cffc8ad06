"""Every form in which Qwen publishes its models, over the official config.json files: names, shapes, dtypes, shards."""

from __future__ import annotations

import json
import math

import pytest

from qwen3np import Config, read_checkpoint
from qwen3np.weights import weight_shapes

BYTES = {"BF16": 2, "F16": 2, "F8_E4M3": 1, "I32": 4, "U32": 4}
SHARD = 10_000  # tensors
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
FORMS = {
    "BF16": None,
    "FP8": FP8,
    "AWQ": AWQ,
    "GPTQ-Int4": GPTQ,
    "GPTQ-Int8": GPTQ | {"bits": 8},
    "MLX-4bit": {"group_size": 64, "bits": 4},
}


def parts(form, out, into):
    """Return the dtype and shape of each tensor that stands for a matrix (out, into)."""
    if form == "FP8":
        scales = (-(-out // 128), -(-into // 128))
        return {"weight": ("F8_E4M3", (out, into)), "weight_scale_inv": ("BF16", scales)}
    if form == "AWQ":
        zeros, scales = ("I32", (into // 128, out // 8)), ("F16", (into // 128, out))
        return {"qweight": ("I32", (into, out // 8)), "qzeros": zeros, "scales": scales}
    if form.startswith("GPTQ"):
        bits, groups = int(form[-1]), into // 128
        zeros, scales = ("I32", (groups, out * bits // 32)), ("F16", (groups, out))
        words = ("I32", (into * bits // 32, out))
        return {"qweight": words, "qzeros": zeros, "scales": scales, "g_idx": ("I32", (into,))}
    if form == "MLX-4bit":
        scales = ("BF16", (out, into // 64))
        return {"weight": ("U32", (out, into // 8)), "scales": scales, "biases": scales}
    return {"weight": ("BF16", (out, into))}


def write_release(folder, raw, form):
    """Write the checkpoint with zeros for all numbers, as holes of the file, in shards."""
    settings = FORMS[form]
    (folder / "config.json").write_text(json.dumps(raw | ({"quantization_config": settings} if settings else {})))
    tensors = {}
    for name, shape in weight_shapes(Config.from_dict(raw)).items():
        stored = parts(form, *shape) if name.endswith("_proj.weight") else {"weight": ("BF16", shape)}
        tensors |= {name.removesuffix("weight") + part: of for part, of in stored.items()}
    names, weight_map = list(tensors), {}
    for n in range(0, len(names), SHARD):
        file, header, end = f"model-{n // SHARD:05}.safetensors", {}, 0
        for name in names[n : n + SHARD]:
            dtype, shape = tensors[name]
            start, end = end, end + math.prod(shape) * BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as shard:
            shard.write(len(text).to_bytes(8, "little") + text)
            shard.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.slow  # 36,000 matrices in the largest
@pytest.mark.parametrize("form", FORMS)
def test_every_official_config_loads_in_every_form(tmp_path, data, form):
    configs = sorted((data / "checkpoints").glob("*/config.json"))
    assert len(configs) == 14
    for path in configs:
        raw = json.loads(path.read_text())
        if form in ("AWQ", "GPTQ-Int8") and "num_experts" in raw:
            continue  # published for dense models alone
        folder = tmp_path / path.parent.name
        folder.mkdir()
        write_release(folder, raw, form)
        config, weights = read_checkpoint(folder)
        assert {name: w.shape for name, w in weights.items()} == weight_shapes(config)
