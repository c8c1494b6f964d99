import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_parallel import apply_linear, linear_problem

from smark_jax import attacks, parallel

RNG = np.random.default_rng(0)
PARAMS = {"kernel": jnp.float32(RNG.normal(size=(40, 50))), "bias": jnp.float32(RNG.normal(size=50))}


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.95])
def test_prune_removes_the_smallest_of_each_kernel(fraction):
    pruned = attacks.prune(PARAMS, fraction)
    before, after = np.asarray(PARAMS["kernel"]), np.asarray(pruned["kernel"])
    np.testing.assert_allclose((after == 0).mean(), fraction, atol=1e-3)
    assert np.abs(before[after == 0]).max() <= np.abs(before[after != 0]).min()
    np.testing.assert_array_equal(after[after != 0], before[after != 0])
    np.testing.assert_array_equal(pruned["bias"], PARAMS["bias"])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantise_leaves_few_levels_within_half_a_step(bits):
    quantised = np.asarray(attacks.quantise(PARAMS, bits)["kernel"], np.float64)
    kernel = np.asarray(PARAMS["kernel"], np.float64)
    step = np.abs(kernel).max() / (2 ** (bits - 1) - 1)
    assert len(np.unique(np.round(quantised / step))) <= 2**bits - 1
    assert np.abs(quantised - kernel).max() <= step / 2 * (1 + 1e-5)


def test_attacks_keep_dtypes_and_survive_zero_kernels():
    params = {"k": jnp.zeros((3, 3), jnp.bfloat16)}
    for attacked in (attacks.prune(params, 0.5), attacks.quantise(params, 4)):
        assert attacked["k"].dtype == jnp.bfloat16
        assert not np.asarray(attacked["k"], np.float32).any()


def test_fine_tune_lowers_the_loss_and_calls_back():
    params, images, labels = linear_problem(1)
    steps = []
    tuned = attacks.fine_tune(
        params,
        apply_linear,
        images[0],
        labels[0],
        epochs=20,
        batch_size=5,
        learning_rate=0.05,
        on_step=lambda: steps.append(1),
    )
    assert len(steps) == 40

    def loss(p):
        return float(parallel.cross_entropy(apply_linear(p, images[0]), labels[0]))

    assert loss(tuned) < 0.7 * loss(params)
    assert jax.tree.structure(tuned) == jax.tree.structure(params)


def test_bad_settings_are_refused():
    for fraction in (0, 1, -0.1, 50):
        with pytest.raises(ValueError, match="prune: expected a fraction"):
            attacks.prune(PARAMS, fraction)
    for bits in (1, 17, 4.5):
        with pytest.raises(ValueError, match="quantise: expected bits"):
            attacks.quantise(PARAMS, bits)
    params, images, labels = linear_problem(1)
    with pytest.raises(ValueError, match="fine_tune: expected at least 64 images"):
        attacks.fine_tune(params, apply_linear, images[0], labels[0])
    with pytest.raises(ValueError, match="epochs"):
        attacks.fine_tune(params, apply_linear, images[0], labels[0], epochs=0, batch_size=5)


CONV = np.float32(np.random.default_rng(3).normal(size=(3, 3, 4, 10)))


def test_prune_filters_zeroes_the_weakest_outputs_of_convolutions():
    pruned = attacks.prune_filters({"conv": jnp.asarray(CONV), **PARAMS}, 0.35)
    weakest = np.argsort(np.abs(CONV.astype(np.float64)).sum(axis=(0, 1, 2)))[:3]
    wanted = CONV.copy()
    wanted[..., weakest] = 0
    np.testing.assert_array_equal(pruned["conv"], wanted)
    np.testing.assert_array_equal(pruned["kernel"], PARAMS["kernel"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cast_rounds_as_numpy_does(dtype):
    rounded = attacks.cast({"conv": jnp.asarray(CONV), "count": jnp.arange(3)}, dtype)
    assert rounded["conv"].dtype == jnp.float32
    np.testing.assert_array_equal(rounded["conv"], CONV.astype(jnp.dtype(dtype)).astype(np.float32))
    assert not np.array_equal(rounded["conv"], CONV)
    np.testing.assert_array_equal(rounded["count"], np.arange(3))


def test_low_rank_leaves_the_tail_of_the_singular_values():
    values = np.linalg.svd(CONV.astype(np.float64).reshape(36, 10), compute_uv=False)
    kept = np.asarray(attacks.low_rank({"conv": jnp.asarray(CONV), **PARAMS}, 0.5)["conv"], np.float64)
    np.testing.assert_allclose(np.linalg.norm(kept - CONV), np.linalg.norm(values[5:]), rtol=1e-5)
    assert np.linalg.matrix_rank(kept.reshape(36, 10), tol=1e-4) == 5


def test_new_attacks_refuse_bad_input():
    for fraction in (0, 1, -0.5, float("nan")):
        for attack in (attacks.prune_filters, attacks.low_rank):
            with pytest.raises(ValueError, match="strictly between 0 and 1"):
                attack(PARAMS, fraction)
    with pytest.raises(ValueError, match="floating-point"):
        attacks.cast(PARAMS, "int8")
