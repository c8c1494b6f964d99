r"""What a copy costs: how far its answers are from the base's, measured on images, with confidence intervals.

With centred logits z of the base and z' of the copy (each image's less their mean over classes), the relative change is
:math:`\sqrt{\mathrm E |z' - z|^2 / \mathrm E |z|^2}`. It is proportional to a mark's strength up to the point where a
network breaks, and hardly differs between codewords, so it is what strength is calibrated by.

References:
  Wilson (1927), "Probable inference, the law of succession, and statistical inference", for the interval of a share.
  Efron (1979), "Bootstrap methods: another look at the jackknife", for the others.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from smark_jax import _batches, _validate, carriers, errors
from smark_jax._types import AnyArray, ApplyFn, PyTree
from smark_jax.carriers import inputs
from smark_jax.carriers.shaping import centred, check_outputs
from smark_jax.embedding import _search, copies

MAX_CHANGE = 0.008
"""Relative change of the logits that a copy may cost by default: of 1,000 classes, 99 answers of 100 stay the same."""
_NORMAL_95 = 1.959964
_RESAMPLES = 1000
_BATCH = 32
# A single copy may cost three times the mean.
_WORST = 3


class Cost(NamedTuple):
    """What copies cost, in the mean over images.

    Attributes:
      change: relative change of the logits.
      kl: Kullback-Leibler divergence of the copy's answer from the base's, in nats, with outputs taken as logits.
      agreement: share of images to which the copy gives the base's answer.
      drop: accuracy of the base less the copy's; NaN without labels.
    """

    change: float
    kl: float
    agreement: float
    drop: float


class Intervals(NamedTuple):
    """95 % confidence intervals of the fields of :class:`Cost`, for other images of the same kind."""

    change: tuple[float, float]
    kl: tuple[float, float]
    agreement: tuple[float, float]
    drop: tuple[float, float]


class Measured(NamedTuple):
    """What a copy costs, and how sure that is."""

    cost: Cost
    interval: Intervals


class Calibration(NamedTuple):
    """The strength that a model bears.

    Attributes:
      strength: the largest that was found within bounds.
      cost: in the mean over copies with throw-away codewords.
      interval: of that cost.
      worst: of these copies, the worst value of each field.
    """

    strength: float
    cost: Cost
    interval: Intervals
    worst: Cost


class _Images(NamedTuple):
    """What one copy's answers to images are beside the base's; all of shape [N]."""

    error: np.ndarray
    power: np.ndarray
    kl: np.ndarray
    same: np.ndarray
    drop: np.ndarray


class Answers(NamedTuple):
    """A base's answers to some images, beside which copies are measured.

    Attributes:
      outputs: the base's, each image's less their mean over classes, shape [N, classes].
      apply_fn: the network.
      images: in the form that the network takes.
      labels: class numbers, if known.
    """

    outputs: np.ndarray
    apply_fn: ApplyFn
    images: Any
    labels: Any = None

    @property
    def accuracy(self) -> float | None:
        """The base's accuracy; None without labels."""
        if self.labels is None:
            return None
        return float((_logits(self.outputs).argmax(axis=1) == np.asarray(self.labels)).mean())

    def cost(self, copy: PyTree) -> Cost:
        """What a copy costs on these images."""
        return _cost(_compare("measure", copy, self))

    def measure(self, copy: PyTree) -> Measured:
        """What a copy costs on these images, and how sure that is, as :func:`measure` says."""
        return _summary([_compare("measure", copy, self)])


def answers(base: PyTree, apply_fn: ApplyFn, images: Any, labels: Int[AnyArray, " N"] | None = None) -> Answers:
    """Asks the base once; ``answers(...).cost(copy)`` then says of any number of copies what they cost.

    Raises:
      NotFinite: when the base's outputs are NaN or infinite.
      SmarkError: when there are no images, labels are not a class number for each, or outputs are not rows of logits
        that differ between classes.
    """
    return _answers("answers", base, apply_fn, images, labels)


def measure(
    copy: PyTree,
    base: PyTree,
    apply_fn: ApplyFn,
    images: Any,
    labels: Int[AnyArray, " N"] | None = None,
) -> Measured:
    """What a copy costs on these images.

    Args:
      copy: the marked model.
      base: the model it was made from.
      apply_fn: the network, pure.
      images: in the form that the network takes; not those that the shape was made from.
      labels: class numbers, for the drop of accuracy.

    Returns:
      The cost with 95 % intervals: Wilson's of the agreement, and of the others by 1,000 bootstrap samples of images.

    Raises:
      NotFinite: when the copy's or the base's outputs are NaN or infinite.
      SmarkError: when there are no images, labels are not a class number for each, or outputs are not rows of logits
        that differ between classes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from smark_jax import embedding
      >>> images = jnp.eye(8)
      >>> embedding.measure({"w": 1.01 * jnp.eye(8)}, {"w": jnp.eye(8)}, lambda p, x: x @ p["w"], images).cost.agreement
      1.0
    """
    return _answers("measure", base, apply_fn, images, labels).measure(copy)


