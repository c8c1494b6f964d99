r"""Putting a codeword into a model: in closed form, without data, or by training.

In closed form a copy is ``w + delta * spread(code)`` with

.. math:: \delta = \text{strength} \sqrt{D' / m},

D' the number of weights that the carrier covers, so that each weight moves by ``strength`` times its leaf's root mean
square, in root mean square. The read-out of an intact copy is ``delta * code``.

Trained embedding minimises a fingerprint loss of the read-out together with whatever gradient the task supplies.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Num

from smark_jax import _trees, _validate, carriers, errors
from smark_jax._types import AnyArray, PyTree
from smark_jax.carriers import selection

FingerprintLoss = Callable[[Array, Array], Array]
"""``loss(chips [m], code [m]) -> scalar``, such as those in :mod:`smark_jax.losses`."""


def embed(
    params: PyTree,
    spec: carriers.Spec,
    carrier: carriers.Carrier,
    code: Num[AnyArray, " m"],
    strength: float = 0.03,
) -> PyTree:
    """A copy of the model that carries ``code``: closed form, no data touched.

    Parameters that a mesh of devices holds (leaves split by a ``NamedSharding``) are marked where they lie: no device
    gets another's weights, and the copy is split as they are. Beside them, each device holds the carrier (about a byte
    a weight of the whole model). Not so under a jit of your own, where the compiler decides, nor in
    :func:`embed_batch`.

    Args:
      params: the base model.
      spec: its carrying leaves.
      carrier: the model's carrier.
      code: the customer's codeword in {-1, +1}, shape [m].
      strength: root mean square change of a weight in units of its leaf's root mean square.

    Returns:
      The marked copy, with the structure and dtypes of ``params``. Leaves that do not carry are those of ``params``,
      untouched; float64 arrays of NumPy are marked in float64.

    Raises:
      SmarkError: when the code has another length than the carrier or entries other than -1 and +1, the carrier was
        drawn for another number of weights, ``params`` does not fit the spec or holds NaN or infinite weights or is
        split over several meshes, or ``strength`` is not positive and finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from smark_jax import carriers, codes, embedding, extraction, keys
      >>> key = keys.from_bytes(bytes(32))
      >>> base = {"kernel": jnp.sin(jnp.arange(10_000.0))}
      >>> spec = carriers.select(base)
      >>> carrier = carriers.draw(keys.derive(key, "carrier"), spec)
      >>> word = codes.codebook(keys.derive(key, "code"), [7])[0]
      >>> copy = embedding.embed(base, spec, carrier, word)
      >>> bool((jnp.sign(extraction.extract(copy, base, spec, carrier)) == word).all())
      True
    """
    _check("embed", params, spec, carrier, strength)
    cause = "Was the codeword made with another num_chips than the carrier?"
    _validate.vector("embed", "code", code, carrier.num_chips, cause)
    where = carriers.layout("embed", params, spec)
    if where is None:
        changed, ok, signs = _embed(selection.narrow("embed", params, spec), spec, carrier, jnp.asarray(code), strength)
        copy = selection.replace(params, spec, changed)
        ok = _wide_too(ok, params, spec)
    else:
        copy = carriers.add_spread(params, spec, where, code, carrier, _delta(carrier, strength))
        ok, signs = _finite(copy, spec), jnp.all(jnp.abs(jnp.asarray(code)) == 1)
    _verify("embed", ok, signs)
    return copy


def embed_batch(
    params: PyTree,
    spec: carriers.Spec,
    carrier: carriers.Carrier,
    codes: Num[AnyArray, "K m"],
    strength: float = 0.03,
) -> PyTree:
    """:func:`embed` for K customers at once: a pytree whose leaves have a leading axis of K copies.

    A copy is the same bit for bit as :func:`embed` makes it, whatever K is. All copies are in memory together, with
    about two models besides. For thousands of large models, call it on a few codewords at a time.

    Raises:
      SmarkError: as :func:`embed`.
    """
    _check("embed_batch", params, spec, carrier, strength)
    if jnp.ndim(codes) != 2 or jnp.shape(codes)[0] == 0 or jnp.shape(codes)[1] != carrier.num_chips:
        expected = f"codes of shape [K, {carrier.num_chips}] with K >= 1"
        cause = "Was the codebook made with another num_chips than the carrier?"
        raise _validate.fail("embed_batch", expected, f"shape {jnp.shape(codes)}", cause)
    leaves = selection.narrow("embed_batch", params, spec)
    changed, ok, signs = _embed_batch(leaves, spec, carrier, jnp.asarray(codes), strength)
    _verify("embed_batch", _wide_too(ok, params, spec), signs)
    marked = {name for leaf in spec.leaves for name in (leaf.path, *leaf.tied)}
    repeated = lambda leaf: _repeated(leaf, jnp.shape(codes)[0])  # noqa: E731
    return _trees.map_named(
        lambda name, leaf: leaf if name in marked else repeated(leaf),
        selection.replace(params, spec, changed),
    )


def _repeated(leaf: Any, times: int) -> Any:
    """A leaf once for each copy, without room for more than one where NumPy has it."""
    xp = jnp if isinstance(leaf, jax.Array) else np
    return xp.broadcast_to(leaf, (times, *np.shape(leaf)))


class Calibration(NamedTuple):
    """What strengths cost a model.

    Attributes:
      strength: the largest one that was tried with a cost in bounds.
      strengths: those tried, in rising order, shape [S].
      mean_drops: mean of the base's score minus the copies', shape [S].
      worst_drops: the largest of a copy, shape [S].
    """

    strength: float
    strengths: tuple[float, ...]
    mean_drops: tuple[float, ...]
    worst_drops: tuple[float, ...]


def calibrate(
    params: PyTree,
    spec: carriers.Spec,
    carrier: carriers.Carrier,
    score: Callable[[PyTree], float],
    max_drop: float = 0.002,
    *,
    strengths: Sequence[float] = (0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2),
    copies: int = 5,
    seed: int = 0,
) -> Calibration:
    """The strength that this model can bear: how much differs by a factor of ten between networks.

    Tries strengths in rising order on copies with throw-away random codewords, and stops where their mean score has
    dropped by more than ``max_drop``, or one of them by more than three times that. The stronger the mark, the more a
    leaker must destroy: see the page on robustness.

    Args:
      params: the base model.
      spec: its carrying leaves.
      carrier: the model's carrier.
      score: ``score(params) -> float``, the larger the better, such as the accuracy on held-out images.
      max_drop: largest acceptable mean drop, in the score's unit.
      strengths: to try.
      copies: with each strength.
      seed: of the codewords.

    Returns:
      The strength, and what each cost.

    Raises:
      TooCostly: when even the smallest strength costs more.
      SmarkError: when a setting is out of range, or as :func:`embed`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from smark_jax import carriers, embedding, keys
      >>> base = {"kernel": jnp.sin(jnp.arange(10_000.0))}
      >>> spec = carriers.select(base)
      >>> carrier = carriers.draw(keys.from_bytes(bytes(32)), spec)
      >>> score = lambda params: float(-jnp.square(params["kernel"] - base["kernel"]).mean() ** 0.5)
      >>> embedding.calibrate(base, spec, carrier, score, max_drop=0.05).strength
      0.07
    """
    _validate.positive("calibrate", "copies", copies)
    _validate.finite_number("calibrate", "max_drop", max_drop)
    rising = sorted(strengths)
    words = np.random.default_rng(seed).choice([-1, 1], (copies, carrier.num_chips)).astype(np.int8)
    original = float(score(params))
    tried: list[tuple[float, float, float]] = []
    for strength in rising:
        drops = [original - float(score(embed(params, spec, carrier, word, strength))) for word in words]
        tried.append((float(strength), float(np.mean(drops)), float(np.max(drops))))
        if not (tried[-1][1] <= max_drop and tried[-1][2] <= 3 * max_drop):
            break
    good = [strength for strength, mean, worst in tried if mean <= max_drop and worst <= 3 * max_drop]
    if not good:
        got = f"drops of {tried[0][1]:.3g} in the mean and {tried[0][2]:.3g} at worst" if tried else "no strengths"
        cause = "Accept a larger drop, mark kernels only (carriers.select(params, 'kernel')), or try smaller strengths."
        raise _validate.fail(
            "calibrate", f"a strength that costs at most {max_drop:g}", got, cause, kind=errors.TooCostly
        )
    used, mean_drops, worst_drops = zip(*tried, strict=True)
    return Calibration(good[-1], used, mean_drops, worst_drops)


def _check(who: str, params: PyTree, spec: carriers.Spec, carrier: carriers.Carrier, strength: float) -> None:
    carriers.check_params(who, params, spec)
    carriers.check_carrier(who, carrier, spec)
    _validate.finite_number(who, "strength", strength)


def _verify(who: str, finite: Array, signs: Array) -> None:
    _validate.all_finite(who, "weights in params", finite)
    if not _validate.is_traced(signs) and not bool(signs):
        raise _validate.fail(who, "codewords of -1 and +1", "other entries", "Bits become chips by 1 - 2 * bits.")


_finite = jax.jit(carriers.finite, static_argnames="spec")


def _delta(carrier: carriers.Carrier, strength: Array | float) -> Array | float:
    return strength * (carrier.num_carrying / carrier.num_chips) ** 0.5


def _wide_too(ok: Any, params: PyTree, spec: carriers.Spec) -> Any:
    """``ok``, and whether the carrying leaves that JAX has not seen are finite."""
    seen = zip(selection.carrying("embed", params, spec), selection.narrow("embed", params, spec), strict=True)
    return ok & all(np.isfinite(leaf).all() for leaf, narrow in seen if narrow is None)


@functools.partial(jax.jit, static_argnames="spec")
def _embed(
    leaves: list[Any], spec: carriers.Spec, carrier: carriers.Carrier, code: Array, strength: Array | float
) -> tuple[list[Array], Array, Array]:
    changed = selection.add(leaves, spec, _delta(carrier, strength) * carriers.spread(code, carrier))
    # Of the copy: a strength that overflows a narrow dtype shows as well.
    return changed, jnp.stack([jnp.isfinite(leaf).all() for leaf in changed]).all(), jnp.all(jnp.abs(code) == 1)


@functools.partial(jax.jit, static_argnames="spec")
def _embed_batch(
    leaves: list[Any], spec: carriers.Spec, carrier: carriers.Carrier, codes: Array, strength: Array | float
) -> tuple[list[Array], Array, Array]:
    # One after the other: all at once would take three times the memory, fall out of cache between the transform's
    # factors, and round by the number of copies.
    copies, ok, signs = jax.lax.map(lambda code: _embed(leaves, spec, carrier, code, strength), codes)
    return copies, ok.all(), signs.all()


class Mark(NamedTuple):
    """What a trained embedding aims at: this codeword, in this carrier, relative to this base. A pytree.

    Attributes:
      base: the carrying weights to measure against, as from ``carriers.read(base, spec)``, shape [D].
      carrier: the model's carrier.
      code: the codeword in {-1, +1}, shape [m].
    """

    base: Float[Array, " D"]
    carrier: carriers.Carrier
    code: Float[Array, " m"]


def mark(base: PyTree, spec: carriers.Spec, carrier: carriers.Carrier, code: Num[AnyArray, " m"]) -> Mark:
    """The aim of a trained embedding.

    Raises:
      SmarkError: when base, spec, carrier and code do not belong together.
    """
    carriers.check_params("mark: base", base, spec)
    carriers.check_carrier("mark", carrier, spec)
    cause = "Was the codeword made with another num_chips than the carrier?"
    _validate.vector("mark", "code", code, carrier.num_chips, cause)
    weights = carriers.read(base, spec)
    _verify("mark", jnp.isfinite(weights).all(), jnp.all(jnp.abs(jnp.asarray(code)) == 1))
    return Mark(weights, carrier, jnp.asarray(code, jnp.float32))


def _fingerprint_gradient(
    loss_fn: FingerprintLoss, params: PyTree, spec: carriers.Spec, aim: Mark
) -> tuple[Array, Array, PyTree]:
    """The fingerprint loss of what ``params`` read relative to the base, how many chips read wrong, the gradient."""
    weights, back = jax.vjp(lambda p: carriers.read(p, spec), params)
    chips = carriers.despread(weights - aim.base, aim.carrier)
    loss, by_chip = jax.value_and_grad(loss_fn)(chips, aim.code)
    # Losses such as the hinge leave chips alone that read well, and most rounds of a training have no others.
    spread = lambda: carriers.spread(by_chip, aim.carrier)  # noqa: E731
    vector = jax.lax.cond(jnp.any(by_chip != 0), spread, lambda: jnp.zeros_like(weights))
    gradient = back(vector)[0]
    if any(leaf.tied for leaf in spec.leaves):  # what moves one name of a tensor moves them all
        gradient = selection.replace(gradient, spec, selection.carrying("gradient", gradient, spec))
    return loss, jnp.sum(chips * aim.code <= 0), gradient


def add_fingerprint_gradient(
    loss_fn: FingerprintLoss, spec: carriers.Spec, aim: Mark, weight: float = 1.0
) -> optax.GradientTransformation:
    """Adds ``weight`` times the gradient of the fingerprint loss to whatever gradient passes through.

    Chained before an optimiser, it marks a model while it is trained: in distributed training the owner applies it
    after aggregation, so that no party ever sees the carrier. The aim travels in the optimiser's state.

    Args:
      loss_fn: loss of soft chips and codeword, such as ``losses.sign_hinge``.
      spec: the carrying leaves.
      aim: what the model shall carry.
      weight: factor on the fingerprint's gradient.

    Returns:
      A transformation for ``optax.chain``.
    """

    def init(params: PyTree) -> optax.OptState:
        carriers.check_params("add_fingerprint_gradient", params, spec)
        return aim  # pyright: ignore[reportReturnType]  # optax types states too narrowly for a NamedTuple

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        _, _, gradient = _fingerprint_gradient(loss_fn, params, spec, state)
        return jax.tree.map(lambda u, g: u + weight * g, updates, gradient), state

    return optax.GradientTransformation(init, update)


class EmbedderState(NamedTuple):
    """What a trained embedding carries from step to step: the parameters, the optimiser's state, and the aim."""

    params: PyTree
    opt_state: optax.OptState
    aim: Mark


