"""The training loop: documents -> a Hugging Face folder with a tokenizer and a model trained on them."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from qwen3np.config import Config
from qwen3np.files.checkpoint import save_checkpoint
from qwen3np.files.writing import written_aside
from qwen3np.guard import forward
from qwen3np.memory import require_memory
from qwen3np.model import Model
from qwen3np.numerics import BFLOAT16, Array
from qwen3np.terminal import bars, shows_bars
from qwen3np.tokenizer import Tokenizer
from qwen3np.training.bpe import generation_config, train_tokenizer, write_tokenizer
from qwen3np.training.documents import Document, Encoded, encode, pack, texts
from qwen3np.training.gradients import cross_entropy, loss_and_gradients
from qwen3np.training.optimizer import Moments, adamw, clip, cosine_schedule, zero_moments
from qwen3np.weights import Weights, count_parameters, init_weights, weight_shapes

STATE = "training_state.safetensors"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    *("special_tokens_map.json", "generation_config.json"),
)
SIZES = {  # the built-in checkpoint's: G >= 2 and Dh is not D / H, as in the large models
    "vocab_size": 2048,
    "hidden_size": 160,
    "intermediate_size": 480,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
_MAY_BE_ZERO = ("seed", "warmup_steps", "weight_decay")
_MAY_CHANGE = ("learning_rate", "steps", "save_every")  # when a run is resumed


@dataclass(frozen=True)
class Settings:
    """How a model is trained: number of steps, batch size, and AdamW's settings."""

    steps: int = 1000
    batch_size: int = 16  # rows per step
    sequence_length: int = 256  # positions per row, and the model's context
    learning_rate: float = 3e-3  # the highest, after the warm-up
    warmup_steps: int = 100
    weight_decay: float = 0.1
    max_norm: float = 1.0  # of the gradients
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        """Check the settings. Raises ValueError, which names the one that is wrong."""
        for name, value in asdict(self).items():
            if not math.isfinite(value) or value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
                allowed = "0 or more" if name in _MAY_BE_ZERO else "more than 0"
                raise ValueError(f"{name} = {value}: it must be finite, and {allowed}")


