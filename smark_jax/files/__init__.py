"""Weights files of any origin: reading trusts nothing in them, and writing never leaves a partial file.

::

    suspect = files.read("leaked.bin")  # safetensors, ONNX, TFLite, Keras, PyTorch, ...: the format is detected
    layout = files.match_layout(suspect.leaves, files.flatten(base))
    params = files.nest(layout.leaves)

Copies of a model are written in the model's own form, byte for byte but for the numbers of leaves::

    files.write("copy.npz", leaves, like="base.npz")

A file that holds the network as well as its weights gives both, as a function of JAX::

    params, apply_fn = files.network("classifier.onnx")

A model is a dict of its leaves by name; a name is the leaf's path with its steps joined by ``/``. :func:`flatten` and
:func:`nest` convert between this dict and a parameter tree.

Untrusted input is checked before it is unpacked. Nothing in a pickle runs, and names never become paths.
A reader holds the file and its leaves in memory, each at most :data:`MAX_BYTES` unless you raise it: less than 1 GB in
all. A file that cannot be read raises :class:`smark_jax.errors.Unreadable` with a message of one line. NaN and infinite
weights are read unchanged; the functions that compute with weights refuse them.
"""

from smark_jax.files._limits import ANY_SIZE, MAX_BYTES, MAX_LEAVES
from smark_jax.files._places import Unwritable
from smark_jax.files._sources import main_files
from smark_jax.files.checkpoints import read_checkpoint
from smark_jax.files.layout import Layout, Move, match_layout
from smark_jax.files.networks.loading import Network, network
from smark_jax.files.reading import Weights, read
from smark_jax.files.trees import content_hash, flatten, nest
from smark_jax.files.writing import Form, write

__all__ = [
    "ANY_SIZE",
    "MAX_BYTES",
    "MAX_LEAVES",
    "Form",
    "Layout",
    "Move",
    "Network",
    "Unwritable",
    "Weights",
    "content_hash",
    "flatten",
    "main_files",
    "match_layout",
    "nest",
    "network",
    "read",
    "read_checkpoint",
    "write",
]