class EmbedderInfo(NamedTuple):
    """What a step of trained embedding shows: the fingerprint loss before it, and how many chips read wrong then."""

    loss: Float[Array, ""]
    bit_errors: Array


class Embedder(NamedTuple):
    """A trained embedding as a pair of pure functions.

    Attributes:
      init: ``init(params, aim) -> state``.
      update: ``update(state, spec, task_gradient=None) -> (state, info)``; ``spec`` is static under jit, and
        ``task_gradient``, a pytree like params, is added to the fingerprint's.
    """

    init: Callable[[PyTree, Mark], EmbedderState]
    update: Callable[..., tuple[EmbedderState, EmbedderInfo]]


def embedder(loss_fn: FingerprintLoss, optimizer: optax.GradientTransformation) -> Embedder:
    """Trained embedding of a codeword, by any fingerprint loss and any optax optimiser.

    Args:
      loss_fn: loss of soft chips and codeword, such as ``losses.sign_hinge``.
      optimizer: an optax optimiser; its learning rate is in the unit of the weights.

    Returns:
      The pair (init, update).

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from smark_jax import carriers, codes, embedding, keys, losses
      >>> base = {"kernel": jnp.sin(jnp.arange(10_000.0))}
      >>> spec = carriers.select(base)
      >>> carrier = carriers.draw(keys.from_bytes(bytes(32)), spec, num_chips=64)
      >>> word = codes.codebook(keys.from_bytes(bytes(32)), [7], num_chips=64)[0]
      >>> embedder = embedding.embedder(losses.sign_hinge, optax.adam(1e-3))
      >>> state = embedder.init(base, embedding.mark(base, spec, carrier, word))
      >>> update = jax.jit(embedder.update, static_argnames="spec")
      >>> for _ in range(20):
      ...     state, info = update(state, spec=spec)
      >>> int(info.bit_errors)
      0
    """

    def init(params: PyTree, aim: Mark) -> EmbedderState:
        return EmbedderState(params, optimizer.init(params), aim)

    def update(
        state: EmbedderState, spec: carriers.Spec, task_gradient: PyTree | None = None
    ) -> tuple[EmbedderState, EmbedderInfo]:
        loss, wrong, gradient = _fingerprint_gradient(loss_fn, state.params, spec, state.aim)
        if task_gradient is not None:
            gradient = jax.tree.map(jnp.add, gradient, task_gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return EmbedderState(params, opt_state, state.aim), EmbedderInfo(loss, wrong)

    return Embedder(init, update)
