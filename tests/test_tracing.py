import math

import jax
import numpy as np
import pytest
from scipy import stats

from smark_jax import codes, keys, statistics, tracing
from smark_jax.tracing import decoders

KEY = keys.from_bytes(bytes(range(32)))
M = 304


DECODERS = tuple(tracing.DECODERS)


def words(serials, num_chips=M):
    return np.asarray(codes.codebook(KEY, serials, num_chips))


def test_statistics_are_the_normalised_correlations():
    book = words(range(40))
    y = np.random.default_rng(0).normal(size=M)
    for decoder in DECODERS:
        verdict = tracing.trace(y, book, decoder=decoder)
        np.testing.assert_allclose(verdict.statistics, book.astype(np.float64) @ y / np.linalg.norm(y), atol=1e-5)
        assert verdict.accused == ()
        assert (verdict.num_customers, verdict.alpha, verdict.decoder) == (40, 1e-6, decoder)
        assert (verdict.num_suspects, verdict.num_alignments) == (1, 1)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_an_intact_copy_is_traced_with_the_p_value_of_full_agreement(scale):
    verdict = tracing.trace(scale * words([17])[0], words(range(1000)), decoder="single")
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
    assert held.decoys.number == streamed.decoys.number == 1024


def test_colluders_share_and_are_sorted():
    book = words(range(200))
    y = (3 * book[5].astype(float) + 2 * book[9]) / 5
    for decoder in DECODERS:
        verdict = tracing.trace(y, book, decoder=decoder)
        shares = {a.serial: a.share for a in verdict.accused}
        assert shares.keys() == {5, 9}
        np.testing.assert_allclose([shares[5], shares[9]], [0.6, 0.4], atol=1e-6)
        assert verdict.accused[0].log10_p <= verdict.accused[1].log10_p


def test_extrapolation_is_traced_because_both_sides_count():
    """The ringleader enters with -0.9, so that a one-sided score would clear him."""
    book = words(range(500))
    y = -0.9 * book[3].astype(float) + 0.95 * book[4] + 0.95 * book[5]
    for decoder in DECODERS:
        verdict = tracing.trace(y, book, decoder=decoder)
        assert {a.serial for a in verdict.accused} == {3, 4, 5}
        assert next(a for a in verdict.accused if a.serial == 3).statistic < 0


def test_a_p_value_is_never_zero():
    verdict = tracing.trace(words([0], 4096)[0], words(range(3), 4096), decoder="single")
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


# Coalitions of 10 at 20 dB, which a single decoder cannot find whole.
def coalition(num_customers: int, size: int, sigma: float, seed: int) -> tuple[np.ndarray, set[int]]:
    rng = np.random.default_rng(seed)
    guilty = rng.choice(num_customers, size, replace=False)
    return words(guilty).astype(float).mean(axis=0) + sigma * rng.normal(size=M), set(guilty.tolist())


@pytest.mark.parametrize("seed", range(3))
def test_joint_decoding_finds_whole_coalitions_that_single_decoding_does_not(seed):
    book = codes.Codebook(KEY, 50_000, M)
    y, guilty = coalition(50_000, 10, 0.1, seed)
    found = {d: {a.serial for a in tracing.trace(y, book, decoder=d).accused} for d in DECODERS}
    assert found["joint"] == guilty
    assert found["single"] < guilty
    assert found["sequential"] <= guilty


def reference_pursuit(u: np.ndarray, book: np.ndarray, masked: int | None) -> np.ndarray:
    """The residual of the pursuit, by least squares on whole codewords in float64, without caches or shortlist."""
    stop = math.sqrt(2 * math.log(2 * len(book)))
    allowed = np.arange(len(book)) != masked

    def state(selected):
        fit = book[selected].T
        residual = u - fit @ np.linalg.lstsq(fit, u, rcond=None)[0] if selected else u
        strength = np.abs(book @ residual) * allowed
        strength[selected] = 0
        return residual, strength / np.linalg.norm(residual)

    selected: list[int] = []
    while True:
        residual, strength = state(selected)
        order = np.argsort(-strength).tolist()
        if strength[order[0]] >= stop:
            selected = [*selected, order[0]]
        elif state([*selected, *order[:4]])[1].max() >= stop + 0.5:
            selected = [*selected, *order[:4]]
        else:
            return residual


