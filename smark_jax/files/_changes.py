"""The layouts that a leaf may be stored in, and which of them its content confirms.

A layout splits axes, reorders them and joins them again. Which of them are tried follows from two shapes alone: axes of
length 1 are dropped, and of the others every order is tried that keeps the axes of space (height, width) together. So
one rule covers the kernels of PyTorch (OIHW), JAX and Keras (HWIO) and TensorFlow Lite (OHWI), depthwise ones (``[C 1 H
W]``, ``[H W C 1]``, ``[1 H W C]``), dense kernels and convolutions of one pixel or of the whole image, and heads of
attention on an axis of their own (``[d H h]``) or not (``[H*h d]``).
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from smark_jax._roles import Role, of_name
from smark_jax.files import _content, _limits
from smark_jax.files._content import Change

Shape = tuple[int, ...]

_TOLD = (Role.KERNEL, Role.BIAS, Role.SCALE, Role.MEAN, Role.VAR)  # roles that names reveal in every framework
_PREFIXES = ("params/", "batch_stats/")  # of linen, which other frameworks' names lack
# Axes of kernels: outputs, inputs, and those of space; PyTorch, JAX and Keras, TensorFlow Lite, and unusual ones. The
# first conversion that describes an order names it.
_KERNELS = ("OIS", "SIO", "OSI", "IOS", "SOI", "ISO")
_MOST_AXES = 8
_SPACE = {3: "W", 4: "HW", 5: "DHW"}


class Option(NamedTuple):
    """A leaf of the suspect, or a part of one, in one layout.

    Attributes:
      source: the leaf's name.
      values: its values, as stored.
      shape: its shape in this layout.
      how: the layout.
      part: which part of the leaf ``values`` is, in words; empty for all of it.
    """

    source: str
    values: np.ndarray
    shape: Shape
    how: Change
    part: str = ""

    @property
    def sources(self) -> tuple[str, ...]:
        """The suspect's leaves that are used."""
        return (self.source,)

    @property
    def change(self) -> str:
        """What is done to the leaf, in words; empty if nothing."""
        words = self.how.words or _named(self.values.shape, self.shape, self.how)
        return ", ".join(filter(None, (self.part, words)))

    @property
    def answer(self) -> str:
        """The option as an answer for ``given``."""
        return f"{self.source}: {self.change}" if self.change else self.source

    @property
    def moves(self) -> tuple[tuple[str, str], ...]:
        """The suspect's leaves that are used, each with its change."""
        return ((self.source, self.change),)

    def leaf(self) -> np.ndarray:
        """The values in this layout."""
        view = self.values.reshape(self.how.split).transpose(self.how.order)
        return np.ascontiguousarray(view).reshape(self.shape)


class Joined(NamedTuple):
    """A leaf that the suspect keeps in parts: one option for each, or None for a part that was not found.

    Attributes:
      parts: the parts in order.
      axis: the axis along which they lie.
      shape: of the whole leaf.
    """

    parts: tuple[Option | None, ...]
    axis: int
    shape: Shape

    @property
    def sources(self) -> tuple[str, ...]:
        """The suspect's leaves that are used."""
        return tuple(part.source for part in self.parts if part)

    @property
    def answer(self) -> str:
        """What the leaf is made of, in words."""
        return ", ".join(part.answer for part in self.parts if part)

    @property
    def moves(self) -> tuple[tuple[str, str], ...]:
        """The suspect's leaves that are used, each with its change."""
        count = len(self.parts)
        words = ((part, f"part {index} of {count} of the base's leaf") for index, part in enumerate(self.parts, 1))
        return tuple((part.source, ", ".join(filter(None, (part.change, said)))) for part, said in words if part)

    def leaf(self) -> np.ndarray:
        """The parts together; NaN, which no reading counts, where one was not found."""
        found = [part.leaf() if part else None for part in self.parts]
        there = [leaf for leaf in found if leaf is not None]
        dtype = np.result_type(*there) if len(there) == len(found) else np.result_type(*there, np.float32)
        gap = np.full(there[0].shape, np.nan, np.float32)
        return np.concatenate([(gap if leaf is None else leaf).astype(dtype) for leaf in found], self.axis)


