import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.interpolate

from smark_jax import carriers, codes, embedding, extraction, keys

RNG = np.random.default_rng(0)
BASE = {"kernel": jnp.float32(RNG.normal(0, 0.1, (60, 50))), "bias": jnp.float32(RNG.normal(size=50))}
KEY = keys.from_bytes(bytes(32))
MARK = carriers.mark(KEY, BASE, 64)


def suspects(count: int) -> dict:
    return {k: v[None] + 0.01 * jnp.float32(RNG.normal(size=(count, *v.shape))) for k, v in BASE.items()}


def test_extract_is_the_dense_product_in_float64():
    suspect = jax.tree.map(lambda leaf: leaf[0], suspects(1))
    matrix = reference.carrier_matrix(*map(np.asarray, MARK.carrier.arrays), MARK.spec.num_weights)
    flat = []
    for name in ("bias", "kernel"):
        base = np.asarray(BASE[name], np.float64)
        flat.append((np.asarray(suspect[name], np.float64) - base).reshape(-1) / np.sqrt(np.square(base).mean()))
    np.testing.assert_allclose(extraction.extract(suspect, BASE, MARK), matrix @ np.concatenate(flat), atol=1e-5)


def test_batch_vmap_and_single_agree():
    batch = suspects(11)
    together = extraction.extract_batch(batch, BASE, MARK)
    mapped = jax.jit(jax.vmap(lambda s: extraction.extract(s, BASE, MARK)))(batch)
    assert together.shape == (11, 64)
    np.testing.assert_allclose(mapped, together, atol=1e-5)
    for row in range(11):
        one = extraction.extract(jax.tree.map(lambda leaf, row=row: leaf[row], batch), BASE, MARK)
        np.testing.assert_allclose(together[row], one, atol=1e-5)


def test_compiles_once_for_all_suspects():
    batch = suspects(5)
    before = extraction.reading._extract._cache_size()
    for row in range(5):
        extraction.extract(jax.tree.map(lambda leaf, row=row: np.asarray(leaf[row]), batch), BASE, MARK)
    assert extraction.reading._extract._cache_size() <= before + 1


def test_the_base_itself_reads_zero():
    np.testing.assert_array_equal(extraction.extract(BASE, BASE, MARK), 0)


def _dense():
    return reference.carrier_matrix(*map(np.asarray, MARK.carrier.arrays), MARK.spec.num_weights)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rectify", [False, True])
def test_weights_that_are_not_finite_are_left_out_and_the_bases_are_refused(bad, rectify):
    suspect = jax.tree.map(lambda leaf: leaf[0], suspects(1))
    places = [(0, 0), (59, 49), (7, 3)]
    broken = {**suspect, "kernel": suspect["kernel"].at[tuple(np.transpose(places))].set(bad)}
    found = extraction.extract(broken, BASE, MARK, rectify)
    assert np.isfinite(found).all()
    if not rectify:  # the reference: the dense matrix in float64, without these weights' columns
        shift = {name: np.asarray(suspect[name], np.float64) - np.asarray(BASE[name], np.float64) for name in BASE}
        shift["kernel"][tuple(np.transpose(places))] = 0
        parts = zip(MARK.spec.leaves, MARK.spec.scales, strict=True)
        vector = np.concatenate([shift[leaf.path].reshape(-1) / scale for leaf, scale in parts])
        np.testing.assert_allclose(found, _dense() @ vector, atol=1e-5)
        stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), suspect, broken)
        np.testing.assert_allclose(extraction.extract_batch(stacked, BASE, MARK)[1], found, atol=1e-6)
        mapped = jax.jit(jax.vmap(lambda s: extraction.extract(s, BASE, MARK)))(stacked)
        np.testing.assert_allclose(mapped[1], found, atol=1e-6)
    read = extraction.coverage(broken, BASE, MARK)
    assert read.left_out == (("kernel", 3, "NaN or infinite"),)
    assert (read.weights, read.read, read.bounded) == (MARK.carrier.num_carrying, MARK.carrier.num_carrying - 3, 0)
    with pytest.raises(ValueError, match="extract: expected finite carrying weights in the base"):
        extraction.extract(suspect, broken, MARK, rectify)


