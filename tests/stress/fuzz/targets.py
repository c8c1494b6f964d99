"""What is fuzzed: how a valid file is made, which forgeries there are besides, and what must read or refuse it.

Another reader of files from strangers is one more :class:`Target` in :data:`TARGETS`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from smark_jax import errors, files
from stress.fuzz import evidence, mutations


class Target(NamedTuple):
    """A reader of hostile files.

    Attributes:
      name: of the kind of file.
      make_valid: a valid file, to be broken.
      forgeries: files that are wrong from the start.
      read: reads a file, or raises ``refusal``; anything else is a failure.
      refusal: the one kind of error that may come.
    """

    name: str
    make_valid: mutations.Make
    forgeries: tuple[mutations.Make, ...]
    read: Callable[[Path], Any]
    refusal: type[Exception]


_WEIGHTS = {
    "safetensors": mutations.safetensors_file,
    "msgpack": mutations.msgpack_file,
    "npz": mutations.npz_file,
    "onnx": mutations.onnx_file,
    "tflite": mutations.tflite_file,
    "keras": mutations.keras_file,
    "hdf5": mutations.hdf5_file,
    "pt2": mutations.exported_program,
    "torch": mutations.torch_file,
    "pickle": mutations.pickle_file,
    "gguf": mutations.gguf_file,
}


def _read_index(path: Path) -> files.Weights:
    """Reads an index beside a file of all leaves that a valid one names."""
    safetensors.numpy.save_file(mutations.tree(np.random.default_rng(0)), path.with_name(mutations.SHARD))
    return files.read(path)


TARGETS = (
    Target("shards", mutations.shard_index, mutations.FORGERIES, _read_index, errors.Unreadable),
    *(Target(name, make, mutations.FORGERIES, files.read, errors.Unreadable) for name, make in _WEIGHTS.items()),
    Target("evidence", evidence.genuine, evidence.FORGERIES, evidence.read, evidence.REFUSAL),
)
