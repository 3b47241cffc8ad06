from __future__ import annotations

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3np.sampling import log_probabilities, processed_logits
from qwen3np.sampling import sample as sample_checked
from qwen3np.settings import checked

VOCAB_SIZE = 151_936
PLAIN = {"temperature": 1.0}


def sample(logits, settings, *rest, **named):
    return sample_checked(logits, checked(settings, needed=False), *rest, **named)


# Small integers make ties at every boundary; the floats make none.
logits_lists = st.one_of(
    st.lists(st.integers(-6, 6), min_size=1, max_size=40),
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
).map(lambda values: np.array(values, np.float32))

all_parameters = st.builds(
    dict,
    temperature=st.sampled_from([0.0, 0.1, 1.0, 50.0]),
    top_k=st.none() | st.integers(0, 50),
    top_p=st.none() | st.floats(0.01, 1),
    min_p=st.none() | st.floats(0, 1),
    repetition_penalty=st.none() | st.floats(0.5, 2),
)


def kept(logits, **changes):
    return set(np.flatnonzero(np.isfinite(processed_logits(logits, PLAIN | changes))))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {0, 1, 2, 3}),  # 2 and 3 tie for the third place
        ({"top_k": 0}, {0, 1, 2, 3}),
        ({"top_p": 0.75}, {0, 1}),  # 1/8 + 1/8 <= 1 - 0.75: both go
        ({"top_p": 0.8}, {0, 1, 3}),  # one of the two goes, the lower id
        ({"top_p": 0.5}, {1}),
        ({"top_p": 1e-9}, {1}),
        ({"min_p": 0.5}, {0, 1}),
        ({"min_p": 0.25}, {0, 1, 2, 3}),
        ({"temperature": 0.5, "min_p": 0.25}, {0, 1}),  # at 1/2 the ratios are squared
        ({"top_k": 2, "top_p": 0.6}, {1}),  # 2/3 and 1/3 once top-k has renormalised
        ({"min_p": 0.5, "top_p": 0.6}, {0, 1}),  # min-p first would leave 1/3 to id 0 and drop it
        ({"temperature": 0.0}, {1}),
    ],
)
def test_filters_by_hand(changes, expected):
    # Probabilities 1/4, 1/2, 1/8, 1/8.
    assert kept(np.log2([0.25, 0.5, 0.125, 0.125]) * np.log(2), **changes) == expected


@pytest.mark.parametrize(("n", "p", "first"), [(10, 0.9, 1), (10, 0.8, 2), (5, 0.6, 2)])
def test_top_p_cuts_equal_ones_where_torch_does(n, p, first):
    # TopPLogitsWarper of transformers; in float64 0.1 is more than 1 - 0.9, and nothing would go
    assert kept(np.zeros(n), top_p=p) == set(range(first, n))


def test_top_p_of_one_is_off():
    assert kept([0.0, -200.0], top_p=1.0) == {0, 1}  # the probability of id 1 is 0 in float32


def test_repetition_penalty_by_hand():
    parameters = PLAIN | {"repetition_penalty": 2.0}
    processed = processed_logits([4.0, -4.0, 0.0, 3.0], parameters, previous_ids=[0, 1, 1, 0, 2])
    assert processed.tolist() == [2.0, -8.0, 0.0, 3.0]
    greedy = parameters | {"temperature": 0.0}
    assert sample([4.0, -4.0, 0.0, 3.0], greedy, np.random.default_rng(0), [0]) == 3


@given(logits_lists, st.floats(1, 3), st.sets(st.integers(0, 39)))
def test_repetition_penalty_changes_previous_ids_alone(logits, penalty, previous):
    previous = [i for i in previous if i < len(logits)]
    processed = processed_logits(logits, PLAIN | {"repetition_penalty": penalty}, previous)
    others = np.setdiff1d(np.arange(len(logits)), previous)
    assert np.array_equal(processed[others], logits[others])
    assert np.all(processed[previous] <= logits[previous])


