"""What users do with marks: jit, vmap, grad, scan, optax's combinators, and moving a mark from place to place."""

import dataclasses
import hashlib
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from smark_jax import carriers, codes, embedding, extraction, keys, losses

RNG = np.random.default_rng(0)
BASE = {
    "a": {"kernel": jnp.float32(RNG.normal(0, 0.05, (40, 30)))},
    "b": {"kernel": jnp.float32(RNG.normal(0, 3.0, (70, 20)))},
}
OTHER = jax.tree.map(lambda leaf: 2 * leaf + 0.01, BASE)  # of the same shapes
KEY, M, STRENGTH = keys.from_bytes(bytes(32)), 64, 0.03
MARK = carriers.mark(KEY, BASE, M)
WORDS = np.asarray(codes.codebook(KEY, range(3), M, version=1))
FINGERPRINT = embedding.add_fingerprint_gradient(losses.code_mse, MARK, WORDS[0])
ZEROS = jax.tree.map(jnp.zeros_like, BASE)


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    return reference.carrier_matrix(*map(np.asarray, MARK.carrier.arrays), MARK.spec.num_weights)


def in_leaves(vector: np.ndarray, power: int) -> dict:
    """A vector in the mark's coordinates as leaves, times a power of each leaf's RMS; all in float64."""
    parts, start = {}, 0
    for name in "ab":
        base = np.asarray(BASE[name]["kernel"], np.float64)
        rms = np.sqrt(np.square(base).mean())
        parts[name] = {"kernel": vector[start : start + base.size].reshape(base.shape) * rms**power}
        start += base.size
    return parts


def close(found: dict, expected: dict, **tolerance: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x, np.float64), y, **tolerance), found, expected)


def copy_of(word: np.ndarray, matrix: np.ndarray) -> dict:
    delta = STRENGTH * np.sqrt(2048 / M)  # one block; the tail carries nothing
    moved = in_leaves(delta * word.astype(np.float64) @ matrix, 1)
    return jax.tree.map(lambda leaf, change: np.asarray(leaf, np.float64) + change, BASE, moved)


# jax


def test_embed_under_vmap_makes_each_customers_copy(matrix):
    copies = jax.vmap(lambda word: embedding.embed(BASE, MARK, word, STRENGTH))(WORDS)
    for row, word in enumerate(WORDS):
        close(jax.tree.map(lambda leaf, row=row: leaf[row], copies), copy_of(word, matrix), atol=2e-6)


def test_embed_under_jit_is_compiled_once_for_all_models_of_an_architecture(matrix):
    embed = jax.jit(embedding.embed)
    close(embed(BASE, MARK, WORDS[1], STRENGTH), copy_of(WORDS[1], matrix), atol=2e-6)
    other = carriers.mark(keys.derive(KEY, "other"), OTHER, M)
    copy = embed(OTHER, other, WORDS[2], 2 * STRENGTH)
    assert embed._cache_size() == 1
    np.testing.assert_array_equal(jnp.sign(extraction.extract(copy, OTHER, other)), WORDS[2])


def test_no_entry_point_is_compiled_again_for_another_model_of_an_architecture():
    compiled = (
        embedding.copies._vector,
        embedding.copies._add,
        embedding.copies._embed_batch,
        extraction.reading._extract,
        extraction.reading._extract_batch,
    )
    sizes = []
    for base, mark in ((BASE, MARK), (OTHER, carriers.mark(keys.derive(KEY, "other"), OTHER, M))):
        copies = embedding.embed_batch(base, mark, WORDS)
        copy = embedding.embed(base, mark, WORDS[0])
        extraction.extract(copy, base, mark)
        extraction.extract_batch(copies, base, mark)
        sizes.append([function._cache_size() for function in compiled])
    assert sizes[0] == sizes[1] and all(sizes[0])


def test_gradient_through_extract_is_the_matrix(matrix):
    suspect = embedding.embed(BASE, MARK, WORDS[0])
    weights = RNG.normal(size=M)
    gradient = jax.grad(lambda s: extraction.extract(s, BASE, MARK) @ jnp.float32(weights))(suspect)
    close(gradient, in_leaves(weights @ matrix, -1), rtol=1e-3, atol=1e-4)


# optax


@pytest.fixture(scope="module")
def gradient(matrix) -> dict:
    """Of the mean squared error at the base, where all chips read 0: d/dy mean (y - b)^2 = -2 b / m; in float64."""
    return in_leaves(-2 / M * WORDS[0].astype(np.float64) @ matrix, -1)


def test_a_scan_over_steps_is_the_loop():
    optimizer = optax.chain(FINGERPRINT, optax.adam(1e-3))

    def step(carried, _):
        params, state = carried
        updates, state = optimizer.update(ZEROS, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), losses.code_mse(extraction.extract(params, BASE, MARK), jnp.float32(WORDS[0]))

    start = BASE, optimizer.init(BASE)
    (scanned, _), loss = jax.jit(lambda carried: jax.lax.scan(step, carried, length=3))(start)
    looped = start
    for _ in range(3):
        looped, _ = jax.jit(step)(looped, None)
    close(scanned, looped[0], atol=1e-6)
    assert loss[0] > loss[1] > loss[2]


def test_weight_may_be_a_schedule(gradient):
    schedule = optax.piecewise_constant_schedule(4.0, {1: 0.5, 2: 0.25})  # 4, 2, 0.5
    transform = embedding.add_fingerprint_gradient(losses.code_mse, MARK, WORDS[0], weight=schedule)
    state = transform.init(BASE)
    for factor in (4, 2, 0.5):
        updates, state = jax.jit(transform.update)(ZEROS, state, BASE)
        close(updates, jax.tree.map(lambda leaf, factor=factor: factor * leaf, gradient), rtol=1e-4, atol=1e-5)
    assert int(state[1]) == 3


