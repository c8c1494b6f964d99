r"""Tracing a suspect by its answers alone: probe images on which each customer's copy answers differently.

The owner derives m probe images from a key. The hash of each image selects one half of the classes; a customer's copy
is trained to answer probe i with a class of that half where :math:`b_i = 1`, and of the other where :math:`b_i = -1`.
The answered classes alone then give chips for :func:`smark_jax.tracing.trace`. Its bound on false accusation holds as
it does for weights: probes, halves and answers say nothing about an innocent customer's codeword.

On good probes the base itself is undecided between the halves: a copy then needs only a slight push, which costs little
accuracy, and further training has no reason to undo it.

Every probe carries a payload: the SHA-256 commitment to the key and the probe's number. An owner who published the
commitment before sale cannot choose probes after a suspect has answered.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Num, UInt8

from smark_jax import _batches, _trees, _validate, carriers, keys
from smark_jax._types import AnyArray, ApplyFn, PyTree
from smark_jax.blackbox import payload

if TYPE_CHECKING:
    import optax

    from smark_jax import training

_IMAGES_PER_PASS = 256


def probes(
    key: keys.SecretKey,
    num_chips: int,
    shape: tuple[int, int, int],
    images: UInt8[AnyArray, "N H W C"] | None = None,
    scores: Callable[[np.ndarray], Any] | None = None,
    candidates: int = 32,
) -> UInt8[np.ndarray, "m H W C"]:
    """The probe images derived from ``key``.

    Args:
      key: of this model's probes.
      num_chips: m, with one probe per chip.
      shape: (height, width, channels), at least 511 pixels.
      images: the owner's images, of that shape. Probes are then blends of two of them and look like data; without them
        they are smooth random patterns, which an API that filters odd inputs may detect.
      scores: the base's logits for images, ``scores(uint8 [B, H, W, C]) -> [B, classes]``. The probes are then the
        candidates on whose halves the base is most evenly divided; by default, they are the first m.
      candidates: the number per probe, used with ``scores``. With more of them the base is more evenly divided, so that
        copies need a smaller push and keep more accuracy; each candidate is made and scored once.

    Returns:
      uint8 images, shape [m, H, W, C], each with its payload.

    Raises:
      SmarkError: when images are of another shape or fewer than two, scores are not one row for each image, or as
        ``mark_images``.
    """
    _validate.positive("probes", "num_chips", num_chips)
    _validate.positive("probes", "candidates", candidates)
    rng = np.random.default_rng(np.frombuffer(keys.derive(key, "probes").to_bytes(), np.uint32))
    count = num_chips * (candidates if scores else 1)
    if images is not None:
        images = np.asarray(images)
        if images.shape[1:] != tuple(shape) or len(images) < 2 or images.dtype != np.uint8:
            got = f"shape {images.shape}, dtype {images.dtype}"
            cause = "Probes are blends of two images: give two or more, all of this size."
            raise _validate.fail("probes", f"at least two uint8 images of shape {tuple(shape)}", got, cause)
    unmarked = _patterns(rng, count, shape) if images is None else _blends(rng, count, images)
    payloads = commitment_payloads(key, count)

    def made(numbers: np.ndarray) -> np.ndarray:
        """The candidates with these numbers."""
        pixels = np.clip(np.round(unmarked(numbers)), 0, 255).astype(np.uint8)
        return payload.mark_images(pixels, payloads[numbers], key)

    numbers = np.arange(count)
    if scores:
        blocks = [numbers[i : i + _IMAGES_PER_PASS] for i in range(0, count, _IMAGES_PER_PASS)]
        uneven = np.concatenate([_uneven(made(block), scores) for block in blocks])
        numbers = np.sort(np.argsort(uneven, kind="stable")[:num_chips])
    return made(numbers)


def _patterns(rng: np.random.Generator, count: int, shape: tuple[int, int, int]) -> Callable[[np.ndarray], np.ndarray]:
    """Smooth random patterns by number."""
    drawn = rng.normal(size=(count, 4, 4, shape[2])).astype(np.float32)
    return lambda some: 127.5 + 60 * np.asarray(jax.image.resize(drawn[some], (len(some), *shape), "cubic"))


def _blends(rng: np.random.Generator, count: int, images: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Means of two images by number."""
    pairs = np.stack([rng.choice(len(images), 2, replace=False) for _ in range(count)])
    return lambda some: images[pairs[some]].mean(axis=1, dtype=np.float32)


def _uneven(candidates: np.ndarray, scores: Callable[[np.ndarray], Any]) -> np.ndarray:
    """How unevenly the base divides its probability between the halves: the logarithm of their ratio."""
    logits = np.asarray(scores(candidates), np.float64)
    if logits.ndim != 2 or len(logits) != len(candidates):
        got = f"shape {logits.shape}"
        raise _validate.fail("probes: scores", f"logits of shape ({len(candidates)}, classes)", got, "Pass the logits.")
    sides = halves(candidates, logits.shape[1])
    inside, outside = (np.logaddexp.reduce(logits, axis=1, where=sides == side, initial=-np.inf) for side in (1, -1))
    return np.abs(inside - outside)


