r"""Copies in closed form: ``w + delta * spread(word, mark)``.

With :math:`\delta = \text{strength} \sqrt{D' / m}`, where D' is the number of coordinates that the carrier covers, the
RMS change of a coordinate is ``strength`` times its scale: the RMS of its leaf for a white mark, the shape's for a
shaped one. The read-out of an intact copy is ``delta * word``.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from smark_jax import _trees, _validate, carriers
from smark_jax._types import AnyArray, PyTree
from smark_jax.carriers import marks, selection, shapes, sharded


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
    check_word("embed", mark, word)
    where = sharded.layout("embed", base, mark.spec)
    if where is None:
        leaves = selection.narrow("embed", base, mark.spec)
        changed, ok, signs = _embed(leaves, mark, jnp.asarray(word), strength)
        copy = selection.replace(base, mark.spec, changed)
        ok = _wide_too(ok, base, mark.spec)
    else:
        copy = sharded.add_spread(base, mark, where, word, _delta(mark, strength))
        ok, signs = _finite(copy, mark.spec), jnp.all(jnp.abs(jnp.asarray(word)) == 1)
    verify("embed", ok, signs)
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
    verify("embed_batch", _wide_too(ok, base, mark.spec), signs)
    marked = {name for leaf in mark.spec.leaves for name in (leaf.path, *leaf.tied)}
    repeated = lambda leaf: _repeated(leaf, jnp.shape(words)[0])  # noqa: E731
    copies = selection.replace(base, mark.spec, changed)
    return _trees.map_named(lambda name, leaf: leaf if name in marked else repeated(leaf), copies)


def _repeated(leaf: Any, times: int) -> Any:
    """A leaf repeated for each copy; a NumPy leaf is broadcast without copying."""
    xp = jnp if isinstance(leaf, jax.Array) else np
    return xp.broadcast_to(leaf, (times, *np.shape(leaf)))


def _check(who: str, base: PyTree, mark: carriers.Mark, strength: float | Array) -> None:
    marks.check(who, mark, base)
    _validate.finite_number(who, "strength", strength)  # pyright: ignore[reportArgumentType]  # or traced


def check_word(who: str, mark: carriers.Mark, word: Num[AnyArray, " m"]) -> None:
    """Refuses a codeword of another length than the mark has chips."""
    cause = "Was the codeword made with another num_chips than the mark?"
    _validate.vector(who, "word", word, mark.num_chips, cause)


def verify(who: str, finite: Any, signs: Array) -> None:
    """Refuses weights that are not finite and codewords of other entries than -1 and +1, unless they are traced."""
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


def _embed(
    leaves: list[Any], mark: carriers.Mark, word: Array, strength: Array | float
) -> tuple[list[Array], Array, Array]:
    vector, signs = _vector(mark, word, strength)
    if mark.shape is None:
        return *_add(leaves, vector, mark.spec), signs
    changed, ok, start = [], [], 0
    counts = shapes.kept(mark.shape, mark.carrier.num_weights)
    for x, (leaf, one), count in zip(leaves, mark.shape, counts, strict=True):
        copy, finite = _add_to_leaf(x, vector, start, one, shapes.unnamed(leaf), count)
        changed.append(copy)
        ok.append(finite)
        start += count
    return changed, jnp.stack(ok).all(), signs


@jax.jit
def _vector(mark: carriers.Mark, word: Array, strength: Array | float) -> tuple[Array, Array]:
    """The change in the mark's coordinates, and whether the word is of -1 and +1."""
    return _delta(mark, strength) * carriers.spread(word, mark), jnp.all(jnp.abs(word) == 1)


@jax.jit
def _add(leaves: list[Any], vector: Array, spec: carriers.Spec) -> tuple[list[Array], Array]:
    changed = selection.add(leaves, selection.changes(vector, spec))
    # The check is on the copy, so that it also catches a strength that overflows a narrow dtype.
    return changed, jnp.stack([jnp.isfinite(leaf).all() for leaf in changed]).all()


# Compiled for each shape of a leaf, as in extraction: one program for all leaves takes more memory to compile.
@functools.partial(jax.jit, static_argnames=("leaf", "count"))
def _add_to_leaf(
    x: Any, vector: Array, start: int, one: carriers.Scales, leaf: carriers.Leaf, count: int
) -> tuple[Array, Array]:
    (copy,) = selection.add([x], [shapes.change(vector, start, count, leaf, one)])
    return copy, jnp.isfinite(copy).all()


@jax.jit
def _embed_batch(
    leaves: list[Any], mark: carriers.Mark, words: Array, strength: Array | float
) -> tuple[list[Array], Array, Array]:
    # One after the other: all at once would take three times the memory, fall out of cache between the transform's
    # factors, and make the rounding depend on the number of copies.
    copies, ok, signs = jax.lax.map(lambda word: _embed(leaves, mark, word, strength), words)
    return copies, ok.all(), signs.all()
