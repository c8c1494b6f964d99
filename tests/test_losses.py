import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smark_jax import losses

REFERENCES = {
    losses.bit_cross_entropy: lambda y, b: np.log1p(np.exp(-b * y)).mean(),
    losses.code_mse: lambda y, b: ((y - b) ** 2).mean(),
    losses.sign_hinge: lambda y, b: np.maximum(0, 0.1 - b * y).mean(),
}


@pytest.mark.parametrize("loss", REFERENCES)
def test_value_and_gradient_against_float64(loss):
    rng = np.random.default_rng(0)
    y, b = rng.normal(size=50), rng.choice([-1.0, 1.0], 50)
    np.testing.assert_allclose(loss(jnp.float32(y), jnp.float32(b)), REFERENCES[loss](y, b), rtol=1e-5)
    gradient = jax.grad(loss)(jnp.float32(y), jnp.float32(b))
    for i in range(5):
        step = np.zeros(50)
        step[i] = 1e-6
        slope = (REFERENCES[loss](y + step, b) - REFERENCES[loss](y - step, b)) / 2e-6
        np.testing.assert_allclose(gradient[i], slope, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("loss", REFERENCES)
def test_agreeing_chips_cost_less(loss):
    b = jnp.array([1.0, -1.0, 1.0])
    assert loss(b, b) < loss(jnp.zeros(3), b) < loss(-b, b)


def test_sign_hinge_stops_at_its_margin():
    b = jnp.array([1.0, -1.0])
    assert losses.sign_hinge(0.3 * b, b, margin=0.3) == 0
    assert losses.sign_hinge(0.3 * b, b, margin=0.31) > 0


@pytest.mark.parametrize("loss", REFERENCES)
def test_vmap_over_a_batch(loss):
    y = jnp.arange(6.0).reshape(2, 3) - 2
    b = jnp.sign(y + 0.5)
    np.testing.assert_allclose(jax.vmap(loss)(y, b), [loss(y[0], b[0]), loss(y[1], b[1])], rtol=1e-6)


@pytest.mark.parametrize("loss", REFERENCES)
def test_unequal_lengths_are_refused(loss):
    with pytest.raises(ValueError, match="expected equal shapes, but got chips"):
        loss(jnp.zeros(3), jnp.ones(4))
