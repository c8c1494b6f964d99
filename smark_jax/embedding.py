r"""Embedding a codeword in a model: in closed form, without data, or by training.

In closed form a copy is ``w + delta * spread(word, mark)`` with

.. math:: \delta = \text{strength} \sqrt{D' / m},

where D' is the number of weights that the carrier covers. So the RMS change of a weight is ``strength`` times the RMS
of its leaf. The read-out of an intact copy is ``delta * word``.

Trained embedding minimises a fingerprint loss of the read-out together with the loss of the task::

    optax.chain(add_fingerprint_gradient(losses.sign_hinge, mark, word), optax.adam(1e-3))
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Num

from smark_jax import _trees, _validate, carriers, errors
from smark_jax._types import AnyArray, PyTree
from smark_jax.carriers import hadamard, marks, selection, sharded

FingerprintLoss = Callable[[Array, Array], Array]
"""``loss(chips [m], word [m]) -> scalar``, such as those in :mod:`smark_jax.losses`."""


def embed(
    base: PyTree, mark: carriers.Mark, word: Num[AnyArray, " m"], strength: float | Array | None = None
) -> PyTree:
    """A copy of the model that carries ``word``, in closed form and without data.

    Composes with jit and vmap, where values cannot be checked; all arguments may be traced.

    Parameters that are split over a mesh of devices (leaves with a ``NamedSharding``) are marked in place: no device
    receives another's weights, and the copy is split as they are. Each device also holds the carrier (about a byte per
    weight of the whole model). This does not hold under a jit of your own, where the compiler decides, nor in
    :func:`embed_batch`.

    Args:
      base: the base model.
      mark: the model's mark.
      word: the customer's codeword in {-1, +1}, shape [m].
      strength: None for the mark's own. Without a shape, the RMS change of a weight in units of its leaf's RMS; with
        one, that of a coordinate in units of its scale: the relative change of the logits that the shape predicts.

    Returns:
      The marked copy, with the structure and dtypes of ``base``. Leaves that do not carry are those of ``base``,
      untouched; float64 arrays of NumPy are marked in float64.

    Raises:
      SmarkError: when the word has another length than the mark has chips or entries other than -1 and +1, ``base``
        does not fit the mark or holds NaN or infinite weights or is split over several meshes, or ``strength`` is not
        positive and finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from smark_jax import carriers, codes, embedding, extraction, keys
      >>> key = keys.from_bytes(bytes(32))
      >>> base = {"kernel": jnp.sin(jnp.arange(10_000.0))}
      >>> mark = carriers.mark(keys.derive(key, "carrier"), base)
      >>> word = codes.codebook(keys.derive(key, "code"), [7])[0]
      >>> copy = embedding.embed(base, mark, word)
      >>> bool((jnp.sign(extraction.extract(copy, base, mark)) == word).all())
      True
    """
    strength = mark.strength if strength is None else strength
    _check("embed", base, mark, strength)
    _check_word("embed", mark, word)
    where = sharded.layout("embed", base, mark.spec)
    if where is None:
        leaves = selection.narrow("embed", base, mark.spec)
        changed, ok, signs = _embed(leaves, mark, jnp.asarray(word), strength)
        copy = selection.replace(base, mark.spec, changed)
        ok = _wide_too(ok, base, mark.spec)
    elif mark.shape is not None:
        cause = "Gather them: jax.device_put(params, jax.devices()[0])."
        raise _validate.fail("embed", "a shaped mark's leaves whole on a device", "leaves split over a mesh", cause)
    else:
        copy = sharded.add_spread(base, mark, where, word, _delta(mark, strength))
        ok, signs = _finite(copy, mark.spec), jnp.all(jnp.abs(jnp.asarray(word)) == 1)
    _verify("embed", ok, signs)
    return copy


def embed_batch(
    base: PyTree, mark: carriers.Mark, words: Num[AnyArray, "K m"], strength: float | Array | None = None
) -> PyTree:
    """:func:`embed` for K customers at once: a pytree whose leaves have a leading axis of K copies.

    Each copy equals that of :func:`embed` bit for bit, whatever K is. Memory holds all copies and about two models
    more. For thousands of large models, call it on a few codewords at a time.

    Raises:
      SmarkError: as :func:`embed`.
    """
    strength = mark.strength if strength is None else strength
    _check("embed_batch", base, mark, strength)
    if jnp.ndim(words) != 2 or jnp.shape(words)[0] == 0 or jnp.shape(words)[1] != mark.num_chips:
        expected = f"words of shape [K, {mark.num_chips}] with K >= 1"
        cause = "Was the codebook made with another num_chips than the mark?"
        raise _validate.fail("embed_batch", expected, f"shape {jnp.shape(words)}", cause)
    leaves = selection.narrow("embed_batch", base, mark.spec)
    changed, ok, signs = _embed_batch(leaves, mark, jnp.asarray(words), strength)
    _verify("embed_batch", _wide_too(ok, base, mark.spec), signs)
    marked = {name for leaf in mark.spec.leaves for name in (leaf.path, *leaf.tied)}
    repeated = lambda leaf: _repeated(leaf, jnp.shape(words)[0])  # noqa: E731
    copies = selection.replace(base, mark.spec, changed)
    return _trees.map_named(lambda name, leaf: leaf if name in marked else repeated(leaf), copies)


def _repeated(leaf: Any, times: int) -> Any:
    """A leaf repeated for each copy; a NumPy leaf is broadcast without copying."""
    xp = jnp if isinstance(leaf, jax.Array) else np
    return xp.broadcast_to(leaf, (times, *np.shape(leaf)))


class Calibration(NamedTuple):
    """How much each strength costs a model.

    Attributes:
      strength: the largest strength tried whose cost is within bounds.
      strengths: those tried, in rising order, shape [S].
      mean_drops: mean of the base's score minus the copies', shape [S].
      worst_drops: the largest drop of any copy, shape [S].
    """

    strength: float
    strengths: tuple[float, ...]
    mean_drops: tuple[float, ...]
    worst_drops: tuple[float, ...]


def calibrate(
    base: PyTree,
    mark: carriers.Mark,
    score: Callable[[PyTree], float],
    max_drop: float = 0.002,
    *,
    strengths: Sequence[float] = (0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2),
    copies: int = 5,
    seed: int = 0,
) -> Calibration:
    """The strength that this model can bear, which differs by a factor of ten between networks.

    Tries strengths in rising order on copies with throw-away random codewords. It stops when their mean score has
    dropped by more than ``max_drop``, or a single score by more than three times that. The stronger the mark, the more
    a leaker must destroy: see the page on robustness.

    Args:
      base: the base model.
      mark: the model's mark.
      score: ``score(params) -> float``, the larger the better, such as the accuracy on held-out images.
      max_drop: largest acceptable mean drop, in the score's unit.
      strengths: the strengths to try.
      copies: how many copies to try for each strength.
      seed: of the codewords.

    Returns:
      The strength, and what each one cost.

    Raises:
      TooCostly: when even the smallest strength costs more.
      SmarkError: when a setting is out of range, or as :func:`embed`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from smark_jax import carriers, embedding, keys
      >>> base = {"kernel": jnp.sin(jnp.arange(10_000.0))}
      >>> mark = carriers.mark(keys.from_bytes(bytes(32)), base)
      >>> score = lambda params: float(-jnp.square(params["kernel"] - base["kernel"]).mean() ** 0.5)
      >>> embedding.calibrate(base, mark, score, max_drop=0.05).strength
      0.07
    """
    _validate.positive("calibrate", "copies", copies)
    _validate.finite_number("calibrate", "max_drop", max_drop)
    rising = sorted(strengths)
    words = np.random.default_rng(seed).choice([-1, 1], (copies, mark.num_chips)).astype(np.int8)
    original = float(score(base))
    tried: list[tuple[float, float, float]] = []
    for strength in rising:
        drops = [original - float(score(embed(base, mark, word, strength))) for word in words]
        tried.append((float(strength), float(np.mean(drops)), float(np.max(drops))))
        if not (tried[-1][1] <= max_drop and tried[-1][2] <= 3 * max_drop):
            break
    good = [strength for strength, mean, worst in tried if mean <= max_drop and worst <= 3 * max_drop]
    if not good:
        got = f"drops of {tried[0][1]:.3g} in the mean and {tried[0][2]:.3g} at worst" if tried else "no strengths"
        cause = (
            "Accept a larger drop, mark kernels only (carriers.mark(..., match='kernel')), or try smaller strengths."
        )
        raise _validate.fail(
            "calibrate", f"a strength that costs at most {max_drop:g}", got, cause, kind=errors.TooCostly
        )
    used, mean_drops, worst_drops = zip(*tried, strict=True)
    return Calibration(good[-1], used, mean_drops, worst_drops)


def _check(who: str, base: PyTree, mark: carriers.Mark, strength: float | Array) -> None:
    marks.check(who, mark, base)
    _validate.finite_number(who, "strength", strength)  # pyright: ignore[reportArgumentType]  # or traced


def _check_word(who: str, mark: carriers.Mark, word: Num[AnyArray, " m"]) -> None:
    cause = "Was the codeword made with another num_chips than the mark?"
    _validate.vector(who, "word", word, mark.num_chips, cause)


def _verify(who: str, finite: Any, signs: Array) -> None:
    _validate.all_finite(who, "weights in the base", finite)
    if not _validate.is_traced(signs) and not bool(signs):
        raise _validate.fail(who, "codewords of -1 and +1", "other entries", "Bits become chips by 1 - 2 * bits.")


_finite = jax.jit(selection.finite)


def _delta(mark: carriers.Mark, strength: Array | float) -> Array | float:
    return strength * (mark.carrier.num_carrying / mark.num_chips) ** 0.5


def _wide_too(ok: Any, base: PyTree, spec: carriers.Spec) -> Any:
    """``ok``, and whether the carrying leaves that stayed on the host are finite."""
    seen = zip(selection.carrying("embed", base, spec), selection.narrow("embed", base, spec), strict=True)
    return ok & all(np.isfinite(leaf).all() for leaf, narrow in seen if narrow is None)


@jax.jit
def _embed(
    leaves: list[Any], mark: carriers.Mark, word: Array, strength: Array | float
) -> tuple[list[Array], Array, Array]:
    changed = selection.add(leaves, marks.changes(_delta(mark, strength) * carriers.spread(word, mark), mark))
    # The check is on the copy, so that it also catches a strength that overflows a narrow dtype.
    return changed, jnp.stack([jnp.isfinite(leaf).all() for leaf in changed]).all(), jnp.all(jnp.abs(word) == 1)


@jax.jit
def _embed_batch(
    leaves: list[Any], mark: carriers.Mark, words: Array, strength: Array | float
) -> tuple[list[Array], Array, Array]:
    # One after the other: all at once would take three times the memory, fall out of cache between the transform's
    # factors, and make the rounding depend on the number of copies.
    copies, ok, signs = jax.lax.map(lambda word: _embed(leaves, mark, word, strength), words)
    return copies, ok.all(), signs.all()


class FingerprintState(NamedTuple):
    """The optimiser state of :func:`add_fingerprint_gradient`; it holds the data so that jit takes it as an argument.

    Attributes:
      base: the carrying weights to measure against, in the mark's coordinates, shape [D].
      mark: the mark; its carrier is secret.
      code: the codeword in {-1, +1}, shape [m].
    """

    base: Float[Array, " D"]
    mark: carriers.Mark
    code: Float[Array, " m"]


def add_fingerprint_gradient(
    loss_fn: FingerprintLoss,
    mark: carriers.Mark,
    word: Num[AnyArray, " m"],
    weight: float | Array | optax.Schedule = 1.0,
) -> optax.GradientTransformation:
    """Adds ``weight`` times the gradient of the fingerprint loss to the gradient that passes through.

    Chained before an optimiser, it marks a model during training. In distributed training the owner applies it after
    aggregation, so that no party ever sees the mark. The read-out is relative to the weights passed to ``init``: pass
    it the base. Training may go on from other weights.

    Args:
      loss_fn: loss of soft chips and codeword, such as ``losses.sign_hinge``.
      mark: the model's mark.
      word: the codeword in {-1, +1} that the model is to carry, shape [m].
      weight: factor of the fingerprint's gradient, or a schedule of it.

    Returns:
      A transformation for ``optax.chain``. Its state holds the mark's carrier and the codeword: it is as secret as
      they are. With a schedule, the state is a pair of :class:`FingerprintState` and the number of steps so far.

    Raises:
      SmarkError: when the word does not fit the mark. From ``init``, when the mark is not for these parameters, or a
        carrying weight is NaN or infinite; from ``update``, when it is called without parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from smark_jax import carriers, codes, embedding, extraction, keys, losses
      >>> key = keys.from_bytes(bytes(32))
      >>> base = {"kernel": jnp.sin(jnp.arange(10_000.0))}
      >>> mark = carriers.mark(keys.derive(key, "carrier"), base, num_chips=64)
      >>> word = codes.codebook(keys.derive(key, "code"), [7], num_chips=64)[0]
      >>> fingerprint = embedding.add_fingerprint_gradient(losses.sign_hinge, mark, word)
      >>> optimizer = optax.chain(fingerprint, optax.adam(1e-3))
      >>> params, state = base, optimizer.init(base)
      >>> task_gradient = jax.tree.map(jnp.zeros_like, base)  # jax.grad of the task's loss, where there is one
      >>> for _ in range(20):
      ...     updates, state = jax.jit(optimizer.update)(task_gradient, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool((jnp.sign(extraction.extract(params, base, mark)) == word).all())
      True
    """
    who, spec = "add_fingerprint_gradient", mark.spec
    _check_word(who, mark, word)
    _verify(who, True, jnp.all(jnp.abs(jnp.asarray(word)) == 1))

    def init(params: PyTree) -> Any:
        marks.check(who, mark, params)
        weights = carriers.coordinates(params, mark)
        _verify(who, jnp.isfinite(weights).all(), jnp.asarray(True))
        aim = FingerprintState(weights, mark, jnp.asarray(word, jnp.float32))
        return (aim, jnp.zeros((), jnp.int32)) if callable(weight) else aim

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if params is None:  # the second line is optax's own
            cause = (
                "You are using a transformation that requires the current value of parameters, but you are not passing "
                "`params` when calling `update`."
            )
            raise _validate.fail(who, "update(updates, state, params)", "no params", cause)
        aim, factor = state, cast(Any, weight)
        if callable(weight):
            aim, count = state
            factor, state = weight(count), (aim, optax.safe_increment(count))
        gradient = _fingerprint_gradient(loss_fn, selection.carrying(who, params, spec), aim)
        pairs = zip(spec.leaves, gradient, strict=True)
        by_name = {name: part for leaf, part in pairs for name in (leaf.path, *leaf.tied)}

        def added(name: str, leaf: Any) -> Any:  # an update of one name of a tied tensor goes to all its names
            return leaf + (factor * by_name[name]).astype(leaf.dtype) if name in by_name else leaf

        return _trees.map_named(added, updates), state

    return optax.GradientTransformation(init, update)


def _fingerprint_gradient(loss_fn: FingerprintLoss, leaves: list[Any], aim: FingerprintState) -> list[Array]:
    """The gradient with respect to the carrying leaves of the fingerprint loss of their read-out against the base."""
    weights, back = jax.vjp(lambda leaves: marks.coordinates_of(leaves, aim.mark), leaves)
    by_chip = jax.grad(loss_fn)(hadamard.despread(weights - aim.base, aim.mark.carrier), aim.code)
    # Losses such as the hinge have no gradient once all chips read well, as in most rounds of a training.
    spread = lambda: hadamard.spread(by_chip, aim.mark.carrier)  # noqa: E731
    return back(jax.lax.cond(jnp.any(by_chip != 0), spread, lambda: jnp.zeros_like(weights)))[0]
