"""Spaces whose units may be mixed, and the gains that stand in the way: what the graph of a network says of them."""

from typing import Literal, NamedTuple

import numpy as np

from smark_jax.alignment._identities import Compute

Group = Literal["linear", "orthogonal"]


class Place(NamedTuple):
    """Where a linear space's units stand on an axis of a leaf.

    Attributes:
      path: of the leaf.
      axis: of the leaf as the graph sees it.
      entries: each unit's, shape [blocks, units of a block, entries of each].
      reads: whether the leaf reads the units, and so changes by the inverse transpose.
    """

    path: str
    axis: int
    entries: np.ndarray
    reads: bool


class Linear(NamedTuple):
    """A space whose units may be mixed.

    Attributes:
      places: on the axes of kernels.
      group: by which matrices: any invertible ones, or orthogonal ones.
      ones: whether these must keep the vector of ones.
      heads: number of the set of blocks that change places together, or -1 where blocks stay.
      vectors: on vectors, which change too, but say too little to fit anything by.
    """

    places: tuple[Place, ...]
    group: Group
    ones: bool
    heads: int
    vectors: tuple[Place, ...] = ()

    @property
    def blocks(self) -> int:
        """The number of blocks: units mix only within one."""
        return self.places[0].entries.shape[0] if self.places else 0

    @property
    def width(self) -> int:
        """The number of units of a block."""
        return self.places[0].entries.shape[1] if self.places else 0


class Factor(NamedTuple):
    """Gains that are folded into a kernel's axis: entries ``entries`` take the factors ``vector[positions]``.

    Attributes:
      axis: of the kernel.
      entries: on the axis, shape [n].
      positions: in the vector, shape [n].
      vector: computes the gains.
      gain: number of the multiplication; kernels that share it take the same gains.
      reads: whether the kernel reads what was multiplied, and does not make it.
    """

    axis: int
    entries: np.ndarray
    positions: np.ndarray
    vector: Compute
    gain: int
    reads: bool
