"""Carriers: which direction of weight space each chip of a fingerprint occupies.

A model's chosen leaves, each divided by its own RMS, form one vector w in R^D (:func:`select`, :func:`read`,
:func:`write`). A carrier is a secret m x D matrix X with orthonormal rows, one for each chip (:func:`draw`). Together
they form a model's :class:`Mark` (:func:`mark`). A copy carries ``w + spread(word, mark)`` with ``spread(c) = X^T c``,
and ``despread(v) = X v`` reads it back.
"""

from smark_jax._roles import Role
from smark_jax.carriers.drawing import Keys, draw, draw_even
from smark_jax.carriers.hadamard import MOST_PIECES, Carrier, Coverage, coverage
from smark_jax.carriers.marks import Mark, coordinates, despread, mark, spread
from smark_jax.carriers.pieces import piece_keys
from smark_jax.carriers.selection import Leaf, Spec, read, roles, select, with_tied, with_ties, write
from smark_jax.carriers.shapes import Scales, Shape
from smark_jax.carriers.shaping import shape

__all__ = [
    "MOST_PIECES",
    "Carrier",
    "Coverage",
    "Keys",
    "Leaf",
    "Mark",
    "Role",
    "Scales",
    "Shape",
    "Spec",
    "coordinates",
    "coverage",
    "despread",
    "draw",
    "draw_even",
    "mark",
    "piece_keys",
    "read",
    "roles",
    "select",
    "shape",
    "spread",
    "with_tied",
    "with_ties",
    "write",
]
