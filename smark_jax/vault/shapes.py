"""The shape of a model's mark: made and measured when the model is added, then kept in a file named by its digest.

A shape follows from the base and public images, never from a codeword, and is fixed before the first copy: commitments
bind its digest and the strength. An arbiter needs the same file, which lies beside a bundle of evidence.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smark_jax import _io, _validate, carriers, embedding, errors, files, keys
from smark_jax.carriers import marks
from smark_jax.carriers.shapes import is_vector
from smark_jax.vault import documents, trials, versions

FEWEST_IMAGES = 48
"""A third of them makes the shape, and the others measure the strength."""
# More change little: a shape takes 64 passes of one image, and the agreement of 256 is known to a percent or two.
_MOST_OF_SHAPE, _MOST_OF_STRENGTH = 64, 256


class Made(NamedTuple):
    """A new model's shape and strength, and what copies of that strength cost.

    Attributes:
      shape: how far each coordinate moves.
      strength: of copies.
      images: the number of images that the shape was made from, the first of those given; 0 without images.
      tried: the number of other images that copies were run on.
      measured: what copies cost on those, in the mean of a few with throw-away codewords; None without a network.
      worst: of those copies, the worst value of each cost.
    """

    shape: carriers.Shape
    strength: float
    images: int = 0
    tried: int = 0
    measured: embedding.Measured | None = None
    worst: embedding.Cost | None = None

    @property
    def document(self) -> documents.Shape:
        """What the vault stores of it."""
        change = self.measured.cost.change if self.measured else math.nan
        return documents.Shape(self.shape.digest(), self.images, change if math.isfinite(change) else None)


def from_weights(leaves: Mapping[str, np.ndarray], spec: carriers.Spec, strength: float | None = None) -> Made:
    """The default for a model that nobody can run: shape and strength from the weights alone, and no measurement.

    Args:
      leaves: the base.
      spec: the leaves that may carry.
      strength: another one than the default.
    """
    shape = carriers.shape(files.nest(leaves), match=_among(spec))
    return Made(shape, marks.SHAPED if strength is None else strength)


def from_network(
    key: keys.SecretKey,
    leaves: Mapping[str, np.ndarray],
    spec: carriers.Spec,
    network: trials.Network,
    num_chips: int,
    *,
    max_change: float = embedding.MAX_CHANGE,
    strength: float | None = None,
    on_step: Callable[[str], None] = lambda text: None,
) -> Made:
    """The shape from some of the images, and from the others the strength whose copies cost what the owner will pay.

    The first third of the images makes the shape, at most 64; the last ones that are not among these, at most 256, are
    those that copies are run on. So where several images show the same thing, they should stand together.

    Args:
      key: of the carrier.
      leaves: the base.
      spec: the leaves that may carry. If only one of them is a kernel, the shape follows from the weights alone, since
        by sensitivity the last kernel never carries.
      network: how to run the base.
      num_chips: m.
      max_change: largest acceptable relative change of the logits.
      strength: a strength to measure instead of finding one.
      on_step: called with a description of the next step.

    Raises:
      TooCostly: when even a weak mark costs more than ``max_change``.
      SmarkError: when there are too few images, or the network refuses base or images or gives NaN.
    """
    images, number = np.asarray(network.images), len(network.images)
    if number < FEWEST_IMAGES:
        cause = "A third of them makes the shape, the others measure what copies cost: name more with --images."
        raise _validate.fail("add-model", f"at least {FEWEST_IMAGES} images", f"{number}", cause)
    used = min(_MOST_OF_SHAPE, number // 3)
    tried = min(_MOST_OF_STRENGTH, number - used)
    labels = None if network.labels is None else np.asarray(network.labels)[-tried:]
    tree = files.nest(leaves)
    trials.run("add-model", network.apply_fn, tree, images[:2])
    on_step(f"finding how far each weight may move, on {used} images")
    if sum(not is_vector(leaf) for leaf in spec.leaves) > 1:
        shape = carriers.shape(tree, network.apply_fn, images[:used], match=_among(spec))
    else:
        shape, used = carriers.shape(tree, match=_among(spec)), 0
    mark = carriers.mark(carriers.piece_keys(key), tree, num_chips, shape=shape)
    say = lambda tried_one: on_step(f"measuring copies of strength {tried_one:.2g} on {tried} images")  # noqa: E731
    if strength is None:
        found = embedding.calibrate(
            tree, mark, network.apply_fn, images[-tried:], max_change=max_change, labels=labels, on_strength=say
        )
        return Made(shape, found.strength, used, tried, embedding.Measured(found.cost, found.interval), found.worst)
    say(strength)
    word = np.random.default_rng(0).choice([-1, 1], num_chips).astype(np.int8)
    copy = embedding.embed(tree, mark, word, strength)
    measured = embedding.measure(copy, tree, network.apply_fn, images[-tried:], labels)
    return Made(shape, strength, used, tried, measured, measured.cost)


def _among(spec: carriers.Spec) -> Callable[[str], object]:
    return {leaf.path for leaf in spec.leaves}.__contains__


def path(folder: Path, digest: str) -> Path:
    """The file of the shape with this digest, in the vault's folder of models or beside a bundle."""
    return folder / f"shape-{digest[:16]}.safetensors"


def write(folder: Path, shape: carriers.Shape) -> Path:
    """Writes a shape's file, complete or not at all, readable for its owner only."""
    found = path(folder, shape.digest())
    with _io.private_files():
        files.write(found, shape.to_arrays())
    return found


def read(
    who: str, folder: Path, name: str | None, digest: str, cause: str, max_bytes: int = files.MAX_BYTES
) -> carriers.Shape:
    """The shape with this digest, from its file.

    Args:
      who: the command or function that refuses.
      folder: where the file is.
      name: of the shape in :data:`smark_jax.vault.versions.SHAPES`.
      digest: that was committed to.
      cause: what to do when there is no such file, or another content.
      max_bytes: limit on its size.

    Raises:
      SmarkError: when the file is missing, cannot be read, or does not hold the shape with this digest.
    """
    file, make = path(folder, digest), versions.SHAPES[name]
    expected = f"the shape of the marks in {file}"
    if not file.is_file():
        raise _validate.fail(who, expected, "no such file", cause)
    try:
        shape: Any = make(files.read(file, max_bytes=max_bytes).leaves) if make else None
    except errors.SmarkError:
        shape = None
    if shape is None or shape.digest() != digest:
        raise _validate.fail(who, expected, "another content", cause)
    return shape
