"""Rules for settings, read from the annotations of a TypedDict; test_config.py tests those of Config."""

from __future__ import annotations

import math
from typing import Annotated, TypedDict

import numpy as np
import pytest

from qwen3np.rules import REQUIRED, Count, Rule, Switch, broken, finite, many, one_of, plain, rules, whole


class Sampling(TypedDict, total=False):
    top_k: Count | None
    top_p: Annotated[float, finite(lambda x: 0 < x <= 1, "above 0, at most 1")]
    greedy: Switch
    mode: Annotated[str, Rule(lambda x: x in ("a", "b"), "a and b", default="a")]
    stop_ids: Annotated[tuple[int, ...], many(whole(0, 2000))]


def test_each_value_that_breaks_its_rule_is_named_with_what_is_supported():
    wrong = {"top_k": -1, "top_p": 0, "greedy": 1, "mode": "c", "stop_ids": (1, 2001), "other": object()}
    assert list(broken(Sampling, wrong)) == [
        ("top_k", -1, "whole numbers from 0 to 2^63 - 1"),
        ("top_p", 0, "finite numbers above 0, at most 1"),
        ("greedy", 1, "true and false"),
        ("mode", "c", "a and b"),
        ("stop_ids", (1, 2001), "a tuple or list of whole numbers from 0 to 2,000"),
    ]
    right = {"top_k": None, "top_p": 1, "greedy": True, "mode": "b", "stop_ids": (0, 2000)}
    assert not list(broken(Sampling, right))
    assert not list(broken(Sampling, {}))


@pytest.mark.parametrize("value", [None, True, "1", math.nan, math.inf, 10**400, [1], np.float64(0.5)])
def test_what_is_no_finite_number(value):
    assert not finite(lambda x: True, "").holds(value)


def test_a_rule_may_have_a_default():
    found = rules(Sampling)
    assert found["mode"].default == "a"
    assert found["top_k"].default is REQUIRED
    assert rules(Sampling) is found  # read once


def test_values_are_made_plain():
    assert plain([np.int64(3), [np.float32(0.5)], "a"]) == (3, (0.5,), "a")
    assert type(plain(np.int64(3))) is int
    assert type(plain(np.bool_(True))) is bool


def test_values_may_be_listed():
    assert one_of("a", "b").supported == '"a" and "b"'
    assert not one_of("a", "b").holds(["a"])
