"""Write the data of this folder: python -m qwen3np.published.make builtin | rows FOLDER."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

from qwen3np.loading import load
from qwen3np.verify import BUILTIN, ROWS, exact_hash, hashed_ids


def rows(folder: Path) -> dict[str, Any]:
    """Return the ids, the largest logits and the norms of the layers' outputs in a folder of published tables."""

    def table(name: str) -> list[dict[str, str]]:
        with (folder / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, delimiter="\t"))

    ids = [int(row["token_id"]) for row in table("sequence.tsv")]
    top: list[list[tuple[int, float]]] = [[] for _ in ids]
    for row in table("top32.tsv"):
        top[int(row["position"])].append((int(row["token_id"]), float(row["logit"])))
    hidden = table("hidden.tsv")
    norms = [[0.0] * len(ids) for _ in range(1 + max(int(row["layer"]) for row in hidden))]
    for row in hidden:
        norms[int(row["layer"])][int(row["position"])] = float(row["l2_norm"])
    return {"ids": ids, "top": top, "norms": norms}


def main() -> None:
    """Write one of the files."""
    if sys.argv[1:] == ["builtin"]:
        model = load(progress=False)
        BUILTIN.write_text(json.dumps({"sha256": exact_hash(model, hashed_ids(model))}) + "\n", encoding="utf-8")
    elif len(sys.argv) == 3 and sys.argv[1] == "rows":
        ROWS.write_text(json.dumps(rows(Path(sys.argv[2]))) + "\n", encoding="utf-8")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
