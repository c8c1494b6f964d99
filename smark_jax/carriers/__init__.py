"""Carriers: which direction of weight space each chip of a fingerprint occupies.

A model's chosen leaves, each divided by its own root mean square, form one vector w in R^D (:func:`select`,
:func:`read`, :func:`write`). A carrier is a secret m x D matrix X with orthonormal rows, one for each chip
(:func:`draw`). A copy carries ``w + spread(code)`` with ``spread(c) = X^T c``, and ``despread(v) = X v`` reads it back.
"""

from smark_jax.carriers.hadamard import Carrier, check_carrier, despread, draw, spread
from smark_jax.carriers.selection import Leaf, Spec, check_params, finite, read, select, write
from smark_jax.carriers.sharded import Layout, add_spread, despread_difference, layout

__all__ = [
    "Carrier",
    "Layout",
    "Leaf",
    "Spec",
    "add_spread",
    "check_carrier",
    "check_params",
    "despread",
    "despread_difference",
    "draw",
    "finite",
    "layout",
    "read",
    "select",
    "spread",
    "write",
]