@given(logits_lists, st.floats(0.01, 1), st.floats(0.01, 1), st.integers(1, 40), st.integers(1, 40))
def test_kept_set_shrinks_as_filters_tighten(logits, p, q, k, m):
    p, q, k, m = min(p, q), max(p, q), min(k, m), max(k, m)
    assert kept(logits, top_p=p) <= kept(logits, top_p=q)
    assert kept(logits, top_k=k) <= kept(logits, top_k=m)
    assert kept(logits, min_p=q) <= kept(logits, min_p=p)
    assert kept(logits, top_k=k, top_p=p, min_p=q) <= kept(logits, top_k=m, top_p=q, min_p=p)


@given(logits_lists, st.floats(0.01, 1))
def test_top_p_keeps_the_smallest_nucleus(logits, p):
    """Holtzman et al. 2019, section 3.1: the smallest set of the likeliest ids whose mass reaches p."""
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum()
    nucleus = probabilities[list(kept(logits, top_p=p))]
    rounding = 8e-7  # a dozen float32 roundings, 6e-8 each: exp, sum, quotient, threshold
    assert nucleus.sum() >= p - rounding
    assert nucleus.sum() - nucleus.min() < p + rounding
    assert nucleus.min() >= np.sort(probabilities)[-len(nucleus)]


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=40), st.integers(-100, 100), all_parameters)
def test_a_constant_added_to_the_logits_changes_nothing(logits, constant, parameters):
    # Integers and temperature 1, so that float32 adds exactly.
    parameters = parameters | {"temperature": 1.0, "repetition_penalty": None}
    first, second = (processed_logits(np.add(logits, shift), parameters) for shift in (0, constant))
    assert np.array_equal(first + constant, second)
    draws = [sample(np.add(logits, c), parameters, np.random.default_rng(3)) for c in (0, constant)]
    assert draws[0] == draws[1]


@given(logits_lists, st.integers(0, 2**32))
def test_greedy_is_the_first_of_the_highest(logits, seed):
    expected = logits.tolist().index(max(logits.tolist()))
    greedy = {"top_k": 5, "top_p": 0.5, "min_p": 0.1}
    assert sample(logits, greedy, np.random.default_rng(seed)) == expected
    assert np.flatnonzero(np.isfinite(processed_logits(logits, greedy))).tolist() == [expected]


@given(logits_lists, all_parameters, st.integers(0, 2**32))
def test_each_draw_takes_one_number_and_a_kept_id(logits, parameters, seed):
    rng, again = np.random.default_rng(seed), np.random.default_rng(seed)
    drawn = [sample(logits, parameters, rng, previous_ids=[0]) for _ in range(3)]
    allowed = np.isfinite(processed_logits(logits, parameters, previous_ids=[0]))
    assert allowed[drawn].all()
    assert drawn == [sample(logits, parameters, again, previous_ids=[0]) for _ in range(3)]
    assert rng.random() == np.random.default_rng(seed).random(4)[3]


def test_draw_is_the_inverse_cdf():
    # Equal logits: the id is the random number times the vocabulary, rounded down.
    rng, numbers = np.random.default_rng(1), np.random.default_rng(1).random(50)
    drawn = [sample(np.zeros(VOCAB_SIZE), PLAIN, rng) for _ in numbers]
    assert drawn == (numbers * VOCAB_SIZE).astype(int).tolist()


def test_ids_of_probability_zero_are_never_drawn():
    logits = np.full(100, -np.inf)
    logits[[40, 60]] = 1.0
    rng = np.random.default_rng(0)
    assert {sample(logits, PLAIN, rng) for _ in range(200)} == {40, 60}

    # The all-zero state of the Mersenne Twister yields nothing but zeros.
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": np.zeros(624, np.uint32), "pos": 0}}
    rng = np.random.Generator(twister)
    assert rng.random() == 0
    assert sample(logits, PLAIN, rng) == 40


def test_many_unlikely_ids_are_drawn_as_often_as_they_should():
    # each is less than half of the last bit of float32 at 1, where a sum in float32 would stand still
    logits = np.full(100_001, -16.7)
    logits[0] = 0
    rng, others = np.random.default_rng(0), 100_000 * np.exp(-16.7)
    drawn = [sample(logits, PLAIN, rng) for _ in range(1000)]
    expected = np.count_nonzero(np.random.default_rng(0).random(1000) * (1 + others) > 1)
    assert np.count_nonzero(drawn) == expected > 0


