import math

import numpy as np
import pytest
from scipy import stats

from smark_jax import codes, keys, tracing

KEY = keys.from_bytes(bytes(range(32)))
M = 304


def words(serials, num_chips=M):
    return np.asarray(codes.codebook(KEY, serials, num_chips))


def test_statistics_are_the_normalised_correlations():
    book = words(range(40))
    y = np.random.default_rng(0).normal(size=M)
    verdict = tracing.trace(y, book)
    np.testing.assert_allclose(verdict.statistics, book.astype(np.float64) @ y / np.linalg.norm(y), atol=1e-5)
    assert verdict.accused == ()
    assert (verdict.num_customers, verdict.alpha, verdict.decoder) == (40, 1e-6, "single")


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_an_intact_copy_is_traced_with_the_p_value_of_full_agreement(scale):
    verdict = tracing.trace(scale * words([17])[0], words(range(1000)))
    (accusation,) = verdict.accused
    assert accusation.serial == 17
    np.testing.assert_allclose(accusation.statistic, math.sqrt(M), rtol=1e-6)
    np.testing.assert_allclose(accusation.log10_p, math.log10(1000) - 303 * math.log10(2), rtol=1e-9)
    np.testing.assert_allclose(math.log10(accusation.p_value), accusation.log10_p, rtol=1e-9)
    assert accusation.share == 1.0


def test_streamed_and_held_codebooks_give_the_same_verdict():
    y = words([20_000])[0] * 0.5 + np.random.default_rng(1).normal(size=M)
    held = tracing.trace(y, words(range(20_001)))
    streamed = tracing.trace(y, codes.Codebook(KEY, 20_001, M))
    np.testing.assert_allclose(held.statistics, streamed.statistics, atol=1e-5)
    assert held.accused == streamed.accused
    assert [a.serial for a in held.accused] == [20_000]


def test_colluders_share_and_are_sorted():
    book = words(range(200))
    y = (3 * book[5].astype(float) + 2 * book[9]) / 5
    verdict = tracing.trace(y, book)
    assert [a.serial for a in verdict.accused] == [5, 9]
    shares = [a.share for a in verdict.accused]
    assert shares[0] > shares[1]
    np.testing.assert_allclose(sum(shares), 1)
    assert verdict.accused[0].log10_p < verdict.accused[1].log10_p


def test_extrapolation_is_traced_because_both_sides_count():
    """The ringleader enters with -0.9, so that a one-sided score would clear him."""
    book = words(range(500))
    y = -0.9 * book[3].astype(float) + 0.95 * book[4] + 0.95 * book[5]
    verdict = tracing.trace(y, book)
    assert {a.serial for a in verdict.accused} == {3, 4, 5}
    assert next(a for a in verdict.accused if a.serial == 3).statistic < 0


def test_a_p_value_is_never_zero():
    verdict = tracing.trace(words([0], 4096)[0], words(range(3), 4096))
    (accusation,) = verdict.accused
    assert 0 < accusation.p_value < 1e-300
    np.testing.assert_allclose(accusation.log10_p, math.log10(3) - 4095 * math.log10(2), rtol=1e-9)


def test_own_serials_name_the_accused():
    serials = [900, 4, 2**40]
    verdict = tracing.trace(words(serials)[2], words(serials), serials=serials)
    assert [a.serial for a in verdict.accused] == [2**40]


def test_silence_accuses_nobody():
    verdict = tracing.trace(np.zeros(M), words(range(10)))
    assert verdict.accused == ()
    assert not verdict.statistics.any()
    assert verdict.threshold == math.inf


NULLS = {
    "noise": lambda rng, m: rng.normal(size=m),
    "few large chips": lambda rng, m: np.r_[rng.normal(size=4) * 20, rng.normal(size=m - 4)],
    "a stranger's word": lambda rng, m: rng.choice([-1.0, 1.0], m),
    "copied from one word": lambda rng, m: np.ones(m),
}


def false_accusations(rule, trials: int, customers: int = 20, m: int = 32) -> dict[str, int]:
    """How often anybody is accused when everybody is innocent: fresh words each time, any read-out."""
    counts = {}
    for number, (name, null) in enumerate(NULLS.items()):
        rng = np.random.default_rng(number)
        hits = 0
        for _ in range(trials):
            book = rng.choice(np.array([-1, 1], np.int8), (customers, m))
            hits += rule(null(rng, m), book)
        counts[name] = hits
    return counts


def upper_limit(alpha: float, trials: int) -> int:
    """What a rule with family-wise error alpha exceeds with probability below 1e-4."""
    return int(stats.binom.isf(1e-4, trials, alpha))


def test_innocents_are_accused_within_the_bound():
    trials, alpha = 500, 0.1
    counts = false_accusations(lambda y, book: bool(tracing.trace(y, book, alpha).accused), trials)
    assert max(counts.values()) <= upper_limit(alpha, trials)


def test_broken_statistics_break_the_bound():
    """Negative controls: without the correction for N; and a normal z-score that takes the chips' variance as known."""

    def uncorrected(y, book):
        statistics_ = tracing.trace(y, book, 0.1).statistics
        return bool((2 * stats.norm.sf(np.abs(statistics_)) <= 0.1).any())

    def assumed_variance(y, book):
        scores = book.astype(float) @ y / math.sqrt(len(y))
        return bool((2 * stats.norm.sf(np.abs(scores)) * len(book) <= 0.1).any())

    trials = 300
    assert min(false_accusations(uncorrected, trials).values()) > 2 * upper_limit(0.1, trials)
    assert false_accusations(assumed_variance, trials)["few large chips"] > 2 * upper_limit(0.1, trials)


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5, math.nan, "0.1"])
def test_alpha_outside_zero_to_one_is_refused(alpha):
    with pytest.raises(ValueError, match="trace: expected alpha strictly between 0 and 1"):
        tracing.trace(np.ones(M), words([0]), alpha)


def test_bad_input_is_refused():
    book = words(range(3))
    with pytest.raises(ValueError, match=r"trace: expected chips of shape \(304,\), but got shape \(300,\)"):
        tracing.trace(np.ones(300), book)
    with pytest.raises(ValueError, match="finite chips"):
        tracing.trace(np.full(M, np.nan), book)
    with pytest.raises(ValueError, match=r"chips of shape \[m\]"):
        tracing.trace(np.ones((2, M)), book)
    with pytest.raises(ValueError, match=r"codewords of -1 and \+1"):
        tracing.trace(np.ones(M), (book + 1) // 2)
    with pytest.raises(ValueError, match=r"a codebook of shape \[K, m\] with K >= 1"):
        tracing.trace(np.ones(M), book[:0])
    with pytest.raises(ValueError, match="duplicates"):
        tracing.trace(np.ones(M), book, serials=[1, 1, 2])
    with pytest.raises(ValueError, match=r"serials of shape \(3,\)"):
        tracing.trace(np.ones(M), book, serials=[1, 2])
    with pytest.raises(ValueError, match="decoder"):
        tracing.trace(np.ones(M), book, decoder="nearest")