def test_each_joint_statistic_is_that_of_a_run_which_never_saw_the_codeword():
    """Against a slow reference; and changing the accused's own word does not change the residual that tests it."""
    book = words(range(300)).astype(float)
    rng = np.random.default_rng(5)
    y = book[[3, 50, 120, 200, 250, 299]].mean(axis=0) + 0.2 * rng.normal(size=M)
    u = y / np.linalg.norm(y)
    verdict = tracing.trace(y, book.astype(np.int8))
    assert len(verdict.accused) == 6
    for accusation in verdict.accused:
        residual = reference_pursuit(u, book, masked=accusation.serial)
        expected = residual @ book[accusation.serial] / np.linalg.norm(residual)
        np.testing.assert_allclose(accusation.statistic, expected, rtol=1e-4)
        np.testing.assert_allclose(verdict.statistics[accusation.serial], expected, rtol=1e-4)
        scrambled = book.copy()
        scrambled[accusation.serial] = rng.choice([-1.0, 1.0], M)
        np.testing.assert_allclose(reference_pursuit(u, scrambled, accusation.serial), residual, atol=1e-12)


def test_masked_runs_begin_where_a_run_from_scratch_would():
    """Small codebooks and few chips, where trials are common: the shared prefix changes no masked run."""
    differing = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        book = rng.choice(np.array([-1, 1], np.int8), (12, 32))
        u = statistics.direction(book[:3].mean(axis=0) + 0.5 * rng.normal(size=32))
        chase = tracing.pursuit.Pursuit(
            u, book, tracing.scoring.shortlist(book, np.arange(12)), book @ np.float32(u), 12
        )
        selected = chase.run()
        for place in selected:
            from_scratch = tracing.pursuit.Pursuit(
                u, book, tracing.scoring.shortlist(book, np.arange(12)), book @ np.float32(u), 12
            )
            expected = from_scratch.run(masked=place)
            assert chase.run(masked=place) == expected
            differing += expected != [other for other in selected if other != place]
    assert differing > 0  # the cases are not all trivial


@pytest.mark.parametrize("customers", range(2, 9))
def test_nobody_is_selected_twice_nor_in_the_run_that_masks_them(customers):
    """Fewer candidates than a trial adds, and a read-out that one word explains up to the rounding of its scores."""
    for seed in range(40):
        rng = np.random.default_rng([seed, customers])
        book = rng.choice(np.array([-1, 1], np.int8), (customers, 64))
        noise = 10.0 ** rng.uniform(-9, -1)
        u = statistics.direction(book[0] + noise * rng.normal(size=64))
        scores = np.nextafter(np.float32(book @ u), np.float32(0))
        chosen = tracing.scoring.shortlist(book, np.arange(customers))
        chase = tracing.pursuit.Pursuit(u, book, chosen, scores, customers)
        for masked in (None, *chase.run()):
            selected = chase.run(masked=masked)
            assert len(set(selected)) == len(selected) and masked not in selected
        if noise < 1e-4:  # what is left is rounding
            assert chase.run() == [0]


def test_a_shortlist_gives_what_the_whole_codebook_gives(monkeypatch):
    y, guilty = coalition(20_000, 6, 0.1, seed=8)  # one seed in ten differs in a T
    book = codes.Codebook(KEY, 20_000, M)
    whole = tracing.trace(y, book)
    monkeypatch.setattr(tracing.scoring, "_SHORTLIST_CHIPS", 500 * M)
    monkeypatch.setattr(tracing.scoring, "_ROWS_PER_CALL", 3000)
    told = []
    short = tracing.trace(y, book, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(min(done, 20_000), 20_000) for done in range(3000, 23_000, 3000)]
    assert {a.serial for a in short.accused} == guilty
    assert [(a.serial, round(a.statistic, 4)) for a in short.accused] == [
        (a.serial, round(a.statistic, 4)) for a in whole.accused
    ]
    np.testing.assert_allclose(short.statistics, whole.statistics, atol=1e-4)


def test_several_devices_share_the_customers_and_find_the_same(monkeypatch):
    y, guilty = coalition(7000, 2, 0.1, seed=3)
    for book in (codes.Codebook(KEY, 7000, M), words(range(7000))):
        alone = tracing.trace(y, book)
        with monkeypatch.context() as patch:
            patch.setattr(tracing.scoring, "_ROWS_PER_CALL", 1024)
            patch.setattr(tracing.scoring, "_devices", lambda: jax.devices()[:3])
            shared = tracing.trace(y, book)
        assert {a.serial for a in shared.accused} == {a.serial for a in alone.accused} == guilty
        np.testing.assert_allclose(shared.statistics, alone.statistics, atol=1e-5)