def commitment_payloads(key: keys.SecretKey, count: int) -> Int[np.ndarray, "n 304"]:
    """The candidates' payloads: the 256 bits of ``keys.commitment(key)``, then the candidate's number in 48 bits."""
    digest = np.frombuffer(bytes.fromhex(keys.commitment(key)), np.uint8)
    numbers = np.arange(count, dtype=">u8").view(np.uint8).reshape(count, 8)[:, 2:]
    return np.unpackbits(np.concatenate([np.tile(digest, (count, 1)), numbers], axis=1), axis=1)


def halves(probe_images: UInt8[AnyArray, "m H W C"], num_classes: int) -> Int[np.ndarray, "m classes"]:
    """The half of the classes that the SHA-256 of each probe's pixels selects: +1 inside it, -1 outside."""
    if num_classes < 2:
        raise _validate.fail("halves", "at least two classes", str(num_classes), "Is num_classes set?")
    found = -np.ones((len(probe_images), num_classes), np.int8)
    for row, image in zip(found, np.asarray(probe_images), strict=True):
        digest = hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()
        rng = np.random.default_rng(np.frombuffer(digest, np.uint8).astype(np.uint32))
        row[rng.permutation(num_classes)[: num_classes // 2]] = 1
    return found


class Trained(NamedTuple):
    """The result of :func:`train_copies`.

    Attributes:
      params: the copies: leaves with a leading axis of K.
      agreement: share of probes that each copy answers as its codeword demands, shape [K].
    """

    params: PyTree
    agreement: Float[np.ndarray, " K"]


def train_copies(
    copies: PyTree,
    base: PyTree,
    apply_fn: ApplyFn,
    images: UInt8[AnyArray, "N H W C"],
    probe_images: UInt8[AnyArray, "m H W C"],
    codes: Num[AnyArray, "K m"],
    num_classes: int,
    *,
    epochs: int = 4,
    batch_size: int = 64,
    probes_per_batch: int = 64,
    probe_weight: float = 0.1,
    learning_rate: float = 1e-3,
    seed: int = 0,
    at_once: int = 1,
    on_progress: "training.OnProgress | None" = None,
) -> Trained:
    r"""Trains K copies at once to answer each probe by their own codewords, and everything else as the base does.

    The loss of a copy is the cross-entropy between the base's probabilities and its own on images (no labels are
    needed), plus ``probe_weight`` times the mean of :math:`-\log \sum_{c \in H_i} p(c)` over the probes of the batch,
    where :math:`H_i` is the half that the codeword's chip selects: any class of the half will do, and the copy learns
    the easiest one. A large weight learns faster and costs accuracy. Copies that carry a fingerprint in their weights
    keep it, as after any fine-tuning. ``at_once`` copies are trained together under vmap. Where the leaves of
    ``copies`` are sharded over devices along their leading axis and all are trained at once, they are trained on those
    devices. Use many at once on accelerators. On a CPU, convolutions whose kernels differ by copy are slow, and one at
    a time is two to three times faster. Running statistics, counters and other leaves without gradients stay as they
    are.

    Args:
      copies: leaves with a leading axis of K, as ``embedding.embed_batch`` returns.
      base: the model that the copies were made from.
      apply_fn: ``apply_fn(params, images) -> logits``.
      images: training images, shape [N, H, W, C], uint8 as the probes are.
      probe_images: shape [m, H, W, C].
      codes: codewords in {-1, +1}, shape [K, m].
      num_classes: length of the logits.
      epochs: passes over the images.
      batch_size: images per step, at most N.
      probes_per_batch: probes per step.
      probe_weight: weight of the probes' loss relative to that of the images.
      learning_rate: Adam's at the start; it falls to zero along a half cosine.
      seed: of the shuffles, the same for all copies.
      at_once: copies trained together.
      on_progress: called after each step of ``at_once`` copies with the steps done, the total number, and the loss.

    Raises:
      SmarkError: when the codes are not one row for each copy and one column for each probe, images are not of the
        probes' shape and dtype, or a batch is larger than the number of images.
    """
    from smark_jax import training  # with optax; here and not above, since tracing and issuing load this module

    count = _validate.stacked("train_copies", "copies", copies)
    probe_images = np.asarray(probe_images)
    if np.shape(codes) != (count, len(probe_images)):
        expected = f"codes of shape ({count}, {len(probe_images)}): copies by probes"
        raise _validate.fail("train_copies", expected, f"shape {np.shape(codes)}", "Do K and m agree?")
    images, codes = np.asarray(images), np.asarray(codes)
    if images.dtype != probe_images.dtype or images.shape[1:] != probe_images.shape[1:]:
        expected = f"images of shape {probe_images.shape[1:]} and dtype {probe_images.dtype}, as the probes are"
        got = f"shape {images.shape[1:]}, dtype {images.dtype}"
        cause = "Scale pixels inside apply_fn, not before."
        desk = "The function that --teach names returns images as the probes are; the network scales their pixels."
        raise _validate.fail("train_copies", expected, got, cause, desk=desk)
    _validate.positive("train_copies", "at_once", at_once)
    if not 1 <= batch_size <= len(images):
        cause = "Take smaller batches."
        raise _validate.fail("train_copies", f"a batch_size of 1 to {len(images)}", str(batch_size), cause)
    sides = halves(probe_images, num_classes)
    wanted = _batches.apply(functools.partial(_probabilities, apply_fn, base), _IMAGES_PER_PASS, images)
    steps = training.num_batches(len(images), batch_size, epochs)
    loss_fn, optimizer = _task(apply_fn, probe_weight), _adam(learning_rate, max(steps, 1))
    still = _still(base)

    def drawn(codes: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        """Per step: images with the base's probabilities, and probes with the classes that each copy may answer."""
        rng = np.random.default_rng(seed)
        for _ in range(epochs):
            for index in _batches.shuffled(rng, len(images), batch_size):
                asked = rng.choice(len(probe_images), min(probes_per_batch, len(probe_images)), replace=False)
                yield images[index], wanted[index], probe_images[asked], sides[None, asked] == codes[:, asked, None]

    report = on_progress or (lambda done, total, loss: None)

    def teach(first: int) -> PyTree:
        some = jax.tree.map(lambda x: x[first : first + at_once], copies) if at_once < count else copies
        moving = jax.tree.map(lambda kept, copy: copy if kept is None else None, still, some, is_leaf=_is_none)

        def on_step(done: int, total: int, loss: Array) -> None:
            jax.block_until_ready(loss)  # otherwise the progress bar would run ahead of the work
            report(first // at_once * steps + done, -(-count // at_once) * steps, loss)

        state, _ = training.minimise(
            loss_fn,
            optimizer,
            training.begin(moving, optimizer),
            drawn(codes[first : first + at_once]),
            arguments=(still,),
            on_progress=on_progress and on_step,
        )
        return _trees.join(state.params, some)

    groups = [teach(first) for first in range(0, count, at_once)]
    copies = jax.tree.map(lambda *parts: jnp.concatenate(parts), *groups) if len(groups) > 1 else groups[0]
    each = (jax.tree.map(lambda x, k=k: x[k], copies) for k in range(count))
    answers = np.stack([np.asarray(_probabilities(apply_fn, copy, probe_images)).argmax(axis=-1) for copy in each])
    chips = sides[np.arange(len(probe_images)), answers]
    return Trained(copies, (chips == codes).mean(axis=1))


def _still(base: PyTree) -> PyTree:
    """The leaves that gradients do not move; None in place of the others."""
    roles = carriers.roles(base)
    moves = lambda name, leaf: roles[name].trains and jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    return _trees.map_named(lambda name, leaf: None if moves(name, leaf) else leaf, base)


def _is_none(value: Any) -> bool:
    return value is None


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(apply_fn: ApplyFn, params: PyTree, images: Array) -> Array:
    return jax.nn.softmax(apply_fn(params, images).astype(jnp.float32))


# Cached per network, so that a step is compiled only once, even when copies are trained one after the other.
@functools.lru_cache(maxsize=8)
def _task(apply_fn: ApplyFn, probe_weight: float) -> Callable[..., Array]:
    """The sum of the copies' losses: each copy has its own parameters, and so its own gradient."""

    def of_copy(params: PyTree, allowed: Array, shown: Array, wanted: Array, still: PyTree) -> Array:
        log_p = jax.nn.log_softmax(apply_fn(_trees.join(params, still), shown).astype(jnp.float32))
        of_images, of_probes = log_p[: len(wanted)], log_p[len(wanted) :]
        task = -jnp.sum(wanted * of_images, axis=-1).mean()
        return task - probe_weight * jax.nn.logsumexp(of_probes, axis=-1, where=allowed).mean()

    def loss(copies: PyTree, images: Array, wanted: Array, probes: Array, allowed: Array, still: PyTree) -> Array:
        shown = jnp.concatenate([images, probes])
        return jnp.sum(jax.vmap(of_copy, in_axes=(0, 0, None, None, None))(copies, allowed, shown, wanted, still))

    return loss


@functools.lru_cache(maxsize=8)
def _adam(learning_rate: float, steps: int) -> "optax.GradientTransformation":
    import optax

    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
