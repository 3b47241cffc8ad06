"""The sizes of a Qwen3 model, under Hugging Face's names, and three questions about its layers and its context."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from qwen3np.rules import Count, Counts, Even, Positive, Rule, Size, Switch, finite, many, one_of, whole


@dataclass(frozen=True)
class Yarn:
    """The settings of YaRN, under their names in rope_scaling; rope.py shows what they do."""

    factor: Annotated[float, finite(lambda x: x >= 1, "from 1")]
    original_max_position_embeddings: Size
    attention_factor: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: Switch = True


@dataclass(frozen=True)
class Config:
    """The architecture of one Qwen3 model. Raises ConfigError with the field, its value, and what is supported."""

    vocab_size: Size  # V
    hidden_size: Size  # D
    intermediate_size: Size  # F
    num_hidden_layers: Annotated[int, whole(1, 1000)]  # L; the largest released model has 94
    num_attention_heads: Size  # H
    num_key_value_heads: Size  # K
    head_dim: Even  # Dh; the rotation works on halves of a head
    rope_theta: Positive
    rms_norm_eps: Positive = 1e-6
    max_position_embeddings: Size = 32768
    attention_bias: Switch = False
    tie_word_embeddings: Switch = False
    initializer_range: Positive = 0.02
    eos_token_id: Counts = ()
    rope_scaling: Annotated[Yarn, Rule(lambda x: isinstance(x, Yarn), "None and Yarn(...)")] | None = None
    sliding_window: Size | None = None  # None: no layer slides
    max_window_layers: Count = 0  # the first layer that slides, where layer_types is empty
    layer_types: Annotated[tuple[str, ...], many(one_of("full_attention", "sliding_attention"))] = ()
    num_experts: Count = 0  # E; 0: no layer is sparse
    num_experts_per_tok: Count = 0
    moe_intermediate_size: Count = 0
    norm_topk_prob: Switch = False
    decoder_sparse_step: Size = 1
    mlp_only_layers: Counts = ()

    def __post_init__(self) -> None:
        """Check each value, then those that must fit together."""
        self._file().check(self)

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer has a router and experts instead of one MLP."""
        return self.num_experts > 0 and layer not in self.mlp_only_layers and not (layer + 1) % self.decoder_sparse_step

    def window(self, layer: int) -> int | None:
        """Return how many positions a position of this layer sees, up to its own; None: all of them."""
        slides = self.layer_types[layer] != "full_attention" if self.layer_types else layer >= self.max_window_layers
        return self.sliding_window if slides else None

    def extended(self, factor: float) -> "Config":
        """Return this config with YaRN, for a context `factor` times as long. Raises ConfigError for one below 1."""
        return self._file().extended(self, factor)

    @staticmethod
    def _file():  # config.json: imported when called, since it imports this file
        from qwen3np.files import hf_config

        return hf_config

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> "Config":
        """Read the contents of a config.json, as files/hf_config.py describes. Raises ConfigError."""
        return cls._file().from_dict(d)

    @classmethod
    def from_file(cls, path: str | Path) -> "Config":
        """Read a config.json, or the one in a folder. Raises ConfigError, which names the file."""
        return cls._file().from_file(path)

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of a config.json that this package and transformers (4.51 or newer) read."""
        return self._file().to_dict(self)
