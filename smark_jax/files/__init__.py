"""Weights files of any origin: read without trusting them, written so that none is ever half there.

::

    suspect = files.read("leaked.bin")                  # safetensors, Flax msgpack, npz or PyTorch, told by content
    layout = files.match_layout(suspect.leaves, files.flatten(base))
    params = files.nest(layout.leaves)

A model is a dict of its leaves by name, the steps of a leaf's path joined by ``/``; :func:`flatten` and :func:`nest` go
back and forth between that and a parameter tree.

What may be hostile is checked before it is unpacked. Pickle is never loaded, names never become paths, and a reader
holds the file and its leaves in memory, each at most :data:`MAX_BYTES` unless you raise it: less than 1 GB in all. What
cannot be read is an :class:`smark_jax.errors.Unreadable` of one line. NaN and infinite weights are read as they are;
who computes with them refuses them.
"""

from smark_jax.files._limits import MAX_BYTES, MAX_LEAVES
from smark_jax.files.layout import Layout, Move, match_layout
from smark_jax.files.reading import Weights, read
from smark_jax.files.trees import content_hash, flatten, nest
from smark_jax.files.writing import dump, write

__all__ = [
    "MAX_BYTES",
    "MAX_LEAVES",
    "Layout",
    "Move",
    "Weights",
    "content_hash",
    "dump",
    "flatten",
    "match_layout",
    "nest",
    "read",
    "write",
]
