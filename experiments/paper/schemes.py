"""Other authors' fingerprints, in JAX, and ours: each embeds a copy for a customer, reads a suspect, and accuses.

======================= ============================ ======================= ==================================
scheme                  where                        what it minimises       whom it accuses
======================= ============================ ======================= ==================================
Uchida et al. 2017      mean of a kernel over its    cross-entropy of the    whose message agrees too well for
(arXiv 1701.04082)      outputs, dense projection    projected bits          chance: binomial, corrected for N
DeepMarks 2019          the same                     squared distance from   the published AND of a BIBD code,
(arXiv 1804.03648)                                   the BIBD codeword       hard threshold
FedTracker-like         scales of norm layers, a     hinge on the signs      as the first
(arXiv 2211.07160)      projection for each client
ours                    all weights, closed form     -                       joint decoding, proved bound
======================= ============================ ======================= ==================================

The first three train the copy further with the task's loss, for the same number of epochs. Uchida and DeepMarks add
their own loss to it; FedTracker's server sets the scales before each epoch and at the end. The original FedTracker
names the best match, and so always accuses somebody; the binomial test used here favours it where nobody should be
accused.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from scipy import stats

from experiments.common import comparators
from experiments.common.networks import Subject
from experiments.paper import common
from smark_jax import (
    _validate,
    alignment,
    carriers,
    codes,
    embedding,
    errors,
    extraction,
    keys,
    losses,
    parallel,
    tracing,
    training,
)

Params = Any
Aim = dict[str, Array]
_MARGIN = 0.1  # margin of FedTracker's hinge
_MOST_SIGNING_STEPS = 500


class Scheme(NamedTuple):
    """One method with its settings, for one base model.

    Attributes:
      embed: ``embed(serial, seed) -> params``.
      bit_errors: ``bit_errors(params, serial) -> (wrong, bits)``.
      accuse: ``accuse(params) -> serials``.
    """

    embed: Callable[[int, int], Params]
    bit_errors: Callable[[Params, int], tuple[int, int]]
    accuse: Callable[[Params], set[int]]


class World(NamedTuple):
    """What all schemes of one seed share.

    Attributes:
      subject: the base model and the data.
      train_on: ``train_on(loss)`` gives the training that embeds by a loss.
      customers: N.
      order: of the plane behind the BIBD code.
      epochs: of training that embeds.
      key: secret of this seed.
      image: a few images, for alignment.
    """

    subject: Subject
    train_on: Callable[[Callable[..., Array]], Callable[..., Params]]
    customers: int
    order: int
    epochs: int
    key: keys.SecretKey
    image: np.ndarray


def trainer(apply_fn: Callable, loss: Callable[[Params, Aim], Array]) -> Callable[..., Params]:
    """Fine-tuning by Adam at 1e-3 in batches of 64, as ``attacks.fine_tune``, plus ``weight * loss(params, aim)``.

    The aim is an argument: one compilation serves all copies.
    """
    optimizer = optax.adam(1e-3)

    def total(params: Params, x: Array, y: Array, weight: Array, aim: Aim) -> Array:
        return parallel.cross_entropy(apply_fn(params, x), y) + weight * loss(params, aim)

    def run(
        params: Params, images: np.ndarray, labels: np.ndarray, epochs: int, seed: int, weight: float, aim: Aim
    ) -> Params:
        size = min(64, len(images))
        batches = training.minibatches((images, labels), batch_size=size, epochs=epochs, seed=seed)
        arguments = (jnp.float32(weight), aim)
        return training.minimise(total, optimizer, training.begin(params, optimizer), batches, arguments=arguments)[
            0
        ].params

    return run


def kernel_mean(params: Params) -> Array:
    """The carrier of Uchida and DeepMarks: the convolution with most inputs, averaged over its outputs, flat."""
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 4]
    return max(kernels, key=lambda leaf: leaf[..., 0].size).mean(axis=-1).reshape(-1)


def scales(params: Params) -> Array:
    """FedTracker's carrier: the scales of all norm layers."""
    named = jax.tree_util.tree_leaves_with_path(params)
    found = [leaf for path, leaf in named if jax.tree_util.keystr(path).endswith("['scale']")]
    if not found:
        cause = "FedTracker marks the scales of norms, and this network has none."
        raise _validate.fail("schemes.scales", "a network with norm layers", "no leaf named 'scale'", cause)
    return jnp.concatenate([leaf.reshape(-1) for leaf in found])


