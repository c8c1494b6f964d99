"""smark_jax.models: sizes, scaling, norms, and the accuracy against a plain count."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smark_jax import models

TINY = (8, 8, 3)


def num_weights(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def abstract(model, image_shape):
    """The variables' shapes, without computing anything."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, *TINY), dtype=np.uint8)


def filled(shapes):
    """Weights in place of drawn ones: compiling a ResNet's initialization takes longer than every test of it."""
    rng = np.random.default_rng(0)

    def fill(shape):
        if len(shape.shape) == 1:
            return np.ones(shape.shape, np.float32)
        return rng.normal(size=shape.shape, scale=np.prod(shape.shape[:-1]) ** -0.5).astype(np.float32)

    return jax.tree.map(fill, shapes)


@pytest.fixture(scope="module", params=["cnn", "group", "batch"])
def network(request):
    if request.param == "cnn":
        model = models.CNN(num_classes=4)
        return model, models.init(model, jax.random.key(1), TINY), jax.jit(models.apply_fn(model))
    model = models.ResNet18(4, norm=request.param, width=4)
    variables = filled(abstract(model, TINY))
    params = variables if request.param == "batch" else variables["params"]
    return model, params, jax.jit(models.apply_fn(model))


def test_numbers_of_weights():
    assert num_weights(abstract(models.CNN(), (28, 28, 1))) == 421_642
    group = abstract(models.ResNet18(), (32, 32, 3))
    batch = abstract(models.ResNet18(norm="batch"), (32, 32, 3))
    assert num_weights(group["params"]) == num_weights(batch["params"]) == 11_173_962
    assert set(group) == {"params"} and set(batch) == {"params", "batch_stats"}


def test_init_hands_out_layers_alone_or_the_whole_variables():
    def keys(model):
        return set(jax.eval_shape(lambda key: models.init(model, key, TINY), jax.random.key(0)))

    assert keys(models.CNN()) == {"Conv_0", "Conv_1", "Dense_0", "Dense_1"}
    assert keys(models.ResNet18(norm="batch", width=4)) == {"params", "batch_stats"}


def test_init_is_determined_by_its_key():
    model = models.CNN(num_classes=2)
    first, again, other = (models.init(model, jax.random.key(seed), TINY) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["Conv_0"]["kernel"], other["Conv_0"]["kernel"])


@pytest.mark.parametrize("shape", [(28, 28), (1, 28, 28, 1), (28, 0, 1)])
def test_init_refuses_what_is_no_image_shape(shape):
    with pytest.raises(ValueError, match="image_shape"):
        models.init(models.CNN(), jax.random.key(0), shape)


def test_uint8_and_scaled_floats_are_the_same_under_jit(network, images):
    _, params, apply = network
    logits = apply(params, images)
    assert logits.shape == (5, 4) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, apply(params, images.astype(np.float32) / 255), rtol=1e-4, atol=1e-5)
    assert np.ptp(logits, axis=0).min() > 1e-4  # Different images, different logits.


def test_other_integers_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        models.apply_fn(models.CNN())({}, jnp.zeros((1, *TINY), jnp.int32))


def test_inference_treats_each_image_alone_and_changes_nothing(network, images):
    _, params, apply = network
    before = jax.tree.map(np.array, params)
    np.testing.assert_allclose(apply(params, images)[:2], apply(params, images[:2]), rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_gradients_are_finite_and_reach_every_weight(network, images):
    model, params, _ = network
    apply, labels = models.apply_fn(model), jnp.arange(5) % 4

    def loss(params):
        return -jnp.mean(jax.nn.log_softmax(apply(params, images))[jnp.arange(5), labels])

    gradient = jax.jit(jax.grad(loss))(params)
    gradient = gradient.get("params", gradient)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (1, 7, 5, 2), (3, 1, 4, 1)])
def test_max_pool_and_its_gradient_are_those_of_flax_with_ties_and_odd_edges(shape):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.integers(-1, 2, shape), jnp.float32)  # most windows have several largest values
    x = jnp.where(x < 0, -0.0, x)

    def flax(x):
        return nn.max_pool(x, (2, 2), strides=(2, 2))

    ours, back = jax.vjp(models.max_pool, x)
    theirs, reference = jax.vjp(flax, x)
    np.testing.assert_array_equal(ours, theirs)
    upstream = jnp.asarray(rng.normal(size=ours.shape), jnp.float32)
    np.testing.assert_array_equal(back(upstream)[0], reference(upstream)[0])
    # Forwards, and of a gradient's gradient, the tangent is the entry that NumPy's argmax finds.
    direction = rng.normal(size=shape).astype(np.float32)
    batch, rows, columns, channels = ours.shape
    windows = [
        np.asarray(a)[:, : 2 * rows, : 2 * columns]
        .reshape(batch, rows, 2, columns, 2, channels)
        .transpose(0, 1, 3, 5, 2, 4)
        .reshape(*ours.shape[:3], channels, 4)
        for a in (x, direction)
    ]
    expected = np.take_along_axis(windows[1], windows[0].argmax(-1)[..., None], -1)[..., 0]
    np.testing.assert_array_equal(jax.jvp(models.max_pool, (x,), (direction,))[1], expected)
    twice = jax.grad(lambda x: (jax.grad(lambda y: (models.max_pool(y) ** 2).sum())(x) ** 2).sum())(x)
    np.testing.assert_array_equal(twice, 8 * reference(ours)[0])


