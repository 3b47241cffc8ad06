"""Kills saves, downloads and trainings at random moments, repeats each, and compares with an undisturbed run.

    python tests/kills.py --kills 60 --seed 0

A kill is SIGKILL (on Windows TerminateProcess, which is as sudden) to a process that has begun. A continuation is clean
if the same call again, told to resume where it has to be told, ends without an error and leaves the files, byte for
byte and no other, that a call leaves which was not killed.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from loopback_hub import LoopbackHub

import qwen3np
from qwen3np.training.loop import STATE

# each prints a line when all is imported and the work begins; the folder is the first argument
SAVE = """
from dataclasses import replace
from qwen3np import Config, init_weights, save_checkpoint
from qwen3np.files.hub import BUILTIN
config = replace(Config.from_file(BUILTIN), vocab_size=40_000)
weights = init_weights(config, 0)
print(flush=True)
if not (folder / "model.safetensors").exists():  # else it was killed when all was done
    save_checkpoint(folder, config, weights)
"""
DOWNLOAD = """
import huggingface_hub
from qwen3np.files.hub import resolve
print(flush=True)
resolve("Qwen/Tiny", progress=False)
"""
TRAIN = """
from qwen3np.training.loop import STATE, Settings, train
documents = [f"{name} has {n} apples." for n, name in enumerate(["Ada", "Bo", "Cleo", "Dov"] * 3)]
sizes = dict(vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=1, head_dim=8)
settings = Settings(40, batch_size=4, sequence_length=24, learning_rate=0.01, warmup_steps=2, save_every=2)
print(flush=True)
if not folder.exists() or (folder / STATE).exists():  # else it was killed when all was done
    train(documents, folder, sizes, settings, resume=folder.exists(), progress=False)
"""
WORK = {"save": SAVE, "download": DOWNLOAD, "training": TRAIN}


def start(kind: str, folder: Path, hub: LoopbackHub) -> subprocess.Popen[bytes]:
    """Start the work of this kind on a folder, and return its process when it has begun."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(Path(qwen3np.__file__).parents[1]),
    }
    code = f"import sys, pathlib\nfolder = pathlib.Path(sys.argv[1]){WORK[kind]}"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == b"", f"{kind}: did not begin"
    return process


def left(kind: str, folder: Path) -> dict[str, bytes]:
    """Return the files that count by their names: of a download those of the checkpoint.

    The state of a training only by its name: the safetensors library writes its metadata in another order each time.
    """
    top = next(iter(folder.glob("hub/models--*/snapshots/*")), folder) if kind == "download" else folder
    files = {path.relative_to(top).as_posix(): path for path in top.rglob("*") if path.is_file()}
    return {name: b"" if name == STATE else path.read_bytes() for name, path in files.items()}


def kills(count: int, seed: int, report: Callable[[str, float, str], object]) -> None:
    """Kill this many jobs, of each kind in rotation, and report each one's kind, time of death and result."""
    draw = random.Random(seed)
    with LoopbackHub() as hub, tempfile.TemporaryDirectory() as name:
        place = Path(name)
        files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": draw.randbytes(30_000_000)}
        hub.repos["Qwen/Tiny"] = {"main": files}
        seconds: dict[str, float] = {}
        expected: dict[str, dict[str, bytes]] = {}
        for kind in WORK:
            process, began = start(kind, place / kind, hub), time.monotonic()
            assert process.wait() == 0
            seconds[kind], expected[kind] = time.monotonic() - began, left(kind, place / kind)
        assert expected["download"] == files
        done = 0
        while done < count:
            kind, folder = list(WORK)[done % len(WORK)], place / "killed" / str(done)
            folder.parent.mkdir(exist_ok=True)
            process, moment = start(kind, folder, hub), draw.uniform(0, seconds[kind])
            time.sleep(moment)
            process.kill()
            if process.wait() == 0:
                seconds[kind] *= 0.9  # it was over before: another one, sooner
                continue
            again = start(kind, folder, hub).wait()
            same = left(kind, folder) == expected[kind]
            report(
                kind, moment, "clean" if again == 0 and same else f"BAD: status {again}, {sorted(left(kind, folder))}"
            )
            done += 1


def main() -> None:
    """Run what the command line asks for. Status 1 unless all continuations were clean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcomes: Counter[tuple[str, str]] = Counter()

    def report(kind: str, moment: float, outcome: str) -> None:
        print(f"{kind:<9} killed after {moment:.3f} s: {outcome}", flush=True)
        outcomes[kind, outcome] += 1

    kills(arguments.kills, arguments.seed, report)
    print(", ".join(f"{count} {kind} {outcome}" for (kind, outcome), count in sorted(outcomes.items())))
    sys.exit(any(outcome != "clean" for _, outcome in outcomes))


if __name__ == "__main__":
    main()
