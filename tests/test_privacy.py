"""Differential privacy: the accountant against theory, sensitivity and clipping against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from parties import party_secrets
from scipy import optimize, stats

pytest.importorskip("jax_privacy")
dp_accounting = pytest.importorskip("dp_accounting")

from smark_jax import aggregation, keys, parallel, privacy  # noqa: E402

# jax_privacy 2.0.0 calls what optax 0.2.8 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning")
SAMPLING = privacy.Sampling(num_parties=2, examples=40, probability=0.25, rounds=30)
CLIP = 0.5


def apply_linear(params, x):
    return x @ params["w"] + params["b"][None]


def problem(seed: int):
    rng = np.random.default_rng(seed)
    params = {"b": np.float32(rng.normal(size=3)), "w": np.float32(rng.normal(size=(6, 3)))}
    images = np.float32(rng.normal(0, 3, (2, SAMPLING.batch_size, 6)))
    labels = rng.integers(0, 3, (2, SAMPLING.batch_size)).astype(np.int32)
    labels[:, -3:] = -1
    return params, images, labels


def without_one(labels: np.ndarray, party: int, example: int) -> np.ndarray:
    neighbour = labels.copy()
    neighbour[party, example] = -1
    return neighbour


def test_epsilon_without_sampling_is_the_analytic_gaussian_mechanisms():
    """Balle and Wang 2018, theorem 8, in float64; T rounds are one with noise smaller by sqrt(T)."""
    sampling = privacy.Sampling(num_parties=3, examples=50, probability=1.0, rounds=4)
    noise, delta = 5.0, 1e-5
    mu = np.sqrt(sampling.rounds) / noise

    def excess(epsilon: float) -> float:
        tail = np.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
        return stats.norm.cdf(mu / 2 - epsilon / mu) - tail - delta

    expected = optimize.brentq(excess, 0, 50)
    got = privacy.achieved(sampling, noise, delta).epsilon
    assert expected <= got + 1e-6
    assert got == pytest.approx(expected, rel=2e-3)


def test_epsilon_with_sampling_is_a_little_below_another_accountants():
    got = privacy.achieved(SAMPLING, 1.5, 1e-5).epsilon
    event = dp_accounting.PoissonSampledDpEvent(0.25, dp_accounting.GaussianDpEvent(1.5))
    renyi = dp_accounting.rdp.RdpAccountant(orders=np.arange(2, 64).tolist())
    upper = renyi.compose(dp_accounting.SelfComposedDpEvent(event, 30)).get_epsilon(1e-5)
    assert 0.75 * upper < got < upper


def test_a_plan_reaches_its_epsilon_and_says_what_it_covers(monkeypatch):
    """The search, which asks the accountant fifteen times, on a coarser grid; the tests above have the usual one."""
    monkeypatch.setattr(privacy, "_DISCRETIZATION", 1e-2)
    guarantee = privacy.plan(SAMPLING, 3.0, 1e-4)
    assert 2.95 < guarantee.epsilon <= 3.0
    assert privacy.achieved(SAMPLING, guarantee.noise_multiplier - 0.01, 1e-4).epsilon > 3.0
    for text in ("at delta 0.0001", "one example added to or removed from", "30 rounds", "not the sums before noise"):
        assert text in str(guarantee)


def test_gradients_are_clipped_example_by_example_as_in_float64():
    params, images, labels = problem(0)
    transform = privacy.value_and_clipped_grad(SAMPLING, CLIP)
    loss = transform(lambda p, x, y: parallel.cross_entropy(apply_linear(p, x), y))
    value, got = jax.jit(loss)(params, images[0], labels[0])
    w, b = np.float64(params["w"]), np.float64(params["b"])
    total = {"w": np.zeros_like(w), "b": np.zeros_like(b)}
    clipped = 0
    for x, y in zip(np.float64(images[0]), labels[0], strict=True):
        if y >= 0:
            _, gw, gb = reference.softmax_cross_entropy_gradient(w, b, x[None], np.array([y]))
            norm = np.sqrt(np.square(gw).sum() + np.square(gb).sum())
            clipped += norm > CLIP
            for name, leaf in (("w", gw), ("b", gb)):
                total[name] += min(1.0, CLIP / norm) * leaf / (0.25 * 40)
    assert 0 < clipped < SAMPLING.batch_size - 3
    assert value == 0
    for name, expected in total.items():
        np.testing.assert_allclose(got[name], expected, atol=1e-6)


def summed(loss):
    """Like privacy.value_and_clipped_grad, without clipping."""

    def value_and_grad(params, images, labels):
        def total(p):
            each = jax.vmap(lambda x, y: loss(p, x[None], y[None]))(images, jnp.maximum(labels, 0))
            return jnp.where(labels < 0, 0.0, each).sum() / SAMPLING.expected_batch

        return jnp.float32(0), jax.grad(total)(params)

    return value_and_grad


def decoded_mean(value_and_grad):
    """What the owner gets before noise, seen by an optimiser that keeps it as its state."""
    keep = optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, updates))
    form = privacy.fixed_point(SAMPLING, CLIP)
    step = parallel.train_step(apply_linear, keep, form, value_and_grad=value_and_grad)
    pair_keys = aggregation.pair_keys(party_secrets(2))

    def mean(params, images, labels, round_=0):
        state = step.init(jax.tree.map(jnp.asarray, params))._replace(round=jnp.uint32(round_))
        state, info = step.update(state, images, labels, pair_keys)
        assert info.loss == 0
        assert info.diverged == 0
        return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(state.opt_state)])

    return mean


def moves(value_and_grad, draws: int) -> np.ndarray:
    mean, rng = decoded_mean(value_and_grad), np.random.default_rng(1)
    distances = []
    for draw in range(draws):
        params, images, labels = problem(draw)
        neighbour = without_one(labels, rng.integers(2), rng.integers(SAMPLING.batch_size - 3))
        one, other = mean(params, images, labels, draw), mean(params, images, neighbour, draw)
        distances.append(np.linalg.norm(one - other))
    return np.array(distances)


def test_one_example_moves_the_decoded_mean_by_at_most_the_sensitivity():
    bound = privacy.sensitivity(SAMPLING, CLIP, 21)
    got = moves(privacy.value_and_clipped_grad(SAMPLING, CLIP), 60)
    assert got.max() <= bound
    assert got.max() > 0.99 * bound
    # Negative control: without clipping the bound does not hold.
    assert moves(summed, 20).max() > bound


def cast(params, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def test_a_bfloat16_model_keeps_to_the_sensitivity_and_a_cast_before_the_noise_exceeds_it(monkeypatch):
    """The mean reaches the noise in float32; the control rounds it to the parameters' type, as an optimiser would."""
    whole = problem
    monkeypatch.setattr(f"{__name__}.problem", lambda seed: (cast(whole(seed)[0], jnp.bfloat16), *whole(seed)[1:]))
    bound = privacy.sensitivity(SAMPLING, CLIP, 21)
    private = privacy.value_and_clipped_grad(SAMPLING, CLIP)
    assert 0.9 * bound < moves(private, 15).max() <= bound

    def rounded(loss):
        def value_and_grad(*batch):
            value, gradient = private(loss)(*batch)
            return value, cast(gradient, jnp.bfloat16)

        return value_and_grad

    assert moves(rounded, 15).max() > bound