@pytest.mark.parametrize("decoder", ["joint", "sequential", "single"])
def test_suspects_and_alignments_are_counted(decoder):
    book = words(range(100))
    y = np.stack([book[4] + 0.0, np.random.default_rng(0).normal(size=M), book[9] - 0.2])
    batch = tracing.trace_batch(y, book, decoder=decoder, num_alignments=2)
    assert [[a.serial for a in v.accused] for v in batch] == [[4], [], [9]]
    alone = tracing.trace(y[0], book, decoder=decoder)
    np.testing.assert_allclose(batch[0].accused[0].log10_p, alone.accused[0].log10_p + math.log10(6), rtol=1e-6)
    assert (batch[0].num_suspects, batch[0].num_alignments) == (3, 2)
    assert batch[0].threshold > alone.threshold
    for text in ("100 customers", "3 suspects", "2 alignments", "1e-06"):
        assert text in batch[0].assumptions


def test_holm_lets_later_ranks_pass_more_easily():
    """Two leakers among two: the second is corrected for one customer, not two."""
    book = words(range(2), 40)
    y = book.sum(axis=0) / 2
    p = sorted(a.log10_p for a in tracing.trace(y, book, 0.1, decoder="single").accused)
    statistic = np.abs(book.astype(float) @ y / np.linalg.norm(y))
    raw = np.sort(statistics.log_p_value(statistic, y)) / math.log(10)
    np.testing.assert_allclose(p, [raw[0] + math.log10(2), max(raw[0] + math.log10(2), raw[1])], atol=1e-6)


def test_statistics_need_not_be_kept():
    y, guilty = coalition(5000, 3, 0.1, seed=1)
    for decoder in DECODERS:
        verdict = tracing.trace(y, codes.Codebook(KEY, 5000, M), decoder=decoder, keep_statistics=False)
        assert {a.serial for a in verdict.accused} == guilty
        assert verdict.statistics.size == 0


def test_a_decoy_that_stands_out_raises_the_alarm():
    decoy = np.asarray(codes.codebook(keys.derive(KEY, "decoys"), [700], M))[0]
    with pytest.warns(RuntimeWarning, match="a codeword that nobody received scores 17"):
        verdict = tracing.trace(decoy, codes.Codebook(KEY, 100, M))
    assert verdict.decoys.alarm
    assert not tracing.trace(words([3])[0], codes.Codebook(KEY, 100, M)).decoys.alarm


def test_decoys_of_honest_verdicts_follow_the_null():
    """The largest of 1,024 decoys, over many read-outs, against the largest of 1,024 normal variables."""
    largest = [
        tracing.trace(np.random.default_rng(i).normal(size=M), words(range(3)), decoder="single").decoys.largest
        for i in range(100)
    ]
    expected = stats.norm.isf((1 - 0.5 ** (1 / 1024)) / 2)
    below = np.mean(np.array(largest) < expected)
    assert abs(below - 0.5) < 4 * 0.05


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


@pytest.mark.parametrize("decoder", DECODERS)
def test_innocents_are_accused_within_the_bound(decoder):
    trials, alpha = 300, 0.1
    counts = false_accusations(lambda y, book: bool(tracing.trace(y, book, alpha, decoder).accused), trials)
    assert max(counts.values()) <= upper_limit(alpha, trials)


def innocents_accused_past_capacity(rule, trials: int) -> int:
    """How often an innocent is accused when 12 of 60 customers collude, far more than 48 chips can tell apart."""
    hits = 0
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        book = rng.choice(np.array([-1, 1], np.int8), (60, 48))
        y = book[:12].astype(float).mean(axis=0) + 0.1 * rng.normal(size=48)
        hits += any(j >= 12 for j in rule(y, book))
    return hits


@pytest.mark.parametrize("decoder", DECODERS)
def test_innocents_are_safe_beside_a_coalition_past_capacity(decoder):
    trials = 200
    hits = innocents_accused_past_capacity(
        lambda y, book: [a.serial for a in tracing.trace(y, book, 0.1, decoder).accused], trials
    )
    assert hits <= upper_limit(0.1, trials)


