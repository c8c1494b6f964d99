import functools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.sharding import Mesh, PartitionSpec
from parties import party_secrets

from smark_jax import aggregation, carriers, codes, embedding, keys, losses, parallel, tracing

ENGINES = typing.get_args(parallel.Engine)
TREES = {
    "one leaf": lambda rng: np.float32(rng.normal(0, 0.1, 33)),
    "nested, scalars and empty axes": lambda rng: {
        "a": [np.float32(rng.normal(0, 0.1, (2, 3))), np.float32(rng.normal(0, 0.1, ()))],
        "b": (np.float32(rng.normal(0, 0.1, (4, 1, 5))), np.zeros((0, 3), np.float32)),
    },
}


def collect(engine: str, tree, pair_keys, round_: int, fixed, masked: bool = True):
    """The masked mean of stacked trees over the axis of parties, by either engine, outside of train_step."""
    num_parties = pair_keys.shape[0]

    def body(tree, row):
        if masked:
            return parallel.masked_mean(tree, row, round_, fixed, "p")
        party = jax.lax.axis_index("p")
        words = aggregation.encode(tree, fixed, aggregation.rounding_key(row, party, round_))
        total = jax.tree.map(lambda w: jax.lax.psum(w, "p"), words)
        return jax.tree.map(lambda leaf: leaf / num_parties, aggregation.decode(total, fixed, num_parties))

    if engine == "pmap":
        return jax.tree.map(
            lambda leaf: leaf[0], jax.pmap(body, "p", devices=jax.devices()[:num_parties])(tree, pair_keys)
        )
    mesh = Mesh(np.array(jax.devices()[:num_parties]), ("p",))
    mapped = jax.shard_map(
        lambda tree, row: body(jax.tree.map(lambda leaf: leaf[0], tree), row[0]),
        mesh=mesh,
        in_specs=PartitionSpec("p"),
        out_specs=PartitionSpec(),
    )
    return jax.jit(mapped)(tree, pair_keys)


@pytest.mark.parametrize(
    ("tree", "num_parties"), [(tree, n) for i, tree in enumerate(TREES) for n in (2 + i, 5 + 3 * i)]
)
def test_masked_equals_unmasked_bit_for_bit_and_is_near_the_float_mean(tree, num_parties):
    rng = np.random.default_rng(num_parties)
    updates = [TREES[tree](rng) for _ in range(num_parties)]
    stacked = aggregation.stack(updates)
    pair_keys = aggregation.pair_keys(party_secrets(num_parties))
    fixed = aggregation.FixedPoint(1.0, num_parties)
    results = {
        (engine, masked): collect(engine, stacked, pair_keys, 7, fixed, masked)
        for engine in ENGINES
        for masked in (True, False)
    }
    first = results["pmap", True]
    for other in results.values():
        jax.tree.map(np.testing.assert_array_equal, first, other)
    mean = jax.tree.map(lambda *leaves: np.mean(np.float64(leaves), axis=0), *updates)
    jax.tree.map(
        lambda got, expected: np.testing.assert_allclose(got, expected, atol=fixed.resolution + 1e-7), first, mean
    )
    assert jax.tree.structure(first) == jax.tree.structure(updates[0])


def test_quantisation_error_of_the_mean_is_as_stated():
    fixed = aggregation.FixedPoint(1.0, 4, bits=16)
    stacked = np.float32(np.random.default_rng(0).normal(0, 0.2, (4, 20_000)))
    pair_keys = aggregation.pair_keys(party_secrets(4))
    error = np.asarray(collect("pmap", stacked, pair_keys, 0, fixed), np.float64) - stacked.astype(np.float64).mean(
        axis=0
    )
    assert np.sqrt(np.square(error).mean()) <= 1.02 * fixed.mean_standard_error
    assert np.sqrt(np.square(error).mean()) > 0.5 * fixed.mean_standard_error
    assert abs(error.mean()) < 5 * fixed.mean_standard_error / np.sqrt(20_000)