def test_noise_refuses_a_mean_that_was_cast(key):
    guarantee = privacy.Guarantee(1.0, 1e-5, 1.0, SAMPLING)
    for dtype in (jnp.bfloat16, jnp.float16):
        params = {"a": jnp.zeros(8, dtype)}
        noise = privacy.gaussian_noise(guarantee, CLIP, params, key)
        with pytest.raises(ValueError, match="gaussian_noise: expected a mean in float32"):
            noise.update(params, noise.init(params))


def test_training_in_bfloat16_adds_the_noise_before_it_rounds(key):
    """Two updates of one mean, far below bfloat16's resolution of the weights: what the optimiser gets is float32."""
    params, images, labels = problem(0)
    seen = optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, updates))
    guarantee = privacy.Guarantee(1.0, 1e-5, 1.0, SAMPLING)
    noise = privacy.gaussian_noise(guarantee, CLIP, params, key)
    form = privacy.fixed_point(SAMPLING, CLIP)
    private = privacy.value_and_clipped_grad(SAMPLING, CLIP)
    step = parallel.train_step(apply_linear, optax.chain(noise, seen, optax.adam(1e-3)), form, value_and_grad=private)
    state, _ = step.update(
        step.init(cast(params, jnp.bfloat16)), images, labels, aggregation.pair_keys(party_secrets(2))
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    noisy = np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(state.opt_state[1])])
    assert noisy.dtype == np.float32
    assert (noisy != np.asarray(noisy.astype(jnp.bfloat16), np.float32)).any()


