"""Embedding by training: the gradient of a fingerprint loss is added to that of the task."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from smark_jax import _trees, _validate, carriers
from smark_jax._types import AnyArray, PyTree
from smark_jax.carriers import hadamard, marks, selection
from smark_jax.embedding import copies

if TYPE_CHECKING:
    import optax

FingerprintLoss = Callable[[Array, Array], Array]
"""``loss(chips [m], word [m]) -> scalar``, such as those in :mod:`smark_jax.losses`."""


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
    weight: "float | Array | optax.Schedule" = 1.0,
) -> "optax.GradientTransformation":
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
    import optax  # here and not above: no copy that is made or traced in closed form needs it

    who, spec = "add_fingerprint_gradient", mark.spec
    copies.check_word(who, mark, word)
    copies.verify(who, True, jnp.all(jnp.abs(jnp.asarray(word)) == 1))

    def init(params: PyTree) -> Any:
        marks.check(who, mark, params)
        weights = carriers.coordinates(params, mark)
        copies.verify(who, jnp.isfinite(weights).all(), jnp.asarray(True))
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