def calibrate(
    base: PyTree,
    mark: carriers.Mark,
    apply_fn: ApplyFn,
    images: Any,
    *,
    max_change: float | None = MAX_CHANGE,
    max_drop: float | None = None,
    labels: Int[AnyArray, " N"] | None = None,
    num_copies: int = 3,
    seed: int = 0,
    on_strength: Callable[[float], None] = lambda strength: None,
) -> Calibration:
    """The strength that a model bears, by what copies with throw-away codewords cost on unlabelled images.

    Finds the largest strength at which the mean cost of the copies is within bounds, and no single copy's above three
    times the bound. Networks differ by a factor of a hundred in how strong a white mark they bear; a shape's
    prediction is up to a few times too low. The stronger the mark, the more a leaker must destroy.

    Args:
      base: the base model.
      mark: its mark.
      apply_fn: the network, pure.
      images: of the kind that the network is for, and not those that the shape was made from.
      max_change: largest acceptable relative change of the logits; None for any.
      max_drop: largest acceptable drop of accuracy, which needs labels; None for any.
      labels: class numbers of the images.
      num_copies: how many copies are made at each strength.
      seed: of their codewords.
      on_strength: called with each strength before it is tried.

    Returns:
      The strength and what it costs, which is within 4 % of a bound; or else the strength is known to within 4 %.
      ``mark._replace(strength=...)`` keeps it.

    Raises:
      TooCostly: when even a thousandth of the mark's own strength costs more.
      SmarkError: when no bound is given, one is out of range or lacks labels, or as :func:`embed` and :func:`measure`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from smark_jax import carriers, embedding, keys
      >>> base = {"a": jax.random.normal(jax.random.key(0), (90, 90)), "b": jnp.eye(90, 5)}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
      >>> images = jax.random.normal(jax.random.key(1), (20, 90))
      >>> mark = carriers.mark(keys.from_bytes(bytes(32)), base, shape=carriers.shape(base, apply_fn, images))
      >>> found = embedding.calibrate(base, mark, apply_fn, images)
      >>> 0.007 < found.cost.change <= 0.008
      True
    """
    bounds = _bounds(max_change, max_drop, labels)
    _validate.positive("calibrate", "num_copies", num_copies)
    words = np.random.default_rng(seed).choice([-1, 1], (num_copies, mark.num_chips)).astype(np.int8)
    before = _answers("calibrate", base, apply_fn, images, labels)

    def tried(strength: float) -> tuple[float, Calibration | None]:
        """The largest cost over its bound; and the costs, where they are within bounds."""
        on_strength(strength)
        made = (copies.embed(base, mark, word, strength) for word in words)
        try:
            rows = [_compare("calibrate", copy, before) for copy in made]
        except errors.NotFinite:
            return math.inf, None
        mean, each = _summary(rows), [_cost(row) for row in rows]
        worst = Cost(*(max(xs) for xs in zip(*each, strict=True)))._replace(
            agreement=min(one.agreement for one in each)
        )
        ratio = max(
            getattr(cost, name) / (times * most)
            for name, most in bounds.items()
            for cost, times in ((mean.cost, 1), (worst, _WORST))
        )
        return ratio, Calibration(strength, *mean, worst) if ratio <= 1 else None

    best, high = _search.largest(tried, float(mark.strength))
    if best is None:
        got = f"a larger cost at {high:g}"
        cause = "Accept a larger change, or mark fewer leaves (carriers.mark(..., match='kernel'))."
        desk = "Accept a larger --change, or mark fewer leaves: --match kernel."
        expected = "a strength that costs at most " + ", ".join(f"{most:g} of {name}" for name, most in bounds.items())
        raise _validate.fail("calibrate", expected, got, cause, kind=errors.TooCostly, desk=desk)
    return best


