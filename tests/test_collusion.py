import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smark_jax import attacks, carriers, codes, embedding, extraction, keys

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
K = 5
WEIGHTS = jnp.asarray([0.5, 0.3, -0.1, 0.1, 0.2])


def make_copies(num_colluders: int = K, dtype: jnp.dtype = jnp.float32) -> dict:
    base = {"a": {"kernel": RNG.normal(size=(40, 50)), "bias": RNG.normal(size=50)}, "scale": RNG.normal(size=())}
    return jax.tree.map(lambda x: jnp.asarray(x + 0.05 * RNG.normal(size=(num_colluders, *x.shape)), dtype), base)


COPIES = make_copies()
IN_RANGE = [name for name in attacks.COLLUSIONS if name != "extrapolate"]


def pairs(pirate, copies):
    """Leaf by leaf: the pirate's weights [n] and the colluders' [K, n], in float64."""
    for got, leaf in zip(jax.tree.leaves(pirate), jax.tree.leaves(copies), strict=True):
        assert got.shape == leaf.shape[1:] and got.dtype == leaf.dtype
        yield np.asarray(got, np.float64).reshape(-1), np.asarray(leaf, np.float64).reshape(leaf.shape[0], -1)


def by_loops(rule, columns):
    """One weight at a time, from the list of the colluders' values."""
    return np.array([rule(list(column)) for column in columns.T])


def middle(values):
    values, half = sorted(values), len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


