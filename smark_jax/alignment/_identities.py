"""Identities of the entries of a network's weights, and what the pass over its equations learns about them."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

MOVING, PROVEN = "", "images, logits or windows"


class Compute(NamedTuple):
    """The value of an expression of weights alone.

    Attributes:
      paths: the leaves that it depends on.
      run: computes it from the leaves by path.
    """

    paths: frozenset[str]
    run: Callable[[Mapping[str, Any]], Any]

    def __call__(self, leaves: Mapping[str, Any]) -> Any:
        """The value."""
        return self.run(leaves)


class Role(NamedTuple):
    """Identities along some axes of a value; the shape of ``ids`` is the sizes of these axes.

    Attributes:
      axes: of the value, ascending.
      ids: identities of the entries.
      source: path and axis of the leaf that the value is, in another form; None for anything else.
      maker: the leaf by which the value was made, as long as nothing but a vector was added since.
      vector: the value's entries along these axes, if it is them times something that does not depend on them.
      squared: whether the value is the square of one that has these identities.
      bent: how it depends on the weights: 0 linearly, 1 linearly but times others, 2 in another way.
      changed: whether it is the source times something.
      block: whether each identity stands for a block of others (a head, a group that is normalised together).
      loose: whether entries repeat others, and nothing tells them apart.
    """

    axes: tuple[int, ...]
    ids: np.ndarray
    source: tuple[str, int] | None = None
    maker: str | None = None
    vector: Compute | None = None
    squared: bool = False
    bent: int = 0
    changed: bool = False
    block: bool = False
    loose: bool = False


Roles = tuple[Role, ...]


class Form(NamedTuple):
    """How a value is computed, as numbers that are equal for equal expressions.

    Attributes:
      exact: of the expression itself.
      alike: of the expression with any weights of the same shapes, and with any signs.
      altered: whether it is a matrix of weights that many leaves give: they are free beyond channels.
    """

    exact: int = -1
    alike: int = -2
    altered: bool = False


class Value(NamedTuple):
    """What the pass knows of a value: its roles, how to compute it where it depends on weights alone, and its form."""

    roles: Roles = ()
    compute: Compute | None = None
    form: Form = Form()


class Gain(NamedTuple):
    """A value times a vector of weights along an axis.

    Attributes:
      before: identities before the multiplication, shape [n].
      after: identities after it, shape [n].
      vector: the factors, shape [n].
      form: the number of the expression that gives them, or -1.
    """

    before: np.ndarray
    after: np.ndarray
    vector: Compute
    form: int = -1


def gain_name(number: int) -> str:
    """By what the sum of a gained value and a vector is noted among the biases."""
    return f"*{number}"


class Grouped(NamedTuple):
    """The kernel of a convolution in groups, by the axes of its leaf.

    Attributes:
      inputs: the axis of a group's inputs.
      outputs: the axis of all outputs.
      groups: how many there are.
    """

    inputs: int
    outputs: int
    groups: int


class Roots(dict[int, int]):
    """Disjoint sets of numbers, as a forest (union-find)."""

    def of(self, number: int) -> int:
        """The number that stands for a number's set."""
        while (above := self.setdefault(number, number)) != number:
            self[number] = self.setdefault(above, above)
            number = self[number]
        return number


