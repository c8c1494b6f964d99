"""Carriers: which direction of weight space each chip of a fingerprint occupies.

A model's chosen leaves, each divided by its own root mean square, form one vector w in R^D (:func:`select`,
:func:`read`, :func:`write`). A carrier is a secret m x D matrix X with orthonormal rows, one for each chip
(:func:`draw`). A copy carries ``w + spread(code)`` with ``spread(c) = X^T c``, and ``despread(v) = X v`` reads it back.
"""

from smark_jax._roles import Role
from smark_jax.carriers.hadamard import Carrier, Coverage, check_carrier, coverage, despread, draw, spread
from smark_jax.carriers.selection import (
    Leaf,
    Spec,
    check_params,
    finite,
    read,
    roles,
    select,
    with_tied,
    with_ties,
    write,
)
from smark_jax.carriers.sharded import Layout, add_spread, despread_difference, layout

__all__ = [
    "Carrier",
    "Coverage",
    "Layout",
    "Leaf",
    "Role",
    "Spec",
    "add_spread",
    "check_carrier",
    "check_params",
    "coverage",
    "despread",
    "despread_difference",
    "draw",
    "finite",
    "layout",
    "read",
    "roles",
    "select",
    "spread",
    "with_tied",
    "with_ties",
    "write",
]
