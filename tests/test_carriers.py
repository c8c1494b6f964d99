import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from smark_jax import carriers, keys

KEY = keys.from_bytes(bytes(range(32)))
# Sizes below a block (a power of two, and not), of exactly one block, of several with a tail; and m up to D.
SIZES = [(1, 1), (5, 3), (64, 64), (300, 300), (1000, 304), (2048, 304), (5000, 304), (7001, 33), (9000, 700)]


def spec_of(num_weights: int) -> carriers.Spec:
    return carriers.Spec((carriers.Leaf("w", (num_weights,)),), (1.0,))


def mark_of(num_weights: int, num_chips: int = 304, key: keys.SecretKey = KEY) -> carriers.Mark:
    return carriers.Mark(spec_of(num_weights), carriers.draw(key, spec_of(num_weights), num_chips))


def dense(carrier: carriers.Carrier) -> np.ndarray:
    arrays = (carrier.inner_signs, carrier.outer_signs, carrier.positions)
    return reference.carrier_matrix(*map(np.asarray, arrays), carrier.num_weights)


@functools.cache
def drawn(num_weights: int, num_chips: int) -> tuple[carriers.Mark, np.ndarray]:
    mark = mark_of(num_weights, num_chips)
    return mark, dense(mark.carrier)


@pytest.mark.parametrize(("num_weights", "num_chips"), SIZES)
def test_transforms_equal_the_dense_matrix(num_weights, num_chips):
    mark, matrix = drawn(num_weights, num_chips)
    rng = np.random.default_rng(num_weights)
    chips, vector = rng.normal(size=num_chips), rng.normal(size=num_weights)
    np.testing.assert_allclose(carriers.spread(jnp.float32(chips), mark), chips @ matrix, atol=2e-5)
    np.testing.assert_allclose(carriers.despread(jnp.float32(vector), mark), matrix @ vector, atol=2e-5)


@pytest.mark.parametrize(("num_weights", "num_chips"), SIZES)
def test_rows_are_orthonormal_and_dense(num_weights, num_chips):
    mark, matrix = drawn(num_weights, num_chips)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(num_chips), atol=1e-12)
    covered = matrix[:, : mark.carrier.num_carrying]
    assert not matrix[:, mark.carrier.num_carrying :].any()
    assert num_weights - mark.carrier.num_carrying < max(2048, 8 * num_chips)
    if num_weights > 1000:
        assert (np.count_nonzero(covered, axis=1) > 0.9 * covered.shape[1]).all()
        # Energy is spread over all blocks alike, and the rows have no direct-current part to speak of.
        assert np.abs(covered.sum(axis=1) / np.sqrt(covered.shape[1])).max() < 6 / np.sqrt(covered.shape[1]) ** 0.5


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_despread_inverts_spread_and_both_are_linear(data):
    num_weights, num_chips = data.draw(st.sampled_from(SIZES))
    seed = data.draw(st.integers(0, 2**31))
    scale = data.draw(st.floats(-100, 100, width=32))
    mark = mark_of(num_weights, num_chips, keys.derive(KEY, str(seed % 3)))
    rng = np.random.default_rng(seed)
    a, b = jnp.float32(rng.normal(size=(2, num_chips)))
    v = jnp.float32(rng.normal(size=num_weights))
    np.testing.assert_allclose(carriers.despread(carriers.spread(a, mark), mark), a, atol=1e-5)
    combined = carriers.spread(a + scale * b, mark)
    separate = carriers.spread(a, mark) + scale * carriers.spread(b, mark)
    np.testing.assert_allclose(combined, separate, atol=1e-4 * (1 + abs(scale)))
    # Adjoint: <spread(a), v> = <a, despread(v)>; and spread preserves length.
    np.testing.assert_allclose(carriers.spread(a, mark) @ v, a @ carriers.despread(v, mark), atol=1e-3)
    np.testing.assert_allclose(jnp.linalg.norm(carriers.spread(a, mark)), jnp.linalg.norm(a), rtol=1e-5)


def test_gradient_of_despread_is_spread():
    mark = mark_of(5000, 40)
    chips = jnp.float32(np.random.default_rng(0).normal(size=40))
    _, pull = jax.vjp(lambda v: carriers.despread(v, mark), jnp.zeros(5000))
    np.testing.assert_allclose(pull(chips)[0], carriers.spread(chips, mark), atol=1e-6)


