r"""Example-level differential privacy: parties clip each example's gradient, and the owner adds Gaussian noise.

A party draws each of its n examples with probability q (Poisson sampling, at most B of them), clips each example's
gradient to norm C and divides the sum by b = q n. The owner adds noise to the mean over the P parties. Adding or
removing one example moves this mean by at most :func:`sensitivity`. ::

    sampling = privacy.Sampling(num_parties=4, examples=1000, probability=0.064, rounds=150)
    guarantee = privacy.plan(sampling, epsilon=8.0, delta=1e-5)
    noise = privacy.gaussian_noise(guarantee, 1.0, params, key)
    step = parallel.train_step(
        apply_fn,
        optax.chain(noise, optax.adam(1e-3)),
        privacy.fixed_point(sampling, 1.0),
        value_and_grad=privacy.value_and_clipped_grad(sampling, 1.0),
    )
    batches = privacy.batches(sampling, images, labels, party_secrets)

The owner is trusted: it (and every device of the program) sees the sums before noise. Sampling, clipping and noise come
from jax_privacy, and the accounting from dp_accounting; ``pip install 'smark-jax[dp]'`` installs both. (Abadi et al.
2016, "Deep learning with differential privacy".)
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int
from scipy import stats

from smark_jax import _validate, aggregation, keys
from smark_jax._types import PyTree

with _validate.needs("smark_jax.privacy", "dp"):
    import dp_accounting
    from dp_accounting import pld
    from jax_privacy import batch_selection, clipped_grad, noise_addition

# Batches longer than the padded length are cut, and the accountant includes it. It is so rare that it costs next to
# nothing.
_CUT_PROBABILITY = 1e-7
# Discretisation interval of privacy losses in the accountant. Its result is an upper bound at any interval; with
# dp_accounting's default it takes minutes.
_DISCRETIZATION = 1e-3
_FIXED_POINT_ROOM = 1.001
_PADDING = -1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How examples are drawn for the rounds; everybody knows this.

    Attributes:
      num_parties: P.
      examples: n, how many examples each party holds.
      probability: q, that an example enters a round, independently of all others.
      rounds: T.

    Raises:
      SmarkError: for counts below one, or a probability outside (0, 1].
    """

    num_parties: int
    examples: int
    probability: float
    rounds: int

    def __post_init__(self) -> None:
        for name in ("num_parties", "examples", "rounds"):
            _validate.positive("Sampling", name, getattr(self, name))
        if not 0 < self.probability <= 1:
            cause = "It is the expected batch size over the examples of a party."
            raise _validate.fail("Sampling", "a probability above 0 and at most 1", repr(self.probability), cause)

    @property
    def expected_batch(self) -> float:
        """The number b = q n by which a party divides its sum."""
        return self.probability * self.examples

    @property
    def batch_size(self) -> int:
        """B, the length to which batches are padded. Of a longer batch (one in 10^7), B random examples are kept."""
        return max(1, int(stats.binom.isf(_CUT_PROBABILITY, self.examples + 1, self.probability)))


