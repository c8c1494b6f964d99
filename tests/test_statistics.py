import math

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from smark_jax import statistics

READ_OUTS = {
    "flat": np.ones(16),
    "two levels": np.r_[np.full(4, 3.0), np.full(11, 0.7)],
    "one chip": np.r_[1.0, np.zeros(9)],
    "dominated": np.r_[5.0, np.full(12, 0.5)],
    "random": np.random.default_rng(0).normal(size=14),
    "tiny": np.random.default_rng(1).normal(size=12) * 1e-30,
}


def exact(y: np.ndarray, t: np.ndarray) -> np.ndarray:
    """P(|<u, b>| >= t) over all 2^m words b, with a margin for rounding."""
    u = np.asarray(y, np.float64) / np.abs(y).max()
    scores = np.abs(reference.all_words(len(u)) @ (u / np.linalg.norm(u)))
    return (scores[None] >= t[:, None] - 1e-9).mean(axis=1)


@pytest.mark.parametrize("name", READ_OUTS)
def test_t1plus_bounds_the_exact_tail_everywhere(name):
    y = READ_OUTS[name]
    u = np.abs(y) / np.abs(y).max()
    t = np.linspace(0.01, (u / np.linalg.norm(u)).sum(), 200)
    bound = np.exp(statistics.log_p_value(t, y))
    assert (bound >= exact(y, t) * (1 - 1e-9)).all()
    assert (np.diff(bound) <= 1e-12).all()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=10).filter(any))
def test_t1plus_bounds_the_exact_tail_for_any_read_out(y):
    y = np.array(y) / 7
    t = np.linspace(0.05, np.abs(y).sum() / np.linalg.norm(y), 20)
    assert (np.exp(statistics.log_p_value(t, y)) >= exact(y, t) * (1 - 1e-9)).all()


@pytest.mark.parametrize("sharpened", [3.0, 1.0])
def test_a_sharper_constant_would_break_the_bound(sharpened):
    """Negative control: enumeration refutes a normal tail with a smaller constant than Bentkus' (1: the usual z)."""
    worst = 0.0
    for m in range(2, 17):
        u = np.ones(m) / math.sqrt(m)
        t = np.unique(np.abs(reference.all_words(m) @ u))
        t = t[t > 0.5]
        normal = np.exp(special.log_ndtr(-t))
        worst = max(worst, float((exact(np.ones(m), t) / (2 * sharpened * normal)).max()))
    assert worst > 1.0
    assert worst * sharpened <= 1 / (4 * np.exp(special.log_ndtr(-math.sqrt(2)))) * (1 + 1e-9)


def test_never_worse_than_hoeffding_and_at_its_best_exact():
    y = np.random.default_rng(2).normal(size=304)
    t = np.linspace(2, 20, 100)
    assert (statistics.log_p_value(t, y) <= math.log(2) - t**2 / 2 + 1e-9).all()
    flat = np.ones(304)
    np.testing.assert_allclose(statistics.log_p_value(math.sqrt(304), flat), -303 * math.log(2), rtol=1e-9)


@pytest.mark.parametrize("m", [5, 60])
def test_newton_finds_the_infimum_of_brute_force(m):
    y = np.abs(np.random.default_rng(m).normal(size=m)) + 0.01
    u = y / np.linalg.norm(y)
    for t in np.linspace(0.5, 0.98 * u.sum(), 8):
        ours = statistics._log_chernoff_one(t, u)
        np.testing.assert_allclose(ours, reference.chernoff_log(t, u), rtol=1e-3, atol=1e-3)


def test_p_values_live_in_logarithms():
    y = np.ones(65_536)
    log10 = statistics.log_p_value(256.0, y) / math.log(10)
    np.testing.assert_allclose(log10, -65_535 * math.log10(2), rtol=1e-9)


def test_threshold_is_where_the_p_value_crosses():
    for y in (np.random.default_rng(3).normal(size=304), np.ones(1024)):
        for log_alpha in (math.log(0.1), math.log(1e-12), -200.0):
            bar = statistics.threshold(y, log_alpha)
            assert statistics.log_p_value(bar, y) <= log_alpha < statistics.log_p_value(bar - 1e-6, y)


@pytest.mark.parametrize("log_alpha", [-1e-3, math.log(0.1), -14.0, -27.6, -200.0])
def test_thresholds_are_those_of_a_bisection_of_p_values(log_alpha):
    rng = np.random.default_rng(5)
    for y in (np.ones(32), np.ones(304), np.r_[rng.normal(size=4) * 20, rng.normal(size=300)], rng.normal(size=4096)):
        low, high = 0.0, float(np.abs(y).sum() / np.linalg.norm(y))
        if statistics.log_p_value(high, y) > log_alpha:
            assert statistics.threshold(y, log_alpha) == math.inf
            continue
        while high - low > 1e-10:
            middle = (low + high) / 2
            low, high = (low, middle) if statistics.log_p_value(middle, y) <= log_alpha else (middle, high)
        assert statistics.threshold(y, log_alpha) == pytest.approx(high, abs=2e-9)


def test_thresholds_of_the_guarantees_page():
    """Hoeffding needs 6.54 / 7.53 / 7.83 for N = 1e3 / 1e6 / 1e7 at 1e-6; T1+ needs less."""
    y = np.random.default_rng(4).normal(size=304)
    for customers, hoeffding in ((1e3, 6.54), (1e6, 7.53), (1e7, 7.83)):
        assert abs(math.sqrt(2 * math.log(2 * customers / 1e-6)) - hoeffding) < 0.01
        assert hoeffding - 0.6 < statistics.threshold(y, math.log(1e-6 / customers)) < hoeffding


def test_too_few_chips_accuse_nobody():
    assert statistics.threshold(np.ones(8), math.log(1e-6)) == math.inf
    assert statistics.threshold(np.zeros(8), math.log(0.5)) == math.inf


def test_zero_and_extreme_chips():
    assert statistics.log_p_value(3.0, np.zeros(5)) == 0
    for scale in (1e-300, 1e300):
        np.testing.assert_allclose(statistics.direction(scale * np.array([3.0, 4.0])), [0.6, 0.8])


@pytest.mark.parametrize("chips", [np.array([1.0, np.nan]), np.array([np.inf, 1.0]), np.ones((2, 2)), np.array([])])
def test_bad_chips_are_refused(chips):
    with pytest.raises(ValueError, match=r"direction: expected (finite chips|chips of shape \[m\])"):
        statistics.log_p_value(1.0, chips)