REFERENCES = {
    "average": (attacks.average, lambda v: sum(v) / len(v)),
    "median": (attacks.median, middle),
    "minimum": (attacks.minimum, min),
    "maximum": (attacks.maximum, max),
    "min_max": (attacks.min_max, lambda v: (min(v) + max(v)) / 2),
    "modified_negative": (attacks.modified_negative, lambda v: min(v) + max(v) - middle(v)),
    "extrapolate": (attacks.extrapolate, lambda v: -0.9 * v[0] + 1.9 * sum(v[1:]) / (len(v) - 1)),
    "extrapolate by 3": (
        functools.partial(attacks.extrapolate, magnitude=3.0),
        lambda v: -3 * v[0] + 4 * sum(v[1:]) / (len(v) - 1),
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("num_colluders", [2, 4, 5])
def test_deterministic_attacks_are_their_formulas_in_float64(name, num_colluders):
    attack, rule = REFERENCES[name]
    copies = make_copies(num_colluders)
    for got, columns in pairs(attack(copies), copies):
        np.testing.assert_allclose(got, by_loops(rule, columns), atol=3e-6)


def test_average_weighs_each_colluder():
    def rule(values):
        return 0.5 * values[0] + 0.3 * values[1] - 0.1 * values[2] + 0.1 * values[3] + 0.2 * values[4]

    for got, columns in pairs(attacks.average(COPIES, WEIGHTS), COPIES):
        np.testing.assert_allclose(got, by_loops(rule, columns), atol=2e-6)


def test_two_colluders_leave_the_order_statistics_nothing_but_the_average():
    copies = make_copies(2)
    for attack in (attacks.median, attacks.min_max, attacks.modified_negative):
        for got, columns in pairs(attack(copies), copies):
            np.testing.assert_allclose(got, columns.mean(axis=0), atol=1e-6)


def test_randomised_negative_takes_extremes_with_the_stated_probability():
    for got, columns in pairs(attacks.randomised_negative(COPIES, KEY, 0.2), COPIES):
        lowest, highest = columns.min(axis=0), columns.max(axis=0)
        assert ((got == lowest) | (got == highest)).all()
        if got.size == 2000:
            # Five standard deviations of a binomial share.
            np.testing.assert_allclose((got == lowest).mean(), 0.2, atol=5 * np.sqrt(0.16 / 2000))


def test_interleave_takes_each_colluder_as_often():
    kernel, columns = list(pairs(attacks.interleave(COPIES, KEY), COPIES))[1]
    matches = columns == kernel[None]
    np.testing.assert_array_equal(matches.sum(axis=0), 1)
    np.testing.assert_allclose(matches.mean(axis=1), 1 / K, atol=5 * np.sqrt(0.16 / 2000))


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_largest_difference_masks_the_widest_and_averages_the_rest(fraction):
    for got, columns in pairs(attacks.largest_difference(COPIES, KEY, fraction), COPIES):
        lowest, highest = columns.min(axis=0), columns.max(axis=0)
        masked = (got == lowest) | (got == highest)
        np.testing.assert_allclose(got[~masked], columns.mean(axis=0)[~masked], atol=1e-6)
        if got.size > 1:
            assert abs(masked.sum() - fraction * got.size) <= 1
            assert (highest - lowest)[masked].min() >= (highest - lowest)[~masked].max() - 1e-6
            assert (got == lowest).any() and (got == highest).any()


@pytest.mark.parametrize("name", IN_RANGE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_stay_in_the_colluders_range(name, dtype):
    copies = make_copies(dtype=dtype)
    for got, columns in pairs(attacks.COLLUSIONS[name](copies, KEY), copies):
        # Modified negative mirrors the median in the range, so it stays in; rounding may cross by a unit in float32.
        assert (got >= columns.min(axis=0) - 1e-6).all()
        assert (got <= columns.max(axis=0) + 1e-6).all()


def test_extrapolation_leaves_the_colluders_range():
    _, (got, columns), _ = pairs(attacks.extrapolate(COPIES), COPIES)
    assert ((got > columns.max(axis=0)) | (got < columns.min(axis=0))).mean() > 0.1


@pytest.mark.parametrize("name", attacks.COLLUSIONS)
def test_every_attack_runs_under_jit_and_repeats_under_its_key(name):
    attack = attacks.COLLUSIONS[name]
    eager, again, jitted = attack(COPIES, KEY), attack(COPIES, KEY), jax.jit(attack)(COPIES, KEY)
    for one, two, three in zip(*map(jax.tree.leaves, (eager, again, jitted)), strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(one, three, atol=2e-6)


@pytest.mark.parametrize("name", attacks.COLLUSIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_stay_and_round_once(name, dtype):
    copies = make_copies(dtype=dtype)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), copies)
    expected = attacks.COLLUSIONS[name](wide, KEY)
    for (got, _), reference in zip(
        pairs(attacks.COLLUSIONS[name](copies, KEY), copies), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(got, np.asarray(reference.astype(dtype), np.float64).reshape(-1))


@pytest.mark.parametrize("name", attacks.COLLUSIONS)
def test_a_weight_depends_on_itself_alone(name):
    """Moving one weight of every copy moves that weight of the pirate and no other, in its leaf or another.

    Largest-difference masking compares weights of a leaf, so there the whole leaf is moved by one offset.
    """
    attack = attacks.COLLUSIONS[name]
    shift = np.zeros((40, 50), np.float32)
    shift[(...,) if name == "largest_difference" else (3, 7)] = 0.25
    moved = {**COPIES, "a": {**COPIES["a"], "kernel": COPIES["a"]["kernel"] + shift[None]}}
    before, after = attack(COPIES, KEY), attack(moved, KEY)
    np.testing.assert_allclose(after["a"]["kernel"] - before["a"]["kernel"], shift, atol=2e-6)
    np.testing.assert_array_equal(after["a"]["bias"], before["a"]["bias"])
    np.testing.assert_array_equal(after["scale"], before["scale"])


@pytest.mark.parametrize("attack", [attacks.randomised_negative, attacks.interleave, attacks.largest_difference])
def test_randomness_differs_between_leaves_and_keys(attack):
    kernel = COPIES["a"]["kernel"]
    twins = attack({"one": kernel, "two": kernel}, KEY)
    assert (twins["one"] != twins["two"]).mean() > 0.1
    other = attack({"one": kernel, "two": kernel}, jax.random.key(1))
    assert (twins["one"] != other["one"]).mean() > 0.1


def test_counters_and_empty_leaves_come_from_the_first_colluder():
    copies = {"steps": jnp.asarray([2**30 + 1, 7]), "empty": jnp.zeros((2, 0, 3))}
    for attack in attacks.COLLUSIONS.values():
        pirate = attack(copies, KEY)
        assert pirate["steps"].dtype == copies["steps"].dtype and int(pirate["steps"]) == 2**30 + 1
        assert pirate["empty"].shape == (0, 3)


def test_settings_may_be_traced():
    for attack, setting in (
        (lambda c, s: attacks.average(c, s), WEIGHTS),
        (lambda c, s: attacks.extrapolate(c, s), 0.5),
        (lambda c, s: attacks.randomised_negative(c, KEY, s), 0.3),
        (lambda c, s: attacks.largest_difference(c, KEY, s), 0.3),
    ):
        for one, two in zip(
            *map(jax.tree.leaves, (attack(COPIES, setting), jax.jit(attack)(COPIES, setting))), strict=True
        ):
            np.testing.assert_allclose(one, two, atol=2e-6)


def test_add_noise_has_the_stated_size_in_each_leaf():
    params = {
        "small": jnp.float32(RNG.normal(0, 0.01, (100, 100))),
        "large": jnp.float32(RNG.normal(3, 4.0, (100, 100))),
        "narrow": jnp.ones((100, 100), jnp.bfloat16),
        "zero": jnp.zeros(10),
        "steps": jnp.asarray(3),
    }
    noisy = jax.jit(attacks.add_noise)(params, KEY, 0.5)
    drawn = {}
    for name in ("small", "large", "narrow"):
        assert noisy[name].dtype == params[name].dtype
        clean = np.asarray(params[name], np.float64)
        drawn[name] = (np.asarray(noisy[name], np.float64) - clean) / np.sqrt(np.square(clean).mean())
        # Five standard errors of a mean and of a standard deviation over 10,000 draws.
        assert abs(drawn[name].mean()) < 5 * 0.5 / 100
        np.testing.assert_allclose(drawn[name].std(), 0.5, atol=5 * 0.5 / np.sqrt(20_000))
    assert abs(np.corrcoef(drawn["small"].reshape(-1), drawn["large"].reshape(-1))[0, 1]) < 0.05
    np.testing.assert_array_equal(noisy["zero"], 0)
    assert int(noisy["steps"]) == 3
    with pytest.raises(
        ValueError, match="add_noise: expected the noise relative to the RMS to be a positive finite number"
    ):
        attacks.add_noise(params, KEY, 0.0)


@pytest.mark.parametrize("name", attacks.COLLUSIONS)
def test_copies_of_fewer_than_two_or_of_different_number_are_refused(name):
    attack = attacks.COLLUSIONS[name]
    with pytest.raises(ValueError, match=f"{name}: expected copies whose leaves share a leading axis"):
        attack({"a": jnp.zeros((3, 4)), "b": jnp.zeros((2, 4))}, KEY)
    with pytest.raises(ValueError, match=f"{name}: expected copies whose leaves share a leading axis"):
        attack({"a": jnp.zeros(()), "b": jnp.zeros((2, 4))}, KEY)
    with pytest.raises(ValueError, match=f"{name}: expected copies of at least two colluders"):
        attack({"a": jnp.zeros((1, 4))}, KEY)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="average: expected weights of shape"):
        attacks.average(COPIES, jnp.ones(4) / 4)
    for weights in (jnp.ones(K), jnp.full(K, jnp.nan)):
        with pytest.raises(ValueError, match="average: expected weights that sum to 1"):
            attacks.average(COPIES, weights)
    for magnitude in (0, -0.5, float("inf")):
        with pytest.raises(ValueError, match="extrapolate: expected magnitude to be a positive finite number"):
            attacks.extrapolate(COPIES, magnitude)
    for share in (0, 1, -0.1, 50, float("nan")):
        with pytest.raises(ValueError, match="randomised_negative: expected probability strictly between"):
            attacks.randomised_negative(COPIES, KEY, share)
        with pytest.raises(ValueError, match="largest_difference: expected fraction strictly between"):
            attacks.largest_difference(COPIES, KEY, share)


@pytest.fixture(scope="module")
def coalition():
    """Five real copies of 100,000 weights at 5 %, and the codewords of their holders and of 1,000 innocents."""
    base = {"kernel": jnp.float32(RNG.normal(size=(300, 300))), "head": jnp.float32(RNG.normal(0, 0.1, (100, 100)))}
    secret = keys.from_bytes(bytes(32))
    mark = carriers.mark(keys.derive(secret, "carrier"), base, 512)
    book = codes.codebook(keys.derive(secret, "code"), range(K + 1000), 512)
    return base, mark, book, embedding.embed_batch(base, mark, book[:K], strength=0.05)


def normalised_scores(pirate, coalition):
    base, mark, book, _ = coalition
    chips = np.asarray(extraction.extract(pirate, base, mark), np.float64)
    return np.asarray(book, np.float64) @ chips / np.linalg.norm(chips)


@pytest.mark.parametrize("name", IN_RANGE)
def test_every_colluder_shows_in_what_a_symmetric_attack_leaves(name, coalition):
    # An ideal average of five gives sqrt(512 / 5) = 10.1 each; innocents are standard normal, two-sided.
    scores = normalised_scores(attacks.COLLUSIONS[name](coalition[-1], KEY), coalition)
    assert scores[:K].min() > 7
    assert np.abs(scores[K:]).max() < 5.5


def test_extrapolation_turns_the_first_colluder_negative_and_no_more_hidden(coalition):
    scores = normalised_scores(attacks.extrapolate(coalition[-1]), coalition)
    assert scores[0] < -7
    assert np.abs(scores[K:]).max() < 5.5


def test_attacks_compose_with_removal(coalition):
    pirate = attacks.prune(attacks.add_noise(attacks.median(coalition[-1]), KEY, 0.05), 0.3)
    assert normalised_scores(pirate, coalition)[:K].min() > 6
