import itertools
import math

import numpy as np
import pytest
import reference
from scipy import stats

from experiments.common import comparators
from smark_jax import keys

KEY = keys.from_bytes(bytes(range(32)))
PLANES = [("projective", 2), ("projective", 3), ("projective", 5), ("projective", 7), ("affine", 3), ("affine", 5)]


def serials(verdict):
    return sorted(accusation.serial for accusation in verdict.accused)


# Anti-collusion codes


@pytest.mark.parametrize(("kind", "q"), [*PLANES, ("affine", 2), ("projective", 17), ("affine", 17)])
def test_planes_obey_every_axiom_of_a_bibd(kind, q):
    points = comparators.incidence(kind, q).astype(int)
    v, k = (q * q + q + 1, q + 1) if kind == "projective" else (q * q, q)
    assert points.shape == (v, v * (v - 1) // (k * (k - 1)))
    assert (points.sum(axis=0) == k).all()
    assert (points.sum(axis=1) == (v - 1) // (k - 1)).all()
    together = points @ points.T
    assert (together[~np.eye(v, dtype=bool)] == 1).all()


@pytest.mark.parametrize(("kind", "q"), [("projective", 2), ("projective", 3), ("affine", 3), ("affine", 5)])
def test_the_and_of_up_to_k_minus_1_words_names_the_coalition(kind, q):
    """Over all coalitions: the ANDs differ, and the decoder reads each coalition from the mean of its copies."""
    code = comparators.bibd(kind, q)
    bits = code.words > 0
    k = q + 1 if kind == "projective" else q
    sizes = range(1, k if math.comb(len(bits), k - 1) < 5000 else k - 1)
    seen = set()
    for size in sizes:
        tuned = comparators.bibd(kind, q, colluders=size)
        for coalition in itertools.combinations(range(len(bits)), size):
            rows = list(coalition)
            joint = bits[rows].all(axis=0)
            seen.add(joint.tobytes())
            covered = [j for j in range(len(bits)) if not (joint & ~bits[j]).any() and not joint[~bits[j]].any()]
            assert covered == rows
            mean = 0.02 * code.words[rows].mean(axis=0)
            assert serials(tuned.trace(mean)) == rows
            assert serials(code.trace(mean)) == rows
    assert len(seen) == sum(math.comb(len(bits), size) for size in sizes)


def test_one_colluder_too_many_can_frame_an_innocent():
    """Negative control: k blocks through the k points of another block cover it."""
    points = comparators.incidence("projective", 3)
    target = 0
    framing = []
    for point in np.flatnonzero(points[:, target]):
        framing.append(next(j for j in np.flatnonzero(points[point]) if j != target))
    code = comparators.bibd("projective", 3)
    assert len(framing) == 4 == code.colluders + 1
    joint = (code.words[framing] > 0).all(axis=0)
    assert not joint[points[:, target]].any()


def test_the_published_rule_has_no_bound():
    """Noise alone, of a model that nobody marked, accuses; and p-values say that nothing is known."""
    code = comparators.bibd("projective", 3)
    rng = np.random.default_rng(0)
    verdicts = [code.trace(rng.normal(size=13) + 0.1, alpha=1e-6) for _ in range(300)]
    assert np.mean([bool(verdict.accused) for verdict in verdicts]) > 0.05
    assert all(math.isnan(a.p_value) and math.isnan(a.log10_p) for verdict in verdicts for a in verdict.accused)
    assert not code.bounded


def test_a_lower_threshold_reads_fewer_zeros():
    rng = np.random.default_rng(10)
    high, low = comparators.bibd("projective", 17), comparators.bibd("projective", 17, colluders=5)
    for _ in range(20):
        y = high.words[:5].mean(axis=0) + 0.2 * rng.normal(size=307)
        strict, lenient = low.trace(y), high.trace(y)
        assert (strict.statistics <= lenient.statistics).all()
        assert set(serials(strict)) <= set(serials(lenient))


def test_capacity_is_the_formula_at_the_largest_admissible_length():
    assert comparators.bibd_capacity(1024, 2) == 1023 * 1022 // 6 == 174_251
    assert comparators.bibd_capacity(1024, 5) == 1021 * 1020 // 30 == 34_714
    for q in (2, 3, 5, 7, 17):
        assert comparators.bibd_capacity(q * q + q + 1, q) == q * q + q + 1
        assert comparators.bibd_capacity(q * q, q - 1) == q * q + q
    assert comparators.bibd_capacity(6, 2) == 0
    assert comparators.bibd_capacity(10, 1) == 45


# The bound for biased words


def exact_tail(u: np.ndarray, p: np.ndarray, t: float) -> float:
    """P(T >= t) over all 2^m words; t counts as reached within rounding."""
    bits = reference.all_words(len(u)) > 0
    scores = np.zeros(len(bits))
    chance = np.ones(len(bits))
    for i in range(len(u)):
        scores += u[i] * (bits[:, i] - p[i]) / math.sqrt(p[i] * (1 - p[i]))
        chance *= np.where(bits[:, i], p[i], 1 - p[i])
    return float(chance[scores >= t - 1e-9].sum())


CASES = {
    "fair": (np.ones(12), np.full(12, 0.5)),
    "rare": (np.ones(14), np.full(14, 0.004)),
    "mirrored": (np.r_[np.ones(6), -np.ones(6)], np.r_[np.full(6, 0.01), np.full(6, 0.99)]),
    "one chip": (np.r_[1.0, np.zeros(6)], np.full(7, 0.03)),
    "spread": (np.random.default_rng(0).normal(size=12), np.random.default_rng(1).beta(0.5, 0.5, 12).clip(1e-3, 0.999)),
    "tiny chips": (1e-30 * np.random.default_rng(2).normal(size=10), np.linspace(0.02, 0.9, 10)),
    "dominated": (np.r_[9.0, np.full(11, -0.3)], np.r_[0.002, np.full(11, 0.7)]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_bound_covers_the_exact_tail_of_biased_words(name):
    y, p = CASES[name]
    u = y / np.abs(y).max()
    u = u / np.linalg.norm(u)
    w = u / np.sqrt(p * (1 - p))
    top, bottom = np.where(w > 0, w * (1 - p), -w * p).sum(), np.where(w > 0, -w * p, w * (1 - p)).sum()
    grid = np.r_[np.linspace(0.01, top, 25), np.linspace(-0.01, bottom, 25)]
    bounds = np.exp(comparators.log_p_value(grid, y, p))
    for t, bound in zip(grid, bounds, strict=True):
        exact = exact_tail(u, p, t) if t > 0 else exact_tail(-u, p, -t)
        assert bound >= min(1.0, 2 * exact) * (1 - 1e-9)
    assert (np.diff(bounds[:25]) <= 1e-12).all()
    # At the most extreme word Chernoff is exact: its probability, twice.
    atom = np.log(np.where(w > 0, p, 1 - p))[w != 0].sum()
    np.testing.assert_allclose(np.log(bounds[24]), min(0.0, math.log(2) + atom), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_is_the_infimum_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    y, p = rng.normal(size=40), rng.beta(0.5, 0.5, 40).clip(1e-3, 1 - 1e-3)
    u = y / np.linalg.norm(y)
    up, down = u * np.sqrt((1 - p) / p), -u * np.sqrt(p / (1 - p))
    grid = np.concatenate([np.linspace(0, 20, 4001), np.geomspace(20, 500, 500)])[:, None]
    psi = np.logaddexp(np.log(p) + grid * up, np.log1p(-p) + grid * down).sum(axis=1)
    for t in (0.5, 2.0, 5.0, 8.0):
        brute = (psi - grid[:, 0] * t).min()
        np.testing.assert_allclose(comparators.log_p_value(t, y, p), min(0, math.log(2) + brute), rtol=1e-3, atol=1e-3)


def test_a_gaussian_threshold_would_be_optimistic():
    """Negative control, exact: rare bits reach far tails a million times likelier than a normal law has it."""
    y, p = np.ones(14), np.full(14, 0.01)
    u = y / math.sqrt(14)
    t = 7.0
    exact, normal = exact_tail(u, p, t), stats.norm.sf(t)
    assert exact > 1e6 * normal
    assert np.exp(comparators.log_p_value(t, y, p)) >= 2 * exact
    y, p = np.abs(np.random.default_rng(3).normal(size=14)), np.full(14, 0.05)
    assert exact_tail(y / np.linalg.norm(y), p, 4.0) > 10 * stats.norm.sf(4.0)


def test_fair_words_get_hoeffding_or_better():
    y = np.random.default_rng(4).normal(size=304)
    t = np.linspace(2, 20, 30)
    assert (comparators.log_p_value(t, y, np.full(304, 0.5)) <= math.log(2) - t**2 / 2 + 1e-9).all()


@pytest.mark.parametrize("log_alpha", [math.log(0.1), math.log(1e-12), -150.0])
def test_thresholds_are_where_the_p_value_crosses(log_alpha):
    rng = np.random.default_rng(5)
    y, p = rng.normal(size=512), rng.beta(0.5, 0.5, 512).clip(1e-3, 1 - 1e-3)
    lower, upper = comparators.thresholds(y, p, log_alpha)
    for bar, inside in ((upper, upper - 1e-5), (lower, lower + 1e-5)):
        assert comparators.log_p_value(bar, y, p) <= log_alpha + 1e-9 < comparators.log_p_value(inside, y, p)


def test_too_few_chips_and_no_chips_accuse_nobody():
    p = np.full(5, 0.1)
    assert comparators.thresholds(np.ones(5), p, math.log(2e-6)) == (-math.inf, math.inf)
    assert comparators.thresholds(np.ones(5), p, math.log(3e-5))[1] < math.inf  # all ones: 2 * 0.1^5
    assert comparators.thresholds(np.zeros(5), p, math.log(0.5)) == (-math.inf, math.inf)
    assert comparators.log_p_value(3.0, np.zeros(5), p) == 0


# Tardos and Nuida


def test_nuida_biases_are_the_published_ones():
    for colluders in (3, 4):
        values, weights = comparators.nuida_distribution(colluders)
        np.testing.assert_allclose(values, [0.21132, 0.78868], atol=5e-6)
        np.testing.assert_allclose(weights, 0.5)
    for colluders in (7, 8):
        values, weights = comparators.nuida_distribution(colluders)
        np.testing.assert_allclose(values, [0.06943, 0.33001, 0.66999, 0.93057], atol=5e-6)
        np.testing.assert_allclose(weights, [0.24833, 0.25167, 0.25167, 0.24833], atol=5e-6)
    for colluders in (1, 2):
        np.testing.assert_allclose(np.concatenate(comparators.nuida_distribution(colluders)), [0.5, 1.0])


def test_nuida_weights_follow_their_formula():
    for degree in (2, 5, 9):
        values, weights = comparators.nuida_distribution(2 * degree)
        legendre = np.polynomial.legendre.Legendre.basis(degree)
        x = 2 * values - 1
        np.testing.assert_allclose(legendre(x), 0, atol=1e-12)
        expected = (1 - x**2) ** -1.5 * legendre.deriv()(x) ** -2.0
        np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-9)


def test_tardos_biases_are_arcsine_and_words_follow_them():
    """Frequencies over 4,000 words give the biases back: arcsine within the cut-off, by Kolmogorov's test."""
    colluders, n = 6, 4000
    words = comparators.tardos(KEY, n, 400, colluders).words
    frequency = (words > 0).mean(axis=0)
    cut = math.asin(math.sqrt(1 / (300 * colluders)))
    law = stats.uniform(cut, math.pi / 2 - 2 * cut)
    assert stats.kstest(np.arcsin(np.sqrt(frequency)), law.cdf).pvalue > 1e-3
    assert set(np.unique(words)) == {-1, 1}
    halves = words[: n // 2] > 0, words[n // 2 :] > 0
    spread = np.sqrt(frequency * (1 - frequency) * 4 / n).clip(1e-9)
    assert np.abs(halves[0].mean(axis=0) - halves[1].mean(axis=0)).max() < 5 * spread.max()


@pytest.mark.parametrize("make", [comparators.tardos, comparators.nuida])
def test_innocent_scores_have_mean_0_and_variance_1(make):
    """T over unit-norm chips is the score a position; the moments hold for a read-out that follows three words."""
    n = 20_000
    code = make(KEY, n, 200, 8)
    for y in (np.random.default_rng(6).normal(size=200), code.words[:3].mean(axis=0)):
        scores = code.trace(y).statistics[3:]
        assert abs(scores.mean()) < 5 / math.sqrt(n)
        assert abs(scores.var() - 1) < 0.1
    one = np.zeros(200)
    one[17] = 1.0  # a single position
    scores = code.trace(one).statistics
    assert abs(scores.mean()) < 5 / math.sqrt(n)


def test_statistics_are_the_published_scores():
    """Against a loop over chips, with the biases of Nuida for 3 colluders read off the words themselves."""
    code = comparators.nuida(KEY, 3000, 60, 3)
    low, high = comparators.nuida_distribution(3)[0]
    p = np.where((code.words > 0).mean(axis=0) > 0.5, high, low)
    y = np.random.default_rng(7).normal(size=60)
    mean = 2 * p - 1
    centred = y - (y @ mean) / (mean @ mean) * mean
    expected = np.zeros(3000)
    for i in range(60):
        x = code.words[:, i] > 0
        expected += centred[i] * np.where(x, math.sqrt((1 - p[i]) / p[i]), -math.sqrt(p[i] / (1 - p[i])))
    np.testing.assert_allclose(code.trace(y).statistics, expected / np.linalg.norm(centred), rtol=1e-6, atol=1e-6)


def test_centring_helps_and_needs_no_word():
    code = comparators.tardos(KEY, 50, 2000, 10)
    p = ((code.words > 0).sum(axis=0) + 0.5) / 51
    y = 0.7 * code.words[:5].mean(axis=0)
    centred = comparators.centre(y, p)
    assert np.linalg.norm(centred) < 0.7 * np.linalg.norm(y)
    np.testing.assert_allclose(comparators.centre(3 * (2 * p - 1), p), 0, atol=1e-12)
    np.testing.assert_array_equal(comparators.centre(y, np.full(2000, 0.5)), y)


@pytest.mark.parametrize("make", [comparators.tardos, comparators.nuida])
def test_family_wise_error_stays_inside_its_bound(make):
    """Innocents beside three colluders, a new code each time; at 300 trials the binomial limit of 0.1 is 0.152."""
    trials, n, m, alpha = 300, 200, 128, 0.1
    rng = np.random.default_rng(8)
    wrong = normal = 0
    for trial in range(trials):
        code = make(keys.derive(KEY, str(trial)), n + 3, m, 6)
        verdict = code.trace(code.words[:3].mean(axis=0) + 0.3 * rng.normal(size=m), alpha)
        wrong += any(serial >= 3 for serial in serials(verdict))
        normal += (np.abs(verdict.statistics[3:]) >= stats.norm.isf(alpha / 2 / n)).any()
    limit = stats.binom.isf(1e-3, trials, alpha)
    assert wrong <= limit
    if make is comparators.tardos:
        assert normal > limit  # negative control: the normal threshold breaks the level


def test_the_key_alone_decides():
    for make in (comparators.tardos, comparators.nuida):
        code = make(KEY, 30, 100, 5)
        np.testing.assert_array_equal(code.words, make(keys.from_bytes(bytes(range(32))), 30, 100, 5).words)
        np.testing.assert_array_equal(code.words, make(KEY, 500, 100, 5).words[:30])
        other = make(keys.derive(KEY, "other"), 30, 100, 5).words
        assert 0.2 < (code.words != other).mean() < 0.6
    assert (comparators.tardos(KEY, 30, 100, 3).words != comparators.nuida(KEY, 30, 100, 3).words).any()


def test_words_are_the_same_however_many_passes_draw_them(monkeypatch):
    from experiments.common.comparators import biased

    whole = comparators.tardos(KEY, 50, 70, 4)
    verdict = whole.trace(whole.words[:2].mean(axis=0))
    monkeypatch.setattr(biased, "_BYTES_PER_PASS", 4 * 70 * 7)
    parts = comparators.tardos(KEY, 50, 70, 4)
    np.testing.assert_array_equal(whole.words, parts.words)
    np.testing.assert_allclose(parts.trace(whole.words[:2].mean(axis=0)).statistics, verdict.statistics)


# All of them


def everyone():
    return {
        "projective": comparators.bibd("projective", 17),
        "affine": comparators.bibd("affine", 17, num_customers=200, colluders=5),
        "tardos": comparators.tardos(KEY, 2000, 304, 5),
        "nuida": comparators.nuida(KEY, 2000, 304, 5),
        "orthogonal": comparators.orthogonal(255),
    }


EVERYONE = everyone()


@pytest.mark.parametrize("name", EVERYONE)
def test_a_lone_leaker_is_traced_under_noise_at_any_scale(name):
    code = EVERYONE[name]
    rng = np.random.default_rng(9)
    noise = 0.1 if name == "projective" else 0.3
    for leaker in (0, 7, len(code.words) - 1):
        y = code.words[leaker] + noise * rng.normal(size=code.words.shape[1])
        for scale in (1e-200, 0.02, 1e200):
            verdict = code.trace(scale * y, 1e-6)
            assert serials(verdict) == [leaker]
            (accusation,) = verdict.accused
            assert accusation.statistic == verdict.statistics[leaker] >= verdict.upper
            if code.bounded:
                assert 0 < accusation.p_value <= 1e-6
                np.testing.assert_allclose(math.log10(accusation.p_value), accusation.log10_p, rtol=1e-9)
            else:
                assert math.isnan(accusation.p_value)
    assert (verdict.num_customers, verdict.alpha, verdict.decoder) == (len(code.words), 1e-6, code.name)


@pytest.mark.parametrize("name", EVERYONE)
def test_words_are_what_embedding_takes_and_three_colluders_are_named(name):
    code = EVERYONE[name]
    assert code.words.dtype == np.int8
    assert (np.abs(code.words) == 1).all()
    assert len(np.unique(code.words, axis=0)) == len(code.words)
    assert serials(code.trace(code.words[[3, 50, 120]].mean(axis=0))) == [3, 50, 120]


@pytest.mark.parametrize("name", EVERYONE)
def test_the_base_model_accuses_nobody(name):
    code = EVERYONE[name]
    assert code.trace(np.zeros(code.words.shape[1])).accused == ()


def test_extrapolation_is_traced_by_the_two_sided_scores():
    """The ringleader enters with -0.9; the score of his word is as negative as an accomplice's is positive."""
    for code in (comparators.tardos(KEY, 1000, 1024, 3), comparators.nuida(KEY, 1000, 1024, 3)):
        y = -0.9 * code.words[0] + 0.95 * code.words[1] + 0.95 * code.words[2]
        verdict = code.trace(y)
        assert serials(verdict) == [0, 1, 2]
        assert verdict.statistics[0] <= verdict.lower < 0 < verdict.upper


def test_p_values_below_the_smallest_float_go_on_in_logarithms():
    code = comparators.nuida(KEY, 100, 4096, 2)
    (accusation,) = code.trace(code.words[5]).accused
    assert accusation.p_value > 0
    np.testing.assert_allclose(accusation.log10_p, 2 - 4095 * math.log10(2), rtol=1e-9)


def test_orthogonal_words_are_orthogonal():
    words = comparators.orthogonal(100).words.astype(int)
    assert words.shape == (100, 128)
    np.testing.assert_array_equal(words @ words.T, 128 * np.eye(100, dtype=int))
    assert (words.sum(axis=1) == 0).all()
    assert comparators.orthogonal(3, 64).words.shape == (3, 64)
    assert comparators.orthogonal(7).words.shape == (7, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: comparators.bibd("projective", 4), "bibd: expected a prime order, but got 4"),
        (lambda: comparators.bibd("affine", 1), "bibd: expected a prime order, but got 1"),
        (lambda: comparators.bibd("affine", 49), "bibd: expected a prime order, but got 49"),
        (lambda: comparators.bibd("affine", 2), "bibd: expected an order of at least 3"),
        (lambda: comparators.bibd("conic", 3), "bibd: expected kind 'projective' or 'affine', but got 'conic'"),
        (lambda: comparators.bibd("affine", 3, num_customers=13), "bibd: expected at most 12 customers, but got 13"),
        (lambda: comparators.bibd("affine", 3, colluders=3), "bibd: expected at most k - 1 = 2 colluders, but got 3"),
        (lambda: comparators.bibd("affine", 3, colluders=0), "bibd: expected colluders to be a whole number"),
        (lambda: comparators.bibd_capacity(100, 0), "bibd_capacity: expected colluders to be a whole number"),
        (lambda: comparators.tardos(KEY, 10, 10, 0), "tardos: expected colluders to be a whole number"),
        (lambda: comparators.nuida(KEY, 10, 10, -1), "nuida: expected colluders to be a whole number"),
        (lambda: comparators.nuida(KEY, 0, 10, 2), "nuida: expected num_customers to be a whole number"),
        (lambda: comparators.tardos(KEY, 2**31 + 1, 10, 2), "tardos: expected at most 2\\^31 customers"),
        (lambda: comparators.nuida_distribution(0), "nuida_distribution: expected colluders to be a whole number"),
        (lambda: comparators.orthogonal(64, 64), "orthogonal: expected at most 63 customers, but got 64"),
        (lambda: comparators.orthogonal(10, 48), "orthogonal: expected a power of two for num_chips, but got 48"),
        (lambda: comparators.orthogonal(10**6), "orthogonal: expected at most 16,384 chips"),
        (lambda: comparators.log_p_value(1.0, np.ones(3), np.ones(3)), "log_p_value: expected biases strictly between"),
        (lambda: comparators.thresholds(np.ones(3), np.full(4, 0.5), -1.0), "thresholds: expected biases of shape"),
        (lambda: comparators.centre(np.ones(3), np.full(4, 0.5)), "centre: expected biases of shape"),
    ],
)
def test_impossible_designs_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", EVERYONE)
def test_bad_chips_and_levels_are_refused(name):
    code = EVERYONE[name]
    m = code.words.shape[1]
    for chips, message in (
        (np.ones(m + 1), r"trace: expected chips of shape \("),
        (np.ones((2, m)), r"trace: expected chips of shape \[m\]"),
        (np.r_[np.nan, np.ones(m - 1)], "trace: expected finite chips"),
        (np.r_[np.inf, np.ones(m - 1)], "trace: expected finite chips"),
    ):
        with pytest.raises(ValueError, match=message):
            code.trace(chips)
    for alpha in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="alpha strictly between 0 and 1"):
            code.trace(np.ones(m), alpha)
