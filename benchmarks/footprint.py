"""Print the cost of loading a checkpoint as mapped bfloat16, and the peak memory of a forward pass over 32 tokens.

    python benchmarks/footprint.py FOLDER

Linux: memory is read from /proc. The process that measures does nothing else before.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

import qwen3np
from qwen3np.commands.bench import memory


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    now = memory()
    return now["anonymous_bytes"] + now["file_bytes"]


def main() -> None:
    """Measure and print a JSON object."""
    folder = Path(sys.argv[1])
    file = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    before, began = resident(), time.perf_counter()
    model = qwen3np.load(folder, weights_dtype="bfloat16", progress=False)
    seconds, after = time.perf_counter() - began, resident()
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 32)
    model.forward(ids)
    peak = memory()["peak_bytes"]
    result = {
        "file_bytes": file,
        "load_seconds": round(seconds, 4),
        "load_resident_growth_bytes": after - before,
        "forward_peak_bytes": peak,
        "forward_peak_over_file": round(peak / file, 4),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