def uchida_loss(params: Params, aim: Aim) -> Array:
    """Mean cross-entropy of the message's bits, the projected carrier being their logits."""
    return losses.bit_cross_entropy(aim["projection"] @ kernel_mean(params), aim["code"])


def deepmarks_loss(params: Params, aim: Aim) -> Array:
    """Mean squared distance of the projected carrier from the codeword."""
    return losses.code_mse(aim["projection"] @ kernel_mean(params), aim["code"])


def fedtracker_loss(params: Params, aim: Aim) -> Array:
    """Mean hinge of the signs of the projected scales."""
    return losses.sign_hinge(aim["projection"] @ scales(params), aim["code"], _MARGIN)


def improbable(read: np.ndarray, words: np.ndarray, alpha: float) -> set[int]:
    """Whose words agree with the bits read in more places than alpha allows among N fair words.

    Args:
      read: numbers whose signs are the bits; one row for all customers, shape [m], or one for each, shape [N, m].
      words: of -1 and +1, shape [N, m].
      alpha: corrected for N (Bonferroni).
    """
    agree = (np.sign(read) == words).sum(axis=-1)
    return set(np.flatnonzero(stats.binom.sf(agree - 1, words.shape[1], 0.5) * len(words) <= alpha).tolist())


def _rng(key: keys.SecretKey, *names: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(keys.derive(key, *names).to_bytes()))


def _signs(key: keys.SecretKey, customers: int, bits: int) -> np.ndarray:
    return np.asarray(codes.codebook(keys.derive(key, "code"), range(customers), bits))


def _trained(
    world: World, train: Callable[..., Params], weight: float, aim: Callable[[int], Aim]
) -> Callable[[int, int], Params]:
    def embed(serial: int, seed: int) -> Params:
        subject = world.subject
        copy = train(subject.base, subject.images, subject.labels, world.epochs, seed, weight, aim(serial))
        return jax.block_until_ready(copy)

    return embed


def uchida(world: World, settings: Mapping[str, Any]) -> Scheme:
    """Settings: ``bits`` and ``weight`` of the regulariser."""
    key, bits = keys.derive(world.key, "uchida"), settings["bits"]
    words = _signs(key, world.customers, bits)
    size = kernel_mean(world.subject.base).size
    projection = jnp.asarray(_rng(key, "projection").normal(size=(bits, size)), jnp.float32)

    def read(params: Params) -> np.ndarray:
        return np.asarray(projection @ kernel_mean(params))

    return Scheme(
        _trained(
            world,
            world.train_on(uchida_loss),
            settings["weight"],
            lambda serial: {"projection": projection, "code": jnp.asarray(words[serial], jnp.float32)},
        ),
        lambda params, serial: (int((np.sign(read(params)) != words[serial]).sum()), bits),
        lambda params: improbable(read(params), words, common.ALPHA),
    )


def deepmarks(world: World, settings: Mapping[str, Any]) -> Scheme:
    """Settings: ``weight`` of the regulariser, ``colluders`` for whom the threshold stands."""
    key = keys.derive(world.key, "deepmarks")
    code = comparators.bibd("projective", world.order, num_customers=world.customers, colluders=settings["colluders"])
    bits, size = code.words.shape[1], kernel_mean(world.subject.base).size
    projection = jnp.asarray(_rng(key, "projection").normal(size=(bits, size)), jnp.float32)

    def read(params: Params) -> np.ndarray:
        return np.asarray(projection @ kernel_mean(params), np.float64)

    return Scheme(
        _trained(
            world,
            world.train_on(deepmarks_loss),
            settings["weight"],
            lambda serial: {"projection": projection, "code": jnp.asarray(code.words[serial], jnp.float32)},
        ),
        lambda params, serial: (int((np.sign(read(params)) != code.words[serial]).sum()), bits),
        lambda params: {accusation.serial for accusation in code.trace(read(params), common.ALPHA).accused},
    )