def test_one_wrong_pair_key_ruins_the_sum():
    """Control: the masks do hide something, since the sum is noise when two parties disagree about their key."""
    pair_keys = aggregation.pair_keys(party_secrets(3)).copy()
    pair_keys[0, 1, 0] ^= 1
    fixed = aggregation.FixedPoint(1.0, 3)
    got = collect("pmap", np.full((3, 1000), 0.25, np.float32), pair_keys, 0, fixed)
    assert np.abs(np.asarray(got) - 0.25).mean() > 0.1


def apply_linear(params, x):
    return x.reshape(x.shape[0], -1) @ params["w"] + params["b"][None]


def linear_problem(num_parties: int):
    rng = np.random.default_rng(1)
    params = {"w": jnp.float32(rng.normal(size=(6, 3))), "b": jnp.zeros(3)}
    images = np.float32(rng.normal(size=(num_parties, 10, 6)))
    labels = rng.integers(0, 3, (num_parties, 10)).astype(np.int32)
    return params, images, labels


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("num_parties", [1, 2, 4, 8])
def test_a_step_is_float64_gradient_descent_on_the_clipped_mean(engine, num_parties):
    params, images, labels = linear_problem(num_parties)
    fixed = aggregation.FixedPoint(0.7, num_parties)
    step = parallel.train_step(apply_linear, optax.sgd(0.5), fixed, engine=engine)
    pair_keys = aggregation.pair_keys(party_secrets(num_parties))
    state, info = step.update(step.init(params), images, labels, pair_keys)
    w, b, total_loss = np.float64(params["w"]), np.float64(params["b"]), 0.0
    dw, db = np.zeros_like(w), np.zeros_like(b)
    for x, y in zip(np.float64(images), labels, strict=True):
        loss, gw, gb = reference.softmax_cross_entropy_gradient(w, b, x, y)
        scale = min(1.0, 0.7 / np.sqrt(np.square(gw).sum() + np.square(gb).sum()))
        dw, db, total_loss = dw + scale * gw / num_parties, db + scale * gb / num_parties, total_loss + loss
    np.testing.assert_allclose(state.params["w"], w - 0.5 * dw, atol=1e-6)
    np.testing.assert_allclose(state.params["b"], b - 0.5 * db, atol=1e-6)
    np.testing.assert_allclose(info.loss, total_loss / num_parties, rtol=1e-5)
    assert info.diverged == 0
    assert state.round == 1