Place = Option | Joined
"""Where a leaf of the base is in the suspect."""


class Choice(NamedTuple):
    """The option that agrees best with a leaf of the base.

    Attributes:
      option: the best one.
      correlation: of its content with the base's.
      told: whether content, or the lack of another option, speaks for this one.
      sure: whether no other agrees nearly as well.
    """

    option: Option
    correlation: float
    told: bool
    sure: bool


def channels(base: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """The channel counts that an image may have had when it was flattened: the outputs of any convolution."""
    sizes = {size for leaf in base.values() if leaf.ndim > 2 for size in (leaf.shape[0], *leaf.shape[-2:])}
    return tuple(sorted(sizes - {0, 1}))


def real(leaf: np.ndarray) -> bool:
    """Whether a leaf holds real numbers, as weights do."""
    return leaf.dtype.name in _limits.BY_NAME


def unchanged(source: str, leaf: np.ndarray) -> Option:
    """The leaf as it is."""
    return Option(source, leaf, leaf.shape, Change(leaf.shape, tuple(range(leaf.ndim))))


def options(source: str, leaf: np.ndarray, shape: Shape, channels: tuple[int, ...]) -> list[Option]:
    """The leaf in every layout of this shape that it may have come from, with the least changed one first."""
    return [Option(source, leaf, shape, how) for how in changes(leaf.shape, shape, channels)]


def squeezed(shape: Shape) -> Shape:
    """The shape without axes of length 1."""
    return tuple(size for size in shape if size != 1)


@functools.lru_cache(maxsize=1 << 14)
def changes(source: Shape, target: Shape, channels: tuple[int, ...]) -> tuple[Change, ...]:
    """The layouts that lead from one shape to another."""
    unchanged = (Change(source, tuple(range(len(source)))),) if source == target else ()
    ours, theirs = squeezed(target), squeezed(source)
    if math.prod(ours) != math.prod(theirs) or 0 in ours or max(len(source), len(target)) > _MOST_AXES:
        return unchanged
    longer, shorter = (theirs, ours) if len(theirs) >= len(ours) else (ours, theirs)
    found: dict[tuple[Shape, Shape], Change] = {}
    for order in _orders(source, target):
        ordered = tuple(longer[axis] for axis in order)
        if _joins(ordered, shorter):
            back = tuple(sorted(range(len(order)), key=order.__getitem__))
            how = Change(theirs, order) if longer is theirs else Change(ordered, back)
            found.setdefault((how.split, how.order), how)
        if len(source) == len(target) == 2 and ordered == target:
            turned = "transposed, " if order == (1, 0) else ""
            for how in _flattened(source, order, channels):
                found.setdefault((how.split, how.order), how._replace(words=turned + how.words))
    return tuple(found.values())


def _orders(source: Shape, target: Shape) -> Iterator[Shape]:
    """Orders of the longer shape's axes that are not of length 1, in which the axes of space stay together."""
    ours, theirs = squeezed(target), squeezed(source)
    if len(ours) == len(theirs) and len(source) == len(target) > 2:
        kept = [axis for axis, size in enumerate(source) if size != 1]
        for order in _together(source, len(source) - 2):
            yield tuple(kept.index(axis) for axis in order if axis in kept)
    else:
        longer = theirs if len(theirs) >= len(ours) else ours
        axes = len(longer)
        yield from _together(longer, 2 if len(ours) == len(theirs) == 3 else max(axes - 2, min(axes, 1)))


def _together(shape: Shape, space: int) -> Iterator[Shape]:
    """The orders of axes in which this many neighbours, wherever they are, stay neighbours: height and width.

    Axes of which one has length 1 are not taken for these where neighbours of a shorter equal length can be.
    """
    runs = [range(start, start + space) for start in range(len(shape) - space + 1)]
    sizes = [shape[run.start : run.stop] for run in runs]
    square = min((max(size) for size in sizes if space > 1 and 1 < min(size) == max(size)), default=math.inf)
    for run, size in zip(runs, sizes, strict=True):
        if 1 not in size or max(size) < square:
            units = [*((axis,) for axis in range(run.start)), tuple(run)]
            units += ((axis,) for axis in range(run.stop, len(shape)))
            yield from (tuple(itertools.chain(*order)) for order in itertools.permutations(units))


def _joins(sizes: Shape, target: Shape) -> bool:
    """Whether neighbouring axes can be joined to give this shape."""
    left = iter(sizes)
    for size in target:
        joined = 1
        while joined < size:
            joined *= next(left, size + 1)
        if joined != size:
            return False
    return next(left, None) is None


def _flattened(source: Shape, order: Shape, channels: tuple[int, ...]) -> Iterator[Change]:
    """A matrix of which one axis is an image that the other framework flattens in another order."""
    for axis, depth in itertools.product((0, 1), channels):
        at = order[axis]
        size = source[at]
        if 1 < depth < size and size % depth == 0:
            for first, second, words in ((depth, size // depth, "CHW to HWC"), (size // depth, depth, "HWC to CHW")):
                split = (*source[:at], first, second, *source[at + 1 :])
                other = 2 if at == 0 else 0
                axes = (at + 1, at, other) if axis == 0 else (other, at + 1, at)
                whose = "columns " if axis else ""
                yield Change(split, axes, f"{whose}flattened {words} ({depth} channels)")


def _named(source: Shape, target: Shape, how: Change) -> str:
    """What a layout does to a leaf, in words."""
    trivial = how.order == tuple(range(len(how.order)))
    if trivial and source == target:
        return ""
    if len(source) == len(target) == 2:
        return "transposed"
    if len(source) == len(target) in _SPACE:
        space = _SPACE[len(source)]
        usual = itertools.permutations(_KERNELS[:3], 2)
        for one, other in itertools.chain(usual, itertools.permutations(_KERNELS, 2)):
            one, other = one.replace("S", space), other.replace("S", space)
            order = [one.index(axis) for axis in other]
            if tuple(source[axis] for axis in order) == target:
                kept = [axis for axis in range(len(source)) if source[axis] != 1]
                if tuple(kept.index(axis) for axis in order if axis in kept) == how.order:
                    return f"{one} to {other}"
    if trivial:
        return "reshaped"
    moved = "transposed" if how.order == (1, 0) else f"axes reordered to {', '.join(map(str, how.order))}"
    return f"{moved}, reshaped"


def best(options: Sequence[Option], leaf: np.ndarray) -> Choice:
    """The option, of one leaf in several layouts, whose content agrees best with the base's leaf."""
    scores = _content.correlations(options[0].values, [option.how for option in options], leaf)
    if len(options) == 1:
        return Choice(options[0], scores[0], True, True)
    order = sorted(range(len(options)), key=lambda i: -scores[i])
    first, second = scores[order[0]], scores[order[1]]
    sure = first >= _content.ALIKE and first - second >= _content.MARGIN
    if not sure:
        values = options[0].leaf()
        sure = all(np.array_equal(values, option.leaf(), equal_nan=True) for option in options[1:])
    return Choice(options[order[0]], first, sure or first >= _content.ALIKE, sure)


def layers(leaves: Mapping[str, np.ndarray]) -> dict[str, dict[str, str]]:
    """The leaves' names by layer and role: ``{"conv1": {"kernel": "conv1.weight", "bias": "conv1.bias"}, ...}``."""
    found: dict[str, dict[str, str]] = {}
    for name, leaf in leaves.items():
        bare = next((name[len(c) :] for c in _PREFIXES if name.startswith(c)), name).replace("/", ".")
        layer, _, last = bare.rpartition(".")
        said = of_name(last)
        role: str = said if said is not None and said in _TOLD else last
        role = Role.SCALE if role is Role.KERNEL and leaf.ndim == 1 else role
        roles = found.setdefault(layer, {})
        roles[last if role in roles else role] = name
    return found


def singles(leaves: Iterable[str]) -> dict[str, dict[str, str]]:
    """Each leaf as a layer of its own, for names that say nothing."""
    return {name: {"": name} for name in leaves}