class Identities:
    """What ties identities to each other, and which changes of them the network's function allows.

    A *link* says that two entries belong to the same unit and change alike. A *flip* says that they belong to the same
    unit, and that one changes by the inverse transpose of the other's change: two factors of a sum of products.
    Units are permuted together either way. Mixing them is free as long as only linear operations touch them, over
    *cells* as a whole.
    """

    def __init__(self) -> None:
        self.count = 0
        self.links: list[np.ndarray] = []
        self.flips: list[np.ndarray] = []
        self.ties: list[np.ndarray] = []
        self.frozen: list[np.ndarray] = []
        self.singles: list[np.ndarray] = []
        self.even: list[np.ndarray] = []
        self.cells: list[np.ndarray] = []
        self.sets: list[np.ndarray] = []
        self.reduced_over: list[np.ndarray] = []
        self.logits = np.zeros(0, int)
        self.blocks: list[tuple[np.ndarray, np.ndarray]] = []
        self.gains: list[Gain] = []
        self.consumed: set[tuple[str, int]] = set()
        self.biases: dict[str, str] = {}
        self.shifted: set[str] = set()
        self.makers: set[str] = set()
        self.reads: dict[str, set[bytes]] = {}
        self.joint: set[tuple[str, int, int]] = set()
        self.grouped: dict[str, Grouped] = {}
        self.unfollowed: dict[str, None] = {}
        self.beyond: dict[str, None] = {}
        self.padded: list[np.ndarray] = []
        self.apart: list[tuple[np.ndarray, np.ndarray]] = []
        self.why: list[str] = [MOVING, PROVEN]
        self._still = np.zeros(1024, np.int16)
        self._origins: list[tuple[int, str, int]] = []
        self._leaves_end = 0

    def fresh(self, shape: tuple[int, ...]) -> np.ndarray:
        first, self.count = self.count, self.count + math.prod(shape)
        if self.count > len(self._still):
            self._still = np.concatenate([self._still, np.zeros(max(self.count, len(self._still)), np.int16)])
        return np.arange(first, self.count).reshape(shape)

    def fixed(self, shape: tuple[int, ...], why: str = PROVEN) -> np.ndarray:
        ids = self.fresh(shape)
        self.freeze(ids, why)
        return ids

    def leaf(self, path: str, axis: int, shape: tuple[int, ...]) -> np.ndarray:
        """Fresh identities of a leaf's axis, or of several neighbouring ones that belong together."""
        self._origins.append((self.count, path, axis))
        return self.fresh(shape)

    def origin(self, ids: np.ndarray) -> tuple[str, int] | None:
        """The leaf and axis of whose entries these are, if they are of one."""
        starts = [start for start, _, _ in self._origins]
        first, last = (int(np.searchsorted(starts, at, "right")) - 1 for at in (ids.min(), ids.max()))
        if first != last or first < 0 or (first == len(starts) - 1 and ids.max() >= self._leaves_end):
            return None
        return self._origins[first][1:]

    def leaves_done(self) -> None:
        """Ends the leaves' identities: whatever is fresh from here on belongs to no leaf."""
        self._leaves_end = self.count

    def freeze(self, ids: np.ndarray, why: str = PROVEN) -> None:
        """Fixes entries; ``why`` names what holds them where no image, logit or window is known to."""
        flat = ids.reshape(-1)
        self.frozen.append(flat)
        if why not in self.why:
            self.why.append(why)
        code = self.why.index(why)
        self._still[flat] = np.where((self._still[flat] == 1) | (code == 1), 1, code)

    def reason(self, roles: Sequence[Role]) -> str:
        """Why entries computed from these are fixed: proven if all of these are."""
        codes = [int(code) for role in roles for code in np.unique(self._still[role.ids])]
        return self.why[max(codes, default=1)]

    def reasons(self) -> np.ndarray:
        """For each identity, why it is fixed: the number of an entry of ``why``."""
        return self._still[: self.count]

    def still(self, role: Role) -> bool:
        """Whether all its entries are fixed already, as those of images are."""
        return bool((self._still[role.ids] > 0).all())

    def link(self, a: np.ndarray, b: np.ndarray) -> None:
        self.links.append(np.stack([a.reshape(-1), b.reshape(-1)]))

    def flip(self, a: np.ndarray, b: np.ndarray) -> None:
        self.flips.append(np.stack([a.reshape(-1), b.reshape(-1)]))

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Entries that are permuted together, though they do not change alike otherwise."""
        self.ties.append(np.stack([a.reshape(-1), b.reshape(-1)]))

    def single(self, *roles: Role) -> None:
        """Entries that something other than a linear operation touches: they do not mix."""
        self.singles.extend(role.ids.reshape(-1) for role in roles)

    def whole(self, ids: np.ndarray, batch: int = 0) -> None:
        """Entries over which the network sums, for each entry of the first ``batch`` axes."""
        self.cells.append(ids.reshape(math.prod(ids.shape[:batch]), -1))

    def together(self, ids: np.ndarray, batch: int = 0) -> None:
        """Entries that are reduced to one value, for each entry of the first ``batch`` axes: they stay together."""
        self.sets.append(ids.reshape(math.prod(ids.shape[:batch]), -1))

    def summed(self, role: Role, ids: np.ndarray, batch: int = 0) -> None:
        """A sum over entries, or over their squares, for each entry of the first ``batch`` axes."""
        self.whole(ids, batch)
        if role.bent:
            self.single(role)
        elif role.squared:
            self.flip(ids, ids)
        else:
            self.even.append(ids.reshape(-1))

    def loosened(self, one: Role, other: Role) -> None:
        """Notes that entries tied to repeats that nothing tells apart may change places among themselves."""
        if (one.loose or other.loose) and not self.still(one) and not self.still(other):
            if len(np.unique(one.ids)) != len(np.unique(other.ids)):
                self.beyond["channels that repeat"] = None

    def read(self, kernel: Role, role: Role) -> None:
        """Notes what a leaf reads, as long as it is a kernel."""
        if kernel.source:
            self.reads.setdefault(kernel.source[0], set()).add(role.ids.tobytes())

    def added(self, one: Role, other: Role) -> None:
        """Notes that products of two kernels with the same value are added: a part may go from one to the other."""
        readers = [self.reads.get(role.maker or "", set()) for role in (one, other)]
        if one.maker != other.maker and not readers[0].isdisjoint(readers[1]):
            self.beyond["kernels whose products are added"] = None

    def repeated(self, role: Role, others: np.ndarray) -> None:
        """Notes that distinct entries are summed over, or multiplied with, repeats that nothing tells apart."""
        if role.loose and len(np.unique(role.ids)) < len(np.unique(others)):
            self.beyond["channels that repeat"] = None

    def couple(self, small: Role, big: Role) -> None:
        """Ties each entry of a role to a block of another's, whose axes include its own."""
        order = [*small.axes, *(axis for axis in big.axes if axis not in small.axes)]
        ids = big.ids.transpose([big.axes.index(axis) for axis in order]).reshape(small.ids.size, -1)
        names = small.ids.reshape(-1)
        if len(np.unique(names)) < names.size:  # each is repeated along its block
            ids = np.stack([ids[names == name].reshape(-1) for name in np.unique(names)])
            names = np.unique(names)
        self.blocks.append((names, ids))
        self.whole(ids, 1)
        self.together(ids, 1)

    def request(self, parts: Sequence[Sequence[Role]], apart: bool = False) -> None:
        """Asks for neighbouring axes of a leaf to be seen as one; ``parts`` are the roles along each.

        With ``apart``, any two axes of a leaf.
        """
        for first, second in itertools.pairwise(parts):
            for a, b in ((a, b) for a in first for b in second):
                one, other = self.origin(a.ids), self.origin(b.ids)
                if one and other and one[0] == other[0] and (abs(other[1] - one[1]) == 1 or (apart and one != other)):
                    self.joint.add((one[0], min(one[1], other[1]), max(one[1], other[1])))

    def give_up(self, why: str, roles: Sequence[Role]) -> None:
        """Fixes entries that an operation of unknown effect touches, and reports the operation."""
        moving = tuple(role for role in roles if not self.still(role))
        if moving:
            self.unfollowed[why] = None
            for role in moving:
                self.freeze(role.ids, why)


