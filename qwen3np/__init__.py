"""Qwen3 in NumPy: every layer is a stateless function over a dictionary of weights."""

import signal
import sys
from typing import TYPE_CHECKING, Any

# Ctrl-C while the command line is still importing all this ends it without a traceback; cli.main takes over then.
if (
    sys.orig_argv[1:3] == ["-m", "qwen3np"] or getattr(sys, "argv", [""])[0].endswith(("/qwen3np", "\\qwen3np.exe"))
) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from qwen3np.audit import audit
from qwen3np.cache import KVCache
from qwen3np.config import Config
from qwen3np.conversation import Conversation
from qwen3np.embeddings import embed, rerank
from qwen3np.errors import CheckpointError, ConfigError, ContextOverflowError, NonFiniteError
from qwen3np.files.checkpoint import read_checkpoint, save_checkpoint
from qwen3np.generate import generate, steps, stream
from qwen3np.guard import forward
from qwen3np.loading import load
from qwen3np.model import Model
from qwen3np.sampling import log_probabilities, processed_logits
from qwen3np.scoring import score
from qwen3np.settings import GenerationSettings
from qwen3np.tokenizer import Tokenizer, stop_at
from qwen3np.weights import Weights, count_parameters, init_weights

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "ContextOverflowError",
    "Conversation",
    "GenerationSettings",
    "KVCache",
    "Model",
    "NonFiniteError",
    "Tokenizer",
    "Weights",
    "audit",
    "batch",
    "count_parameters",
    "damage",
    "embed",
    "forward",
    "generate",
    "init_weights",
    "load",
    "log_probabilities",
    "processed_logits",
    "read_checkpoint",
    "rerank",
    "save_checkpoint",
    "score",
    "steps",
    "stop_at",
    "stream",
]
__version__ = "0.1.0"


if TYPE_CHECKING:  # imported when they are asked for
    from qwen3np.audit.damage import damage
    from qwen3np.batches import batch
else:

    def __getattr__(name: str) -> Any:
        if name == "SamplingParameters":
            from qwen3np.settings import sampling_parameters

            return sampling_parameters
        if name == "damage":
            from qwen3np.audit.damage import damage

            return damage
        if name == "batch":
            from qwen3np.batches import batch

            return batch
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