@dataclass
class State:
    """What an interrupted run needs to continue to the same weights, bit for bit."""

    config: Config
    settings: Settings
    corpus: str  # the digest of the training documents
    weights: dict[str, Array]
    moments: Moments
    step: int = 0
    log: list[dict[str, float]] = field(default_factory=list[dict[str, float]])

    def save(self, folder: Path) -> None:
        """Write the state; the previous file stays until the new one is complete."""
        import safetensors.numpy

        tensors = dict(self.weights)
        for name, moments in self.moments.items():
            tensors |= {f"moments.{n}.{name}": moment for n, moment in enumerate(moments)}
        rest = {
            "config": self.config.to_dict(),
            "settings": asdict(self.settings),
            "corpus": self.corpus,
            "step": self.step,
            "log": self.log,
        }
        texts = {name: json.dumps(value) for name, value in rest.items()}
        with written_aside(folder / STATE) as part, part.open("wb") as file:
            file.write(cast("Any", safetensors.numpy).save(tensors, texts))
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, folder: Path) -> State:
        """Read the state of an interrupted run. Raises ValueError if there is none."""
        import safetensors

        if not (folder / STATE).exists():
            raise ValueError(f"{folder}: no {STATE}, so there is no training to resume")
        try:
            with cast("Any", safetensors).safe_open(folder / STATE, "np") as file:
                rest: dict[str, Any] = {name: json.loads(value) for name, value in file.metadata().items()}
                tensors: dict[str, Array] = {name: file.get_tensor(name) for name in list(file.keys())}
            rest |= {"config": Config.from_dict(rest["config"]), "settings": Settings(**rest["settings"])}
            weights = {name: tensor for name, tensor in tensors.items() if not name.startswith("moments.")}
            moments = {name: (tensors[f"moments.0.{name}"], tensors[f"moments.1.{name}"]) for name in weights}
            return cls(weights=weights, moments=moments, **rest)
        except (safetensors.SafetensorError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{folder / STATE}: cannot be read: {error}") from None


def train(
    documents: Sequence[Document],
    folder: str | Path,
    sizes: Mapping[str, int],
    settings: Settings,
    *,
    held_out: Sequence[Document] = (),
    resume: bool = False,
    progress: bool = True,
    base: Model | None = None,
) -> None:
    """Train a tokenizer and a model on documents, and write them to a folder.

    The folder becomes an ordinary Hugging Face checkpoint in bfloat16, with tied embeddings and the sequence length as
    its context, and has a training_log.csv: every save_every steps the mean training loss since the previous line, and
    the loss of the held-out documents, in nats per token. During training the folder holds the tokenizer and the last
    saved state.

    Parameters
    ----------
    documents
        Texts and conversations, as documents.read_documents returns them.
    folder
        A new folder, or with resume the one that holds the interrupted run.
    sizes
        Keys of config.json, those in SIZES; a missing one has the value there.
    settings
        How to train.
    held_out
        Documents that are only measured.
    resume
        Continue an interrupted run, to the same weights bit for bit, or a finished one with more steps.
    progress
        Show a bar on stderr with the loss and tokens per second; without a terminal, a line of the log at each save.
    base
        Fine-tune this model: start with its weights, tokenizer and sizes, in place of the sizes given.

    Raises
    ------
    ValueError
        For sizes that do not fit together or exceed the free memory, documents in which no token counts, and a folder
        that exists (with resume: a folder without a state, or with other sizes, another corpus or more steps); then no
        folder is left behind. For a loss that is not finite; then the last saved state is kept.

    Examples
    --------
    >>> from qwen3np.training.loop import Settings, train
    >>> settings = Settings(steps=1, batch_size=1, sequence_length=8)
    >>> train(["One, two, three. One, two, three."], "counting", {"vocab_size": 282}, settings, progress=False)
    >>> qwen3np.load("counting").config.vocab_size
    282
    """
    tqdm = bars()

    folder = Path(folder)
    if unknown := [name for name in sizes if name not in SIZES]:
        raise ValueError(f"sizes: {unknown[0]!r} is none of {', '.join(SIZES)}")
    sizes = {**SIZES, **sizes}
    state, encoded, test = _begun(documents, held_out, folder, sizes, settings, resume, base)
    config = state.config
    if progress:
        print(_estimate(state, encoded, settings), file=sys.stderr, flush=True)
    tokens = settings.batch_size * settings.sequence_length
    bar: Any = tqdm(
        total=settings.steps * tokens,
        initial=state.step * tokens,
        desc="training",
        unit=" tokens",
        unit_scale=True,
        disable=not (progress and shows_bars()),
    )
    lines = progress and not shows_bars()
    losses: list[float] = []
    begun, started = state.step, 0.0
    with bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an overflow shows in the loss
        for rows, masks in islice(batches(encoded, settings), state.step, None):
            loss, gradients = loss_and_gradients(state.weights, config, rows[:, :-1], rows[:, 1:], masks[:, 1:])
            norm = clip(gradients, settings.max_norm)
            if not math.isfinite(loss + norm):
                raise ValueError(
                    f"after step {state.step} the loss is {loss}, the norm of its gradients {norm}; {folder} keeps "
                    f"step {State.load(folder).step}: resume with a lower learning rate than {settings.learning_rate}"
                )
            last = state.step == settings.steps
            # saved only now, when the weights of the last step are known to give a finite loss
            if state.step > begun and (last or state.step % settings.save_every == 0):
                state.save(folder)
            if last:
                break
            rate = cosine_schedule(state.step, settings.steps, settings.warmup_steps, settings.learning_rate)
            state.step += 1
            adamw(state.weights, gradients, state.moments, state.step, rate, weight_decay=settings.weight_decay)
            losses.append(loss)
            bar.update(tokens)
            timed = state.step - begun - 1  # the first takes longer
            if not timed:
                started = time.perf_counter()
            elif progress and started and (timed == 8 or time.perf_counter() - started > 2):
                seconds = (settings.steps - state.step) * (time.perf_counter() - started) / timed
                bar.write(f"[about {_duration(seconds)} to go]", file=sys.stderr)
                started = 0.0  # once
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            if state.step % settings.save_every == 0 or state.step == settings.steps:
                line: dict[str, float] = {"step": state.step, "learning_rate": rate, "loss": sum(losses) / len(losses)}
                if test:
                    line["held_out_loss"] = mean_loss(state.weights, config, test)
                state.log.append(line)
                if lines:
                    told = ", ".join(f"{name} {value:.4g}" for name, value in line.items())
                    print(f"[{told}; of {settings.steps} steps]", file=sys.stderr, flush=True)
                losses.clear()
    _write_log(folder / "training_log.csv", state.log)
    for name in ("config.json", "model.safetensors"):  # left by a run that continues or was interrupted right here
        (folder / name).unlink(missing_ok=True)
    save_checkpoint(folder, config, state.weights, dtype=BFLOAT16)


def _duration(seconds: float) -> str:
    """Say how long this is, as roughly as it is known."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"


def _estimate(state: State, encoded: Sequence[Encoded], settings: Settings) -> str:
    """Describe the corpus, the size of the model and the remaining work."""
    tokens, parameters = sum(len(ids) for ids, _ in encoded), count_parameters(state.config)["unique"]
    per_step = settings.batch_size * settings.sequence_length
    steps = settings.steps - state.step
    documents = f"{len(encoded):,} document{'s' * (len(encoded) != 1)}"
    return (
        f"[{documents}, {tokens:,} tokens; {parameters:,} parameters; {steps:,} steps of {per_step:,} tokens, "
        f"about {steps * per_step / max(tokens, 1):.1f} epochs]"
    )


def _begun(
    documents: Sequence[Document],
    held_out: Sequence[Document],
    folder: Path,
    sizes: Mapping[str, int],
    settings: Settings,
    resume: bool,
    base: Model | None,
) -> tuple[State, list[Encoded], tuple[Array, Array] | None]:
    """Return the state to continue from, the documents as ids, and held-out rows and masks. Raises like train."""
    fixed = {"rope_theta": 1e4, "max_position_embeddings": settings.sequence_length, "tie_word_embeddings": True}
    config = Config.from_dict({**sizes, **fixed}) if base is None else base.config
    if settings.sequence_length > config.max_position_embeddings:
        context = config.max_position_embeddings
        raise ValueError(f"sequence_length = {settings.sequence_length}: the context of this model is {context}")
    size = 16 * count_parameters(config)["unique"]
    require_memory(size, "training: weights, gradients and two moments in float32", "choose smaller sizes")
    state = State.load(folder) if resume else None
    if state is None and folder.exists():
        raise ValueError(f"{folder} exists; choose a new folder, or resume the run that was interrupted there")
    new = folder.with_name(f"{folder.name}.part")  # renamed to folder once it holds all that a run needs to continue
    try:
        if state is None:
            shutil.rmtree(new, ignore_errors=True)
            if base is None:
                _write_tokenizer(new, documents, config)
            else:
                new.mkdir(parents=True)
                for name in TOKENIZER_FILES:
                    if (base.text.folder / name).is_file():
                        shutil.copyfile(base.text.folder / name, new / name)
        tokenizer = Tokenizer.from_folder(folder if state else new)
        if base is None:
            config = replace(config, eos_token_id=(cast("int", tokenizer.token_to_id("<|im_end|>")),))
        encoded = [encode(document, tokenizer) for document in documents]
        kept = [encode(document, tokenizer) for document in held_out]
        test = _counting(kept, settings, np.random.default_rng(0)) if kept else None
        next(batches(encoded, settings))  # raises if no token counts
        corpus = _digest(encoded)
        if state is None:
            if base is None:
                weights = init_weights(config, settings.seed)
            else:  # a copy: training changes them in place
                weights = {name: np.array(base.weights[name], np.float32) for name in weight_shapes(config)}
            state = State(config, settings, corpus, weights, zero_moments(weights))
            state.save(new)
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if config != state.config:
        had = {key: size for key, size in state.config.to_dict().items() if size != config.to_dict()[key]}
        raise ValueError(f"{folder}: the interrupted run there had other sizes: {had}")
    if corpus != state.corpus:
        raise ValueError(f"{folder}: the interrupted run there had another corpus")
    changed = {name: value for name, value in asdict(state.settings).items() if value != getattr(settings, name)}
    if refused := {name: value for name, value in changed.items() if name not in _MAY_CHANGE}:
        raise ValueError(f"{folder}: the interrupted run there had other settings: {refused}")
    if state.step > settings.steps:
        raise ValueError(f"{folder}: the run there is at step {state.step}, beyond steps = {settings.steps}")
    return state, encoded, test


def batches(encoded: Sequence[Encoded], settings: Settings) -> Iterator[tuple[Array, Array]]:
    """Yield rows of ids and masks, both (batch_size, S + 1), forever; the documents are packed again for each epoch.

    Rows in which no token counts are left out. Raises ValueError if no others are left.
    """
    none = (0, settings.sequence_length + 1)
    rows, masks = np.empty(none, np.int32), np.empty(none, np.bool_)
    for epoch in count():
        packed = _counting(encoded, settings, np.random.default_rng([settings.seed, epoch]))
        rows, masks = np.concatenate([rows, packed[0]]), np.concatenate([masks, packed[1]])
        while len(rows) >= settings.batch_size:
            yield rows[: settings.batch_size], masks[: settings.batch_size]
            rows, masks = rows[settings.batch_size :], masks[settings.batch_size :]


def mean_loss(weights: Weights, config: Config, batch: tuple[Array, Array]) -> float:
    """Return the mean cross-entropy, in nats per token, of rows of ids and masks, both (B, S + 1)."""
    rows, masks = batch
    losses = [
        cross_entropy(forward(weights, config, ids[:-1])[0][mask[1:]], ids[1:][mask[1:]])[0]
        for ids, mask in zip(rows, masks, strict=True)
    ]
    return sum(losses) / int(np.sum(masks[:, 1:]))


def _counting(encoded: Sequence[Encoded], settings: Settings, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return packed rows with tokens that count, and their masks. Raises ValueError if there are none."""
    rows, masks = pack(encoded, settings.sequence_length, rng)
    counting = masks.any(axis=1)
    if not counting.any():
        raise ValueError("no token of the documents counts in the loss, so there is nothing to learn")
    return rows[counting], masks[counting]


def _write_tokenizer(folder: Path, documents: Sequence[Document], config: Config) -> None:
    """Make the folder, with a tokenizer for these documents."""
    backend = train_tokenizer(texts(documents), config.vocab_size)
    write_tokenizer(folder, backend, config.max_position_embeddings)
    text = json.dumps(generation_config(backend), indent=2) + "\n"
    (folder / "generation_config.json").write_bytes(text.encode())


def _write_log(file: Path, log: Sequence[Mapping[str, float]]) -> None:
    with written_aside(file) as part, part.open("w", encoding="utf-8", newline="") as opened:
        # a resumed run may have held-out documents that its beginning had not
        writer = csv.DictWriter(opened, list(dict.fromkeys(chain(*log))), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: round(value, 6) for key, value in line.items()} for line in log)


def _digest(encoded: Sequence[Encoded]) -> str:
    digest = hashlib.sha256()
    for ids, mask in encoded:
        digest.update(ids.tobytes() + mask.tobytes())
    return digest.hexdigest()