def test_rounding_lengthens_a_move_within_the_formula_and_beyond_the_clip_alone():
    """At a coarse resolution the term for rounding matters: coupled stochastic rounding in exact float64."""
    form = aggregation.FixedPoint(1.0, 1, bits=8)
    rng = np.random.default_rng(0)
    excess = []
    for draw in range(200):
        x = np.float32(rng.uniform(-0.4, 0.4, 64))
        y = x + np.float32(rng.normal(0, 0.01, 64))
        words = [np.asarray(aggregation.encode(v, form, jax.random.key(draw)), np.int64) for v in (x, y)]
        moved = form.resolution * np.linalg.norm(words[0] - words[1])
        excess.append(moved - np.linalg.norm(np.float64(x) - y))
    assert 0 < max(excess) <= form.resolution * np.sqrt(64)


def test_the_steps_own_clipping_never_acts():
    """All examples of a full batch alike and far beyond the clip: the longest sum there can be."""
    params, images, labels = problem(3)
    images[:] = images[:1, :1]
    labels[:] = np.argmin(apply_linear(params, images[0])[0])
    got = decoded_mean(privacy.value_and_clipped_grad(SAMPLING, CLIP))(params, images, labels)
    assert np.linalg.norm(got) == pytest.approx(CLIP * SAMPLING.batch_size / SAMPLING.expected_batch, rel=1e-5)


def test_noise_has_the_stated_deviation_and_is_fresh_for_each_round_and_leaf(key):
    params = {"a": jnp.zeros(20_000), "b": jnp.zeros(20_000)}
    guarantee = privacy.achieved(SAMPLING, 1.3, 1e-5)
    noise = privacy.gaussian_noise(guarantee, CLIP, params, key)
    state, draws = noise.init(params), []
    for _ in range(2):
        noisy, state = noise.update(params, state)
        draws += [np.asarray(noisy["a"], np.float64), np.asarray(noisy["b"], np.float64)]
    expected = 1.3 * privacy.sensitivity(SAMPLING, CLIP, 40_000)
    for draw in draws:
        assert draw.std() == pytest.approx(expected, rel=5 / np.sqrt(2 * 20_000))
        assert stats.kstest(draw / expected, "norm").pvalue > 1e-6
    correlation = np.corrcoef(draws) - np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(20_000)
    other = privacy.gaussian_noise(guarantee, CLIP, params, keys.derive(key, "other"))
    assert abs(np.corrcoef(other.update(params, other.init(params))[0]["a"], draws[0])[0, 1]) < 0.05


def test_batches_are_poisson_and_padded():
    labels = np.tile(np.arange(40), (2, 1))
    images = np.float32(labels[..., None] + 1)
    sampling = privacy.Sampling(2, 40, 0.25, 2000)
    counts, sizes = np.zeros((2, 40)), []
    for image, label in privacy.batches(sampling, images, labels, party_secrets(2)):
        assert label.shape == (2, sampling.batch_size)
        np.testing.assert_array_equal(image[..., 0], label + 1)  # zeros where padding
        for party in range(2):
            real = label[party][label[party] >= 0]
            assert len(set(real)) == len(real)
            counts[party, real] += 1
        sizes.append((label >= 0).sum(axis=1))
    assert np.abs(counts / 2000 - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 2000)
    assert np.var(sizes) == pytest.approx(40 * 0.25 * 0.75, rel=0.15)
    assert abs(np.corrcoef(np.transpose(sizes))[0, 1]) < 0.12


def test_bad_input_is_refused(key):
    with pytest.raises(ValueError, match="Sampling: expected a probability"):
        privacy.Sampling(2, 40, 1.5, 3)
    with pytest.raises(ValueError, match="rounds"):
        privacy.Sampling(2, 40, 0.5, 0)
    with pytest.raises(ValueError, match="plan: expected epsilon"):
        privacy.plan(SAMPLING, -1.0, 1e-5)
    with pytest.raises(ValueError, match="delta strictly between 0 and 1"):
        privacy.achieved(SAMPLING, 1.0, 0.0)
    with pytest.raises(ValueError, match="achieved: expected noise_multiplier"):
        privacy.achieved(SAMPLING, 0.0, 1e-5)
    with pytest.raises(ValueError, match="gaussian_noise: expected a SecretKey, but got int"):
        privacy.gaussian_noise(privacy.Guarantee(1.0, 1e-5, 1.0, SAMPLING), CLIP, {"a": jnp.zeros(2)}, 0)
    images, labels = np.zeros((2, 39, 6), np.float32), np.zeros((2, 39), int)
    with pytest.raises(ValueError, match="batches: expected 40 examples"):
        privacy.batches(SAMPLING, images, labels, party_secrets(2))
    with pytest.raises(ValueError, match="a key of its own"):
        privacy.batches(SAMPLING, np.zeros((2, 40, 6)), np.zeros((2, 40), int), [key, key])
