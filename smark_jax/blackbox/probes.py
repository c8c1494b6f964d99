r"""Tracing a suspect that only answers: probe images on which each customer's copy gives answers of its own.

The owner derives m probe images from a key. Each names, by its own hash, one half of the classes; a customer's copy is
trained to answer probe i with a class of that half where :math:`b_i = 1`, and of the other half where :math:`b_i = -1`.
Labels alone then read as chips for :func:`smark_jax.tracing.trace`, whose bound on accusing the innocent holds as it
does for weights: probes, halves and answers say nothing about an innocent customer's codeword.

Every probe carries a payload: the SHA-256 commitment to the key and the probe's number. An owner who published the
commitment before sale cannot choose probes after a suspect has answered.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int, Num, UInt8

from smark_jax import _batches, _validate, keys
from smark_jax._types import AnyArray, ApplyFn, PyTree
from smark_jax.blackbox import payload

Predict = Callable[[np.ndarray], Any]
"""Images, uint8 [B, H, W, C], to class numbers [B]; or to scores [B, classes], of which the largest counts."""


def probes(
    key: keys.SecretKey,
    num_chips: int,
    shape: tuple[int, int, int],
    images: UInt8[AnyArray, "N H W C"] | None = None,
) -> UInt8[np.ndarray, "m H W C"]:
    """The probe images that ``key`` names.

    Args:
      key: of this model's probes.
      num_chips: m, one probe each.
      shape: (height, width, channels), at least 511 pixels.
      images: the owner's images, of that shape. Probes are then blends of two of them and pass for data; without them
        they are smooth random patterns, which an API that refuses odd inputs may notice.

    Returns:
      uint8 images, shape [m, H, W, C], each with its payload.

    Raises:
      ValueError: when images are of another shape or fewer than two, or as ``mark_images``.
    """
    _validate.positive("probes", "num_chips", num_chips)
    rng = np.random.default_rng(np.frombuffer(keys.derive(key, "probes").to_bytes(), np.uint32))
    if images is None:
        drawn = jnp.asarray(rng.normal(size=(num_chips, 4, 4, shape[2])), jnp.float32)
        smooth = np.asarray(jax.image.resize(drawn, (num_chips, *shape), "cubic"))
        blends = 127.5 + 60 * smooth
    else:
        images = np.asarray(images)
        if images.shape[1:] != tuple(shape) or len(images) < 2 or images.dtype != np.uint8:
            got = f"shape {images.shape}, dtype {images.dtype}"
            raise _validate.fail("probes", f"at least two uint8 images of shape {tuple(shape)}", got, "Resize them.")
        pairs = np.stack([rng.choice(len(images), 2, replace=False) for _ in range(num_chips)])
        blends = images[pairs].astype(np.float32).mean(axis=1)
    pixels = np.clip(np.round(blends), 0, 255).astype(np.uint8)
    return payload.mark_images(pixels, commitment_payloads(key, num_chips), key)


def commitment_payloads(key: keys.SecretKey, num_chips: int) -> Int[np.ndarray, "m 304"]:
    """What probes carry: the 256 bits of ``keys.commitment(key)``, then the probe's number in 48 bits."""
    digest = np.frombuffer(bytes.fromhex(keys.commitment(key)), np.uint8)
    numbers = np.arange(num_chips, dtype=">u8").view(np.uint8).reshape(num_chips, 8)[:, 2:]
    return np.unpackbits(np.concatenate([np.tile(digest, (num_chips, 1)), numbers], axis=1), axis=1)


