import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st
from parties import party_secrets
from scipy import stats

from smark_jax import aggregation, chacha


def total_of(words: list) -> np.ndarray:
    """Sum modulo 2^32 on Python integers."""
    return (sum(np.asarray(w).astype(object) for w in words) % 2**32).astype(np.uint32)


@settings(deadline=None, max_examples=60)
@given(
    clip=st.floats(1e-3, 1e3),
    num_parties=st.integers(1, 5000),
    bits=st.integers(14, 32),
    seed=st.integers(0, 2**31),
)
def test_words_stay_in_range_and_errors_within_a_level(clip, num_parties, bits, seed):
    fixed = aggregation.FixedPoint(clip, num_parties, bits)
    assert num_parties * (fixed.num_levels - 1) < 2**bits
    x = np.random.default_rng(seed).uniform(-1.5 * clip, 1.5 * clip, 200).astype(np.float32)
    x[:4] = [clip, -clip, 0, 100 * clip]
    words = np.asarray(aggregation.encode(jnp.asarray(x), fixed, jax.random.key(seed)))
    assert words.dtype == np.uint32
    assert words.max() <= fixed.num_levels - 1
    # The reference: a float64 grid. Float32 rounds the quotient by 2^-24 of it.
    levels = words.astype(np.float64) - (fixed.num_levels - 1) // 2
    clipped = np.clip(x.astype(np.float64), -clip, clip)
    assert (np.abs(levels * fixed.resolution - clipped) <= fixed.resolution + 2e-7 * np.abs(clipped)).all()
    back = np.asarray(aggregation.decode(jnp.asarray(words), fixed, 1), np.float64)
    np.testing.assert_allclose(back, levels * fixed.resolution, rtol=2e-7, atol=1e-30)


