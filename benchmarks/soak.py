"""Run thousands of short generations with the built-in checkpoint, and print how much memory the process keeps.

    python benchmarks/soak.py [--generations 10000]

One half uses a float32 copy of the weights, the other the mapped file. One in four is a turn of a chat, one in four is
refused or broken off, one in eight is a text that is scored. Status 1 if the process keeps more than 5 MB more
at the end than after the first 100. Linux: memory is read from /proc, and pages of files do not count.
"""

from __future__ import annotations

import argparse
import gc
import sys
from contextlib import suppress

from qwen3np import Conversation, Model, load, score
from qwen3np.commands.bench import memory

WARM, MOST = 100, 5_000_000
PROMPTS = ("The capital of France is", "The opposite of hot is", "Seven plus five is", "The day after Monday is")


def one(model: Model, n: int, chat: Conversation) -> None:
    """Run number n: completed, scored, sampled from a batch, in the chat, or one that ends in an error."""
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(f"{PROMPTS[n % 7 % 4]} {n % 13}")
    kind = n % 8
    if kind in (0, 1):
        model.tokenizer.decode(model.generate(ids, max_new_tokens=1 + n % 3)[0])
    elif kind == 2:
        score(model.weights, model.config, ids)
    elif kind == 3:
        model.generate([ids, ids[:2]], max_new_tokens=2, temperature=1.0, top_k=20, seed=n)
    elif kind in (4, 5):
        if len(chat.messages) >= 8:
            chat.reset()
        list(chat.reply(PROMPTS[n % 4], options={"max_new_tokens": 3}))
    elif kind == 6:
        wrong = [*ids, model.config.vocab_size] if n % 3 else [1] * (model.config.max_position_embeddings + 1)
        with suppress(ValueError):
            model.generate(wrong, max_new_tokens=1)
    else:
        next(stream := model.stream(ids, max_new_tokens=5))
        stream.close()


def main() -> None:
    """Run them, print the memory on the way, and end with the status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=10_000, metavar="N")
    generations = parser.parse_args().generations
    models = [load(weights_dtype=dtype, progress=False) for dtype in ("float32", "bfloat16")]
    chats, first, kept = [Conversation(model) for model in models], 0, 0
    for n in range(1, generations + 1):
        which = n // 8 % 2
        one(models[which], n, chats[which])
        if n in (WARM, generations) or n % 1000 == 0:
            gc.collect()
            kept = memory()["anonymous_bytes"]
            first = first or kept
            print(f"{n:>6} generations: {kept / 1e6:6.1f} MB, {(kept - first) / 1e6:+.1f}", flush=True)
    sys.exit(kept - first > MOST)


if __name__ == "__main__":
    main()