def halves(probe_images: UInt8[AnyArray, "m H W C"], num_classes: int) -> Int[np.ndarray, "m classes"]:
    """The half of the classes that each probe names: +1 in it, -1 outside, drawn by the SHA-256 of its pixels."""
    if num_classes < 2:
        raise _validate.fail("halves", "at least two classes", str(num_classes), "Is num_classes set?")
    found = -np.ones((len(probe_images), num_classes), np.int8)
    for row, image in zip(found, np.asarray(probe_images), strict=True):
        rng = np.random.default_rng(list(hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()))
        row[rng.permutation(num_classes)[: num_classes // 2]] = 1
    return found


def query(
    predict: Predict,
    probe_images: UInt8[AnyArray, "m H W C"],
    num_classes: int,
    *,
    repeats: int = 1,
    batch_size: int = 64,
    answers: Path | None = None,
    on_answer: Callable[[int], None] = lambda count: None,
) -> Float[np.ndarray, " m"]:
    """Asks a suspect about every probe and reads the answers as chips.

    Args:
      predict: the suspect.
      probe_images: as :func:`probes` made them, shape [m, H, W, C].
      num_classes: of the suspect, as of the base.
      repeats: times that each probe is asked; more than once where answers are not deterministic.
      batch_size: probes in a call.
      answers: a file that keeps the answers already paid for; a query that failed half-way goes on from it.
      on_answer: called with the number of answers after each call: a progress bar.

    Returns:
      Chips, shape [m]: the mean over repeats of +1 for an answer inside the probe's half and -1 outside.

    Raises:
      ValueError: when answers are not one class number (or one row of scores) for each image, a class is out of range,
        or the file holds another query's answers.
    """
    for name, value in (("repeats", repeats), ("batch_size", batch_size)):
        _validate.positive("query", name, value)
    images = np.asarray(probe_images)
    sides = halves(images, num_classes)
    identity = {"probes": hashlib.sha256(images.tobytes()).hexdigest(), "num_classes": num_classes}
    labels = _kept(answers, identity)
    wanted = np.tile(np.arange(len(images)), repeats)
    while len(labels) < len(wanted):
        index = wanted[len(labels) : len(labels) + batch_size]
        labels += _labels(predict(images[index]), len(index), num_classes)
        if answers:
            answers.with_suffix(".new").write_text(json.dumps({**identity, "labels": labels}))
            answers.with_suffix(".new").replace(answers)
        on_answer(len(labels))
    asked = np.array(labels[: len(wanted)]).reshape(repeats, len(images))
    return np.take_along_axis(sides, asked.T, axis=1).mean(axis=1, dtype=np.float64)


def _kept(answers: Path | None, identity: dict[str, Any]) -> list[int]:
    if answers is None or not answers.exists():
        return []
    document = json.loads(answers.read_text())
    if {name: document.get(name) for name in identity} != identity:
        cause = "Name another file for this query, or remove that one."
        raise _validate.fail("query", f"answers to these probes in {answers}", "those to others", cause)
    return list(document["labels"])


def _labels(found: Any, count: int, num_classes: int) -> list[int]:
    found = np.asarray(found)
    if found.shape == (count, num_classes) and np.issubdtype(found.dtype, np.floating):
        found = found.argmax(axis=1)
    if found.shape != (count,) or not np.issubdtype(found.dtype, np.integer):
        expected = f"class numbers of shape ({count},), or scores of shape ({count}, {num_classes})"
        got = f"shape {found.shape}, dtype {found.dtype}"
        raise _validate.fail("query: predict", expected, got, "Does predict take a batch of images?")
    if found.min() < 0 or found.max() >= num_classes:
        got = f"{found.min()} to {found.max()}"
        raise _validate.fail("query: predict", f"classes of 0 to {num_classes - 1}", got, "Does it count from 1?")
    return found.tolist()


class Trained(NamedTuple):
    """What :func:`train_copies` returns.

    Attributes:
      params: the copies: leaves with a leading axis of K.
      agreement: share of probes that each answers as its codeword asks, shape [K].
    """

    params: PyTree
    agreement: Float[np.ndarray, " K"]


def train_copies(
    copies: PyTree,
    apply_fn: ApplyFn,
    images: Num[AnyArray, "N H W C"],
    labels: Int[AnyArray, " N"],
    probe_images: UInt8[AnyArray, "m H W C"],
    codes: Num[AnyArray, "K m"],
    num_classes: int,
    *,
    epochs: int = 4,
    batch_size: int = 64,
    probes_a_batch: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> Trained:
    r"""Teaches K copies at once to answer the probes, each by its own codeword.

    The loss of a copy is the task's cross-entropy plus :math:`-\log \sum_{c \in H_i} p(c)` over the probes of the
    batch, :math:`H_i` the half that the codeword's chip names: any class of the half will do, and the copy takes the
    one that comes easiest. Copies that carry a fingerprint in their weights keep it, as after any fine-tuning. The K
    copies are trained under vmap, and where ``copies`` lie on several devices, there.

    Args:
      copies: leaves with a leading axis of K, as ``embedding.embed_batch`` returns.
      apply_fn: ``apply_fn(params, images) -> logits``.
      images: training images, shape [N, H, W, C].
      labels: class numbers, shape [N].
      probe_images: shape [m, H, W, C].
      codes: codewords in {-1, +1}, shape [K, m].
      num_classes: length of the logits.
      epochs: passes over the images.
      batch_size: images in a step.
      probes_a_batch: probes in a step.
      learning_rate: Adam's at first; it falls to zero along a half cosine.
      seed: of the shuffles.
      on_step: called after each step.

    Raises:
      ValueError: when the codes are not one row for each copy and one column for each probe.
    """
    count = _validate.stacked("train_copies", "copies", copies)
    probe_images = np.asarray(probe_images)
    if np.shape(codes) != (count, len(probe_images)):
        expected = f"codes of shape ({count}, {len(probe_images)}): copies by probes"
        raise _validate.fail("train_copies", expected, f"shape {np.shape(codes)}", "Do K and m agree?")
    sides = halves(probe_images, num_classes)
    steps = epochs * (len(images) // batch_size)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, max(1, steps)))

    def loss(params: PyTree, x: Array, y: Array, p: Array, allowed: Array) -> Array:
        logits = apply_fn(params, jnp.concatenate([x, p]))
        task = optax.softmax_cross_entropy_with_integer_labels(logits[: len(x)], y).mean()
        log_p = jax.nn.log_softmax(logits[len(x) :])
        return task - jax.nn.logsumexp(jnp.where(allowed, log_p, -jnp.inf), axis=-1).mean()

    @jax.jit
    def step(params: PyTree, state: Any, x: Array, y: Array, p: Array, allowed: Array) -> tuple[PyTree, Any]:
        gradient = jax.vmap(jax.grad(loss), (0, None, None, None, 0))(params, x, y, p, allowed)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    codes = np.asarray(codes)
    rng, state = np.random.default_rng(seed), optimizer.init(copies)
    for _ in range(epochs):
        for index in _batches.shuffled(rng, len(images), batch_size):
            asked = rng.choice(len(probe_images), min(probes_a_batch, len(probe_images)), replace=False)
            allowed = sides[None, asked] == codes[:, asked, None]
            copies, state = step(copies, state, images[index], labels[index], probe_images[asked], allowed)
            on_step()
    answers = np.asarray(_answers(apply_fn, copies, jnp.asarray(probe_images)))
    chips = sides[np.arange(len(probe_images)), answers]
    return Trained(copies, (chips == codes).mean(axis=1))


@functools.partial(jax.jit, static_argnums=0)
def _answers(apply_fn: ApplyFn, copies: PyTree, images: Array) -> Array:
    return jax.lax.map(lambda params: apply_fn(params, images).argmax(axis=-1), copies)