@pytest.mark.parametrize("n", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_chi_square(n):
    rng = np.random.default_rng(20)
    logits = rng.normal(0, 2, 40).astype(np.float32)
    previous = np.argsort(logits)[-3:]
    parameters = {"temperature": 0.8, "top_k": 16, "top_p": 0.97, "min_p": 0.01, "repetition_penalty": 1.2}
    # The definition in float64, id by id from the likeliest.
    scores = [(x if i not in previous else x / 1.2 if x > 0 else x * 1.2) / 0.8 for i, x in enumerate(logits.tolist())]
    likeliest = sorted(range(40), key=lambda i: -scores[i])[:16]
    weights = np.exp([scores[i] for i in likeliest])
    before = np.cumsum(weights) - weights
    stay = (before < 0.97 * weights.sum()) & (weights >= 0.01 * weights[0])
    expected = n * weights[stay] / weights[stay].sum()
    assert len(expected) == 12

    drawn = [sample(logits, parameters, rng, previous) for _ in range(n)]
    counts = np.bincount(drawn, minlength=40)[np.array(likeliest)[stay]]
    assert counts.sum() == n
    # Upper 0.001 point for 11 degrees of freedom: NIST/SEMATECH e-Handbook, section 1.3.6.7.4.
    assert ((counts - expected) ** 2 / expected).sum() < 31.264


@given(logits_lists)
def test_log_probabilities(logits):
    row, exact = log_probabilities(logits), logits.astype(np.float64)
    assert row.dtype == np.float64
    # Measured 1.4e-14: a few roundings of numbers up to 60.
    np.testing.assert_allclose(row, exact - np.logaddexp.reduce(exact), rtol=0, atol=4e-14)
    rows = np.stack([exact, exact + 1])
    assert np.array_equal(log_probabilities(rows)[0], row)
    assert np.array_equal(rows[0], logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-0.1, np.nan, np.inf, None, "1")),
        *(("top_k", value) for value in (-1, 1.5, np.nan, "20")),
        *(("top_p", value) for value in (0, -0.5, 1.01, np.nan, "0.9")),
        *(("min_p", value) for value in (-0.01, 1.01, np.nan, [0.1])),
        *(("repetition_penalty", value) for value in (0, -1.0, np.inf, np.nan)),
    ],
)
def test_parameters_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be ") as error:
        checked({name: value}, needed=False)
    assert repr(value) in str(error.value)


