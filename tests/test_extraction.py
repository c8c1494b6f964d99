import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from smark_jax import carriers, codes, embedding, extraction, keys

RNG = np.random.default_rng(0)
BASE = {"kernel": jnp.float32(RNG.normal(0, 0.1, (60, 50))), "bias": jnp.float32(RNG.normal(size=50))}
KEY = keys.from_bytes(bytes(32))
SPEC = carriers.select(BASE)
CARRIER = carriers.draw(KEY, SPEC, 64)


def suspects(count: int) -> dict:
    return {k: v[None] + 0.01 * jnp.float32(RNG.normal(size=(count, *v.shape))) for k, v in BASE.items()}


def test_extract_is_the_dense_product_in_float64():
    suspect = jax.tree.map(lambda leaf: leaf[0], suspects(1))
    matrix = reference.carrier_matrix(
        *(np.asarray(a) for a in (CARRIER.inner_signs, CARRIER.outer_signs, CARRIER.positions)), SPEC.num_weights
    )
    flat = []
    for name in ("bias", "kernel"):
        base = np.asarray(BASE[name], np.float64)
        flat.append((np.asarray(suspect[name], np.float64) - base).reshape(-1) / np.sqrt(np.square(base).mean()))
    np.testing.assert_allclose(
        extraction.extract(suspect, BASE, SPEC, CARRIER), matrix @ np.concatenate(flat), atol=1e-5
    )


def test_batch_vmap_and_single_agree():
    batch = suspects(11)
    together = extraction.extract_batch(batch, BASE, SPEC, CARRIER)
    mapped = jax.jit(jax.vmap(lambda s: extraction.extract(s, BASE, SPEC, CARRIER)))(batch)
    assert together.shape == (11, 64)
    np.testing.assert_allclose(mapped, together, atol=1e-5)
    for row in range(11):
        one = extraction.extract(jax.tree.map(lambda leaf, row=row: leaf[row], batch), BASE, SPEC, CARRIER)
        np.testing.assert_allclose(together[row], one, atol=1e-5)


def test_compiles_once_for_all_suspects():
    batch = suspects(5)
    before = extraction._extract._cache_size()
    for row in range(5):
        extraction.extract(jax.tree.map(lambda leaf, row=row: np.asarray(leaf[row]), batch), BASE, SPEC, CARRIER)
    assert extraction._extract._cache_size() <= before + 1


def test_the_base_itself_reads_zero():
    np.testing.assert_array_equal(extraction.extract(BASE, BASE, SPEC, CARRIER), 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [(0, 0), (59, 49)])
def test_weights_that_are_not_finite_are_refused(bad, place):
    broken = {**BASE, "kernel": BASE["kernel"].at[place].set(bad)}
    with pytest.raises(ValueError, match="extract: expected finite carrying weights"):
        extraction.extract(broken, BASE, SPEC, CARRIER)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), BASE, broken)
    with pytest.raises(ValueError, match="extract_batch: expected finite carrying weights"):
        extraction.extract_batch(stacked, BASE, SPEC, CARRIER)


def test_what_does_not_belong_together_is_refused():
    other = carriers.draw(KEY, carriers.select({"w": jnp.ones(5000)}), 64)
    with pytest.raises(ValueError, match=r"extract: expected a carrier for the 3,050 weights .* one drawn for 5,000"):
        extraction.extract(BASE, BASE, SPEC, other)
    narrow = {"kernel": BASE["kernel"][:, :40], "bias": BASE["bias"][:40]}
    expected = r"extract: suspect: expected leaf 'bias' .*3,050 carrying weights in all.*\(2,440 weights\)"
    with pytest.raises(ValueError, match=expected):
        extraction.extract(narrow, BASE, SPEC, CARRIER)
    with pytest.raises(ValueError, match="extract: base: expected the 2 carrying leaves"):
        extraction.extract(BASE, {"kernel": BASE["kernel"]}, SPEC, CARRIER)
    with pytest.raises(ValueError, match="share a leading axis"):
        extraction.extract_batch({"kernel": jnp.ones((3, 60, 50)), "bias": jnp.ones((2, 50))}, BASE, SPEC, CARRIER)


def test_a_suspect_may_carry_other_leaves_besides():
    word = codes.codebook(KEY, [0], 64)[0]
    copy = embedding.embed(BASE, SPEC, CARRIER, word)
    chips = extraction.extract({**copy, "extra": jnp.ones(3)}, BASE, SPEC, CARRIER)
    np.testing.assert_array_equal(jnp.sign(chips), word)