def test_transforms_under_jit_and_vmap():
    mark = mark_of(5000, 40)
    batch = jnp.float32(np.random.default_rng(0).normal(size=(3, 40)))
    spread = jax.jit(jax.vmap(carriers.spread, in_axes=(0, None)))(batch, mark)
    np.testing.assert_allclose(spread[1], carriers.spread(batch[1], mark), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(carriers.despread, (0, None))(spread, mark), batch, atol=1e-5)


def test_the_key_names_the_carrier_and_nothing_else_does():
    same = [carriers.draw(KEY, spec_of(5000), 304) for _ in range(2)]
    other = carriers.draw(keys.derive(KEY, "other"), spec_of(5000), 304)
    for name in ("inner_signs", "outer_signs", "positions"):
        first, second, third = (np.asarray(getattr(c, name)) for c in (*same, other))
        np.testing.assert_array_equal(first, second)
        assert (first != third).any()
    overlap = dense(same[0]) @ dense(other).T
    assert np.abs(overlap).max() < 6 / np.sqrt(4096)
    assert "inner" not in repr(other)


def test_positions_are_distinct_uniform_and_fresh_in_each_block():
    carrier = carriers.draw(KEY, spec_of(2048 * 600), 304)
    positions = np.asarray(carrier.positions)
    assert positions.shape == (600, 304)
    assert all(len(set(row)) == 304 for row in positions)
    assert positions.min() == 0
    assert positions.max() == 2047
    counts = np.bincount(positions.reshape(-1), minlength=2048)
    expected = 600 * 304 / 2048
    assert np.square(counts - expected).sum() / expected < 2048 + 6 * np.sqrt(2 * 2048)
    assert (positions[0] != positions[1]).mean() > 0.95


def test_two_rounds_hide_the_coefficients_that_one_round_shows():
    """The squared difference of two copies, averaged over its blocks, under the Walsh transform: see the theory."""
    mark = mark_of(2048, 32)
    positions = np.asarray(mark.carrier.positions)[0]
    difference = np.where(np.random.default_rng(1).random(32) < 0.5, 2.0, 0.0)
    h = reference.hadamard(2048)

    def spectrum_hits(rounds: int) -> float:
        coefficients = np.zeros(2048)
        coefficients[positions] = difference
        x = h @ coefficients
        if rounds == 2:
            x = np.asarray(carriers.spread(jnp.float32(difference), mark), np.float64)
        spectrum = np.abs(h @ np.square(x))
        # Squaring one round puts energy exactly at the exclusive-ors of used coefficients.
        used = positions[difference > 0]
        pairs = {int(a ^ b) for a in used for b in used if a < b}
        strongest = np.argsort(-spectrum[1:])[: len(pairs)] + 1
        return len(pairs & set(strongest.tolist())) / len(pairs)

    assert spectrum_hits(rounds=1) > 0.95
    assert spectrum_hits(rounds=2) < 0.25


def test_more_chips_than_weights_is_refused():
    with pytest.raises(ValueError, match="at most as many chips as the 303 carrying weights, but got 304 chips"):
        carriers.draw(KEY, spec_of(303))
    with pytest.raises(ValueError, match="num_chips"):
        carriers.draw(KEY, spec_of(303), 0)


def test_wrong_lengths_are_refused():
    mark = mark_of(3000)
    with pytest.raises(ValueError, match=r"spread: expected chips of shape \(304,\), but got shape \(303,\)"):
        carriers.spread(jnp.ones(303), mark)
    with pytest.raises(ValueError, match=r"despread: expected vector of shape \(3,000,\)"):
        carriers.despread(jnp.ones(2999), mark)


PARAMS = {
    "conv": {"kernel": np.float32(np.random.default_rng(0).normal(0, 0.1, (3, 3, 1, 8))), "bias": np.zeros(8, "f4")},
    "dense": {"kernel": np.float32(np.random.default_rng(1).normal(0, 2.0, (72, 10))), "bias": np.ones(10, "f4")},
    "steps": np.int32(3),
}


