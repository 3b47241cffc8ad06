"""The public functions have numpydoc sections, and their examples print what they show."""

from __future__ import annotations

import doctest
import inspect
import re

import numpy as np
import pytest

import qwen3np
from qwen3np.files import hf_config
from qwen3np.porting import compare, record
from qwen3np.porting.diagnose import diagnose
from qwen3np.training.loop import train
from qwen3np.verify import verify

MODEL = qwen3np.Model
SHORT = ["log_probabilities", "processed_logits", "steps", "stop_at", "stream"]  # a paragraph says it all
FULL = [
    *(f for name in qwen3np.__all__ if inspect.isfunction(f := getattr(qwen3np, name)) and name not in SHORT),
    *(hf_config.from_dict, hf_config.from_file),  # of Config
    *(MODEL.complete, MODEL.trace, MODEL.save),
    qwen3np.Tokenizer.encode,
    *(record, compare, diagnose, train, verify),
]
WITH_EXAMPLES = [MODEL.__call__, MODEL.generate, MODEL.stream, MODEL.score, qwen3np.processed_logits]


@pytest.mark.parametrize("function", FULL, ids=lambda f: f.__qualname__)
def test_sections(function):
    text = inspect.getdoc(function)
    sections = re.findall(r"^(.+)\n-+$", text, re.MULTILINE)
    expected = ["Parameters", "Returns", "Raises", "Examples"]
    if "Yields" in sections:
        expected[1] = "Yields"
    if inspect.signature(function).return_annotation == "None":
        expected.remove("Returns")
    if function is qwen3np.count_parameters:  # a config has been checked
        expected.remove("Raises")
    assert sections == expected
    described = re.split(r"\n\n(?:Returns|Yields|Raises)\n", text.partition("Parameters\n-")[2])[0]
    names = {
        name.strip("* ") for line in re.findall(r"^\w.*|^\*.*", described, re.MULTILINE) for name in line.split(",")
    }
    own = inspect.signature(inspect.unwrap(function), follow_wrapped=False).parameters
    settings = qwen3np.GenerationSettings.__annotations__ if "settings" in names else ()
    assert {name for name in own if name not in ("self", *settings)} <= names


@pytest.mark.parametrize("function", [*FULL, *WITH_EXAMPLES], ids=lambda f: f.__qualname__)
def test_examples(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(function)
    example = doctest.DocTestParser().get_doctest(text, {"qwen3np": qwen3np, "np": np}, function.__name__, None, None)
    assert example.examples
    printed = []
    failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=printed.append).failed
    assert not failed, "".join(printed)