def test_parameters_in_range():
    checked({"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}, needed=False)
    checked({"temperature": np.float32(0.6), "top_k": np.int64(20), "top_p": 1e-9, "min_p": 1}, needed=False)


@pytest.mark.parametrize("parameters", [PLAIN, {}, {"temperature": 0.6, "top_k": 2}])
@pytest.mark.parametrize("bad", [[1, np.nan, 2], [1, np.inf, 2], [-np.inf] * 3])
def test_logits_without_a_finite_maximum(bad, parameters):
    for function in (processed_logits, lambda *a: sample(*a, np.random.default_rng(0))):
        with pytest.raises(ValueError, match="no finite maximum"):
            function(bad, parameters)
    with pytest.raises(ValueError, match="no finite maximum"):
        log_probabilities([[1, 2, 3], bad])


def test_other_bad_inputs():
    with pytest.raises(ValueError, match=r"shape \(V,\), got \(1, 2\)"):
        processed_logits([[1, 2]], PLAIN)
    with pytest.raises(ValueError, match=r"shape \(V,\), got \(0,\)"):
        processed_logits([], PLAIN)
    with pytest.raises(ValueError, match=r"float32 under .*temperature=1e-40"):
        processed_logits([5, 6], PLAIN | {"temperature": 1e-40})
    for previous in ([-1, 0], [0, 2]):
        with pytest.raises(ValueError, match=r"previous_ids must be in \[0, 2\)"):
            processed_logits([5, 6], PLAIN | {"repetition_penalty": 1.1}, previous)


def drawn_case(rng):
    """Logits, parameters and previous ids: every vocabulary size, kind of logits and combination of filters."""
    size = int(rng.choice([1, 2, 10, 17, 100, 1000, 5000, 32_000, VOCAB_SIZE]))
    normal = rng.normal(0, rng.choice([0.01, 0.5, 2, 4]), size).astype(np.float32)
    logits = (
        normal,
        (normal + 15).astype(ml_dtypes.bfloat16).astype(np.float32),
        np.round(normal),
        rng.integers(0, 2, size).astype(np.float32),
        np.where(rng.random(size) < 0.5, normal, -np.inf).astype(np.float32),
        np.zeros(size, np.float32),
    )[rng.integers(6)]
    logits[0] = max(logits[0], -50)  # never -inf alone
    maybe = {
        "top_k": int(rng.choice([1, 2, 20, 50, 1000, 200_000])),
        "top_p": float(rng.choice([1e-6, 0.05, 0.1, 0.25, 0.5, 0.75, 0.8, 0.9, 0.95, 0.999, rng.uniform(0.01, 1)])),
        "min_p": float(rng.choice([0, 0.01, 0.05, 0.25, 0.5, 1, rng.uniform(0, 1)])),
        "repetition_penalty": float(rng.choice([0.5, 1.05, 1.3, 2])),
    }  # fmt: skip
    on = {name: value for name, value in maybe.items() if rng.random() < 0.5}
    temperature = float(rng.choice([0.001, 0.1, 0.6, 1.0, 1.5, 1000.0]))
    previous = rng.integers(0, size, rng.integers(1, 50))
    return logits, dict(temperature=temperature, **on), previous


@pytest.mark.oracle
def test_agrees_with_transformers():
    """1,000 drawn cases: the scores equal bit for bit, the kept set equal but for what torch leaves open.

    Open are (1) which of equal scores go where the top-p boundary parts them, since torch.sort is not stable, and
    (2) ids nearer to that boundary than torch's own error: its softmax adds float32 numbers in 8 or 16 lanes,
    which for large vocabularies is off by up to 1e-4 (here 7e-5 with AVX-512, 8e-5 with AVX2).
    """
    torch = pytest.importorskip("torch")
    from transformers import GenerationConfig
    from transformers.generation.logits_process import TopPLogitsWarper
    from transformers.generation.utils import GenerationMixin

    model = GenerationMixin()
    model.config = SimpleNamespace(is_encoder_decoder=False)
    rng = np.random.default_rng(3)
    rounded = 0
    for _ in range(1000):
        logits, parameters, previous = drawn_case(rng)
        config = GenerationConfig(do_sample=True, **parameters)
        ids, scores, boundary = torch.tensor(previous)[None], torch.tensor(logits)[None], None
        for processor in model._get_logits_processor(config, len(previous)):
            if isinstance(processor, TopPLogitsWarper):
                boundary = scores
            scores = processor(ids, scores)
        expected = scores[0].numpy()

        ours = processed_logits(logits, parameters, previous)
        differing = np.flatnonzero(ours != expected)
        if not differing.size:
            continue
        # Bit for bit where both keep an id; and nothing but top-p leaves anything open.
        assert np.isneginf(np.minimum(ours, expected)[differing]).all()
        assert boundary is not None
        if np.array_equal(np.sort(ours), np.sort(expected)):
            assert np.ptp(np.maximum(ours, expected)[differing]) == 0  # (1)
            continue
        rounded += 1
        ordered = boundary[0].sort().values
        exact = ordered.double().softmax(-1).cumsum(-1)
        error = (ordered.softmax(-1).cumsum(-1) - exact).abs().max().item()
        stay = sorted(np.isfinite(scores).sum() for scores in (ours, expected))
        doubtful = exact.numpy()[len(logits) - stay[1] : len(logits) - stay[0]]
        assert np.abs(doubtful - (1 - parameters["top_p"])).max() <= error < 1e-4  # (2)
    assert rounded <= 10  # 3 with AVX-512, 7 with AVX2


@pytest.mark.oracle
def test_log_probabilities_agree_with_torch():
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(0).normal(0, 5, (2, VOCAB_SIZE)).astype(np.float32)
    expected = torch.tensor(logits).double().log_softmax(-1).numpy()
    np.testing.assert_allclose(log_probabilities(logits), expected, rtol=0, atol=1e-14)  # measured 3.6e-15