class Guarantee(NamedTuple):
    """The guarantee of a run with this noise; ``str`` states it in words.

    Attributes:
      epsilon: of differential privacy for adding or removing one example.
      delta: likewise.
      noise_multiplier: standard deviation of the noise divided by the sensitivity.
      sampling: of the run that it covers.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    sampling: Sampling

    def __str__(self) -> str:
        s = self.sampling
        return (
            f"epsilon {self.epsilon:.3g} at delta {self.delta:.3g}, for one example added to or removed from one "
            f"party's data.\nCovers the weights after each of {s.rounds} rounds, whoever sees them; not the sums "
            "before noise, nor settings chosen by looking at the data.\n"
            f"Noise multiplier {self.noise_multiplier:.4g}, sampling probability {s.probability:.4g} of "
            f"{s.num_parties} x {s.examples:,} examples, PLD accountant."
        )


def achieved(sampling: Sampling, noise_multiplier: float, delta: float) -> Guarantee:
    """The guarantee of a given noise.

    Args:
      sampling: of the whole run.
      noise_multiplier: standard deviation of the noise divided by the sensitivity.
      delta: well below one over the number of all examples.

    Raises:
      SmarkError: for a noise that is not positive, or a delta outside (0, 1).
    """
    _validate.finite_number("achieved", "noise_multiplier", noise_multiplier)
    _check_delta("achieved", delta)
    epsilon = _accountant().compose(_event(sampling, noise_multiplier)).get_epsilon(delta)
    return Guarantee(float(epsilon), delta, noise_multiplier, sampling)


def plan(sampling: Sampling, epsilon: float, delta: float) -> Guarantee:
    """The least noise, to a thousandth, with which a run is (epsilon, delta)-differentially private.

    Args:
      sampling: of the whole run.
      epsilon: positive.
      delta: well below one over the number of all examples.

    Returns:
      The guarantee with the noise; its epsilon is the one achieved, at most the one asked for.

    Raises:
      SmarkError: for an epsilon that is not positive, or a delta outside (0, 1).

    Examples:
      >>> from smark_jax import privacy
      >>> sampling = privacy.Sampling(num_parties=2, examples=500, probability=0.1, rounds=1)
      >>> guarantee = privacy.plan(sampling, epsilon=1.0, delta=1e-5)
      >>> 0.99 < guarantee.epsilon <= 1.0
      True
    """
    _validate.finite_number("plan", "epsilon", epsilon)
    _check_delta("plan", delta)
    bracket = dp_accounting.LowerEndpointAndGuess(0.1, 1.0)
    noise = dp_accounting.calibrate_dp_mechanism(
        _accountant, lambda noise: _event(sampling, noise), epsilon, delta, bracket, tol=1e-3
    )
    return achieved(sampling, float(noise), delta)


def value_and_clipped_grad(
    sampling: Sampling, clip: float
) -> Callable[[Callable[..., Array]], Callable[..., tuple[Array, PyTree]]]:
    """For ``train_step(value_and_grad=...)``: the sum of gradients, each example's clipped to ``clip``, divided by b.

    Examples labelled -1 are padding and count as zero, and so does an example whose gradient is NaN or infinite. The
    returned loss is always zero: no noise covers a round's true loss, so it is never opened.

    Args:
      sampling: of the run.
      clip: C, the largest norm of one example's gradient.
    """
    _validate.finite_number("value_and_clipped_grad", "clip", clip)

    def transform(loss: Callable[..., Array]) -> Callable[..., tuple[Array, PyTree]]:
        def value_and_grad(params: PyTree, images: Array, labels: Array) -> tuple[Array, PyTree]:
            # Each example's gradient is computed, clipped and summed in float32: rounded to bfloat16, a clipped
            # gradient may be longer than C, and the sum may move by more than any of them.
            def wide_loss(wide: PyTree, *batch: Array) -> Array:
                return loss(jax.tree.map(lambda w, p: w.astype(p.dtype), wide, params), *batch)

            each = {"batch_argnums": (1, 2), "l2_clip_norm": clip, "normalize_by": sampling.expected_batch}
            wide = jax.tree.map(lambda p: p.astype(_at_least_float32(p)), params)
            padding = labels == _PADDING
            real = jnp.where(padding, 0, labels)
            return jnp.float32(0.0), clipped_grad(wide_loss, **each)(wide, images, real, is_padding_example=padding)

        return value_and_grad

    return transform


def fixed_point(sampling: Sampling, clip: float) -> aggregation.FixedPoint:
    """The words' format for a run: its clip, slightly above C B / b, exceeds any sum that a party can reach.

    So the step's own clipping of a party's gradient, on which the sensitivity does not rest, never acts.
    """
    _validate.finite_number("fixed_point", "clip", clip)
    largest = clip * sampling.batch_size / sampling.expected_batch
    return aggregation.FixedPoint(largest * _FIXED_POINT_ROOM, sampling.num_parties)


def sensitivity(sampling: Sampling, clip: float, num_weights: int) -> float:
    r"""How far adding or removing one example moves the decoded mean, in Euclidean norm.

    .. math:: \frac{C}{P b} + \frac{\Delta \sqrt{D}}{P} + 2^{-21} F

    Only the example's own party sends other words. Its exact sum divided by b moves by at most C / b. Its D words are
    rounded with the same random numbers with and without the example, since these do not depend on the data (given
    them, noise covers the difference; averaged over them, the guarantee holds). Rounding is monotone, so each
    coordinate moves by at most one level Delta more. The last term covers the float32 roundings of encoding and
    decoding: one of relative size 2^-24 on a party's vector and three on the sum, with and without the example, on
    vectors of norm at most F and P F, where F is the format's clip. As in jax_privacy, float32 rounding within the
    gradient's own computation is not covered.

    Args:
      sampling: of the run.
      clip: C, the largest norm of one example's gradient.
      num_weights: D.
    """
    _validate.positive("sensitivity", "num_weights", num_weights)
    form, parties = fixed_point(sampling, clip), sampling.num_parties
    rounding = form.resolution * math.sqrt(num_weights) / parties + 2**-21 * form.clip
    return clip / (parties * sampling.expected_batch) + rounding


def gaussian_noise(
    guarantee: Guarantee, clip: float, params: PyTree, key: keys.SecretKey
) -> optax.GradientTransformation:
    """The owner's noise, drawn anew in each round and for each weight; chain it first in the owner's optimiser.

    Its standard deviation is ``guarantee.noise_multiplier * sensitivity(...)``. Its state holds the generator's key: a
    checkpoint with it is as secret as ``key``. Going back to an earlier state would repeat the noise: use a new key.
    The generator is jax.random's threefry, seeded with 64 bits of ``key``: the guarantee is against adversaries who
    cannot search through 2^64 keys.

    Args:
      guarantee: from :func:`plan` or :func:`achieved`.
      clip: C, the same as in :func:`value_and_clipped_grad`.
      params: the model, for its number of weights.
      key: the owner's, fresh for each run.

    Raises:
      SmarkError: from ``update``, when the mean's type is narrower than float32: the sensitivity does not cover a cast.
    """
    if not isinstance(key, keys.SecretKey):
        got, cause = type(key).__name__, "Noise that others can reproduce protects nobody: use keys.new()."
        raise _validate.fail("gaussian_noise", "a SecretKey", got, cause)
    num_weights = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    stddev = guarantee.noise_multiplier * sensitivity(guarantee.sampling, clip, num_weights)
    words = keys.derive(key, "privacy noise").to_words()[:2]
    generator = jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
    noise = noise_addition.gaussian_privatizer(stddev=stddev, prng_key=generator)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        narrow = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(updates) if leaf.dtype != _at_least_float32(leaf)})
        if narrow:
            cause = (
                "Chain the noise first and cast afterwards: rounding may move two means further apart than noise hides."
            )
            raise _validate.fail("gaussian_noise", "a mean in float32", f"{narrow}", cause)
        return noise.update(updates, state, params)

    return optax.GradientTransformation(noise.init, update)


def batches(
    sampling: Sampling, images: np.ndarray, labels: Int[np.ndarray, "P n"], party_secrets: Sequence[keys.SecretKey]
) -> Iterator[tuple[np.ndarray, Int[np.ndarray, "P B"]]]:
    """Poisson-sampled batches for all rounds of a run; which examples they hold must stay secret.

    Args:
      sampling: of the run.
      images: every party's images, shape [P, n, ...]; with several processes, those of the process's own parties.
      labels: their labels, shape [P, n].
      party_secrets: a key of each of these parties, fresh for each run; the draws are derived from them.

    Yields:
      Images of shape [P, B, ...] and labels of shape [P, B]; padding is zeros labelled -1.

    Raises:
      SmarkError: when a party's number of examples differs from the sampling's, or two parties share a key.
    """
    if labels.shape[1:] != (sampling.examples,) or images.shape[:2] != labels.shape:
        got = f"images {images.shape} and labels {labels.shape}"
        cause = "The guarantee was computed for this number: make the Sampling from the data's shape."
        raise _validate.fail("batches", f"{sampling.examples} examples for each party", got, cause)
    if len(party_secrets) != len(labels) or len(set(party_secrets)) != len(labels):
        cause = "Each party draws its own with keys.new()."
        got = f"{len(set(party_secrets))} different keys of {len(party_secrets)}"
        raise _validate.fail("batches", f"a key of its own for each of {len(labels)} parties", got, cause)
    return _draw_batches(sampling, images, labels, party_secrets)


def _draw_batches(
    sampling: Sampling, images: np.ndarray, labels: np.ndarray, party_secrets: Sequence[keys.SecretKey]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    strategy = batch_selection.CyclicPoissonSampling(sampling.probability, sampling.rounds, sampling.batch_size)
    seeds = [int.from_bytes(keys.derive(secret, "privacy sampling").to_bytes()) for secret in party_secrets]
    draws = [strategy.batch_iterator(sampling.examples, np.random.default_rng(seed)) for seed in seeds]
    party = np.arange(len(labels))[:, None]
    for drawn in zip(*draws, strict=True):
        index = np.stack([batch_selection.split_and_pad_global_batch(i, sampling.batch_size)[0] for i in drawn])
        image, label = images[party, index], labels[party, index]
        image[index < 0], label[index < 0] = 0, _PADDING
        yield image, label


def _event(sampling: Sampling, noise_multiplier: float) -> dp_accounting.DpEvent:
    # With the example that is added. Other parties' draws are independent of it, so only its own party's batch counts.
    one_round = dp_accounting.TruncatedSubsampledGaussianDpEvent(
        sampling.examples + 1, sampling.probability, sampling.batch_size, noise_multiplier
    )
    return dp_accounting.SelfComposedDpEvent(one_round, sampling.rounds)


def _accountant() -> pld.PLDAccountant:
    return pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, _DISCRETIZATION)


def _at_least_float32(leaf: Array) -> jnp.dtype:
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _check_delta(who: str, delta: float) -> None:
    if not 0 < delta < 1:
        raise _validate.fail(who, "delta strictly between 0 and 1", repr(delta), "Stay below 1 / all examples.")