def simplified(role: Role) -> Role:
    """The role without the axes along which identities do not change."""
    ids, kept = role.ids, []
    for axis in reversed(range(ids.ndim)):
        first = ids.take([0], axis=axis)
        if ids.shape[axis] == 1 or (ids == first).all():
            ids = first.squeeze(axis)
        else:
            kept.append(role.axes[axis])
    axes = tuple(reversed(kept))
    return role._replace(axes=axes, ids=ids, vector=role.vector if axes == role.axes else None)


def moved(roles: Sequence[Role], order: Sequence[int]) -> Roles:
    """Roles of a value whose axes were reordered to ``order``; a role that lost an axis is dropped."""
    place = {axis: i for i, axis in enumerate(order)}
    found = []
    for role in roles:
        if all(axis in place for axis in role.axes):
            axes = [place[axis] for axis in role.axes]
            by = np.argsort(axes)
            vector = role.vector if len(axes) == 1 else None
            found.append(role._replace(axes=tuple(sorted(axes)), ids=role.ids.transpose(by), vector=vector))
    return tuple(found)


def reshape_groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest groups of neighbouring axes, before and after, with equal numbers of entries."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [], []
        a = b = 1
        while a != b or not (left or right):
            if i < len(before) and (a <= b or j == len(after)):
                a, left, i = a * before[i], [*left, i], i + 1
            else:
                b, right, j = b * after[j], [*right, j], j + 1
        groups.append((left, right))
    return groups