def test_what_does_not_belong_together_is_refused():
    other = MARK._replace(carrier=carriers.mark(KEY, {"w": jnp.ones(5000)}, 64).carrier)
    with pytest.raises(ValueError, match=r"extract: expected a carrier for the 3,050 weights .* one drawn for 5,000"):
        extraction.extract(BASE, BASE, other)
    narrow = {"kernel": BASE["kernel"][:, :40], "bias": BASE["bias"][:40]}
    expected = r"extract: suspect: expected leaf 'bias' .*3,050 carrying weights in all.*\(2,440 weights\)"
    with pytest.raises(ValueError, match=expected):
        extraction.extract(narrow, BASE, MARK)
    with pytest.raises(ValueError, match="extract: base: expected the 2 carrying leaves"):
        extraction.extract(BASE, {"kernel": BASE["kernel"]}, MARK)
    with pytest.raises(ValueError, match="share a leading axis"):
        extraction.extract_batch({"kernel": jnp.ones((3, 60, 50)), "bias": jnp.ones((2, 50))}, BASE, MARK)


def test_a_suspect_may_carry_other_leaves_besides():
    word = codes.codebook(KEY, [0], 64)[0]
    copy = embedding.embed(BASE, MARK, word)
    chips = extraction.extract({**copy, "extra": jnp.ones(3)}, BASE, MARK)
    np.testing.assert_array_equal(jnp.sign(chips), word)


def _attacked(seed=0):
    """A base, a copy's weights, and what shrinking by half and zeroing the small half leave of it, in float64."""
    rng = np.random.default_rng(seed)
    base = {"kernel": jnp.float32(rng.normal(size=(200, 300))), "bias": jnp.float32(rng.normal(size=(300,)))}
    mark = carriers.mark(keys.from_bytes(bytes(32)), base, 304)
    word = codes.codebook(keys.from_bytes(bytes(32)), [7], 304)[0]
    copy = embedding.embed(base, mark, word, 0.03)
    crushed = jax.tree.map(lambda leaf: jnp.where(jnp.abs(leaf) > 1, 0.5 * leaf, 0), copy)
    return base, mark, np.asarray(word, np.float64), copy, crushed


def _cosine(chips, word):
    return float(np.asarray(chips, np.float64) @ word / np.linalg.norm(np.asarray(chips)) / np.linalg.norm(word))


def _line(x, y, groups):
    """Scipy's piecewise linear function through the groups' means, extrapolated along the outer pieces."""
    means = [np.array([v[g].mean() for g in groups]) for v in (x, y)]
    return y - scipy.interpolate.interp1d(*means, fill_value="extrapolate")(x)