def test_select_takes_floating_leaves_with_spread():
    spec = carriers.select(PARAMS)
    assert [leaf.path for leaf in spec.leaves] == ["conv/kernel", "dense/bias", "dense/kernel"]
    assert spec.num_weights == 72 + 10 + 720
    np.testing.assert_allclose(spec.scales[0], np.sqrt(np.square(PARAMS["conv"]["kernel"]).mean()), rtol=1e-6)
    assert hash(spec) == hash(carriers.select(PARAMS))
    assert [leaf.path for leaf in carriers.select(PARAMS, "^dense").leaves] == ["dense/bias", "dense/kernel"]
    by_predicate = carriers.select(PARAMS, lambda path: path.endswith("kernel"))
    assert by_predicate == carriers.select(PARAMS, "kernel$")


def test_running_statistics_never_carry():
    variables = {"params": PARAMS, "batch_stats": {"norm": {"mean": np.ones(10, np.float32)}}}
    spec = carriers.select(variables)
    assert [leaf.path for leaf in spec.leaves] == [f"params/{leaf.path}" for leaf in carriers.select(PARAMS).leaves]
    with pytest.raises(ValueError, match="none that matches 'batch_stats'"):
        carriers.select(variables, "batch_stats")


def test_read_divides_by_scale_and_write_adds():
    spec = carriers.select(PARAMS)
    vector = np.asarray(carriers.read(PARAMS, spec))
    np.testing.assert_allclose(np.square(vector[:72]).mean(), 1, rtol=1e-5)
    np.testing.assert_allclose(vector[82:], PARAMS["dense"]["kernel"].reshape(-1) / spec.scales[2], rtol=1e-5)
    delta = np.float32(np.random.default_rng(2).normal(size=802))
    written = carriers.write(PARAMS, spec, jnp.asarray(delta))
    np.testing.assert_allclose(carriers.read(written, spec), vector + delta, atol=1e-5)
    np.testing.assert_array_equal(written["conv"]["bias"], PARAMS["conv"]["bias"])
    assert written["steps"] == 3
    assert jax.tree.structure(written) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_dtypes_stay(dtype):
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=4096), dtype)}
    spec = carriers.select(params)
    assert carriers.read(params, spec).dtype == jnp.float32
    written = carriers.write(params, spec, jnp.ones(4096))
    assert written["w"].dtype == dtype
    np.testing.assert_allclose(np.float32(written["w"]), np.float32(params["w"]) + spec.scales[0], rtol=1e-2)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"w": np.ones(3, np.float32)}, "kernel"),
        ({"w": np.zeros(3, np.float32)}, None),
        ({"w": np.ones(3, np.int32)}, None),
        ({}, None),
    ],
)
def test_an_empty_selection_is_refused(params, match):
    with pytest.raises(ValueError, match="select: expected at least one floating-point leaf"):
        carriers.select(params, match)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_select_refuses_weights_that_are_not_finite(bad):
    params = {"a": np.ones(3, np.float32), "b": np.array([1, bad], np.float32)}
    with pytest.raises(ValueError, match="finite weights in leaf 'b'"):
        carriers.select(params)


def test_paths_that_collide_are_refused():
    with pytest.raises(ValueError, match="select: expected a path of its own for each leaf, but got 'x/y' twice"):
        carriers.select({"x": {"y": np.ones(3, np.float32)}, "x/y": np.ones(3, np.float32)})


def test_another_architecture_is_refused():
    spec = carriers.select(PARAMS)
    with pytest.raises(ValueError, match="a model without 'dense/bias', 'dense/kernel'"):
        carriers.read({"conv": PARAMS["conv"]}, spec)
    wider = {**PARAMS, "conv": {**PARAMS["conv"], "kernel": np.ones((3, 3, 1, 9), np.float32)}}
    expected = r"leaf 'conv/kernel' of shape \(3, 3, 1, 8\) \(802 carrying weights in all\), but got shape .* \(811 wei"
    with pytest.raises(ValueError, match=expected):
        carriers.read(wider, spec)
    with pytest.raises(ValueError, match=r"write: expected vector of shape \(802,\)"):
        carriers.write(PARAMS, spec, jnp.ones(801))