def test_batch_norm_updates_its_statistics_in_training_only(images):
    model = models.ResNet18(4, norm="batch", width=4)
    variables = filled(abstract(model, TINY))
    train = jax.jit(lambda variables, images: model.apply(variables, images, train=True, mutable=["batch_stats"]))
    logits, new = train(variables, images)
    changed = jax.tree.map(lambda old, now: not np.array_equal(old, now), variables["batch_stats"], new["batch_stats"])
    assert all(jax.tree.leaves(changed))
    assert not np.allclose(logits, models.apply_fn(model)(variables, images))


def test_unknown_norm_and_width_are_refused():
    with pytest.raises(ValueError, match=r"'group' or 'batch'.*'layer'"):
        models.init(models.ResNet18(norm="layer"), jax.random.key(0), TINY)
    with pytest.raises(ValueError, match="width"):
        models.init(models.ResNet18(width=0), jax.random.key(0), TINY)


@pytest.mark.parametrize("width", [1, 3, 7, 12, 64])
def test_group_norm_divides_any_width(width):
    assert abstract(models.ResNet18(width=width), TINY)["params"]["Conv_0"]["kernel"].shape == (3, 3, 3, width)


def test_apply_fns_of_equal_networks_are_equal_so_that_jit_compiles_once():
    assert models.apply_fn(models.CNN(3)) == models.apply_fn(models.CNN(3))
    assert hash(models.apply_fn(models.CNN(3))) == hash(models.apply_fn(models.CNN(3)))
    assert models.apply_fn(models.CNN(3)) != models.apply_fn(models.CNN(4))


def linear(params, images):
    return images.reshape(images.shape[0], -1) @ params


@pytest.mark.parametrize("num, batch_size", [(11, 4), (12, 4), (3, 500), (1, 1), (7, 7)])
def test_accuracy_is_the_plain_count(num, batch_size):
    rng = np.random.default_rng(num)
    images = rng.normal(size=(num, 2, 2, 1)).astype(np.float32)
    weights = rng.normal(size=(4, 3)).astype(np.float32)
    labels = rng.integers(0, 3, num)
    wanted = sum(int(np.argmax(images[i].ravel() @ weights) == labels[i]) for i in range(num)) / num
    got = models.accuracy(linear, weights, images, labels, batch_size=batch_size)
    assert isinstance(got, float) and got == wanted
    assert models.accuracy(linear, weights, jnp.asarray(images), jnp.asarray(labels), batch_size) == wanted


def test_filling_of_the_last_batch_never_counts():
    always_zero = np.zeros((4, 3), np.float32)  # All logits equal: class 0 wins, for the filling too.
    assert models.accuracy(linear, always_zero, np.ones((5, 2, 2, 1)), np.zeros(5, int), batch_size=4) == 1.0
    assert models.accuracy(linear, always_zero, np.ones((5, 2, 2, 1)), np.ones(5, int), batch_size=4) == 0.0


def test_accuracy_compiles_once_for_all_batches_and_calls():
    traces = []

    def counted(params, images):
        traces.append(images.shape)
        return linear(params, images)

    for seed in range(3):
        weights = np.random.default_rng(seed).normal(size=(4, 3))
        models.accuracy(counted, weights, np.ones((11, 2, 2, 1)), np.zeros(11, int), batch_size=4)
    assert traces == [(4, 2, 2, 1)]


@pytest.mark.parametrize(
    "num_images, labels, match",
    [
        (0, np.zeros(0, int), "at least one image"),
        (3, np.zeros(2, int), "label for each"),
        (3, np.zeros((3, 10), int), "One-hot"),
        (3, np.zeros(3), "whole-number"),
    ],
)
def test_accuracy_refuses_mismatched_or_empty_data(num_images, labels, match):
    with pytest.raises(ValueError, match=match):
        models.accuracy(linear, np.zeros((4, 3)), np.zeros((num_images, 2, 2, 1)), labels)


def test_accuracy_refuses_a_batch_size_of_nothing():
    with pytest.raises(ValueError, match="batch_size"):
        models.accuracy(linear, np.zeros((4, 3)), np.zeros((3, 2, 2, 1)), np.zeros(3, int), batch_size=0)