def test_engines_agree_bit_for_bit_over_many_rounds():
    params, images, labels = linear_problem(4)
    pair_keys = aggregation.pair_keys(party_secrets(4))
    ends = []
    for engine in ENGINES:
        step = parallel.train_step(apply_linear, optax.adam(0.05), aggregation.FixedPoint(1.0, 4), engine=engine)
        state = step.init(params)
        for _ in range(25):
            state, info = step.update(state, images, labels, pair_keys)
        ends.append((state, info))
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_but_masked_words_crosses_between_devices(engine):
    """The compiled party's program has one collective, an all-reduce of uint32; a bare-gradient psum would show."""
    params, images, labels = linear_problem(4)
    pair_keys = aggregation.pair_keys(party_secrets(4))

    def collectives(body: Callable) -> list[str]:
        mapped = parallel._map_parties(body, jax.devices()[:4], engine)
        lowered = jax.jit(mapped).lower(params, images, labels, pair_keys, jnp.uint32(0)).compile().as_text()
        names = (
            "all-reduce(",
            "all-gather(",
            "all-to-all(",
            "collective-permute(",
            "reduce-scatter(",
            "all-reduce-start(",
        )
        return [line.strip() for line in lowered.splitlines() if any(name in line for name in names)]

    def masked(params, x, y, row, round_):
        gradient = jax.grad(lambda p: parallel.cross_entropy(apply_linear(p, x), y))(params)
        return parallel.masked_mean(gradient, row, round_, aggregation.FixedPoint(1.0, 4), parallel.AXIS)

    def bare(params, x, y, row, round_):
        return jax.lax.pmean(jax.grad(lambda p: parallel.cross_entropy(apply_linear(p, x), y))(params), parallel.AXIS)

    (only,) = collectives(masked)
    assert "u32[21]" in only.split("=")[1].split("all-reduce")[0]
    assert any("f32[" in line for line in collectives(bare))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_party_that_diverged_is_counted_and_sends_zeros(engine):
    params, images, labels = linear_problem(3)
    images[1, 0, 0] = np.nan
    fixed = aggregation.FixedPoint(10.0, 3)
    step = parallel.train_step(apply_linear, optax.sgd(1.0), fixed, engine=engine)
    state, info = step.update(step.init(params), images, labels, aggregation.pair_keys(party_secrets(3)))
    assert info.diverged == 1
    assert np.isfinite(state.params["w"]).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_owners_mark_enters_after_aggregation_and_is_traced(engine):
    rng = np.random.default_rng(0)
    params = {"w": jnp.float32(rng.normal(size=(60, 50))), "b": jnp.zeros(50)}
    images = np.float32(rng.normal(size=(2, 8, 60)))
    labels = rng.integers(0, 50, (2, 8)).astype(np.int32)
    key = keys.from_bytes(bytes(32))
    mark = carriers.mark(key, params, 128)
    book = codes.codebook(key, range(50), 128)
    loss = functools.partial(losses.sign_hinge, margin=0.5)
    pair_keys = aggregation.pair_keys(party_secrets(2))
    for marked in (True, False):
        fingerprint = embedding.add_fingerprint_gradient(loss, mark, book[7]) if marked else optax.identity()
        optimizer = optax.chain(fingerprint, optax.adam(1e-2))
        step = parallel.train_step(apply_linear, optimizer, aggregation.FixedPoint(1.0, 2), engine=engine)
        state = step.init(params)
        for _ in range(60):
            state, _ = step.update(state, images, labels, pair_keys)
        chips = carriers.despread(carriers.read(state.params, mark.spec) - carriers.read(params, mark.spec), mark)
        accused = [a.serial for a in tracing.trace(chips, book).accused]
        assert accused == ([7] if marked else [])


def test_bad_input_is_refused():
    params, images, labels = linear_problem(2)
    pair_keys = aggregation.pair_keys(party_secrets(2))
    fixed = aggregation.FixedPoint(1.0, 2)
    step = parallel.train_step(apply_linear, optax.sgd(1.0), fixed)
    state = step.init(params)
    with pytest.raises(ValueError, match="train_step: expected images with a row for each of 2 parties"):
        step.update(state, images[:1], labels, pair_keys)
    with pytest.raises(ValueError, match="train_step: expected pair_keys with a row for each of 2"):
        step.update(state, images, labels, pair_keys[:1])
    crooked = pair_keys.copy()
    crooked[0, 1] += 1
    with pytest.raises(ValueError, match="train_step: expected the same key"):
        step.update(state, images, labels, crooked)
    with pytest.raises(ValueError, match=r"masked_mean: expected pair_keys of shape \(2, 8\)"):
        collect("pmap", images, np.zeros((2, 3, 8), np.uint32), 0, fixed)
    with pytest.raises(ValueError, match="may have wrapped around"):
        collect("pmap", images, pair_keys, 0, aggregation.FixedPoint(1.0, 1))
    with pytest.raises(ValueError, match="engine 'pmap' or 'shard_map'"):
        parallel.train_step(apply_linear, optax.sgd(1.0), fixed, engine="pjit")
    with pytest.raises(ValueError, match="9 devices, one for each party"):
        parallel.train_step(apply_linear, optax.sgd(1.0), aggregation.FixedPoint(1.0, 9))
    with pytest.raises(ValueError, match="num_parties"):
        parallel.devices(0)