def test_hyperparameters_may_be_injected(gradient):
    static = ("loss_fn", "mark", "word")
    inject = optax.inject_hyperparams(embedding.add_fingerprint_gradient, static_args=static)
    transform = inject(loss_fn=losses.code_mse, mark=MARK, word=WORDS[0], weight=3.0)
    updates, _ = jax.jit(transform.update)(ZEROS, transform.init(BASE), BASE)
    close(updates, jax.tree.map(lambda leaf: 3 * leaf, gradient), rtol=1e-4, atol=1e-5)


def test_a_mask_leaves_other_leaves_alone():
    mark = carriers.mark(KEY, BASE, M, match="^b/")
    transform = embedding.add_fingerprint_gradient(losses.code_mse, mark, WORDS[0])
    masked = optax.masked(transform, {"a": {"kernel": False}, "b": {"kernel": True}})
    ones = jax.tree.map(jnp.ones_like, BASE)
    updates, _ = jax.jit(masked.update)(ones, masked.init(BASE), BASE)
    whole, _ = jax.jit(transform.update)(ones, transform.init(BASE), BASE)
    jax.tree.map(np.testing.assert_array_equal, updates, whole)
    np.testing.assert_array_equal(updates["a"]["kernel"], 1)
    assert (updates["b"]["kernel"] != 1).all()
    with pytest.raises(ValueError, match="add_fingerprint_gradient: base: expected the 1 carrying leaves"):
        optax.masked(transform, {"a": {"kernel": True}, "b": {"kernel": False}}).init(BASE)


def test_without_params_the_message_is_optaxs():
    with pytest.raises(ValueError) as theirs:
        optax.add_decayed_weights(0.1).update(ZEROS, optax.EmptyState(), None)
    optimizer = optax.chain(FINGERPRINT, optax.adam(1e-3))
    with pytest.raises(ValueError, match="add_fingerprint_gradient: expected") as ours:
        optimizer.update(ZEROS, optimizer.init(BASE))
    assert str(theirs.value) in str(ours.value)


def test_bfloat16_updates_stay_bfloat16():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), BASE)
    for weight in (1.0, optax.constant_schedule(1.0)):
        transform = embedding.add_fingerprint_gradient(losses.code_mse, MARK, WORDS[0], weight)
        updates, _ = transform.update(jax.tree.map(jnp.zeros_like, params), transform.init(params), params)
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


# Moving a mark


def test_a_mark_moves_as_any_pytree_does():
    leaves, structure = jax.tree.flatten(MARK)
    stored = flax.serialization.msgpack_restore(flax.serialization.to_bytes(leaves))
    moved = {
        "flatten": jax.tree.unflatten(structure, leaves),
        "device_put": jax.device_put(MARK, jax.devices()[1]),
        "device_get": jax.device_get(MARK),
        "pickle": pickle.loads(pickle.dumps(MARK)),
        "msgpack": jax.tree.unflatten(structure, [stored[str(number)] for number in range(len(leaves))]),
    }
    copy = embedding.embed(BASE, MARK, WORDS[0])
    chips = extraction.extract(copy, BASE, MARK)
    for name, mark in moved.items():
        assert jax.tree.structure(mark) == structure, name
        assert [leaf.path for leaf in mark.spec.leaves] == ["a/kernel", "b/kernel"], name
        jax.tree.map(np.testing.assert_array_equal, embedding.embed(BASE, mark, WORDS[0]), copy)
        np.testing.assert_allclose(extraction.extract(copy, BASE, mark), chips, rtol=1e-5, atol=1e-6)
    assert moved["pickle"].spec == MARK.spec
    assert "uint32" not in repr(MARK)  # the carrier is secret


def test_a_spec_of_other_scales_has_the_same_structure():
    other = carriers.select(OTHER)
    assert other != MARK.spec
    assert jax.tree.structure(other) == jax.tree.structure(MARK.spec)
    wider = dataclasses.replace(other, leaves=(carriers.Leaf("a/kernel", (40, 31)), other.leaves[1]))
    assert jax.tree.structure(wider) != jax.tree.structure(MARK.spec)  # the control


# Copies of before


def test_a_copy_is_the_one_that_version_0_1_issued():
    """Hashes of version 0.1, of a carrier whose sums are exact in float32, so that no processor rounds them otherwise.

    Where it optimises, the compiler rounds the last product and sum of a float32 weight at once: the second hash.
    """
    shapes = {"a": (50, 60), "b": (996,), "c": (300,)}
    numbers = {name: (np.arange(np.prod(s)) * 7919 % 1000 - 500.0).reshape(s) / 1000 for name, s in shapes.items()}
    base = {"a": np.float32(numbers["a"]), "b": numbers["b"], "c": jnp.asarray(numbers["c"], jnp.bfloat16)}
    leaves = tuple(carriers.Leaf(name, shape) for name, shape in shapes.items())
    spec = carriers.Spec(leaves, (0.1234567, 0.3, 1.7))
    mark = carriers.Mark(spec, carriers.draw(KEY, spec, 1024))
    copy = embedding.embed(base, mark, codes.codebook(KEY, [7], 1024, version=1)[0], 0.03)
    found = {name: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()[:16] for name, leaf in copy.items()}
    assert found["a"] in ("ac9a0c9927067200", "6ac9ebbb09fca951")
    assert (found["b"], found["c"]) == ("541b2d873dd24cb8", "27e620d7eec398be")