def test_testing_against_the_support_minus_j_breaks_the_bound():
    """Negative control: the short cut that leaves j out of a support which was selected by looking at j's word."""

    def short_cut(y, book):
        u = y / np.linalg.norm(y)
        words_ = book.astype(float)
        selected: list[int] = []
        residual = u
        for _ in range(20):
            strength = np.abs(words_ @ residual)
            strength[selected] = 0
            selected.append(int(strength.argmax()))
            fit = words_[selected].T
            residual = u - fit @ np.linalg.lstsq(fit, u, rcond=None)[0]
        for j in selected:
            fit = words_[[s for s in selected if s != j]].T
            r = u - fit @ np.linalg.lstsq(fit, u, rcond=None)[0]
            t = float(r @ words_[j] / np.linalg.norm(r))
            if statistics.log_p_value(t, r) + math.log(len(book)) <= math.log(0.1):
                yield j

    trials = 200
    assert innocents_accused_past_capacity(short_cut, trials) > 2 * upper_limit(0.1, trials)


def test_broken_statistics_break_the_bound():
    """Negative controls: without the correction for N; and a normal z-score that takes the chips' variance as known."""

    def uncorrected(y, book):
        statistics_ = book.astype(float) @ y / np.linalg.norm(y)
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
    with pytest.raises(ValueError, match="a decoder of 'joint', 'sequential', 'single', but got 'nearest'"):
        tracing.trace(np.ones(M), book, decoder="nearest")
    for count in ("num_suspects", "num_alignments"):
        with pytest.raises(ValueError, match=count):
            tracing.trace(np.ones(M), book, **{count: 0})
    with pytest.raises(ValueError, match="serials only with an array"):
        tracing.trace(np.ones(M), codes.Codebook(KEY, 3), serials=[1, 2, 3])
    for chips in (np.ones(M), np.ones((0, M))):
        with pytest.raises(ValueError, match=r"chips of shape \[M, m\]"):
            tracing.trace_batch(chips, book)


@pytest.mark.parametrize("num_chips", [1, 40, 304, 600])
@pytest.mark.parametrize("num_vectors", [1, 4, 5, 16])
def test_packed_words_score_as_unpacked_ones_do(num_chips, num_vectors):
    """By tables and by matmul, over several steps and one that is not full; the reference is float64 on whole words."""
    count = 4500
    y = np.random.default_rng(num_chips).normal(size=(num_vectors, num_chips))
    found = tracing.scoring.score(y, codes.Codebook(KEY, count, num_chips), np.zeros(num_vectors), keep=True)
    expected = y @ words(range(count), num_chips).astype(np.float64).T
    np.testing.assert_allclose(found.all, expected, atol=1e-6 * np.abs(y).sum(axis=1).max())
    assert np.abs(expected - np.roll(expected, 1, axis=1)).max() > 0.1  # a shift by one customer would show


@pytest.mark.parametrize("num_chips", [1, 40, 304, 600])
def test_products_of_codewords_are_counted_exactly(num_chips):
    customers, places = np.arange(5, 4505), [0, 4499, 17]
    book = words(range(4600), num_chips)
    expected = book[customers[places]].astype(int) @ book[customers].astype(int).T
    for some in (codes.Codebook(KEY, 4600, num_chips), book):
        chosen = tracing.scoring.shortlist(some, customers)
        np.testing.assert_array_equal(tracing.scoring.correlate(places, chosen), expected)


def test_many_suspects_compile_once(caplog):
    book = codes.Codebook(KEY, 2000, M)

    def compiled(leaks, book) -> int:
        caplog.clear()
        with jax.log_compiles():
            for leak in leaks:
                y = words([leak])[0] + np.random.default_rng(leak).normal(size=M)
                assert [a.serial for a in tracing.trace(y, book).accused] == [leak]
        return sum(record.getMessage().startswith("Compiling") for record in caplog.records)

    compiled([3], book)
    assert compiled([40, 1999, 0, 700], book) == 0
    assert compiled([3], codes.Codebook(KEY, 2100, M)) > 0  # the control: another codebook does compile


def test_a_decoder_of_one_function_and_one_entry_is_found_by_its_name(monkeypatch):
    """One that tests nobody but whom it was told to, on the whole read-out."""
    words = np.asarray(codes.codebook(keys.from_bytes(bytes(32)), range(8), M))

    def second(near: decoders.Near) -> decoders.Decoded:
        statistic = float(near.direction @ words[2])
        return decoders.Decoded([decoders.Test(2, statistic, -100.0)], near.direction)

    monkeypatch.setitem(tracing.DECODERS, "second", decoders.Decoder(second))
    verdict = tracing.trace(words[2].astype(float), words, decoder="second")
    assert [(a.serial, a.statistic) for a in verdict.accused] == [(2, pytest.approx(math.sqrt(M)))]
    assert verdict.decoder == "second"