@pytest.mark.parametrize(("clip", "num_parties", "bits"), [(1.0, 1, 8), (0.37, 5, 16), (3.0, 40, 24), (0.01, 3, 32)])
def test_rounding_equals_the_reference_to_the_bit(clip, num_parties, bits):
    fixed = aggregation.FixedPoint(clip, num_parties, bits)
    rng = np.random.default_rng(bits)
    x = np.concatenate([rng.normal(0, 0.4 * clip, 4000), [clip, -clip, 0, 9 * clip]]).astype(np.float32)
    key = jax.random.key(7)
    secret = np.pad(np.asarray(jax.random.key_data(key)), (0, 6)).astype("<u4").tobytes()
    blocks = [reference.chacha20_block(secret, i, bytes(12)) for i in range(-(-x.size // 32))]
    drawn = np.frombuffer(b"".join(blocks), "<u4")[: -(-x.size // 2)]
    expected = reference.fixed_point_words(x, fixed.resolution, fixed.offset, drawn)
    np.testing.assert_array_equal(aggregation.encode(jnp.asarray(x), fixed, key), expected)


def test_rounding_is_unbiased_with_the_stated_variance():
    fixed = aggregation.FixedPoint(1.0, 1, bits=8)
    x = np.float32(np.linspace(-0.99, 0.99, 23))
    keys_ = jax.random.split(jax.random.key(0), 4000)
    rounded = jax.vmap(lambda k: aggregation.decode(aggregation.encode(jnp.asarray(x), fixed, k), fixed, 1))(keys_)
    rounded = np.asarray(rounded, np.float64)
    error = np.abs(rounded.mean(axis=0) - x)
    assert (error < 5 * fixed.resolution / 2 / np.sqrt(4000)).all()
    assert (rounded.var(axis=0) <= fixed.resolution**2 / 4 * 1.01).all()
    # Control: rounding to the nearest level is biased, and this test would see it.
    nearest = np.round(x / fixed.resolution) * fixed.resolution
    assert (np.abs(nearest - x) > 5 * fixed.resolution / 2 / np.sqrt(4000)).any()


@settings(deadline=None, max_examples=15)
@given(num_parties=st.integers(1, 40), bits=st.sampled_from([12, 24, 32]), seed=st.integers(0, 2**31))
def test_sum_of_words_decodes_to_the_sum_of_floats(num_parties, bits, seed):
    fixed = aggregation.FixedPoint(2.0, num_parties, bits)
    x = np.random.default_rng(seed).uniform(-2, 2, (num_parties, 50)).astype(np.float32)
    words = [aggregation.encode(jnp.asarray(row), fixed, jax.random.key(i)) for i, row in enumerate(x)]
    total = np.asarray(aggregation.decode(jnp.asarray(total_of(words)), fixed, num_parties), np.float64)
    exact = x.astype(np.float64).sum(axis=0)
    assert (np.abs(total - exact) <= num_parties * fixed.resolution + 1e-6 * num_parties).all()
    # The mean's standard error over 50 values, at five times the bound.
    rms = np.sqrt(np.square((total - exact) / num_parties).mean())
    assert rms <= 5 * fixed.mean_standard_error + 1e-6


def test_a_weighted_sum_is_the_mean_over_all_examples():
    fixed = aggregation.FixedPoint(2.0, 4)
    rng = np.random.default_rng(0)
    x, counts = rng.uniform(-2, 2, (4, 60)).astype(np.float32), [3, 1000, 0, 250]
    sent = [
        aggregation.encode_weighted(jnp.asarray(row), n, 1000, fixed, jax.random.key(i))
        for i, (row, n) in enumerate(zip(x, counts, strict=True))
    ]
    total = (jnp.asarray(total_of([words for words, _ in sent])), sum(int(count) for _, count in sent))
    mean, examples = aggregation.decode_weighted(total, 1000, fixed, 4)
    assert examples == 1253
    exact = np.average(x.astype(np.float64), axis=0, weights=counts)
    np.testing.assert_allclose(mean, exact, atol=4 * fixed.resolution * 1000 / 1253 + 1e-6)
    assert np.abs(exact - x.mean(axis=0)).max() > 0.1  # the control: weights matter here
    for n, most, message in (
        (1001, 1000, "0 to 1,000 examples"),
        (-1, 1000, "0 to 1,000 examples"),
        (1, 2**31, "most_examples below"),
    ):
        with pytest.raises(ValueError, match=message):
            aggregation.encode_weighted(jnp.ones(2), n, most, fixed, jax.random.key(0))
    with pytest.raises(ValueError, match="at least one example"):
        aggregation.decode_weighted((jnp.zeros(2, jnp.uint32), jnp.uint32(0)), 1000, fixed, 4)


def test_the_largest_number_of_parties_does_not_wrap_and_one_more_is_refused():
    for bits in (4, 8, 32):
        most = (2**bits - 1) // 2 if bits < 32 else 5000
        fixed = aggregation.FixedPoint(1.0, most, bits)
        top = int(np.asarray(aggregation.encode(jnp.ones(1), fixed, jax.random.key(0)))[0])
        assert most * top < 2**bits
        total = jnp.full(1, most * top, jnp.uint32)
        np.testing.assert_allclose(aggregation.decode(total, fixed, most), most, rtol=1e-6)
        with pytest.raises(ValueError, match="may have wrapped around"):
            aggregation.decode(total, fixed, most + 1)
    with pytest.raises(ValueError, match="FixedPoint: expected at most 7 parties for sums of 4 bits, but got 8"):
        aggregation.FixedPoint(1.0, 8, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 0), "num_parties to be a whole number of at least 1"),
        ((1.0, 2.5), "num_parties"),
        ((0.0, 3), "clip to be a positive finite number"),
        ((np.nan, 3), "clip"),
        ((1.0, 3, 33), "bits of at most 32"),
        ((1.0, 3, 0), "bits"),
    ],
)
def test_bad_formats_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        aggregation.FixedPoint(*arguments)


def test_bad_updates_are_refused():
    fixed = aggregation.FixedPoint(1.0, 2)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="encode: expected finite update"):
            aggregation.encode({"w": jnp.array([1.0, bad])}, fixed, jax.random.key(0))
    with pytest.raises(ValueError, match="at least one leaf"):
        aggregation.encode({}, fixed, jax.random.key(0))


def test_stack_refuses_trees_that_differ():
    good = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    stacked = aggregation.stack({4: good, 9: jax.tree.map(lambda leaf: 2 * leaf, good)})
    assert stacked["w"].shape == (2, 2, 3)
    assert stacked["b"][1, 0] == 2
    for other, got in (
        ({"w": jnp.ones((2, 3))}, "absent at party 9"),
        ({"w": jnp.ones((3, 2)), "b": jnp.ones(3)}, r"\(3, 2\) float32 at party 9"),
        ({"w": jnp.ones((2, 3)), "b": jnp.ones(3, jnp.bfloat16)}, r"\(3,\) bfloat16 at party 9"),
        ({**good, "extra": jnp.ones(1)}, r"\(1,\) float32 at party 9"),
    ):
        with pytest.raises(ValueError, match=f"the same tree from every party .* but got {got}"):
            aggregation.stack({4: good, 9: other})
    with pytest.raises(ValueError, match="zero parties"):
        aggregation.stack({})


@pytest.mark.parametrize("num_parties", [1, 2, 3, 8])
def test_masks_cancel_exactly_and_are_fresh_each_round(num_parties):
    pair_keys = aggregation.pair_keys(party_secrets(num_parties))
    masks = [
        [np.asarray(aggregation.pairwise_mask(pair_keys[p], p, round_, 500)) for p in range(num_parties)]
        for round_ in (0, 1)
    ]
    for round_masks in masks:
        assert not total_of(round_masks).any()
    if num_parties > 1:
        for p in range(num_parties):
            assert (masks[0][p] != masks[1][p]).mean() > 0.99


def test_a_mask_is_the_signed_sum_of_the_pairs_streams():
    pair_keys = aggregation.pair_keys(party_secrets(4))

    def stream(u: int, v: int) -> np.ndarray:
        nonce = (9).to_bytes(4, "little") + bytes(4) + (1).to_bytes(4, "little")
        key = pair_keys[u, v].astype("<u4").tobytes()
        cipher = Cipher(algorithms.ChaCha20(key, bytes(4) + nonce), None)
        return np.frombuffer(cipher.encryptor().update(bytes(400)), "<u4").astype(np.uint32)

    expected = total_of([stream(2, 3), -stream(2, 0), -stream(2, 1)])
    np.testing.assert_array_equal(aggregation.pairwise_mask(pair_keys[2], 2, 9, 100), expected)
    traced = jax.jit(aggregation.pairwise_mask, static_argnames="num_words")(pair_keys[2], 2, 9, num_words=100)
    np.testing.assert_array_equal(traced, expected)


def test_a_party_needs_its_own_row_only():
    """Each agrees its row from its own secret and public keys; together rows are symmetric, and own keys unique."""
    secrets = party_secrets(5)
    public = [aggregation.public_key(s) for s in secrets]
    rows = np.stack([aggregation.agree(s, p, public) for p, s in enumerate(secrets)])
    np.testing.assert_array_equal(rows, aggregation.pair_keys(secrets))
    np.testing.assert_array_equal(rows, rows.swapaxes(0, 1))
    distinct = {rows[i, j].tobytes() for i in range(5) for j in range(i, 5)}
    assert len(distinct) == 15


def uniformity_p_value(words: np.ndarray) -> float:
    """Chi-square of each of the four bytes against uniform, combined by Bonferroni."""
    data = np.asarray(words).astype("<u4").view(np.uint8).reshape(-1, 4)
    return min(1.0, 4 * min(stats.chisquare(np.bincount(data[:, i], minlength=256)).pvalue for i in range(4)))


def test_masked_words_look_uniform_and_unmasked_words_do_not():
    pair_keys = aggregation.pair_keys(party_secrets(3))
    fixed = aggregation.FixedPoint(1.0, 3)
    update = jnp.float32(np.random.default_rng(0).normal(0, 0.01, 100_000))
    words = aggregation.encode(update, fixed, jax.random.key(0))
    masked = words + aggregation.pairwise_mask(pair_keys[1], 1, 0, words.size)
    assert uniformity_p_value(masked) > 1e-4
    assert uniformity_p_value(words) < 1e-100
    # Nor does the masked stream follow the update.
    assert abs(np.corrcoef(np.asarray(masked, np.float64), np.asarray(update))[0, 1]) < 5 / np.sqrt(update.size)


def test_bad_keys_are_refused():
    secrets = party_secrets(3)
    public = [aggregation.public_key(s) for s in secrets]
    with pytest.raises(ValueError, match="its own from each party"):
        aggregation.pair_keys([secrets[0], secrets[0]])
    with pytest.raises(ValueError, match="own public key at place 1"):
        aggregation.agree(secrets[0], 1, public)
    with pytest.raises(ValueError, match="zero parties"):
        aggregation.pair_keys([])
    rows = aggregation.pair_keys(secrets)
    with pytest.raises(ValueError, match=r"pair_keys of uint32\[P, 8\]"):
        aggregation.pairwise_mask(rows, 0, 0, 10)
    with pytest.raises(ValueError, match="a party from 0 to 2"):
        aggregation.pairwise_mask(rows[0], 3, 0, 10)


def test_rounding_keys_differ_between_parties_and_rounds():
    row = aggregation.pair_keys(party_secrets(2))[0]
    drawn = {
        tuple(np.asarray(jax.random.key_data(aggregation.rounding_key(row, p, r)))) for p in (0, 1) for r in (0, 1)
    }
    assert len(drawn) == 4
    assert chacha.BLOCK_WORDS == 16