def _bounds(max_change: float | None, max_drop: float | None, labels: Any) -> dict[str, float]:
    bounds = {name: most for name, most in (("change", max_change), ("drop", max_drop)) if most is not None}
    for name, most in bounds.items():
        _validate.finite_number("calibrate", f"max_{name}", most)
    if not bounds or ("drop" in bounds and labels is None):
        got = "none" if not bounds else "max_drop without labels"
        raise _validate.fail("calibrate", "max_change, or max_drop and labels", got, "What may a copy cost?")
    return bounds


def _answers(who: str, base: PyTree, apply_fn: ApplyFn, images: Any, labels: Any) -> Answers:
    """As :func:`answers`, in the name of ``who``."""
    if not len(images):
        raise _validate.fail(who, "at least one image", "none", "Is the split empty?")
    if labels is not None and np.shape(labels) != (len(images),):
        cause = "Are images and labels of the same split?"
        raise _validate.fail(who, f"one label for each of {len(images):,} images", f"{np.shape(labels)}", cause)
    width = check_outputs(who, apply_fn, base, images)
    if labels is not None:
        _validate.class_numbers(who, np.asarray(labels), max(2, width))
    outputs = _batches.apply(functools.partial(_outputs, apply_fn, base), _BATCH, np.asarray(images))
    if not np.isfinite(outputs).all():
        cause = "Does the network belong to this base, and are the images as it takes them?"
        raise _validate.fail(who, "finite outputs of the base", "NaN or infinite ones", cause, kind=errors.NotFinite)
    if not outputs.any():
        cause = "Does the network use its parameters, and does it return logits?"
        raise _validate.fail(who, "outputs that differ between classes", "the same for all", cause)
    return Answers(outputs, apply_fn, images, labels)


def _compare(who: str, copy: PyTree, before: Answers) -> _Images:
    outputs = _batches.apply(functools.partial(_outputs, before.apply_fn, copy), _BATCH, np.asarray(before.images))
    if not np.isfinite(outputs).all():
        cause = "The mark is too strong for this network: calibrate finds a strength that it bears."
        desk = "The mark is too strong for this network: leave --strength out, and --change finds what it bears."
        got = "NaN or infinite ones"
        raise _validate.fail(who, "finite outputs of the copy", got, cause, kind=errors.NotFinite, desk=desk)
    base, copied = (x.astype(np.float64) for x in (before.outputs, outputs))
    wide, changed = (_logits(x) for x in (base, copied))
    expected, given = wide.argmax(axis=1), changed.argmax(axis=1)
    drop = np.full(len(base), math.nan)
    if before.labels is not None:
        labels = np.asarray(before.labels)
        drop = (expected == labels).astype(float) - (given == labels)
    kl = np.sum(np.exp(_log_softmax(wide)) * (_log_softmax(wide) - _log_softmax(changed)), axis=1)
    error, power = (np.square(x).sum(axis=1) for x in (copied - base, base))
    return _Images(error, power, kl, (expected == given).astype(float), drop)


@functools.partial(jax.jit, static_argnums=0)
def _outputs(apply_fn: ApplyFn, params: PyTree, images: Array) -> Array:
    return centred(inputs.interpret(apply_fn, params, jnp.asarray(images)))  # depthwise kernels are faster so on CPUs


def _logits(outputs: np.ndarray) -> np.ndarray:
    """Logits of two classes where there is a single output, which is class 1's."""
    return outputs if outputs.shape[1] > 1 else np.concatenate([np.zeros_like(outputs), outputs], axis=1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _cost(row: _Images) -> Cost:
    change = math.sqrt(row.error.mean() / row.power.mean())  # the base's answers are not all zero
    return Cost(change, float(row.kl.mean()), float(row.same.mean()), float(row.drop.mean()))


def _summary(rows: list[_Images]) -> Measured:
    """The mean over copies; intervals are over images, since copies differ much less than images do."""
    mean = _Images(*(np.mean(xs, axis=0) for xs in zip(*rows, strict=True)))
    cost, number = _cost(mean), len(mean.kl)
    rng = np.random.default_rng(0)
    some = rng.integers(number, size=(_RESAMPLES, number))
    error, power, *others = (x[some].mean(axis=1) for x in mean)
    samples = [np.sqrt(error / np.where(power > 0, power, 1)), *others]
    low, high = np.quantile(np.stack(samples), [0.025, 0.975], axis=1).tolist()
    intervals = Intervals(*zip(low, high, strict=True))
    return Measured(cost, intervals._replace(agreement=_wilson(cost.agreement, number)))


def _wilson(share: float, number: int) -> tuple[float, float]:
    z = _NORMAL_95**2 / number
    middle, half = share + z / 2, math.sqrt(z * (share * (1 - share) + z / 4))
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))
