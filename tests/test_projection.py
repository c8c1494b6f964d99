"""Projection of kernels onto the principal components of their inputs, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smark_jax import attacks, models
from smark_jax.attacks import inputs

RNG = np.random.default_rng(7)
KEY = jax.random.key(3)


def low_rank_images(count, size, rank, mean=0.0):
    return np.float32(RNG.normal(size=(count, rank)) @ RNG.normal(size=(rank, size)) + mean)


def dense(params, x):
    return jax.nn.relu(x @ params["kernel"] + params["bias"][None]) @ params["head"]


def dense_params(size=30):
    shapes = {"kernel": (size, 8), "bias": (8,), "head": (8, 3)}
    return {name: jnp.float32(RNG.normal(size=shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize("count", [20, 200])  # fewer rows than inputs, and more
def test_projection_onto_all_directions_in_use_keeps_the_function(count):
    params, x = dense_params(), low_rank_images(count, 30, 5, mean=2.0)
    projected = attacks.project_inputs(params, dense, x, KEY, {"kernel": 6}, noise=20.0)
    np.testing.assert_allclose(dense(projected, x), dense(params, x), atol=2e-3)
    off_plane = np.float32(RNG.normal(size=(50, 30)))
    assert np.abs(dense(projected, off_plane) - dense(params, off_plane)).max() > 10
    np.testing.assert_array_equal(projected["head"], params["head"])


@pytest.mark.parametrize(("count", "keep"), [(25, 4), (300, 4), (300, 0.8)])
def test_projection_in_float64(count, keep):
    """Without noise: W' = U U^T W, with U the leading eigenvectors of E[x x^T]."""
    params, x = dense_params(), low_rank_images(count, 30, 30, mean=1.0)
    wide, kernel = x.astype(np.float64), np.asarray(params["kernel"], np.float64)
    values, vectors = np.linalg.eigh(wide.T @ wide / count)
    share = np.cumsum(values[::-1]) / values.sum()
    top = vectors[:, -(keep if keep >= 1 else int(np.argmax(share >= keep)) + 1) :]
    projected = attacks.project_inputs(params, dense, x, KEY, {"^kernel": keep}, noise=0)
    np.testing.assert_allclose(projected["kernel"], top @ top.T @ kernel, atol=1e-4)
    np.testing.assert_array_equal(projected["bias"], params["bias"])


def test_noise_fills_the_unused_directions_alone():
    params, x = dense_params(), low_rank_images(40, 30, 6)
    noisy, plain = (attacks.project_inputs(params, dense, x, KEY, {"^kernel": 6}, noise=n) for n in (2.0, 0.0))
    added = np.asarray(noisy["kernel"], np.float64) - np.asarray(plain["kernel"], np.float64)
    spread = np.sqrt(np.square(np.asarray(params["kernel"], np.float64)).mean())
    assert np.linalg.matrix_rank(added, tol=1e-3) == 8
    np.testing.assert_allclose(np.square(added).sum() / (24 * 8), (2 * spread) ** 2, rtol=0.3)
    again = attacks.project_inputs(params, dense, x, KEY, {"^kernel": 6}, noise=2.0)
    np.testing.assert_array_equal(noisy["kernel"], again["kernel"])


def windows(images, size):
    """The 3x3 windows of padded images, channels last, in float64."""
    padded = np.pad(images.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    return np.stack([padded[:, i : i + size, j : j + size] for i in range(3) for j in range(3)], axis=3)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_inputs_of_convolutions_are_their_windows(groups):
    """Grouped and depthwise too, with a kernel stored as other frameworks do (outputs first)."""
    images = np.float32(RNG.normal(size=(6, 5, 5, 4)))
    stored = jnp.float32(RNG.normal(size=(8, 4 // groups, 3, 3)))

    def apply_fn(params, x):
        kernel = params["weight"].transpose(2, 3, 1, 0)
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=groups)
        return y.sum(axis=(1, 2))

    params = {"weight": stored}
    (found,) = inputs.enter(params, apply_fn, images)
    x = windows(images, 5).reshape(-1, 9, groups, 4 // groups)  # rows, window, group, channel
    x = x.transpose(2, 3, 1, 0).reshape(groups, -1, 150)  # the kernel's rows: channel, window
    np.testing.assert_allclose(found.square, x @ x.swapaxes(1, 2) / 150, atol=1e-5)
    np.testing.assert_allclose(found.power, np.square(x).mean(axis=2), atol=1e-5)
    kernel = np.asarray(stored, np.float64).reshape(-1)[found.entries]  # groups, inputs, outputs
    made = np.einsum("gir,gio->rgo", x, kernel).reshape(6, 25, 8).sum(axis=1)
    np.testing.assert_allclose(apply_fn(params, images), made, atol=1e-4)


def test_every_kernel_of_the_networks_is_found():
    for network, shape in ((models.CNN(), (12, 12, 1)), (models.ResNet18(width=4, norm="batch"), (8, 8, 1))):
        params = jax.eval_shape(functools.partial(models.init, network, image_shape=shape), KEY)
        images = np.zeros((1, *shape), np.uint8)
        found = [path for path, _ in inputs.kernels(params, models.apply_fn(network), images)]
        leaves = jax.tree_util.tree_leaves_with_path(params)
        assert sorted(found) == sorted(
            jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in leaves if leaf.ndim > 1
        )


def test_bad_settings_are_refused():
    params, x = dense_params(), low_rank_images(5, 30, 2)
    for keep in (0, -1, 1.5, float("nan"), {"kernel": 0}):
        with pytest.raises(ValueError, match="project_inputs: expected keep"):
            attacks.project_inputs(params, dense, x, KEY, keep)
    with pytest.raises(ValueError, match="project_inputs: expected noise"):
        attacks.project_inputs(params, dense, x, KEY, noise=-1)
    with pytest.raises(ValueError, match=r"(?s)project_inputs: expected a pattern.*'Conv'"):
        attacks.project_inputs(params, dense, x, KEY, {"Conv": 3})