def sign(params: Params, rate: float, aim: Aim) -> Params:
    """FedTracker's embedding at the server: Adam on the scales alone, without data, until every sign is right."""
    return _sign(params, jnp.float32(rate), aim)


@jax.jit
def _sign(params: Params, rate: Array, aim: Aim) -> Params:
    optimizer = optax.scale_by_adam()

    def step(carried: tuple[Params, Any, Array]) -> tuple[Params, Any, Array]:
        params, state, done = carried
        updates, state = optimizer.update(jax.grad(fedtracker_loss)(params, aim), state)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), state, done + 1

    def unfinished(carried: tuple[Params, Any, Array]) -> Array:
        return (fedtracker_loss(carried[0], aim) > 0) & (carried[2] < _MOST_SIGNING_STEPS)

    return jax.lax.while_loop(unfinished, step, (params, optimizer.init(params), jnp.int32(0)))[0]


def fedtracker(world: World, settings: Mapping[str, Any]) -> Scheme:
    """Settings: ``bits`` and ``rate`` of the embedding, which comes before each epoch of training and at the end."""
    key, bits = keys.derive(world.key, "fedtracker"), settings["bits"]
    words = _signs(key, world.customers, bits)
    size = scales(world.subject.base).size
    projections = _rng(key, "projections").normal(size=(world.customers, bits, size)).astype(np.float32)

    def aim(serial: int) -> Aim:
        return {"projection": jnp.asarray(projections[serial]), "code": jnp.asarray(words[serial], jnp.float32)}

    def wrong(params: Params, serial: int) -> tuple[int, int]:
        return int((np.sign(projections[serial] @ np.asarray(scales(params))) != words[serial]).sum()), bits

    def embed(serial: int, seed: int) -> Params:
        subject, copy, wanted = world.subject, world.subject.base, aim(serial)
        for epoch in range(world.epochs):
            copy = sign(copy, settings["rate"], wanted)
            copy = world.train_on(no_loss)(copy, subject.images, subject.labels, 1, seed + epoch, 0, {})
        return jax.block_until_ready(sign(copy, settings["rate"], wanted))

    return Scheme(
        embed,
        wrong,
        lambda params: improbable(projections @ np.asarray(scales(params)), words, common.ALPHA),
    )


def ours(world: World, settings: Mapping[str, Any]) -> Scheme:
    """Settings: ``strength``. A suspect is aligned to the base, then read with ``rectify``, whatever it is."""
    key, bits, base = keys.derive(world.key, "ours"), settings["bits"], world.subject.base
    mark = carriers.mark(keys.derive(key, "carrier"), base, bits)
    words = _signs(key, world.customers, bits)

    def read(params: Params) -> np.ndarray:
        chips = extraction.extract(aligned(params, world), base, mark, rectify=True)
        return np.asarray(chips, np.float64)

    return Scheme(
        lambda serial, seed: jax.block_until_ready(embedding.embed(base, mark, words[serial], settings["strength"])),
        lambda params, serial: (int((np.sign(read(params)) != words[serial]).sum()), bits),
        lambda params: {accusation.serial for accusation in tracing.trace(read(params), words, common.ALPHA).accused},
    )


def aligned(params: Params, world: World) -> Params:
    """The suspect with its neurons in the base's order, as far as they can be recognised."""
    try:
        return alignment.align(params, world.subject.base, world.subject.apply_fn, world.image).params
    except (errors.NothingMatched, errors.Undecided) as error:
        return error.attempt.params if error.attempt else params


def without_mark(world: World) -> Callable[[int], Params]:
    """The control: the same training, and nothing embedded."""
    train = world.train_on(no_loss)
    return lambda seed: train(world.subject.base, world.subject.images, world.subject.labels, world.epochs, seed, 0, {})


def no_loss(params: Params, aim: Aim) -> Array:
    return jnp.float32(0)


def trainers(apply_fn: Callable) -> Callable[[Callable[..., Array]], Callable[..., Params]]:
    """:func:`trainer` of each loss, made once."""
    return functools.cache(lambda loss: trainer(apply_fn, loss))
