"""A model for lm-evaluation-harness (extra `eval`), under the name qwen3np.

Newer releases of lm-eval find it by its entry point. For 0.4.13 and older, this file is lm-eval's command line with
the model registered:

    python -m qwen3np.harness run --model qwen3np --model_args pretrained=FOLDER --tasks arc_easy
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from qwen3np.cache import KVCache
from qwen3np.generate import PREFILL_CHUNK
from qwen3np.guard import forward
from qwen3np.loading import load
from qwen3np.numerics import named
from qwen3np.sampling import log_probabilities
from qwen3np.scoring import CHUNK
from qwen3np.settings import GenerationSettings


@register_model("qwen3np")  # pyright: ignore[reportUntypedClassDecorator]
class Harness(TemplateLM):  # pyright: ignore[reportUntypedBaseClass]
    """A checkpoint as lm-eval asks it: log-likelihoods of continuations and of whole texts, and generated texts."""

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        revision: str | None = None,
        gguf_file: str | None = None,
        adapter: str | None = None,
        weights_dtype: str = "auto",
        numerics: str = "float32",
        engine: str = "fast",
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """Load a checkpoint; the first arguments are those of qwen3np.load, and None is the built-in one.

        max_length: the context, if shorter than the model's. enable_thinking: passed to the chat template.
        think_end_token: generated text counts from behind it. device and max_batch_size, which lm-eval passes to every
        model, have no effect; batch_size matters to generated texts only.
        """
        super().__init__()
        self._model = load(
            pretrained, revision=revision, gguf_file=gguf_file, adapter=adapter, weights_dtype=weights_dtype
        )
        self._name = pretrained or "qwen3np-builtin"
        self._computed: dict[str, Any] = {"numerics": numerics, "engine": engine}
        self._batch_size = int(batch_size) if str(batch_size).isdecimal() else 8
        context = self._model.config.max_position_embeddings
        self.max_length = min(int(max_length or context), context)
        self._most, self._think_end = int(max_gen_toks), think_end_token
        self._template_options: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text; it stands before a text without context."""
        end = self._model.text.eos_token_id
        return self._model.config.eos_token_id[0] if end is None else end

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests tells tokenizers apart by."""
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Return the ids of a text. Qwen3's tokenizers add none of their own."""
        return self._model.text.encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the chat template, for lm-eval's log."""
        return self._model.text.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return messages as the text of a prompt."""
        return self._model.text.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._template_options,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation after its context, and whether greedy decoding gives it.

        A request is (what lm-eval caches it by, context, continuation). Sorted, they share what they begin with.
        """
        config = self._model.config
        longest = max((len(context) + len(more) for _, context, more in requests), default=1)
        length = min(longest, self.max_length + 1)
        cache = KVCache.allocate(config, 1, length, named(self._computed["numerics"]).storage)
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda n: requests[n][1] + requests[n][2])
        for n in tqdm(order, desc="log-likelihoods", disable=disable_tqdm or None):
            key, context, continuation = requests[n]
            found[n] = self._likelihood(context, continuation, cache)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, found[n])
        return [found[n] for n in range(len(requests))]

    def _likelihood(self, context: list[int], continuation: list[int], cache: KVCache) -> tuple[float, bool]:
        if len(continuation) > self.max_length:
            raise ValueError(f"a continuation of {len(continuation)} tokens exceeds the context, {self.max_length}")
        ids = np.array([*context, *continuation][-(self.max_length + 1) :])
        first = len(ids) - len(continuation) - 1  # the position whose logits are the first that count
        at, total, greedy = cache.keep_prefix(0, ids[:first].tolist()), 0.0, True
        while at < len(ids) - 1:
            alone = at < first  # context, whose logits are not wanted
            end = min(at + PREFILL_CHUNK, first) if alone else min(at + CHUNK, len(ids) - 1)
            logits = forward(
                self._model.weights,
                self._model.config,
                ids[at:end],
                cache,
                last_only=alone,
                head=not alone,
                **self._computed,
            )[0]
            if not alone:
                targets = ids[at + 1 : end + 1]
                total += float(log_probabilities(logits)[np.arange(end - at), targets].sum())
                greedy = greedy and bool((logits.argmax(-1) == targets).all())
            at = end
        return total, greedy

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in windows as long as the context where it exceeds that."""
        totals: list[float] = []
        for (text,) in tqdm([request.args for request in requests], desc="texts", disable=disable_tqdm or None):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pieces = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(total for total, _ in self._loglikelihood_tokens(pieces, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each prompt, up to the first of its stop strings."""
        found: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda n: (str(requests[n].args[1]), len(requests[n].args[0])))
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm or None) as bar:
            for _, group in groupby(order, key=lambda n: str(requests[n].args[1])):
                rows = list(group)
                for start in range(0, len(rows), self._batch_size):
                    part = rows[start : start + self._batch_size]
                    prompts = [requests[n].args[0] for n in part]
                    for n, text in zip(part, self._continued(prompts, requests[part[0]].args[1]), strict=True):
                        found[n] = text
                        self.cache_hook.add_partial("generate_until", requests[n].args, text)
                    bar.update(len(part))
        return [found[n] for n in range(len(requests))]

    def _continued(self, prompts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        text = self._model.text
        given = normalize_gen_kwargs(dict(options), self._most)
        stops = handle_stop_sequences(given["until"], eos=text.decode([self.eot_token_id]))
        most = given["max_gen_toks"]
        if most >= self.max_length:
            raise ValueError(f"max_gen_toks {most} leaves no room for a prompt in a context of {self.max_length}")
        settings: dict[str, Any] = {
            name: value for name, value in given.items() if name in GenerationSettings.__annotations__
        }
        settings = {"temperature": 0.0, **settings}  # as lm-eval's own models: the checkpoint's defaults may sample
        settings |= {"max_new_tokens": most, "stop_strings": stops, "progress": False, **self._computed}
        batch = [(text.encode(prompt) or [self.eot_token_id])[-(self.max_length - most) :] for prompt in prompts]
        answers, _ = self._model.generate(batch, **settings)
        said = [text.decode(ids, skip_special_tokens=True) for ids in answers]
        return [postprocess_generated_text(one, stops, self._think_end) for one in said]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
