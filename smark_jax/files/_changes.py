"""The possible layouts of a leaf, the layers of a file, and the agreement of contents."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from smark_jax._roles import Role, of_name
from smark_jax.files import _limits

ALIKE = 0.3  # the correlation is above 0.5 for a copy that is still useful, and about 0 for other models
MARGIN = 0.2
_SAMPLE = 1 << 14
_TOLD = (Role.KERNEL, Role.BIAS, Role.SCALE, Role.MEAN, Role.VAR)  # roles that names reveal in every framework
_PREFIXES = ("params/", "batch_stats/")  # of linen, which other frameworks' names lack


class Option(NamedTuple):
    """A leaf of the suspect in one layout: ``view`` has the values in C order, ``shape`` their shape."""

    source: str
    change: str
    view: np.ndarray
    shape: tuple[int, ...]

    @property
    def answer(self) -> str:
        """The option as an answer for ``given``."""
        return f"{self.source}: {self.change}" if self.change else self.source

    def leaf(self) -> np.ndarray:
        """The values in this layout."""
        return np.ascontiguousarray(self.view).reshape(self.shape)


class Choice(NamedTuple):
    """The option that agrees best with a leaf of the base, and whether no other agrees nearly as well."""

    option: Option
    correlation: float
    sure: bool
    options: tuple[Option, ...]
    leaf: np.ndarray


def channels(base: Mapping[str, np.ndarray]) -> set[int]:
    """The channel counts that an image may have had when it was flattened: the outputs of any convolution."""
    return {size for leaf in base.values() if leaf.ndim > 2 for size in (leaf.shape[-1], leaf.shape[0])}


def real(leaf: np.ndarray) -> bool:
    """Whether a leaf holds real numbers, as weights do."""
    return leaf.dtype.name in _limits.BY_NAME


def options(source: str, leaf: np.ndarray, channels: Iterable[int]) -> list[Option]:
    """The leaf in every layout that it may have come from, with the unchanged one first."""
    found = [Option(source, "", leaf, leaf.shape)]
    if leaf.ndim > 2:
        order = (*range(2, leaf.ndim), 1, 0)
        words = {3: "OIW to WIO", 4: "OIHW to HWIO", 5: "OIDHW to DHWIO"}.get(leaf.ndim, "O, I first to I, O last")
        found.append(Option(source, words, leaf.transpose(order), tuple(leaf.shape[axis] for axis in order)))
    if leaf.ndim == 2:
        for words, matrix in (("", leaf), ("transposed", leaf.T)):
            found += [Option(source, words, matrix, matrix.shape)] if words else []
            rows, columns = matrix.shape
            for depth in sorted(channels):
                if 1 < depth < rows and rows % depth == 0:
                    view = matrix.reshape(depth, rows // depth, columns, copy=False).transpose(1, 0, 2)
                    change = f"flattened CHW to HWC ({depth} channels)"
                    found.append(Option(source, f"{words}, {change}" if words else change, view, matrix.shape))
    return found


def fitting(options: Iterable[Option], leaf: np.ndarray) -> list[Option]:
    """The options with the shape of the base's leaf."""
    return [option for option in options if option.shape == leaf.shape]


def best(options: list[Option], leaf: np.ndarray) -> Choice:
    """The option whose content agrees best with the base's leaf."""
    scores = [_correlation(option.view, leaf) for option in options]
    order = sorted(range(len(options)), key=lambda i: -scores[i])
    first, second = scores[order[0]], scores[order[1]] if len(order) > 1 else -np.inf
    sure = len(options) == 1 or (first >= ALIKE and first - second >= MARGIN)
    if not sure:
        values = options[0].leaf()
        sure = all(np.array_equal(values, option.leaf(), equal_nan=True) for option in options[1:])
    return Choice(options[order[0]], first, sure, tuple(options), leaf)


def _correlation(view: np.ndarray, leaf: np.ndarray) -> float:
    """The correlation of two leaves, computed with :func:`directions`; 0 if either is constant."""
    number = min(leaf.size, _SAMPLE)
    return float(directions([view], number)[0] @ directions([leaf], number)[0])


def directions(views: Sequence[np.ndarray], number: int) -> np.ndarray:
    """Samples ``number`` evenly spaced entries of each view, centred and normalised: inner products are correlations.

    Entries are clipped to ten times the median magnitude, so that a few huge weights do not hide the others; NaN and
    infinite entries do not count. A constant view has the direction 0. Shape [views, number].
    """
    size = views[0].size if views else 0
    rows = np.zeros((len(views), number))
    index = np.linspace(0, size - 1, number).astype(np.int64) if size else np.zeros(0, np.int64)
    with np.errstate(over="ignore", invalid="ignore"):
        for row, view in zip(rows, views, strict=True):
            view = np.atleast_1d(view)
            row[:] = view[np.unravel_index(index, view.shape)] if number < size else view.reshape(-1)
    there = np.isfinite(rows)
    rows[~there] = 0
    sizes = np.sort(np.abs(rows), axis=1)
    zeros = (sizes == 0).sum(axis=1)
    middle = np.minimum(zeros + (number - zeros) // 2, number - 1) if number else zeros
    limit = 10 * sizes[np.arange(len(rows)), middle][:, None] if number else sizes
    rows = np.clip(rows, -limit, limit)
    rows -= np.where(there, rows, 0).sum(axis=1, keepdims=True) / np.maximum(there.sum(axis=1, keepdims=True), 1)
    rows[~there] = 0
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    constant = largest <= 1e-12 * limit
    rows /= np.where(constant, 1, largest)
    rows[constant[:, 0]] = 0
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)


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


def singles(leaves: Mapping[str, np.ndarray]) -> dict[str, dict[str, str]]:
    """Each leaf as a layer of its own, for names that say nothing."""
    return {name: {"": name} for name in leaves}