def test_rectified_read_out_in_float64():
    base, mark, word, copy, _ = _attacked()
    noisy = {name: 0.7 * leaf + 0.2 * jnp.float32(RNG.normal(size=leaf.shape)) for name, leaf in copy.items()}
    scores, weights = [], []
    for leaf, scale in zip(mark.spec.leaves, mark.spec.scales, strict=True):
        b = np.asarray(base[leaf.path], np.float64).ravel() / scale
        s = np.asarray(noisy[leaf.path], np.float64).ravel() / scale
        if b.size < 4 * 128:
            scores.append((s - b) / np.square(s - b).mean())
            weights.append(np.full(b.size, 1 / np.square(s - b).mean()))
            continue
        size = -(-b.size // min(256, b.size // 128))
        by_s, by_b = ([np.argsort(v)[at : at + size] for at in range(0, b.size, size)] for v in (s, b))
        shift = -_line(s, b, by_s)
        weight = np.empty_like(shift)
        typical = np.mean([np.square(shift[group]).mean() for group in by_s])
        for group in by_s:
            weight[group] = 1 / (np.square(shift[group]).mean() + typical / 10)
        scores.append(_line(b, shift * weight, by_b))
        weights.append(weight)
    wanted = np.concatenate(scores) / np.concatenate(weights).mean()
    found = extraction.extract(noisy, base, mark, rectify=True)
    np.testing.assert_allclose(found, carriers.despread(jnp.float32(wanted), mark), atol=5e-3)
    assert np.abs(found).mean() > 0.2  # the control of the tolerance
    assert _cosine(found, word) > 0.7


def test_rectifying_reads_through_shrinking_and_pruning():
    base, mark, word, copy, crushed = _attacked()
    read = functools.partial(extraction.extract, base=base, mark=mark)
    assert _cosine(read(crushed), word) < 0.4  # the control: the base itself drowns the mark
    assert _cosine(read(crushed, rectify=True), word) > 0.7
    # An intact copy loses a share of bins over weights.
    assert _cosine(read(copy, rectify=True), word) > 0.995
    np.testing.assert_allclose(read(base, rectify=True), np.zeros(304), atol=1e-6)
    # Ties in the base, as after pruning it, leave no NaN.
    pruned = jax.tree.map(lambda leaf: jnp.where(jnp.abs(leaf) > 1, leaf, 0), base)
    assert np.isfinite(extraction.extract(copy, pruned, mark, rectify=True)).all()


def test_rectified_innocents_are_unbiased():
    base, mark, word, _, crushed = _attacked()
    chips = np.asarray(extraction.extract(crushed, base, mark, rectify=True), np.float64)
    others = np.asarray(codes.codebook(keys.from_bytes(bytes(32)), range(1000, 5000), 304), np.float64)
    scores = others @ chips / np.linalg.norm(chips)
    assert abs(scores.mean()) < 4 / np.sqrt(4000)
    assert scores.std() == pytest.approx(1, abs=4 / np.sqrt(2 * 4000))
    assert word @ chips / np.linalg.norm(chips) > 10  # the control


def test_rectified_read_out_is_deaf_to_leaves_that_are_the_bases_own():
    rng = np.random.default_rng(0)
    shapes = {"bias": (64,), "kernel": (256, 128)}
    base = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    mark = carriers.mark(keys.derive(KEY, "carrier"), base, 128)
    word = codes.codebook(KEY, [7], 128)[0]
    copy = embedding.embed(base, mark, word, 0.05)
    noisy = {name: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in copy.items()}
    for bias in (base["bias"], base["bias"] * np.float32(1 + 1e-6)):  # exactly the base's, and but for rounding
        chips = np.asarray(extraction.extract({**noisy, "bias": bias}, base, mark, rectify=True), np.float64)
        assert np.isfinite(chips).all()
        assert chips @ np.asarray(word) / np.linalg.norm(chips) > 9  # of sqrt(128) = 11.3
    still = extraction.extract(base, base, mark, rectify=True)
    np.testing.assert_array_equal(still, np.zeros(128, np.float32))


def test_many_suspects_of_a_model_compile_once(key, caplog):
    base = {"a": {"kernel": jnp.sin(jnp.arange(6000.0)).reshape(60, 100)}, "b": jnp.cos(jnp.arange(500.0))}
    mark = carriers.mark(key, base, 64)

    def compiled(suspects) -> int:
        caplog.clear()
        with jax.log_compiles():
            for suspect in suspects:
                extraction.extract(suspect, base, mark)
        return sum(record.getMessage().startswith("Compiling") for record in caplog.records)

    copies = [jax.tree.map(lambda leaf, i=i: np.asarray(leaf) * (1 + 0.01 * i), base) for i in range(4)]
    assert compiled(copies[:1]) > 0
    assert compiled(copies[1:]) == 0


def test_bfloat16_stays_bfloat16_through_marking_and_reading(key):
    rng = np.random.default_rng(0)
    base = {"kernel": jnp.asarray(rng.normal(size=(300, 100)), jnp.bfloat16), "bias": jnp.ones(50, jnp.bfloat16)}
    mark = carriers.mark(key, base, 64)
    words = np.asarray(codes.codebook(key, [1, 2], 64))
    copy = embedding.embed(base, mark, words[0])
    copies = embedding.embed_batch(base, mark, words)
    assert {leaf.dtype for leaf in jax.tree.leaves((copy, copies))} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(np.sign(extraction.extract(copy, base, mark)), words[0])
    np.testing.assert_array_equal(np.sign(extraction.extract_batch(copies, base, mark)), words)
